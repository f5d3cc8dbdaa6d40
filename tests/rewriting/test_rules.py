"""The driver of rules: what it replaces, revisits, keeps, and refuses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxopt.errors import PassError
from onnxopt.model import load
from onnxopt.passbase import PassResult
from onnxopt.rewriting import LOOKS_ALIKE, REST, Make, Match, Rule, View, any_of, constant, number, op, rewrite, tensor
from tests.helpers import assert_equal, assert_valid, model, operators, proto, run

x = tensor("x")


class ExpOfLog(Rule):
    """Exp(Log(x)) = x, in this test."""

    pattern = op("Exp", op("Log", x))

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return found["x"]


class Unfold(Rule):
    """Relu(x) = Neg(Abs(x)), in this test."""

    pattern = op("Relu", x)

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make("Neg", make("Abs", found["x"]))


class SinToCos(Rule):
    pattern = op("Sin", x)

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make("Cos", found["x"])


class CosToSin(Rule):
    pattern = op("Cos", x)

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make("Sin", found["x"])


def test_a_chain_collapses_from_within() -> None:
    target = model("g (float x) => (float y) { a = Log(x) b = Log(a) c = Exp(b) d = Exp(c) y = Neg(d) }")
    result = rewrite(target, [ExpOfLog()])
    assert operators(target) == ["Neg"]
    assert [change.detail for change in result.changes] == [
        "exp_of_log: Exp with Log b",
        "exp_of_log: Exp with Log a",
    ]


def test_new_nodes_stand_where_the_old_one_stood_and_inherit_its_name_and_metadata() -> None:
    source = proto("g (float x) => (float y) { a = Sqrt(x) b = Relu(a) y = Tanh(b) }")
    source.graph.node[1].name = "gate"
    source.graph.node[1].doc_string = "why"
    source.graph.node[1].metadata_props.add(key="k", value="v")
    target = load(source)
    rewrite(target, [Unfold()])
    written = target.to_proto().graph.node
    assert [node.op_type for node in written] == ["Sqrt", "Abs", "Neg", "Tanh"]
    assert (written[2].name, written[2].doc_string, written[2].metadata_props[0].value) == ("gate", "why", "v")
    assert written[2].output[0] == "b"
    assert written[1].name == "gate_Abs"


def test_the_name_of_an_output_stays() -> None:
    target = model("g (float x) => (float y) { y = Relu(x) }")
    rewrite(target, [Unfold()])
    assert operators(target) == ["Abs", "Neg"]
    assert target.graph.nodes[1].outputs[0] is target.graph.outputs[0]


def test_an_output_that_would_be_an_input_keeps_a_node() -> None:
    target = model("g (float x) => (float y) { a = Log(x) y = Exp(a) }")
    rewrite(target, [ExpOfLog()])
    assert operators(target) == ["Identity"]
    assert [tensor.name for tensor in target.graph.outputs] == ["y"]
    assert_valid(target)


def test_a_result_that_somebody_else_reads_stays_with_a_reason() -> None:
    target = model("g (float x) => (float y, float z) { a = Log(x) b = Exp(a) y = Neg(b) z = Neg(a) }")
    result = rewrite(target, [ExpOfLog()])
    assert operators(target) == ["Log", "Exp", "Neg", "Neg"]
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("b", "the result of Log a is used elsewhere too")]


def test_a_reason_is_forgotten_once_the_rule_applies() -> None:
    class LogOfLog(Rule):
        """Neg(Log(x)) = x: takes the other reader away."""

        pattern = op("Neg", op("Log", x))
        shared = True

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return found["x"]

    target = model("g (float x) => (float y, float z) { a = Log(x) b = Exp(a) c = Neg(a) y = Sin(b) z = Cos(c) }")
    result = rewrite(target, [ExpOfLog(), LogOfLog()])
    assert operators(target) == ["Sin", "Cos"]
    assert not result.skipped


def test_rules_that_undo_each_other_are_named() -> None:
    target = model("g (float x) => (float y) { a = Sin(x) y = Neg(a) }")
    with pytest.raises(PassError, match=r"at 'a': cos_to_sin, sin_to_cos") as caught:
        rewrite(target, [SinToCos(), CosToSin()])
    assert "leave one of them out" in caught.value.remedy


def test_a_rule_that_grows_without_end_is_named() -> None:
    class Deeper(Rule):
        pattern = op("Sin", x)

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return make("Neg", make("Sin", found["x"]))

    with pytest.raises(PassError, match="deeper"):
        rewrite(model("g (float x) => (float y) { y = Sin(x) }"), [Deeper()])


def test_bodies_see_around_themselves_and_functions_are_left() -> None:
    source = proto(
        """g (float x, bool b) => (float y) {
        a = Log(x)
        y = If (b) < then_branch = t () => (float p) { c = Log(a) d = Exp(c) p = Neg(d) },
                     else_branch = e () => (float q) { q = Exp(a) }> }
        <domain: "own", opset_import: ["" : 17]> F (k) => (m) { l = Log(k) m = Exp(l) }""",
        imports='"own" : 1',
    )
    target = load(source)
    result = rewrite(target, [ExpOfLog()])
    assert [operators(body) for body in target.bodies()] == [["Log", "If"], ["Neg"], ["Exp"], ["Log", "Exp"]]
    assert {(skip.node, skip.reason) for skip in result.skipped} == {
        ("q", "Log a stands in another body"),
        ("F", "a local function; inline_functions brings it into the graph"),
    }


def test_a_tensor_of_several_outputs_and_what_only_it_needed() -> None:
    class SplitToSlices(Rule):
        """The two halves of x, computed otherwise."""

        pattern = op("Split", x, REST)

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return [make("Neg", found["x"]), make("Abs", found["x"])]

    target = model(
        """g (float[4] x) => (float[a] y, float[a] z) <int64[2] two = {2, 2}> {
        s = Identity(two) y, b = Split(x, s) z = Relu(b) }"""
    )
    rewrite(target, [SplitToSlices()])
    assert operators(target) == ["Neg", "Abs", "Relu"]
    assert target.graph.initializers == []
    assert_valid(target)


def test_factors_in_any_order_and_one_tensor_in_two_places() -> None:
    class Silu(Rule):
        pattern = op("Mul", x, op("Sigmoid", x))

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return make("Silu", found["x"], domain="test")

    target = model(
        """g (float x, float w) => (float y) {
        a = Sigmoid(x) b = Mul(a, x) c = Sigmoid(w) d = Mul(x, c) y = Add(b, d) }"""
    )
    rewrite(target, [Silu()])
    assert sorted(operators(target)) == ["Add", "Mul", "Sigmoid", "Silu"]


@pytest.mark.parametrize(("value", "matches"), [("float c = {3}", True), ("float[1] c = {3}", True),
                                                ("float[1,1] c = {3}", False), ("float c = {2.9}", False),
                                                ("int64 c = {3}", True), ("float[2] c = {3, 3}", False)])  # fmt: skip
def test_numbers(value: str, matches: bool) -> None:
    kind = value.split(" ")[0].split("[")[0]
    target = model(f"g ({kind}[2] x) => ({kind}[2] y) <{value}> {{ y = Sub(x, c) }}")
    found = list(op("Sub", x, number(3.0)).of(target.graph.nodes[0]))
    assert bool(found) is matches


def test_alternatives_constants_and_rest() -> None:
    target = model("g (float x) => (float y) <float c = {3}, float d = {4}> { a = Clip(x, c, d) y = Neg(a) }")
    clip, neg = target.graph.nodes
    assert next(op("Neg", any_of(op("Relu", x), op("Clip", x, REST, name="clip"))).of(neg))["clip"] is clip
    assert not list(op("Clip", x).of(clip))
    assert not list(op("Clip", x, constant("low")).of(clip))
    assert next(op("Clip", x, constant("low"), constant("high")).of(clip))["high"].values == 4
    assert not list(op("Clip", constant(), REST).of(clip))


def test_types_and_shapes_follow_from_inputs_only() -> None:
    seen: list[Any] = []

    class Look(Rule):
        pattern = op("Relu", x)

        def check(self, found: Match, view: View) -> str | None:
            seen.append((view.dtype(found["x"]), view.shape(found["x"]), view.opset(found.root)))
            return LOOKS_ALIKE

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            raise AssertionError

    source = proto("g (float[N,3] x) => (float[a,b] y) <float[1] stale> { a = Transpose(x) y = Relu(a) }", 13)
    source.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.DOUBLE, [7]))
    result = rewrite(load(source), [Look()])
    assert seen == [(np.dtype(np.float32), (3, "N"), 13)]
    assert not result.skipped


def test_values_given_for_used_outputs_only() -> None:
    class Forgetful(Rule):
        pattern = op("TopK", x, REST)

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return [make("Neg", found["x"])]

    text = "g (float[4] x) => (float[a] y, int64[a] z) <int64[1] k = {{4}}> {{ v, i = TopK(x, k) y = Abs(v) {} }}"
    with pytest.raises(PassError, match="forgetful"):
        rewrite(model(text.format("z = Neg(i)")), [Forgetful()])


def test_two_runs_give_the_same_bytes() -> None:
    text = "g (float x) => (float y) { a = Relu(x) b = Log(a) c = Exp(b) d = Relu(c) y = Add(d, a) }"
    once, twice = model(text), model(text)
    for target in (once, twice):
        rewrite(target, [Unfold(), ExpOfLog()])
    written = [each.to_proto().SerializeToString(deterministic=True) for each in (once, twice)]
    assert written[0] == written[1]


def long_model(count: int, hub: bool) -> Any:
    """Log and Exp in turn along a chain, or `count` of them side by side behind one tensor."""
    nodes, last = [], "x"
    for at in range(count // 2):
        nodes.append(helper.make_node("Log", ["x" if hub else last], [f"l{at}"]))
        nodes.append(helper.make_node("Exp", [f"l{at}"], [f"e{at}"]))
        last = f"e{at}"
        if hub:
            nodes.append(helper.make_node("Add", [f"s{at - 1}" if at else "x", last], [f"s{at}"]))
    last = f"s{count // 2 - 1}" if hub else last
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("hub", [False, True])
def test_time_grows_with_the_model_not_with_its_square(hub: bool) -> None:
    def seconds(count: int) -> float:
        target = long_model(count, hub)
        begin = time.process_time()
        result: PassResult = rewrite(target, [ExpOfLog()])
        assert len(result.changes) == count // 2
        return time.process_time() - begin

    assert seconds(16000) < 40 * max(seconds(1600), 0.02)


def test_what_a_rule_does_is_right_where_outputs_are_compared() -> None:
    class Associate(Rule):
        """(x + c) + d = x + (c + d) of integers."""

        pattern = op("Add", op("Add", x, constant("c")), constant("d"))

        def rewrite(self, found: Match, make: Make, view: View) -> Any:
            return make("Add", found["x"], make.constant(found["c"].values + found["d"].values))

    source = proto(
        """g (int64[2] x, bool b) => (int64[2] y) <int64 c = {3}, int64 d = {4}, int64 e = {5}> {
        k = Add(x, c) l = Add(d, k) m = Add(l, e)
        y = If (b) < then_branch = t () => (int64[2] p) { n = Add(m, d) p = Add(n, e) },
                     else_branch = f () => (int64[2] q) { q = Neg(m) }> }"""
    )
    target = load(source)
    rewrite(target, [Associate()])
    assert [operators(body) for body in target.bodies()] == [["Add", "If"], ["Add"], ["Neg"]]
    assert_valid(target)
    for which in (True, False):
        given = {"x": np.array([1, -2]), "b": np.array(which)}
        assert_equal(run(source, given), run(target, given))
