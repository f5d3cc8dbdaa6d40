"""Every twentieth of onnx's backend models through every pass; `python -m tests.conformance` takes them all."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from onnxopt.model import Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult
from tests.conformance.__main__ import PASSES, make
from tests.conformance.corpus import Case, cases, frozen
from tests.conformance.judge import Verdict, judge
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
