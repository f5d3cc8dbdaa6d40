"""fuse_consecutive: two of a kind become one where that keeps every bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.model import load
from onnxopt.passes.fuse_consecutive import FuseConsecutive
from tests.helpers import apply, assert_equal, assert_valid, operators, proto, reference, run

QUIET = settings(deadline=None, max_examples=60, derandomize=True)
CONSTANTS = """<int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] a2 = {2}, int64[1] end = {9223372036854775807},
  int64[2] flat = {-1, 4}, int64[3] cube = {2, 3, 4}, int64[2] zeros = {0, 0}, int64[1] two = {2},
  int64[6] p1 = {0, 1, 0, 0, 0, 2}, int64[6] p2 = {1, 1, 0, 0, 0, 0}, int64[6] crop = {0, -1, 0, 0, 0, 0},
  float zero = {0}, float minus = {-0.0}, float one = {1},
  float minus_one = {-1}, float six = {6}, float three = {3}, float nine = {9}>"""
PAIRS = {
    "Transposes": ("a = Transpose<perm = [1, 2, 0]>(x) y = Transpose<perm = [0, 2, 1]>(a)", ["Transpose"]),
    "default Transposes": ("a = Transpose(x) b = Transpose<perm = [1, 0, 2]>(a) y = Neg(b)", ["Transpose", "Neg"]),
    "Transposes that undo each other": ("a = Transpose(x) b = Transpose(a) y = Neg(b)", ["Neg"]),
    "Transposes back and forth": (
        "a = Transpose<perm = [1, 2, 0]>(x) b = Transpose<perm = [2, 0, 1]>(a) y = Neg(b)", ["Neg"]),
    "Reshapes": ("a = Reshape(x, flat) y = Reshape(a, cube)", ["Reshape"]),
    "Unsqueeze and Squeeze": ("a = Unsqueeze(x, a1) y = Squeeze(a, a1)", ["Reshape"]),
    "Flatten and Unsqueeze": ("a = Flatten(x) y = Unsqueeze(a, a0)", ["Reshape"]),
    "three Unsqueezes": ("a = Unsqueeze(x, a0) b = Unsqueeze(a, a0) y = Unsqueeze(b, a1)", ["Reshape"]),
    "Pads": ("a = Pad(x, p1) y = Pad(a, p2)", ["Pad"]),
    "Pads of one constant": ("a = Pad(x, p1, six) y = Pad(a, p2, six)", ["Pad"]),
    "Slices along two axes": ("a = Slice(x, a1, end, a1) y = Slice(a, a0, a2, a2, two)", ["Slice"]),
    "Concats": ("a = Concat<axis = 1>(x, x) y = Concat<axis = 1>(x, a, x)", ["Concat"]),
    "Concats, axis from behind": ("a = Concat<axis = -1>(x, x) y = Concat<axis = 2>(a, x)", ["Concat"]),
    "Relus": ("a = Relu(x) y = Relu(a)", ["Relu"]),
    "Clips": ("a = Clip(x, zero, six) y = Clip(a, one, nine)", ["Clip"]),
    "Clips of one bound": ("a = Clip(x, , six) y = Clip(a, one)", ["Clip"]),
    "Relu and Clip": ("a = Relu(x) y = Clip(a, , six)", ["Clip"]),
    "Clip and Relu": ("a = Clip(x, one, six) y = Relu(a)", ["Clip"]),
    "Clips that leave one value": ("a = Clip(x, zero, one) y = Clip(a, three, six)", ["Clip"]),
}  # fmt: skip
KEPT = {
    "Slices along one axis": "a = Slice(x, a1, end, a1) y = Slice(a, a0, a1, a1)",
    "Pads of two constants": "a = Pad(x, p1, six) y = Pad(a, p2)",
    "Pads of zeros of two signs": "a = Pad(x, p1, minus) y = Pad(a, p2, zero)",
    "a Pad that crops": "a = Pad(x, p1) y = Pad(a, crop)",
    "a Pad that reflects": "a = Pad<mode = \"reflect\">(x, p1) y = Pad(a, p2)",
    "Concats along two axes": "a = Concat<axis = 1>(x, x) y = Concat<axis = 2>(a, a)",
    "a Concat read twice": "a = Concat<axis = 1>(x, x) b = Concat<axis = 1>(a, x) y = Concat<axis = 1>(b, a)",
    "Clips whose bound is a negative zero": "a = Clip(x, one, six) y = Clip(a, zero, minus)",
    "Clips that leave zero": "a = Clip(x, one, six) y = Clip(a, minus_one, zero)",
    "Clips whose bounds cross": "a = Clip(x, six, zero) y = Clip(a, one, nine)",
    "a Clip with a computed bound": "m = ReduceMax<keepdims = 0>(x) a = Clip(x, zero, m) y = Clip(a, one, nine)",
}  # fmt: skip


def cube() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).uniform(-8, 12, (2, 3, 4)).astype(np.float32)
    values[0, 0] = [-0.0, 0.0, np.nan, np.inf]
    values[0, 1] = [-np.inf, 6.0, 1.0, -1e-40]
    return {"x": values}


def model(body: str) -> ModelProto:
    """The nodes between x and y; the rank of y is what comes out."""
    source = proto(f"g (float[2,3,4] x) => (float[a] y) {CONSTANTS} {{ {body} }}")
    shape = source.graph.output[0].type.tensor_type.shape
    del shape.dim[:]
    source.graph.output[0].type.tensor_type.ClearField("shape")
    rank = run(source, cube())["y"].ndim
    for _ in range(rank):
        source.graph.output[0].type.tensor_type.shape.dim.add()
    return source


@pytest.mark.parametrize("kind", list(PAIRS))
def test_two_become_one_and_every_bit_stays(kind: str) -> None:
    body, wanted = PAIRS[kind]
    source = model(body)
    target = load(source)
    result = apply(FuseConsecutive(), target)
    assert operators(target) == wanted
    assert all(change.kind == "fused" for change in result.changes)
    assert_valid(target)
    assert_equal(run(source, cube()), run(target, cube()))
    assert not apply(FuseConsecutive(), target).changes


@pytest.mark.parametrize("kind", list(KEPT))
def test_what_would_become_something_else_stays(kind: str) -> None:
    target = load(model(KEPT[kind]))
    before = operators(target)
    apply(FuseConsecutive(), target)
    kept = kind != "a Concat read twice"
    assert (operators(target) == before) is kept
    assert_equal(run(model(KEPT[kind]), cube()), run(target, cube()))


def test_tensors_without_elements_keep_their_shapes() -> None:
    # a Reshape to [0, 1, 3, -1, 4] would be refused by the runtime where N is 0
    source = proto(
        """g (float[N,3,M,4] x) => (float[a,b,c,d] y) <int64[1] one = {1}> {
        a = Unsqueeze(x, one) b = Neg(a) c = Squeeze(b, one) d = Unsqueeze(c, one) y = Squeeze(d, one) }"""
    )
    target = load(source)
    apply(FuseConsecutive(), target)
    for shape in ((0, 3, 2, 4), (2, 3, 0, 4), (1, 3, 2, 4)):
        feed = {"x": np.ones(shape, np.float32)}
        assert_equal(run(source, feed), run(target, feed))


def test_what_else_reads_the_middle_keeps_it() -> None:
    source = proto(
        "g (float[2,3] x) => (float[2,3] y, float[3,2] z) { a = Transpose(x) b = Transpose(a) y = Neg(b) z = Relu(a) }"
    )
    target = load(source)
    apply(FuseConsecutive(), target)
    assert operators(target) == ["Transpose", "Neg", "Relu"]
    given_ = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert_equal(run(source, given_), run(target, given_))


TYPES = {
    name: getattr(TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL")
}


@pytest.mark.parametrize(
    ("start", "middle", "end"), [each for each in itertools.product(TYPES, TYPES, TYPES) if each[2] != "BFLOAT16"]
)
def test_casts_become_one_only_where_all_values_survive(start: str, middle: str, end: str) -> None:
    kinds = [TYPES[name] for name in (start, middle, end)]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["s"], to=kinds[0]),
            helper.make_node("Cast", ["s"], ["m"], to=kinds[1]),
            helper.make_node("Cast", ["m"], ["y"], to=kinds[2]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [None])],
        [helper.make_tensor_value_info("y", kinds[2], [None])],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    integers = [-128, -127, -1, 0, 1, 2, 3, 127, 100, 7]
    floats = [1.5, -2.75, 0.1, 65504, 1e-8, 3.0e38, 2**24 + 1, -0.0, 1e300, np.nan, np.inf]
    values = np.array([0, 1, 2, 3, 100] if "UINT8" in (start, middle, end) else integers, np.float64)
    if all(name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16") for name in (start, middle, end)):
        values = np.array(floats)
    target = load(source)
    apply(FuseConsecutive(), target)
    assert_equal(run(source, {"x": values}), run(target, {"x": values}))


def test_a_way_through_integers_stays() -> None:
    source = proto("g (float[4] x) => (float[4] y) { a = Cast<to = 7>(x) y = Cast<to = 1>(a) }")
    target = load(source)
    result = apply(FuseConsecutive(), target)
    assert operators(target) == ["Cast", "Cast"]
    assert [skip.reason for skip in result.skipped] == ["the way from float32 over int64 to float32 may change values"]


@QUIET
@given(
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.permutations(range(4)),
)
def test_chains_of_transposes(first: list[int], second: list[int], third: list[int]) -> None:
    nodes = [
        helper.make_node("Transpose", [a], [b], perm=list(perm))
        for a, b, perm in (("x", "s", first), ("s", "t", second), ("t", "u", third))
    ]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Neg", ["u"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    target = load(source)
    apply(FuseConsecutive(), target)
    assert len(target.graph.nodes) <= 2
    feed = {"x": np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)}
    assert_equal(run(source, feed), run(target, feed))
    assert_equal(reference(source, feed), reference(target, feed))


@QUIET
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-4, 6), st.integers(-2, 1)), min_size=2, max_size=3),
    st.sampled_from([1, 2, -1]),
)
def test_chains_of_slices(cuts: list[tuple[int, int, int]], step: int) -> None:
    arrays, nodes, source_name = [], [], "x"
    for at, (start, stop, axis) in enumerate(cuts):
        for name, value in (("s", start), ("e", stop), ("a", axis), ("t", step)):
            arrays.append(numpy_helper.from_array(np.array([value], np.int64), f"{name}{at}"))
        nodes.append(helper.make_node("Slice", [source_name, f"s{at}", f"e{at}", f"a{at}", f"t{at}"], [f"c{at}"]))
        source_name = f"c{at}"
    nodes.append(helper.make_node("Neg", [source_name], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        arrays,
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    target = load(source)
    apply(FuseConsecutive(), target)
    feed = {"x": np.arange(20, dtype=np.float32).reshape(4, 5)}
    assert_equal(run(source, feed), run(target, feed))


BOUND = st.sampled_from([None, -2.0, -0.0, 0.0, 0.5, 1.0, 6.0, float("inf"), float("-inf")])


@QUIET
@given(BOUND, BOUND, BOUND, BOUND, st.booleans(), st.sampled_from([np.float32, np.float64, np.float16]))
def test_chains_of_clips(  # type: ignore[no-untyped-def]
    low: float | None, high: float | None, low2: float | None, high2: float | None, relu: bool, dtype
) -> None:
    arrays, nodes, inputs = [], [], []
    for name, value in (("a", low), ("b", high), ("c", low2), ("d", high2)):
        if value is not None:
            arrays.append(numpy_helper.from_array(np.array(value, dtype), name))
        inputs.append("" if value is None else name)
    nodes = [helper.make_node("Clip", ["x", *inputs[:2]], ["m"])]
    nodes.append(
        helper.make_node("Relu", ["m"], ["y"]) if relu else helper.make_node("Clip", ["m", *inputs[2:]], ["y"])
    )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", kind, [None])],
        arrays,
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    target = load(source)
    apply(FuseConsecutive(), target)
    values = np.array([-7, -2, -1, -0.0, 0.0, 0.25, 0.5, 1, 3, 6, 9, np.inf, -np.inf, np.nan, 1e-8], dtype)
    assert_equal(run(source, {"x": values}), run(target, {"x": values}))
