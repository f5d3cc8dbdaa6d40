"""fold_constants: chains that fold, values that must not be stored, nodes that must not be computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.model import Constant, Model, load
from onnxopt.passbase import Context, Effect
from onnxopt.passes.fold_constants import FoldConstants
from tests.helpers import (
    apply,
    assert_close,
    assert_equal,
    evaluate,
    model,
    operators,
    proto,
    random_feeds,
    reference,
    run,
    with_weights,
)


def folded(source: ModelProto, feeds: dict[str, Any] | None = None, **options: Any) -> Model:
    """The model after folding, checked against both judges."""
    target = load(source)
    present = target.digest()
    result = apply(FoldConstants(**options), target)
    given = random_feeds(source) if feeds is None else feeds
    assert_equal(run(source, given), run(target, given))
    before, after = reference(source, given), reference(target, given)
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
    onnx.checker.check_model(target.to_proto())
    assert bool(result.changes) == (target.digest() != present)
    again = target.digest()
    assert not apply(FoldConstants(**options), target).changes
    assert target.digest() == again
    return target


def test_static_shapes_fold_completely() -> None:
    target = folded(
        proto(
            """g (float[1,3,4,5] x) => (float[1,N] y)
            <int64 zero = {0}, int64[1] minus_one = {-1}, int64[1] axis = {0}> {
                s = Shape(x)  n = Gather(s, zero)  m = Unsqueeze(n, axis)
                t = Concat<axis = 0>(m, minus_one)  y = Reshape(x, t)
            }"""
        )
    )
    assert operators(target) == ["Reshape"]
    assert target.graph.nodes[0].inputs[1].values.tolist() == [1, -1]


def test_open_dims_stay() -> None:
    source = proto("g (float[N,3] x) => (int64[2] y, int64 z) { s = Shape(x) y = Identity(s) z = Size(x) }")
    target = load(source)
    assert not apply(FoldConstants(), target).changes


def test_an_exporters_minus_one_is_an_open_dim() -> None:
    source = proto("g (float[2,3] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }")
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    target = load(source)
    assert not apply(FoldConstants(), target).changes
    assert run(target, {"x": np.zeros((7, 3), np.float32)})["y"].tolist() == [-7, -3]


def test_stale_descriptions_in_the_file_are_not_believed() -> None:
    source = proto("g (float[N,3] x) => (int64[2] y) { t = Relu(x) s = Shape(t) y = Neg(s) }")
    source.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 3]))
    assert not apply(FoldConstants(), load(source)).changes


def test_shape_takes_its_bounds() -> None:
    target = folded(proto("g (float[2,3,4] x) => (int64[1] y) { s = Shape<start = -2, end = 2>(x) y = Neg(s) }"))
    assert operators(target) == ["Identity"]


PADDING = """g (float[1,1,4,4] x) => (float[1,1,H,W] y)
    <int64[4] amounts = {1, 1, 2, 2}, int64[1] four = {4}, int64[2] pairs = {-1, 2}, int64[1] flat = {-1},
     int64[1] begin = {-1}, int64[1] end = {-9223372036854775807}, int64[1] axis = {0}, int64[1] back = {-1}> {
    zeros = ConstantOfShape<value = int64[1] {0}>(four)
    all = Concat<axis = 0>(amounts, zeros)
    two = Reshape(all, pairs)
    turned = Slice(two, begin, end, axis, back)
    across = Transpose<perm = [1, 0]>(turned)
    line = Reshape(across, flat)
    pads = Cast<to = 7>(line)
    y = Pad<mode = "constant">(x, pads)
}"""


def test_the_padding_chain_of_torchscript_folds() -> None:
    target = folded(proto(PADDING))
    assert operators(target) == ["Pad"]
    assert isinstance(target.graph.nodes[0].inputs[1], Constant)
    assert target.graph.nodes[0].inputs[1].values.tolist() == [0, 0, 2, 1, 0, 0, 2, 1]


def test_one_evaluation_for_many_nodes() -> None:
    calls: list[ModelProto] = []

    def counted(source: ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        calls.append(source)
        return evaluate(source, inputs)

    lines = "".join(f"t{i} = Mul(c, k)  u{i} = Add(t{i}, c)  x{i + 1} = Add(x{i}, u{i})\n" for i in range(20))
    text = f"g (float[4] x0) => (float[4] x20) <float[4] c = {{1, 2, 3, 4}}, float k = {{3}}> {{ {lines} }}"
    target = model(text)
    FoldConstants().run(target, Context(evaluate=counted))
    assert operators(target) == ["Add"] * 20
    assert len(calls) == 1


def test_equal_values_are_stored_once() -> None:
    lines = "".join(f"u{i} = Add(c, k)  x{i + 1} = Mul(x{i}, u{i})\n" for i in range(3))
    target = model(f"g (float[4] x0) => (float[4] x3) <float[4] c = {{1, 2, 3, 4}}, float k = {{3}}> {{ {lines} }}")
    apply(FoldConstants(), target)
    assert len({id(node.inputs[1]) for node in target.graph.nodes}) == 1


def test_an_output_keeps_its_name() -> None:
    target = folded(
        proto("g (float[2] x) => (float[2] y, float[2] z) <float[2] c = {1, 2}> { y = Add(c, c) z = Mul(x, y) }")
    )
    assert operators(target) == ["Identity", "Mul"]
    assert [tensor.name for tensor in target.graph.outputs] == ["y", "z"]


def test_identities_of_constants_go() -> None:
    target = folded(
        proto("g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { i = Identity(c) j = Identity(i) y = Mul(x, j) }")
    )
    assert operators(target) == ["Mul"]
    assert target.graph.nodes[0].inputs[1].name == "c"


def test_bodies_fold_with_constants_from_outside() -> None:
    source = proto(
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = If(c) <
                then_branch = t () => (float[2] p) <float[2] v = {3, 4}> { s = Add(w, v) p = Mul(x, s) },
                else_branch = e () => (float[2] q) <float[2] v = {5, 6}> { q = Sub(w, v) }
            >
        }"""
    )
    target = folded(source, {"c": np.array(True), "x": np.ones(2, np.float32)})
    bodies = list(target.bodies())
    assert operators(bodies[1]) == ["Mul"]
    assert operators(bodies[2]) == ["Identity"]
    folded(source, {"c": np.array(False), "x": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    "line",
    [
        "r = RandomNormal<shape = [4]>()",
        "r = RandomNormalLike(c)",
        "r = RandomUniformLike(c)",
        "r = Bernoulli(h)",
        "r, mask = Dropout(c, half, yes)",
        "r = DequantizeLinear(i, k)",
    ],
)
def test_what_is_random_or_quantized_stays(line: str) -> None:
    target = model(
        f"""g (float[4] x) => (float[4] y)
            <float[4] c = {{1, 2, 3, 4}}, float[4] h = {{0.5, 0.5, 0.5, 0.5}}, int8[4] i = {{1, 2, 3, 4}},
             float k = {{3}}, float half = {{0.5}}, bool yes = {{1}}> {{ {line} y = Add(x, r) }}"""
    )
    assert not apply(FoldConstants(), target).changes
    assert len(target.graph.nodes) == 2


def test_dropout_outside_of_training_folds() -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] c = {1, 2}, float h = {0.5}, bool no = {0}>
        { r = Dropout(c, h, no) y = Add(x, r) }"""
    assert operators(folded(proto(text))) == ["Add"]


def test_batch_normalization_in_training_stays() -> None:
    text = """g (float[1,2] x) => (float[1,2] y) <float[1,2] c = {1, 2}, float[2] s = {1, 2}> {
        r, m, v = BatchNormalization<training_mode = 1>(c, s, s, s, s)  y = Add(x, r) }"""
    assert not apply(FoldConstants(), model(text)).changes


def test_a_134_byte_expand_does_not_become_67_megabytes() -> None:
    target = model(
        """g (float[4096,4096] x) => (float[4096,4096] y) <float one = {1}, int64[2] s = {4096, 4096}>
            { e = Expand(one, s) y = Add(x, e) }"""
    )
    result = apply(FoldConstants(), target)
    assert operators(target) == ["Expand", "Add"]
    assert "67108" in result.skipped[0].reason
    assert target.nbytes() < 100


def test_nothing_larger_than_its_limit_is_computed_on_the_way() -> None:
    def refuse(_source: ModelProto, _inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        raise AssertionError("evaluated")

    target = model(
        """g (float[1] x) => (float[1] y) <float one = {1}, int64[1] s = {9000000000000}>
            { e = Expand(one, s) r = ReduceSum<keepdims = 1>(e) y = Add(x, r) }"""
    )
    result = FoldConstants().run(target, Context(evaluate=refuse))
    assert not result.changes
    assert "36000000000000 bytes" in result.skipped[0].reason


def test_the_sizes_around_the_budget() -> None:
    text = (
        "g (float[300] x) => (float[300] y) <float one = {1}, int64[1] s = {300}> { e = Expand(one, s) y = Add(x, e) }"
    )
    growth = 1200 - 4 - 8
    assert operators(folded(proto(text), max_growth=growth)) == ["Add"]
    assert operators(folded(proto(text), max_growth=growth - 1)) == ["Expand", "Add"]


def test_what_stays_does_not_store_its_steps() -> None:
    """Four slices of a weight that two layers share: storing the slices instead of the result would double it."""
    weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    lines = "".join(
        f"a{i} = Slice(w, zero, half)  b{i} = Slice(w, half, end)  p{i} = {op}(b{i})\n"
        f"c{i} = Concat<axis = 0>(p{i}, a{i})\n"
        f"y{i} = MatMul(x, c{i})\n"
        for i, op in enumerate(["Identity", "Neg"])
    )
    text = f"""g (float[1,64] x) => (float[1,64] y0, float[1,64] y1, float[64,64] w2)
        <int64[1] zero = {{0}}, int64[1] half = {{32}}, int64[1] end = {{64}}> {{ {lines} w2 = Neg(w) }}"""
    target = load(with_weights(proto(text), w=weights))
    before = target.nbytes()
    apply(FoldConstants(max_growth=9000), target)
    assert target.nbytes() <= before + 9000


@pytest.mark.parametrize(
    "decompression",
    [
        "f = Cast<to = 1>(q)  w = Mul(f, k)",
        "w = Gather(codebook, indices)",
        "f = Cast<to = 1>(h)  w = Mul(f, k)",
        "w = Cast<to = 1>(h)",
    ],
)
def test_compressed_weights_stay_compressed(decompression: str) -> None:
    source = proto(f"g (float[1,32] x) => (float[1,32] y) <float k = {{0.5}}> {{ {decompression} y = MatMul(x, w) }}")
    rng = np.random.default_rng(0)
    source = with_weights(
        source,
        q=rng.integers(-127, 128, (32, 32)).astype(np.int8),
        h=rng.standard_normal((32, 32)).astype(np.float16),
        codebook=np.arange(16, dtype=np.float32),
        indices=rng.integers(0, 16, (32, 32)).astype(np.uint8).astype(np.int32),
    )
    if "Gather" in decompression:
        source.graph.node[0].input[1] = "wide"
        source.graph.node.insert(0, helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.INT32))
        narrow = numpy_helper.to_array(source.graph.initializer[-1]).astype(np.uint8)
        source.graph.initializer.append(numpy_helper.from_array(narrow, "narrow"))
        del source.graph.initializer[-2]
    target = load(source)
    result = apply(FoldConstants(max_growth=1 << 30), target)
    assert not result.changes
    assert any("full width" in skip.reason for skip in result.skipped)


def test_sparse_weights_stay_sparse() -> None:
    source = proto("g (float[4] x) => (float[4] y) { n = Neg(s) y = Add(x, n) }")
    sparse = source.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([1], np.int64)))
    result = apply(FoldConstants(), load(source))
    assert not result.changes
    assert "sparse" in result.skipped[0].reason


def test_a_weight_may_be_transposed() -> None:
    weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    source = with_weights(
        proto("g (float[1,64] x) => (float[1,64] y) { w = Transpose(v) y = MatMul(x, w) }"), v=weights
    )
    target, careful = load(source), folded(source, max_growth=0, weights=False)
    assert operators(careful) == ["Transpose", "MatMul"]
    assert not apply(FoldConstants(max_growth=0), target).skipped
    assert operators(target) == ["MatMul"]
    assert target.nbytes() == weights.nbytes
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))


def test_the_effect_says_whether_weights_are_computed() -> None:
    assert FoldConstants().effect is Effect.ROUNDING
    assert FoldConstants(weights=False).effect is Effect.EXACT


def test_16_bit_floats_that_the_runtime_keeps_wide_stay() -> None:
    source = proto("g (float16[1] x) => (float16[1] y) { s = Sqrt(c) y = Mul(x, s) }")
    target = load(with_weights(source, c=np.array([0.1], np.float16)))
    result = apply(FoldConstants(), target)
    assert operators(target) == ["Sqrt", "Mul"]
    assert "float32" in result.skipped[0].reason


def test_what_the_runtime_cannot_compute_is_skipped_alone() -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] c = {1, 2}, int64[1] five = {5}> {
        bad = Gather(c, five)  a = Add(x, bad)  good = Neg(c)  y = Add(a, good) }"""
    target = model(text)
    result = apply(FoldConstants(), target)
    assert operators(target) == ["Gather", "Add", "Add"]
    assert [skip.node for skip in result.skipped] == ["bad"]
    assert "can't compute" in result.skipped[0].reason


