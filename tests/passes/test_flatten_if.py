"""flatten_if: a branch that is always taken stands in the place of its If."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from onnxopt.model import load
from onnxopt.passes.flatten_if import FlattenIf
from tests.helpers import apply, assert_equal, assert_valid, operators, proto, run

FEED = {"x": np.array([-1, 2], np.float32)}


@pytest.mark.parametrize("value", [True, False])
def test_the_branch_taken_stays(value: bool) -> None:
    source = proto(
        f"""g (float[2] x) => (float[2] y, float[2] z) <bool c = {{{int(value)}}}> {{
        k = Exp(x)
        y, q = If (c) < then_branch = t () => (float[2] a, float[2] b) {{ m = Neg(k) a = Abs(m) b = Relu(x) }},
                        else_branch = e () => (float[2] a, float[2] b) {{ m = Sin(x) a = Cos(m) b = Tanh(m) }}>
        z = Neg(q) }}"""
    )
    target = load(source)
    result = apply(FlattenIf(), target)
    assert [change.kind for change in result.changes] == ["flattened"]
    assert sorted(operators(target)) == sorted(
        ["Exp", "Neg", "Abs", "Relu", "Neg"] if value else ["Sin", "Cos", "Tanh", "Neg"]
    )
    assert [output.name for output in target.graph.outputs] == ["y", "z"]
    assert_valid(target)
    assert_equal(run(source, FEED), run(target, FEED))


def test_an_initializer_of_the_branch_that_is_its_output() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {
        y = If (c) < then_branch = t () => (float[2] s) <float[2] s = {5, 6}> { },
                     else_branch = e () => (float[2] r) { r = Neg(x) }>
        z = Add(x, y) }"""
    )
    target = load(source)
    apply(FlattenIf(), target)
    assert operators(target) == ["Identity", "Add"]
    assert_valid(target)
    assert_equal(run(source, FEED), run(target, FEED))


def test_names_that_meet_change() -> None:
    branch = "then_branch = t () => (float[2] p) <float w = {2}> { q = Mul(x, w) p = Neg(q) }"
    other = "else_branch = e () => (float[2] p) <float w = {3}> { q = Mul(x, w) p = Exp(q) }"
    source = proto(
        f"""g (float[2] x, bool open) => (float[2] y, float[2] z) <bool c = {{1}}, bool d = {{0}}> {{
        a = If (c) < {branch}, {other}>
        b = If (d) < {branch}, {other}>
        z = If (open) < {branch}, {other}>
        y = Add(a, b) }}"""
    )
    for node in source.graph.node[:3]:
        for attribute in node.attribute:
            attribute.g.node[0].name = "product"  # the runtime wants names of nodes unique too
    target = load(source)
    apply(FlattenIf(), target)
    assert operators(target) == ["Mul", "Neg", "Mul", "Exp", "If", "Add"]
    assert_valid(target)
    for which in (True, False):
        assert_equal(run(source, FEED | {"open": np.array(which)}), run(target, FEED | {"open": np.array(which)}))


def test_ifs_within_ifs() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y) <bool c = {1}, bool d = {0}> {
        y = If (c) < then_branch = t () => (float[2] p) {
            p = If (d) < then_branch = u () => (float[2] q) { q = Neg(x) },
                         else_branch = v () => (float[2] q) { r = Exp(x) q = Log(r) }> },
                     else_branch = e () => (float[2] p) { p = Abs(x) }> }"""
    )
    target = load(source)
    assert len(apply(FlattenIf(), target).changes) == 2
    assert operators(target) == ["Exp", "Log"]
    assert_equal(run(source, FEED), run(target, FEED))


def test_descriptions_move_along() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y) <bool c = {1}> {
        y = If (c) < then_branch = t () => (float[2] p) { q = Neg(x) p = Exp(q) },
                     else_branch = e () => (float[2] p) { p = Abs(x) }> }"""
    )
    source.graph.node[0].attribute[0].g.value_info.append(helper.make_tensor_value_info("q", 1, [2]))
    target = load(source)
    apply(FlattenIf(), target)
    assert [info.name for info in target.to_proto().graph.value_info] == ["q"]


RECURRENT = """g (float[1,n,4] x, float[m,4] h, bool c) => (float[e,3] y, float[b,d] z) {{
  h3 = If (c) < then_branch = t () => (float[1,m,4] p) {{ p = Unsqueeze(h, {axis}) }},
                else_branch = e () => (float[m,4] p) {{ p = Identity(h) }}>
  k = Unsqueeze(h3, {axis})
  {last}
  z = If (c) < then_branch = u () => (float[a] q) {{ q = ReduceSum<keepdims = 0>(k, {axis}) }},
               else_branch = v () => (float[a] q) {{ q = Exp(h) }}> }}"""


def recurrent(last: str) -> ModelProto:
    source = proto(RECURRENT.format(axis="axis0", last=last))
    rng = np.random.default_rng(0)
    for name, shape in (("W", (1, 9, 4)), ("R", (1, 9, 3)), ("h0", (1, 1, 3))):
        source.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    source.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis0"))
    return source


def test_a_rank_that_a_reader_needs_decides() -> None:
    source = recurrent("v = GRU<hidden_size = 3>(k, W, R) y = Squeeze(v, axis0)")
    source.graph.node[3].output[0] = "y"
    source.graph.node[2].output[0] = ""
    source.graph.node[2].output.append("v")
    target = load(source)
    apply(FlattenIf(), target)
    assert "If" not in operators(target)
    given = {
        "x": np.zeros((1, 1, 4), np.float32),
        "h": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32),
        "c": np.array(False),
    }
    assert_equal(run(source, given), run(target, given))


def test_a_reader_in_another_branch_decides_nothing_outside() -> None:
    source = proto(
        """g (float[m,4] h, bool c, bool d) => (float[a,b] y, float[e,f] z) <int64[1] axis0 = {0}> {
        z = If (c) < then_branch = u () => (float[a,b] q) { q = Neg(h) },
                     else_branch = v () => (float[a,b] q) { q = Exp(h) }>
        y = If (d) < then_branch = t () => (float[a,b] s) {
              k = If (c) < then_branch = i () => (float[1,m,4] p) { p = Unsqueeze(h, axis0) },
                           else_branch = j () => (float[m,4] p) { p = Identity(h) }>
              s = Gemm(k, W) },
            else_branch = o () => (float[a,b] s) { s = Identity(h) }> }"""
    )
    source.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "W"))
    target = load(source)
    apply(FlattenIf(), target)
    # z depends on c still, y's inner If does not
    assert operators(target) == ["If", "If"]
    h = np.ones((2, 4), np.float32)
    for c, d in ((False, False), (False, True), (True, False)):
        given = {"h": h, "c": np.array(c), "d": np.array(d)}
        assert_equal(run(source, given), run(target, given))
