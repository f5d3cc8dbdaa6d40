"""dedup of weights that follow from each other: transposed, scaled, both; by nodes, or taken in by readers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxopt.duplicates.related import sample
from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.passbase import Effect, PassResult
from onnxopt.passes.dedup import Dedup
from tests.helpers import apply, assert_close, assert_equal, operators, proto, random_feeds, run, with_weights

Array = NDArray[Any]
TIED = """g (int64[2,3] i) => (float[2,3,50] y, float[2,3,16] e) {
    e = Gather(table, i)
    y = MatMul(e, w)
}"""

TURNED = """g (float[2,3,32] x, float[2,3,24] u) => (float[2,3,24] y, float[2,3,32] z) {
    y = MatMul(x, a)
    z = MatMul(u, b)
}"""


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tied(swapped: bool = False) -> ModelProto:
    table = normal(50, 16)
    weights = {"table": table, "w": np.ascontiguousarray(table.T)}
    return with_weights(proto(TIED), **(dict(reversed(weights.items())) if swapped else weights))


def stored(target: Model) -> list[str]:
    return sorted(tensor.name for tensor in target.to_proto().graph.initializer)


def kinds(result: PassResult) -> list[tuple[str, str]]:
    return [(change.kind, change.where) for change in result.changes]


def check(source: ModelProto, options: dict[str, Any], *, exact: bool = True) -> tuple[Model, PassResult]:
    """Run the pass; outputs must be equal, or close."""
    target = load(source)
    result = apply(Dedup(**options), target)
    onnx.checker.check_model(target.to_proto(), full_check=True)
    feeds = random_feeds(source)
    (assert_equal if exact else assert_close)(run(source, feeds), run(target, feeds))
    assert_close(run(source, feeds, optimize=True), run(target, feeds, optimize=True))
    again = target.digest()
    assert not apply(Dedup(**options), target).changes
    assert target.digest() == again
    return target, result


# effects and options


@pytest.mark.parametrize(
    ("options", "effect"),
    [
        ({}, Effect.EXACT),
        ({"transposed": "off", "scaled": "off"}, Effect.EXACT),
        ({"transposed": "absorb"}, Effect.ROUNDING),
        ({"scaled": "all"}, Effect.ROUNDING),
        ({"tolerance": 1e-4}, Effect.LOSSY),
    ],
)
def test_the_options_decide_what_is_promised(options: dict[str, Any], effect: Effect) -> None:
    assert Dedup(**options).effect is effect


@pytest.mark.parametrize("options", [{"transposed": "yes"}, {"scaled": ""}, {"tolerance": -1.0}, {"tolerance": 2.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="dedup"):
        Dedup(**options)


# transposed


def test_tied_embeddings_are_stored_once_as_the_table() -> None:
    for swapped in (False, True):
        target, result = check(tied(swapped), {})
        assert kinds(result) == [("transposed", "w")]
        assert "transpose(table, [1, 0])" in result.changes[0].detail
        assert stored(target) == ["table"]
        assert operators(target) == ["Transpose", "Gather", "MatMul"]


def test_tied_embeddings_are_taken_in_by_the_gather() -> None:
    target, result = check(tied(), {"transposed": "absorb"})
    assert kinds(result) == [("transposed", "table")]
    assert stored(target) == ["w"]
    assert operators(target) == ["Gather", "Transpose", "MatMul"]


@pytest.mark.parametrize(
    ("shape", "axis"), [((), 0), ((), 1), ((4,), 0), ((4,), -1), ((2, 3), 0), ((2, 3), 1), ((2, 1, 3), -2)]
)
def test_a_gather_takes_in_the_order_whatever_its_axis_and_indices(shape: tuple[int, ...], axis: int) -> None:
    dims = ",".join(map(str, shape))
    table = normal(24, 32)
    rows = (*shape, 32) if axis in (0, -2) else (24, *shape)
    source = proto(
        f"""g (int64[{dims}] i, float[5,32,1] x) => (float[{",".join(map(str, rows))}] y, float[5,32,24] z) {{
            y = Gather<axis = {axis}>(table, i)  o = Expand(x, to)  z = MatMul(o, w)
        }}"""
    )
    source.graph.input[0].type.tensor_type.shape.SetInParent()  # the parser gives a scalar no shape
    source = with_weights(source, table=table, w=np.ascontiguousarray(table.T), to=np.array([5, 32, 32]))
    target, _ = check(source, {"transposed": "absorb"})
    assert stored(target) == ["to", "w"]


def test_a_gather_by_indices_of_unknown_rank_is_left() -> None:
    source = proto(
        """g (int64[n] i, int64[k] s, float[2,3,16] x) => (float y, float[2,3,50] z) {
            j = Reshape(i, s)  y = Gather(table, j)  z = MatMul(x, w)
        }"""
    )
    source.graph.output[0].type.tensor_type.ClearField("shape")
    table = normal(50, 16)
    target = load(with_weights(source, table=table, w=np.ascontiguousarray(table.T)))
    result = apply(Dedup(transposed="absorb"), target)
    assert not result.changes
    [skip] = result.skipped
    assert "known rank" in skip.reason or "not known to multiply two matrices" in skip.reason
    assert len(apply(Dedup(transposed="all"), target).changes) == 1


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_gemm_flips(flag: int, rows: int) -> None:
    source = proto(
        f"""g (float[{rows},32] x, float[{rows},32] u) => (float[{rows},32] y, float[{rows},32] z) {{
            y = Gemm<transB = {flag}>(x, a, c)  z = Gemm(u, b, c)
        }}"""
    )
    weight = normal(32, 32)
    source = with_weights(source, a=weight, b=np.ascontiguousarray(weight.T), c=normal(32, seed=1))
    target, result = check(source, {"transposed": "absorb"}, exact=False)
    assert kinds(result) == [("transposed", "b")]
    assert [node.attrs.get("transB", 0) for node in target.graph.nodes] == [flag, 1]


def test_the_left_input_of_a_gemm_flips_too() -> None:
    source = proto(
        "g (float[24,5] x, float[32,5] u) => (float[32,5] y, float[24,5] z) { y = Gemm(a, x)  z = Gemm(b, u) }"
    )
    weight = normal(32, 24)
    target, _ = check(
        with_weights(source, a=weight, b=np.ascontiguousarray(weight.T)), {"transposed": "absorb"}, exact=False
    )
    assert target.graph.nodes[1].attrs["transA"] == 1
    assert stored(target) == ["a"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [9, 11, 17])
def test_a_matmul_of_matrices_becomes_a_gemm(bias: bool, opset: int) -> None:
    behind = "t = MatMul(u, b)  z = Add(c, t)" if bias else "z = MatMul(u, b)"
    source = proto(
        f"""g (float[2,3,32] x, float[m,24] u) => (float[2,3,24] y, float[m,32] z) {{
            y = MatMul(x, a)  {behind}
        }}""",
        opset,
    )
    weight = normal(32, 24)
    source = with_weights(source, a=weight, b=np.ascontiguousarray(weight.T))
    source = with_weights(source, c=normal(32, seed=1)) if bias else source
    target, result = check(source, {"transposed": "absorb"}, exact=False)
    if not bias and opset < 11:
        assert "from opset 11 on" in result.skipped[0].reason
        return
    assert operators(target) == ["MatMul", "Gemm"]
    assert len(target.graph.nodes[1].inputs) == 2 + bias


def test_a_matmul_of_unknown_rank_is_left_or_gets_a_transpose() -> None:
    weight = normal(32, 24)
    source = with_weights(proto(TURNED), a=weight, b=np.ascontiguousarray(weight.T))
    _, result = check(source, {"transposed": "absorb"})
    assert not result.changes
    assert [skip.node for skip in result.skipped] == ["b"]
    target, _ = check(source, {"transposed": "all"})
    assert operators(target) == ["Transpose", "MatMul", "MatMul"]


def test_off_is_off() -> None:
    target = load(tied())
    before = target.digest()
    result = apply(Dedup(transposed="off"), target)
    assert (result.changes, result.skipped) == ([], [])
    assert target.digest() == before


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    data=st.data(),
    opset=st.integers(9, 21),
    dtype=st.sampled_from([np.float32, np.float64, np.int8, np.uint8]),
)
def test_any_order_of_axes_is_found_and_kept_to_the_bit(
    shape: list[int], data: st.DataObject, opset: int, dtype: type[np.generic]
) -> None:
    shape[0] *= 64
    perm = data.draw(st.permutations(range(len(shape))))
    values = (normal(*shape) * 50).astype(dtype)
    other = np.ascontiguousarray(values.transpose(perm))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    name = TensorProto.DataType.Name(kind).lower()
    dims = [",".join(map(str, s)) for s in (shape, other.shape)]
    source = proto(
        f"g (float[1] x) => ({name}[{dims[0]}] y, {name}[{dims[1]}] z) {{ y = Identity(a) z = Identity(b) }}", opset, 8
    )
    source = with_weights(source, a=values, b=other)
    target, _ = check(source, {})
    worth = values.nbytes > 512
    assert len(stored(target)) == (1 if worth else 1 + (list(perm) != sorted(perm) and not _equal(values, other)))


def _equal(one: Array, other: Array) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def test_bodies_share_a_transpose_in_the_body_around_them() -> None:
    weight = normal(32, 24)
    source = proto(
        """g (bool c, float[2,32] x, float[2,24] u) => (float[2,24] y) {
            y = If(c) <
                then_branch = t () => (float[2,24] p) { p = MatMul(x, a) },
                else_branch = e () => (float[2,24] q) { r = MatMul(u, b)  q = MatMul(r, a2) }
            >
        }"""
    )
    first, other = source.graph.node[0].attribute[0].g, source.graph.node[0].attribute[1].g
    bodies = {body.name: body for body in (first, other)}
    bodies["t"].initializer.append(onnx.numpy_helper.from_array(weight, "a"))
    bodies["e"].initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "b"))
    bodies["e"].initializer.append(onnx.numpy_helper.from_array(weight * 0.5, "a2"))
    target = load(source)
    result = apply(Dedup(), target)
    assert sorted(kinds(result)) == [("scaled", "a2"), ("transposed", "b")]
    onnx.checker.check_model(target.to_proto(), full_check=True)
    assert sorted(operators(target)) == ["If", "Mul", "Transpose"]
    for choice in (True, False):
        feeds = {**random_feeds(source), "c": np.array(choice)}
        assert_equal(run(source, feeds), run(target, feeds))


def test_a_loop_reads_a_transpose_of_what_lies_around_it() -> None:
    weight = normal(32, 32)
    source = proto(
        """g (float[2,32] x) => (float[2,32] y) <int64 n = {3}> {
            s = MatMul(x, a)
            y = Loop(n, , s) <
                body = l (int64 k, bool go, float[2,32] before) => (bool on, float[2,32] behind) {
                    on = Identity(go)  behind = MatMul(before, b)
                }
            >
        }"""
    )
    body = source.graph.node[1].attribute[0].g
    body.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "b"))
    target, _ = check(with_weights(source, a=weight), {})
    assert operators(target) == ["Transpose", "MatMul", "Loop"]


def test_constant_nodes_take_part_whatever_their_place() -> None:
    weight = normal(32, 24)
    source = proto(TURNED)
    for name, values in (("b", np.ascontiguousarray(weight.T)), ("a", weight)):
        tensor = onnx.numpy_helper.from_array(values, name)
        node = helper.make_node("Constant", [], [name], value=tensor)
        source.graph.node.insert(0 if name == "a" else 1, node)
    target, _ = check(source, {})
    assert len(target.graph.initializers) == 1


@pytest.mark.parametrize("ir_version", [3, 8])
def test_old_files_that_list_initializers_as_inputs(ir_version: int) -> None:
    source = tied()
    source.ir_version = ir_version
    source.opset_import[0].version = 9
    if ir_version == 3:
        for tensor in source.graph.initializer:
            source.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    target = load(source)
    result = apply(Dedup(), target)
    assert kinds(result) == [("transposed", "w")]
    written = target.to_proto()
    onnx.checker.check_model(written)
    feeds = {"i": np.array([[0, 1, 2], [49, 3, 4]])}
    assert_equal(run(source, feeds), run(written, feeds))


def test_functions_are_left_alone() -> None:
    weight = normal(32, 32)
    source = proto(
        """g (float[2,32] x) => (float[2,32] y) { t = MatMul(x, a) y = local.f(t) }
        <domain: "local", opset_import: ["": 17]>
        f (x) => (y) { c = Constant<value = float[1] {0}>()  y = MatMul(x, c) }""",
        imports='"local" : 1',
    )
    source.functions[0].node[0].attribute[0].t.CopyFrom(
        onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "c")
    )
    _, result = check(with_weights(source, a=weight), {})
    assert not result.changes


def test_outputs_and_annotated_ones_stay_but_others_follow_from_them() -> None:
    weight = normal(32, 24)
    text = "g (float[2,32] x) => (float[2,24] y, float[24,32] b) { y = MatMul(x, a) }"
    source = with_weights(proto(text), a=weight, b=np.ascontiguousarray(weight.T))
    target, result = check(source, {})
    assert kinds(result) == [("transposed", "a")]
    assert stored(target) == ["b"]
    both = source.graph.quantization_annotation.add(tensor_name="x")
    both.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="a")
    _, result = check(source, {})
    assert not result.changes
    assert "a quantization annotation names it" in result.skipped[0].reason or "output" in result.skipped[0].reason


def test_a_custom_operator_keeps_its_constant() -> None:
    weight = normal(32, 32)
    source = proto(
        "g (float[2,32] x) => (float[2,32] y) { t = MatMul(x, a) y = com.microsoft.FusedMatMul(t, b) }",
        imports='"com.microsoft" : 1',
    )
    source = with_weights(source, a=weight, b=np.ascontiguousarray(weight.T))
    target = load(source)
    result = apply(Dedup(), target)
    assert kinds(result) == [("transposed", "a")]
    feeds = random_feeds(source)
    assert_equal(run(source, feeds), run(target, feeds))


def test_values_in_a_file_beside_the_model(tmp_path: Any) -> None:
    table = normal(600, 48)
    source = with_weights(
        proto("g (int64[3] i) => (float[3,600] y) { e = Gather(table, i) y = MatMul(e, w) }"),
        table=table,
        w=np.ascontiguousarray(table.T),
    )
    onnx.save(
        copy.deepcopy(source), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0
    )
    target = load(tmp_path / "m.onnx")
    assert kinds(apply(Dedup(), target)) == [("transposed", "w")]
    target.save(tmp_path / "out.onnx", external_data="always")
    assert sum(path.stat().st_size for path in tmp_path.glob("out*")) < table.nbytes + 4096
    feeds = {"i": np.array([1, 599, 0])}
    assert_equal(run(source, feeds), run(onnx.load(tmp_path / "out.onnx"), feeds))


# scaled


PAIR = (
    "g (float[2,3,32] x, float[2,3,32] u) => (float[2,3,24] y, float[2,3,24] z) { y = MatMul(x, a) z = MatMul(u, b) }"
)


@pytest.mark.parametrize("scale", [2.0, -1.0, 0.125, -0.5, 0.1, 3.0, 0.35355338])
def test_exact_multiples_are_stored_once(scale: float) -> None:
    weight = normal(32, 24)
    source = with_weights(proto(PAIR), a=weight, b=weight * np.float32(scale))
    target, result = check(source, {})
    assert kinds(result) == [("scaled", "b")]
    assert "a" in stored(target)
    assert "b" not in stored(target)
    assert operators(target)[0] == "Mul"


def test_the_one_that_the_other_follows_from_is_kept() -> None:
    weight = normal(32, 24)
    source = with_weights(proto(PAIR), a=weight * np.float32(0.1), b=weight)
    _, result = check(source, {})
    assert kinds(result) == [("scaled", "a")]


def test_transposed_and_scaled() -> None:
    weight = normal(32, 24)
    source = with_weights(proto(TURNED), a=weight, b=np.ascontiguousarray(weight.T) * np.float32(-0.25))
    target, _ = check(source, {})
    assert operators(target) == ["Transpose", "Mul", "MatMul", "MatMul"] or operators(target)[0] in ("Mul", "Transpose")
    for options in (Dedup(transposed="off"), Dedup(scaled="off")):
        assert not apply(options, load(source)).changes
    assert not check(source, {"transposed": "file", "scaled": "absorb"})[1].changes


@pytest.mark.parametrize(
    ("dtype", "scale", "merged"), [(np.float64, 0.3, True), (np.float16, -0.25, True), (np.float16, 0.3, False)]
)
def test_other_floats_are_multiplied_in_their_type(dtype: Any, scale: float, merged: bool) -> None:
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    weight = normal(32, 24, dtype=dtype)
    source = with_weights(proto(PAIR.replace("float[", f"{name}[")), a=weight, b=weight * dtype(scale))
    _, result = check(source, {})
    assert kinds(result) == [("scaled", "b")] * merged


def test_what_is_no_exact_multiple_stays() -> None:
    weight = normal(32, 24)
    for other in (weight * np.float32(2), -weight):
        other = other.copy()
        other[31, 23] = np.nextafter(other[31, 23], np.float32(9))
        assert not check(with_weights(proto(PAIR), a=weight, b=other), {})[1].changes
    zero = weight.copy()
    zero[3, 5] = 0.0
    minus = -zero
    minus[3, 5] = 0.0  # -1 * 0.0 is -0.0
    assert not check(with_weights(proto(PAIR), a=zero, b=minus), {})[1].changes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_multiple(value: float) -> None:
    weight = normal(32, 24)
    weight[0, 0] = value
    target = load(with_weights(proto(PAIR), a=weight, b=weight * np.float32(2)))
    assert not apply(Dedup(), target).changes


def test_zeros_are_no_multiples_of_others() -> None:
    source = with_weights(proto(PAIR), a=normal(32, 24), b=np.zeros((32, 24), np.float32))
    assert not check(source, {})[1].changes


def test_constants_of_one_value_are_multiples() -> None:
    source = with_weights(proto(PAIR), a=np.full((32, 24), 3, np.float32), b=np.full((32, 24), 6, np.float32))
    assert kinds(check(source, {})[1]) == [("scaled", "b")]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Gemm(x, a) z = Gemm<alpha = 3.0>(u, b)", (32, 24)),
        ("y = MatMul(x, a) z = MatMul(u, b)", (32, 24)),
        ("y = MatMul(x, a) z = Gemm(u, b)", (32, 24)),
    ],
)
def test_readers_take_in_a_scale(text: str, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    source = proto(f"g (float[2,32] x, float[2,32] u) => (float[2,24] y, float[2,24] z) {{ {text} }}")
    source = with_weights(source, a=weight, b=weight * np.float32(-0.5))
    target, _ = check(source, {"scaled": "absorb"}, exact=False)
    assert "Mul" not in operators(target)[:1]
    assert "b" not in stored(target)


@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution_takes_in_a_scale_where_it_has_no_bias(biased: bool) -> None:
    more = ", c" if biased else ""
    source = proto(f"""g (float[1,8,6,6] x) => (float[1,8,2,2] z) {{ y = Conv(x, a) z = Conv(y, b{more}) }}""")
    weight = normal(8, 8, 3, 3)
    source = with_weights(source, a=weight, b=weight * np.float32(4))
    source = with_weights(source, c=normal(8)) if biased else source
    _, result = check(source, {"scaled": "absorb"}, exact=False)
    # with a bias at the second, the first takes the scale in
    assert kinds(result) == [("scaled", "a" if biased else "b")]


def test_scales_of_quantization_stay_constants() -> None:
    source = proto(
        """g (float[256,4] x) => (float[256,4] y, float[256,4] z) {
            q = QuantizeLinear<axis = 0>(x, a, zero)  y = DequantizeLinear<axis = 0>(q, b, zero)
            z = DequantizeLinear<axis = 0>(q, a, zero)
        }"""
    )
    scales = np.abs(normal(256)) + 0.1
    source = with_weights(source, a=scales, b=scales * np.float32(2), zero=np.zeros(256, np.int8))
    _, result = check(source, {})
    assert not result.changes
    assert "stays a constant" in result.skipped[0].reason


def test_what_looks_alike_at_the_samples_only_stays() -> None:
    weight = normal(500, 300)
    text = PAIR.replace("32", "500").replace("24", "300")
    other = weight * np.float32(2)
    marks = np.zeros(weight.shape, bool)
    places = np.arange(weight.size).reshape(weight.shape)
    marks.reshape(-1)[sample(places, 512)] = True
    other[~marks] *= np.float32(1.5)
    assert not check(with_weights(proto(text), a=weight, b=other), {})[1].changes


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(-100, 100, width=32).filter(lambda value: abs(value) > 1e-3),
    perm=st.permutations(range(2)),
    options=st.sampled_from(["file", "all", "absorb"]),
    opset=st.integers(9, 21),
    seed=st.integers(0, 9),
)
def test_random_multiples(scale: float, perm: list[int], options: str, opset: int, seed: int) -> None:
    weight = normal(20, 20, seed=seed)
    other = np.ascontiguousarray(weight.transpose(perm)) * np.float32(scale)
    source = proto(
        "g (float[3,20] x) => (float[3,20] y) { t = MatMul(x, a) r = Add(t, c) s = Gemm(r, b, c) y = MatMul(s, a) }",
        opset,
    )
    source = with_weights(source, a=weight, b=other, c=normal(20, seed=1))
    check(source, {"transposed": options, "scaled": options}, exact=options == "file")
