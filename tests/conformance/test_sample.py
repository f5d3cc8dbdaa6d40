"""Every twentieth of onnx's backend models through every pass; `python -m tests.conformance` takes them all."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from onnxopt.model import Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult
from tests.conformance import __main__ as command
from tests.conformance.__main__ import PASSES, make
from tests.conformance.corpus import Case, cases, frozen
from tests.conformance.judge import Tally, Verdict, expected, expected_of_reference, judge
from tests.helpers import proto

SAMPLE = cases()[::20]


@pytest.mark.parametrize("names", [*((name,) for name in PASSES), PASSES], ids=lambda names: "+".join(names))
def test_no_pass_breaks_a_backend_model(names: tuple[str, ...]) -> None:
    passes = [make(name) for name in names]
    faults = []
    for case in SAMPLE:
        for variant in (case, frozen(case)):
            if variant is not None:
                verdict, detail = judge(variant, passes)
                if verdict.is_fault:
                    faults.append(f"{verdict.value}: {variant.name}: {detail}")
    assert not faults


class Broken(Pass):
    """Does to a model what a test tells it to."""

    name = "broken"

    @property
    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        node = model.graph.nodes[0]
        if node.op == "Neg":
            node.op = "Abs"
        elif node.op == "Exp":
            node.op = "Missing"
        elif node.op == "Abs":
            raise KeyError("lost")
        return PassResult([Change("broken", "it")])


@pytest.mark.parametrize(
    ("op", "verdict"),
    [
        ("Neg", Verdict.WRONG),
        ("Exp", Verdict.UNLOADABLE),
        ("Abs", Verdict.CRASHED),
        ("Relu", Verdict.UNTOUCHED),
    ],
)
def test_the_judge_sees_faults(op: str, verdict: Verdict) -> None:
    source = proto(f"g (float[2] x) => (float[2] y) {{ y = {op}(x) }}")
    case = Case(f"broken {op}", source, {"x": np.array([1, -1], np.float32)})
    assert judge(case, [Broken()])[0] is verdict


def test_a_frozen_case_has_no_inputs() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    found = frozen(Case("case", source, {"x": np.zeros(2, np.float32)}))
    assert found is not None
    assert len(found.model.graph.input) == 0
    assert len(found.model.graph.initializer) == 1
    assert len(source.graph.input) == 1
    source.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, None))
    assert frozen(Case("case", source, {"x": [np.zeros(2, np.float32)]})) is None


class Spoiling(Pass):
    """Takes from a model what a test tells it to."""

    name = "spoiling"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        graph = model.graph
        what = graph.nodes[0].name
        if what == "input":
            graph.inputs.pop()
        elif what == "output":
            graph.outputs.pop()
        elif what == "renamed":
            graph.outputs[0].name = "z"
        elif what == "shape":
            graph.outputs[0].shape = [3]
        elif what == "metadata":
            del model.carrier.metadata_props[:]
        elif what == "domain":
            del model.carrier.opset_import[1]
        elif what == "docs":
            graph.nodes[0].proto = None
        return PassResult()


@pytest.mark.parametrize(
    ("what", "verdict", "detail"),
    [
        ("input", Verdict.SIGNATURE, "inputs were ['x', 'u'] and are ['x']"),
        ("output", Verdict.SIGNATURE, "outputs were ['y', 'v'] and are ['y']"),
        ("renamed", Verdict.SIGNATURE, "outputs were ['y', 'v'] and are ['z', 'v']"),
        ("shape", Verdict.SIGNATURE, "outputs are described differently: ['y']"),
        ("metadata", Verdict.METADATA, "metadata_props"),
        ("domain", Verdict.METADATA, "import of 'custom'"),
        ("docs", Verdict.METADATA, "doc_string of Neg y"),
        ("nothing", Verdict.UNTOUCHED, ""),
    ],
)
def test_the_judge_sees_what_is_lost(what: str, verdict: Verdict, detail: str) -> None:
    source = proto(
        f"g (float[2] x, float[2] u) => (float[2] y, float[2] v) {{ [{what}] y = Neg(x) v = Abs(x) }}",
        imports='"custom" : 1',
    )
    source.metadata_props.add(key="a", value="b")
    source.graph.node[0].doc_string = "doc"
    values = np.zeros(2, np.float32)
    assert judge(Case(f"spoiled {what}", source, {"x": values, "u": values}), [Spoiling()]) == (verdict, detail)


def test_the_reference_evaluator_judges_where_it_reproduces_the_test() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    values = np.array([1, -1], np.float32)
    right = Case("reproduced", source, {"x": values}, (-values,))
    wrong = Case("not reproduced", source, {"x": values}, (values,))
    assert expected_of_reference(wrong) is None
    wanted = expected_of_reference(right)
    assert wanted is not None
    assert wanted["y"].tolist() == [-1, 1]
    tally = Tally()
    assert judge(right, [Broken()], tally)[0] is Verdict.WRONG
    assert tally.runs == {"onnxruntime": 1, "reference evaluator": 0}


def test_the_reference_evaluator_judges_what_onnxruntime_cannot_load() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }", opset=99)
    values = np.array([1, -1], np.float32)
    case = Case("only the evaluator", source, {"x": values}, (-values,))
    assert expected(case) is None
    verdict, detail = judge(case, [Broken()])
    assert verdict is Verdict.WRONG
    assert detail.startswith("reference evaluator")


def test_the_command_prints_a_table_and_answers_by_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    case = Case("one", source, {"x": np.array([1, -1], np.float32)})
    monkeypatch.setattr(command, "cases", lambda: (case,))
    assert command.main(["dedup", "prune"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 models, as they are and frozen\n")
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["dedup", "prune", "all"]
    monkeypatch.setattr(command, "make", lambda _text: Broken())
    assert command.main(["broken"]) == 1
    assert "wrong: one after broken: y: " in capsys.readouterr().out