def test_integer_division_by_zero_in_a_dead_branch_is_not_computed() -> None:
    source = proto(
        """g (bool c, int64[1] x) => (int64[1] y) <int64[1] one = {1}, int64[1] zero = {0}> {
            y = If(c) <
                then_branch = t () => (int64[1] p) { d = Div(one, zero) p = Add(x, d) },
                else_branch = e () => (int64[1] q) { q = Neg(x) }
            >
        }"""
    )
    result = apply(FoldConstants(), load(source))
    assert not result.changes
    assert "zero" in result.skipped[0].reason


def test_custom_operators_and_their_like_named_kin_stay() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { n = custom.Neg(c) y = Add(x, n) }"
    assert not apply(FoldConstants(), model(text, imports='"custom" : 1')).changes


def test_overridable_initializers_are_inputs() -> None:
    text = "g (float[2] x, float[2] c) => (float[2] y) <float[2] c = {1, 2}> { n = Neg(c) y = Add(x, n) }"
    assert not apply(FoldConstants(), model(text)).changes
    assert apply(FoldConstants(), model(text, opset=8, ir_version=3)).changes


def test_a_reversed_file_folds() -> None:
    source = proto("g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { a = Neg(c) b = Exp(a) y = Add(x, b) }")
    nodes = list(source.graph.node)[::-1]
    source.graph.ClearField("node")
    source.graph.node.extend(nodes)
    target = load(source)
    apply(FoldConstants(), target)
    assert operators(target) == ["Add"]


