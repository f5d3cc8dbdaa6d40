"""inline_functions: nodes of functions in the place of their calls."""

from __future__ import annotations

import numpy as np

from onnxopt.model import load
from onnxopt.passes.inline_functions import InlineFunctions
from tests.helpers import apply, assert_equal, assert_valid, operators, proto, run, with_weights

CALLS = """g (float[2] x, bool c) => (float[2] y, float[2] z) {
  y = own.Twice<alpha = 0.25>(x)
  z = If (c) < then_branch = t () => (float[2] p) { p = own.Twice<alpha = 0.5>(w) },
               else_branch = e () => (float[2] r) { r = own.Leaky<alpha = 0.125>(x) }> }
<domain: "own", opset_import: ["" : 17, "own" : 1]> Twice <alpha> (a) => (b) {
  t = own.Leaky<alpha: float = @alpha>(a) b = own.Leaky<alpha: float = @alpha>(t) }
<domain: "own", opset_import: ["" : 17]> Leaky <alpha> (a) => (b) {
  t = LeakyRelu<alpha: float = @alpha>(a) b = Identity(t) }"""


def test_calls_within_calls_and_bodies() -> None:
    source = with_weights(proto(CALLS, imports='"own" : 1'), w=np.array([-8, 8], np.float32))
    source.metadata_props.add(key="k", value="v")
    target = load(source)
    result = apply(InlineFunctions(), target)
    assert [change.where for change in result.changes] == ["Twice", "Leaky"]
    assert target.functions == []
    assert operators(target) == ["LeakyRelu", "Identity", "LeakyRelu", "Identity", "If"]
    assert target.metadata == {"k": "v"}
    assert_valid(target)
    for c in (True, False):
        given = {"x": np.array([-8, 8], np.float32), "c": np.array(c)}
        assert_equal(run(source, given), run(target, given))
    assert not apply(InlineFunctions(), target).changes


def test_a_function_of_another_operator_set_version_stays() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 13]> F (a) => (b) { b = Relu(a) }""",
        imports='"own" : 1',
    )
    target = load(source)
    result = apply(InlineFunctions(), target)
    assert not result.changes
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("F", "it is of another operator set version than the model")
    ]
    assert operators(target) == ["F"]


def test_names_of_nodes_are_told_apart_and_what_a_body_passes_through_stays() -> None:
    source = proto(
        """g (float[2] x) => (float[2] z) { y = own.F(x) z = own.F(y) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) {
          n = Constant<value = int64 {3}>()
          b = Loop (n, "", a) <body = l (int64 i, bool k, float[2] h) => (bool k, float[2] o) { o = Sin(h) }> }""",
        imports='"own" : 1',
    )
    source.functions[0].node[1].name = "loop"
    target = load(source)
    apply(InlineFunctions(), target)
    assert [node.name for node in target.graph.nodes] == ["loop", "loop_1"]
    assert_valid(target)
    given = {"x": np.array([0.5, -2], np.float32)}
    assert_equal(run(source, given), run(target, given))


def test_what_a_function_passes_through_or_does_not_give() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y, float[2] z) { y, u = own.F(x) v, z = own.F(y) }
        <domain: "own", opset_import: ["" : 17]> F (a, b) => (a, c) { c = Neg(a) }""",
        imports='"own" : 1',
    )
    source.graph.node[0].output[1] = ""
    source.graph.node[1].output[0] = ""
    target = load(source)
    apply(InlineFunctions(), target)
    assert sorted(operators(target)) == ["Identity", "Neg", "Neg"]
    assert_valid(target)
    given = {"x": np.array([0.5, -2], np.float32)}
    found = run(target, given)
    assert (found["y"].tolist(), found["z"].tolist()) == ([0.5, -2], [-0.5, 2])


def test_weights_are_shared_not_copied() -> None:
    source = with_weights(proto(CALLS, imports='"own" : 1'), w=np.arange(2, dtype=np.float32))
    target = load(source)
    before = {constant.data.uid for constant in target.constants()}
    apply(InlineFunctions(), target)
    assert {constant.data.uid for constant in target.constants()} == before
