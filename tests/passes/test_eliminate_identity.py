"""eliminate_identity: what gives out what it is given, to the bit, and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import load
from onnxopt.passbase import Effect
from onnxopt.passes.eliminate_identity import EliminateIdentity
from tests.helpers import apply, assert_close, assert_equal, assert_valid, operators, proto, run

NUMBERS = """<float one = {1}, float zero = {0}, float minus = {-0.0}, float two = {2}, float half = {0.5},
  float[1] ones1 = {1}, float[3] ones3 = {1, 1, 1}, float[2,1] ones21 = {1, 1}, float[1,1,1] ones111 = {1},
  int64[2] same = {2, 3}, int64[2] rest = {0, -1}, int64[2] turned = {3, 2}, int64[2] t1 = {1, 1}, int64[2] t2 = {1, 2},
  int64[4] p0 = {0, 0, 0, 0}, int64[4] p1 = {0, 1, 0, 0}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i3 = {3},
  int64[1] i2 = {2}, int64[1] last = {9223372036854775807}, int64[1] back = {-1}, float[2] scales1 = {1, 1},
  int64 i64_1 = {1}>"""
SHAPES = "g (float[2,3] x) => (float[a,b] y)"
# node between x and y -> the part that reads t and gives u
GONE = {
    "Identity": "u = Identity(t)",
    "Cast to its own type": "u = Cast<to = 1>(t)",
    "CastLike its own type": "u = CastLike(t, one)",
    "Reshape to its own shape": "u = Reshape(t, same)",
    "Reshape with an open length": "u = Reshape(t, rest)",
    "Flatten of a matrix": "u = Flatten(t)",
    "Squeeze of nothing": "u = Squeeze(t)",
    "Expand to its own shape": "u = Expand(t, same)",
    "Expand that spreads over it": "u = Expand(t, t1)",
    "Transpose of nothing": "u = Transpose<perm = [0, 1]>(t)",
    "Pad of nothing": "u = Pad(t, p0)",
    "Slice of all": "u = Slice(t, i0, last, i1)",
    "Slice to the length": "u = Slice(t, i0, i3, i1, i1)",
    "Split into one": "u = Split<axis = 1>(t)",
    "Concat of one": "u = Concat<axis = 1>(t)",
    "Sum of one": "u = Sum(t)",
    "Mean of one": "u = Mean(t)",
    "Max of one": "u = Max(t)",
    "Min of one": "u = Min(t)",
    "Tile once": "u = Tile(t, t1)",
    "Resize at scale 1": "u = Resize<mode = \"nearest\">(t, , scales1)",
    "Dropout": "u = Dropout(t)",
    "Dropout with a ratio": "u = Dropout(t, half)",
    "Neg of Neg": "v = Neg(t) u = Neg(v)",
    "times one": "u = Mul(t, one)",
    "one times": "u = Mul(one, t)",
    "times ones along an axis": "u = Mul(t, ones3)",
    "times ones along the other": "u = Mul(t, ones21)",
    "by one": "u = Div(t, ones1)",
    "plus -0.0": "u = Add(t, minus)",
    "minus 0.0": "u = Sub(t, zero)",
}  # fmt: skip
KEPT = {
    "Cast to another type": "v = Cast<to = 11>(t) u = Cast<to = 1>(v)",
    "Reshape to another shape": "u = Reshape(t, turned)",
    "Transpose": "u = Transpose(t)",
    "Pad": "u = Pad(t, p1)",
    "Slice from 1": "u = Slice(t, i1, last, i1)",
    "Slice to 2": "u = Slice(t, i0, i2, i1)",
    "Slice to -1": "u = Slice(t, i0, back, i1)",
    "Slice backwards": "u = Slice(t, back, last, i1, back)",
    "Concat of two": "u = Concat<axis = 1>(t, t)",
    "Sum of two": "u = Sum(t, t)",
    "Tile twice": "u = Tile(t, t2)",
    "Resize by lines": "u = Resize<mode = \"linear\">(t, , scales1)",
    "plus 0.0": "u = Add(t, zero)",
    "minus -0.0": "u = Sub(t, minus)",
    "to the first": "u = Pow(t, one)",
    "to the first, an integer": "u = Pow(t, i64_1)",
    "from zero": "u = Sub(zero, t)",
    "one by": "u = Div(one, t)",
    "one to the": "u = Pow(one, t)",
    "times two": "u = Mul(t, two)",
    "times one with another axis": "w = Mul(t, ones111) u = Squeeze(w, i0)",
    "Clip of floats without bounds": "u = Clip(t)",
    "Clip": "u = Clip(t, zero)",
}  # fmt: skip


def text(body: str) -> str:
    return f"{SHAPES} {NUMBERS} {{ t = Ceil(x) {body} y = Round(u) }}"


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.array([[-0.0, -np.nan, np.nan], [np.inf, -np.inf, -1.5]], np.float32)}


@pytest.mark.parametrize("kind", list(GONE))
def test_it_goes_and_every_bit_stays(kind: str) -> None:
    source = proto(text(GONE[kind]))
    target = load(source)
    result = apply(EliminateIdentity(), target)
    assert operators(target) == ["Ceil", "Round"]
    assert {change.kind for change in result.changes} == {"removed"}
    assert_valid(target)
    assert_equal(run(source, feeds()), run(target, feeds()))
    assert not apply(EliminateIdentity(), target).changes


@pytest.mark.parametrize("kind", list(KEPT))
def test_what_only_looks_like_it_stays(kind: str) -> None:
    target = load(proto(text(KEPT[kind])))
    before = target.digest()
    assert not apply(EliminateIdentity(), target).changes
    assert target.digest() == before


def test_a_sum_with_zero_is_told_and_goes_where_signs_of_zeros_may_go() -> None:
    source = proto(text("u = Add(t, zero)"))
    target = load(source)
    assert [skip.reason for skip in apply(EliminateIdentity(), target).skipped] == [
        "it makes 0.0 of -0.0 (signed_zeros=true)"
    ]
    loose = EliminateIdentity(signed_zeros=False)
    assert (loose.effect, EliminateIdentity().effect) == (Effect.ROUNDING, Effect.EXACT)
    assert apply(loose, target).changes
    assert operators(target) == ["Ceil", "Round"]
    assert_close(run(source, feeds()), run(target, feeds()))


def test_the_first_power_goes_where_nan_may_lose_its_sign_and_for_integers() -> None:
    target = load(proto(text("u = Pow(t, one)")))
    assert [skip.reason for skip in apply(EliminateIdentity(), target).skipped] == [
        "it drops the sign of NaN (signed_zeros=true)"
    ]
    assert apply(EliminateIdentity(signed_zeros=False), target).changes
    whole = load(proto("g (int32[2] x) => (int32[2] y) <float one = {1}> { t = Pow(x, one) y = Neg(t) }"))
    assert apply(EliminateIdentity(), whole).changes


@pytest.mark.parametrize("opset", [9, 11, 13, 15, 18, 21, 23])
def test_integers_lose_sums_with_zero_in_every_opset(opset: int) -> None:
    source = proto("g (int64[n] x) => (int64[n] y) <int64 zero = {0}> { t = Add(x, zero) y = Mul(t, t) }", opset)
    target = load(source)
    apply(EliminateIdentity(), target)
    assert operators(target) == ["Mul"]
    given = {"x": np.array([-(2**63), 0, 5])}
    assert_equal(run(source, given), run(target, given))


@pytest.mark.parametrize("opset", [9, 10])
def test_attributes_of_old_opsets(opset: int) -> None:
    # pads, starts, ends and scales were attributes or other inputs then
    slices = "<axes = [1], starts = [0], ends = [2147483647]>(b)" if opset < 10 else "(b, s, e, a)"
    source = proto(
        f"""g (float[1,1,2,3] x) => (float[1,1,2,3] y)
        <int64[1] s = {{0}}, int64[1] e = {{9223372036854775807}}, int64[1] a = {{1}}, float[4] k = {{1, 1, 1, 1}}> {{
          a0 = Relu(x) b = Pad<pads = [0, 0, 0, 0, 0, 0, 0, 0]>(a0) c = Slice{slices} d = Upsample(c, k)
          y = Neg(d) }}""",
        opset,
    )
    if opset == 10:
        for node in source.graph.node:
            if node.op_type == "Upsample":
                node.op_type = "Resize"
    target = load(source)
    apply(EliminateIdentity(), target)
    assert operators(target) == ["Relu", "Neg"]
    given = {"x": np.ones((1, 1, 2, 3), np.float32)}
    assert_equal(run(source, given), run(target, given))


def test_a_clip_of_integers_without_bounds_goes() -> None:
    # a Clip of floats makes infinities finite
    source = proto("g (int32[3] x) => (int32[3] y) { t = Clip(x) y = Neg(t) }")
    target = load(source)
    apply(EliminateIdentity(), target)
    assert operators(target) == ["Neg"]
    given = {"x": np.array([-(2**31), 0, 2**31 - 1], np.int32)}
    assert_equal(run(source, given), run(target, given))


def test_dropout_in_training_or_with_its_mask_stays() -> None:
    target = load(
        proto(
            """g (float[4] x, bool train) => (float[4] y, bool[4] mask) <float half = {0.5}, bool yes = {1}> {
            a = Dropout(x, half, yes) b = Dropout(a, half, train) c, mask = Dropout(b) y = Neg(c) }"""
        )
    )
    result = apply(EliminateIdentity(), target)
    assert not result.changes
    assert sorted(skip.reason for skip in result.skipped) == [
        "it is, or may be, in training mode",
        "it is, or may be, in training mode",
        "its mask is read",
    ]


def test_names_of_outputs_stay() -> None:
    source = proto(
        "g (float[2] x) => (float[2] y, float[2] z) { a = Relu(x) y = Identity(a) b = Identity(x) z = Cast<to = 1>(b) }"
    )
    target = load(source)
    result = apply(EliminateIdentity(), target)
    assert [output.name for output in target.graph.outputs] == ["y", "z"]
    assert operators(target) == ["Relu", "Cast"]  # y is now what Relu makes; z needs a node that gives it its name
    assert target.graph.nodes[0].outputs[0].name == "y"
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("z", "it gives an output of the graph its name")]
    assert_equal(run(source, {"x": np.ones(2, np.float32)}), run(target, {"x": np.ones(2, np.float32)}))


def test_one_tensor_that_is_given_out_twice() -> None:
    source = proto("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Identity(y) }")
    target = load(source)
    assert not apply(EliminateIdentity(), target).changes
    assert operators(target) == ["Relu", "Identity"]


def test_in_branches_and_around_them() -> None:
    source = proto(
        """g (float[2] x, bool b) => (float[2] y) <float one = {1}> {
        o = Mul(x, one)
        y = If (b) < then_branch = t () => (float[2] p) { q = Identity(o) p = Relu(q) },
                     else_branch = e () => (float[2] r) { r = Identity(o) }> }"""
    )
    target = load(source)
    apply(EliminateIdentity(), target)
    assert operators(target) == ["If"]
    bodies = [operators(body) for body in target.bodies()][1:]
    assert bodies == [["Relu"], ["Identity"]]  # a branch may not give out a tensor of the graph around it
    for which in (True, False):
        given = {"x": np.array([-1, 2], np.float32), "b": np.array(which)}
        assert_equal(run(source, given), run(target, given))


def test_a_local_function_is_left_with_a_reason() -> None:
    source = proto(
        """g (float[2] x) => (float[2] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (c) { b = Identity(a) c = Relu(b) }""",
        imports='"own" : 1',
    )
    target = load(source)
    result = apply(EliminateIdentity(), target)
    assert not result.changes
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("F", "a local function; inline_functions brings it into the graph")
    ]


def test_open_lengths_of_one_name_are_equal_and_others_are_not() -> None:
    source = proto(
        """g (float[N,3] x, float[N,3] same, float[M,3] other) => (float[a,b] y, float[c,d] z) {
        s = Shape(same) u = Reshape(x, s) y = Neg(u)
        o = Shape(other) v = Expand(x, o) z = Neg(v) }"""
    )
    target = load(source)
    apply(EliminateIdentity(), target)
    assert operators(target) == ["Neg", "Shape", "Expand", "Neg"]