def test_producers_that_only_a_shape_read_go_too() -> None:
    target = folded(proto("g (float[2,3] x) => (float[2,3] y) { r = Relu(x) s = Shape(r) y = Reshape(x, s) }"))
    assert operators(target) == ["Reshape"]


def test_dead_random_nodes_are_not_removed() -> None:
    target = model("g (float[2,3] x) => (float[2,3] y) { r = RandomNormalLike(x) s = Shape(r) y = Reshape(x, s) }")
    apply(FoldConstants(), target)
    assert operators(target) == ["RandomNormalLike", "Reshape"]


def test_nodes_of_one_name_in_two_bodies_are_folded_together() -> None:
    """The runtime refuses a graph in which a name occurs twice, and the part that is computed is one graph."""
    source = proto(
        """g (bool c) => (float[2] y) <float[2] w = {1, 2}> {
            [same] a = Neg(w)
            b = If(c) < then_branch = t () => (float[2] p) { [same] p = Abs(a) },
                        else_branch = e () => (float[2] q) { [same] q = Relu(a) } >
            y = Identity(b)
        }"""
    )
    target = load(source)
    result = apply(FoldConstants(), target)
    assert [change.kind for change in result.changes].count("folded") == 2
    assert not result.skipped


def test_a_division_that_would_end_the_process_stays() -> None:
    smallest = np.array([np.iinfo(np.int64).min])
    source = with_weights(
        proto("g (int64[1] x) => (int64[1] y) { d = Div(a, b) y = Add(x, d) }"), a=smallest, b=np.array([-1])
    )
    target = load(source)
    result = apply(FoldConstants(), target)
    assert not result.changes
    assert "may divide" in result.skipped[0].reason


def test_dims_declared_for_the_elements_of_a_sequence_are_no_facts() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 3]))
    nodes = [
        helper.make_node("SequenceAt", ["s", "zero"], ["e"]),
        helper.make_node("Shape", ["e"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_value_info("s", kind)],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2])],
        [numpy_helper.from_array(np.array(0), "zero")],
    )
    target = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert not apply(FoldConstants(), target).changes
