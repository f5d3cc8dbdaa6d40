"""The pass fp16 as storage: weights in half the bytes behind one Cast, which the runtime folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.passbase import Context, Effect
from onnxopt.passes.fp16 import Fp16
from tests.passes.halving import decibels, halve, kinds, optimized_casts, skips
from tests.passes.quantizing import Array, nodes, normal, parse, weight

LAYERS = """g (float[2, 3, 8, 8] x) => (float[2, 5] y) {
  c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  s = Constant<value_ints = [2, 1, 256]>()
  r = Reshape(c, s)
  q = Constant<value_ints = [1, 0, 2]>()
  t = Transpose<perm = [1, 0, 2]>(r)
  l, h, e = LSTM<hidden_size = 16>(t, lw, lr)
  f = Constant<value_ints = [2, 16]>()
  v = Reshape(l, f)
  a = Add(v, shift)
  y = Gemm(a, gw, gb)
}""".replace("  q = Constant<value_ints = [1, 0, 2]>()\n", "")
WEIGHTS: dict[str, Array] = {
    "w": weight(4, 3, 3, 3),
    "b": normal(4),
    "lw": weight(1, 64, 256, seed=2),
    "lr": weight(1, 64, 16, seed=3),
    "shift": normal(2, 16, seed=4),
    "gw": weight(16, 5, seed=5),
    "gb": normal(5, seed=6),
}
FEEDS = [{"x": normal(2, 3, 8, 8, seed=seed)} for seed in range(3)]


def layers(opset: int = 17) -> Model:
    return parse(LAYERS, WEIGHTS, opset)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_large_weights_of_every_operator_take_half_the_bytes(opset: int, tmp_path: Path) -> None:
    text = LAYERS
    if opset < 12:  # Constant knew no integers then
        text = text.replace("  s = Constant<value_ints = [2, 1, 256]>()\n", "")
        text = text.replace("  f = Constant<value_ints = [2, 16]>()\n", "")
    shapes = {"s": np.array([2, 1, 256]), "f": np.array([2, 16])} if opset < 12 else {}
    model, before = (parse(text, {**WEIGHTS, **shapes}, opset) for _ in range(2))
    result = halve(model)
    assert Fp16().effect is Effect.LOSSY
    assert {"lw", "lr"} <= set(kinds(result, "stored"))
    assert 0.49 < model.nbytes() / before.nbytes() < 0.51
    assert optimized_casts(model, tmp_path) == 0
    assert decibels(before, model, FEEDS) > 65


def test_the_smallest_weights_stay_as_they_are() -> None:
    model = layers()
    result = halve(model)
    kept = {constant.name for constant in model.constants() if constant.dtype == np.float32}
    assert {"b", "gb"} <= kept
    assert not kept & set(kinds(result, "stored"))
    total = sum(values.nbytes for values in WEIGHTS.values())
    assert sum(WEIGHTS[name].nbytes for name in kept) < 0.02 * total


def test_values_are_rounded_to_nearest_and_never_written_into() -> None:
    model = layers()
    given = next(constant for constant in model.constants() if constant.name == "lw")
    halve(model)
    found = next(constant for constant in model.constants() if constant.name == "lw_float16")
    assert found.dtype == np.float16
    assert np.array_equal(found.values, WEIGHTS["lw"].astype(np.float16))
    assert np.array_equal(given.values, WEIGHTS["lw"])


def test_the_same_bytes_come_out() -> None:
    one, other = layers(), layers()
    halve(one)
    halve(other)
    assert one.to_proto().SerializeToString(deterministic=True) == other.to_proto().SerializeToString(
        deterministic=True
    )


def test_a_second_run_leaves_the_model_alone() -> None:
    model = layers()
    halve(model)
    digest = model.digest()
    result = halve(model)
    assert model.digest() == digest
    assert not result.changes
    assert "already" in next(iter(skips(result).values()))


@pytest.mark.parametrize("form", ["half", "float"])
def test_a_model_with_float16_inputs_is_left_alone(form: str) -> None:
    text = "g (float16[2, 64] x) => (float[2, 64] y) { f = Cast<to = 1>(x)  y = MatMul(f, w) }"
    model = parse(text, {"w": weight(64, 64)})
    digest = model.digest()
    result = halve(model, compute=form)
    assert model.digest() == digest
    assert skips(result) == {"x": "is a 16-bit float already: the model is left as it is"}


# tables

TABLE = "g (int64[2, 3] i) => (float[2, 3, 32] y) { y = Gather(table, i) }"
IDS = [{"i": np.array([[0, 5, 299], [7, 7, 1]])}]


def test_rows_of_a_table_are_cast_behind_the_gather(tmp_path: Path) -> None:
    model = parse(TABLE, {"table": normal(300, 32)})
    result = halve(model)
    (gather,) = nodes(model, "Gather")
    assert gather.inputs[0].dtype == np.float16
    assert [node.op for node in gather.outputs[0].outputs] == ["Cast"]
    assert optimized_casts(model, tmp_path) == 1
    assert result.changes[0].detail == "float16 rows, cast behind Gather"
    assert decibels(parse(TABLE, {"table": normal(300, 32)}), model, IDS) > 70


def test_a_tied_table_is_cast_once_for_all() -> None:
    text = """g (int64[2, 3] i) => (float[2, 3, 300] y) {
      e = Gather(table, i)  t = Transpose<perm = [1, 0]>(table)  y = MatMul(e, t) }"""
    model = parse(text, {"table": normal(300, 32)})
    halve(model)
    (cast,) = nodes(model, "Cast")
    assert {node.op for node in cast.outputs[0].outputs} == {"Gather", "Transpose"}
    assert decibels(parse(text, {"table": normal(300, 32)}), model, IDS) > 65


def test_a_table_read_in_an_inner_body_is_cast_there() -> None:
    text = """g (bool c, int64[2, 3] i) => (float[2, 3, 32] y) {
      y = If(c) <then_branch = a () => (float[2, 3, 32] p) { p = Gather(table, i) },
                 else_branch = b () => (float[2, 3, 32] q) { r = Gather(table, i)  q = Neg(r) }> }"""
    model = parse(text, {"table": normal(300, 32)})
    halve(model)
    assert all(constant.dtype != np.float32 for constant in model.constants())
    for given in (True, False):
        feed = [{"c": np.array(given), **IDS[0]}]
        assert decibels(parse(text, {"table": normal(300, 32)}), model, feed) > 65


# bodies

LOOP = """g (float[4, 16] x, int64 n) => (float[4, 16] y) {
  k = Constant<value_int = 1>()
  on = Cast<to = 9>(k)
  y = Loop(n, on, x) <body = b (int64 at, bool go, float[4, 16] s) => (bool go_on, float[4, 16] next) {
    go_on = Identity(go)  m = MatMul(s, w)  next = Tanh(m) }>
  }"""


@pytest.mark.parametrize("form", ["half", "float"])
def test_weights_of_a_loop_are_cast_once_outside_of_it(form: str) -> None:
    model, before = (parse(LOOP, {"w": weight(16, 16)}) for _ in range(2))
    halve(model, compute=form)
    home = model.graph if form == "float" else nodes(model, "Loop")[0].attrs["body"]
    assert "w_float16" in {constant.name for constant in home.initializers}
    if form == "float":
        assert [node.op for node in model.graph.nodes].count("Cast") == 2
    assert decibels(before, model, [{"x": normal(4, 16), "n": np.array(3)}]) > 60


def test_a_weight_of_outer_and_inner_readers_has_one_cast() -> None:
    text = """g (float[4, 16] x, bool c) => (float[4, 16] y) {
      z = MatMul(x, w)
      y = If(c) <then_branch = a () => (float[4, 16] p) { p = MatMul(z, w) },
                 else_branch = b () => (float[4, 16] q) { q0 = MatMul(z, w)  q = Relu(q0) }> }"""
    model, before = (parse(text, {"w": weight(16, 16)}) for _ in range(2))
    halve(model)
    assert len(nodes(model, "Cast")) == 1
    for given in (True, False):
        assert decibels(before, model, [{"x": normal(4, 16), "c": np.array(given)}]) > 65


# weights that stay

ONE = "g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize(
    ("factor", "shift"), [(1.0, False), (1e4, False), (3e5, True), (1e-3, True), (1e-9, True), (0.0, False)]
)
@pytest.mark.parametrize("rows", [False, True])
def test_what_the_format_can_not_hold_is_scaled_by_a_power_of_two(
    factor: float, shift: bool, rows: bool, tmp_path: Path
) -> None:
    text, feeds = (TABLE, IDS) if rows else (ONE, [{"x": normal(4, 64)}])
    values = weight(300, 32) if rows else weight(64, 64)
    weights = {"table" if rows else "w": values * np.float32(factor)}
    model, before = parse(text, weights), parse(text, weights)
    (change,) = halve(model).changes
    assert bool(nodes(model, "Mul")) is shift
    assert ("times 2**" in change.detail) is shift
    if not rows:
        assert optimized_casts(model, tmp_path) == 0
    if shift:
        (half,) = [constant.values for constant in model.constants() if constant.dtype == np.float16]
        assert 65504 / 4 <= np.abs(half).max() <= 65504 / 2
        (scale,) = [constant for constant in model.constants() if constant.dtype == np.float32]
        assert scale.shape == ()
        assert np.frexp(scale.values)[0] == 0.5
    if factor:
        assert decibels(before, model, feeds) > 70


def test_weights_of_too_many_magnitudes_stay_float32() -> None:
    values = weight(64, 64)
    values[:, ::2] *= np.float32(1e-12)
    result = halve(parse(ONE, {"w": values}))
    assert not result.changes
    assert skips(result)["weight w"] == "has 50% of its values below 6e-05, where float16 loses digits"


def test_a_few_tiny_values_among_normal_ones_do_not_matter() -> None:
    values = weight(64, 64)
    values[0] *= 1e-9
    assert halve(parse(ONE, {"w": values})).changes[0].detail == "float16 behind a Cast"


def test_infinities_are_kept_as_such() -> None:
    mask = np.where(np.tri(64) > 0, 0.0, -np.inf).astype(np.float32)
    text = "g (float[64, 64] x) => (float[64, 64] y) { z = Add(x, mask)  y = Softmax(z) }"
    model, before = (parse(text, {"mask": mask}) for _ in range(2))
    assert halve(model).changes
    assert decibels(before, model, [{"x": normal(64, 64)}]) > 90


def test_divisors_that_would_become_zero_stay() -> None:
    values = np.abs(normal(64, 64)) + np.float32(0.5)
    values[3, 3] = 1e-15
    text = "g (float[64, 64] x) => (float[64, 64] y) { y = OP(x, w) }"
    assert skips(halve(parse(text.replace("OP", "Div"), {"w": values})))["weight w"].startswith("holds 1e-15")
    assert halve(parse(text.replace("OP", "Mul"), {"w": values})).changes


OTHERS = {
    "is an output too, so its float values stay in the file": (
        "g (float[4, 64] x) => (float[4, 64] y, float[64, 64] w) { y = MatMul(x, w) }"
    ),
    "is read by n1, which is excluded": "g (float[4, 64] x) => (float[4, 64] y) { [n1] y = MatMul(x, w) }",
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_reasons_to_stay(reason: str) -> None:
    model = parse(OTHERS[reason], {"w": weight(64, 64)})
    digest = model.digest()
    result = halve(model, exclude=("n1",) if "excluded" in reason else ())
    assert model.digest() == digest
    assert skips(result) == {"weight w": reason}


def test_float64_weights_are_named() -> None:
    text = ONE.replace("float", "double")
    result = halve(parse(text, {"w": weight(64, 64).astype(np.float64)}))
    assert skips(result)["weight w"] == "is float64, which 16 bits would cut to a quarter of its digits"


def test_scales_of_quantized_weights_stay() -> None:
    text = "g (float[4, 64] x) => (float[4, 256] y) { w = DequantizeLinear<axis = 1>(c, s)  y = MatMul(x, w) }"
    values: dict[str, Array] = {"c": np.ones((64, 256), np.int8), "s": np.abs(normal(256)) + np.float32(0.1)}
    result = halve(parse(text, values))
    assert skips(result)["weight s"] == "is read by w, whose integer kernel asks for initializers"


def test_defaults_and_sparse_tensors_stay() -> None:
    proto = parse(ONE, {"w": weight(64, 64)}).to_proto()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [64, 64]))
    assert "overridden" in skips(halve(load(proto)))["weight w"]
    dense = np.eye(64, dtype=np.float32)
    sparse = onnx.SparseTensorProto()
    sparse.dims.extend([64, 64])
    sparse.values.CopyFrom(numpy_helper.from_array(dense[dense != 0], "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.flatnonzero(dense), "w_at"))
    proto = parse("g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }").to_proto()
    proto.graph.sparse_initializer.append(sparse)
    assert skips(Fp16().run(load(proto), Context())) == {"weight w": "is stored sparse"}


def test_local_functions_are_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[4, 64] x) => (float[4, 64] y) { y = own.f(x) }
    <domain: "own", opset_import: ["" : 17]> f (a) => (b) { w = Constant<value = float[64] {WORDS}>()  b = Add(a, w) }
    """.replace("WORDS", ", ".join(["0.5"] * 64))
    model = load(onnx.parser.parse_model(text))
    found = next(constant for constant in model.constants() if constant.dtype == np.float32)
    found.values = normal(64, seed=1)
    result = halve(model)
    assert not result.changes


def test_constant_nodes_and_metadata_are_kept() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }"
    proto = parse(text, {"w": weight(64, 64)}).to_proto()
    tensor = proto.graph.initializer.pop()
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    proto.metadata_props.add(key="labels", value="a b c")
    model = load(proto)
    result = halve(model)
    assert kinds(result, "stored") == ["w"]
    after = model.to_proto()
    assert [(entry.key, entry.value) for entry in after.metadata_props] == [("labels", "a b c")]
    assert [info.SerializeToString() for info in (*after.graph.input, *after.graph.output)] == [
        info.SerializeToString() for info in (*proto.graph.input, *proto.graph.output)
    ]
    assert after.ByteSize() < 0.55 * proto.ByteSize()


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no node is called 'encoder\*'"):
        halve(layers(), exclude=("encoder*",))


def test_an_operator_that_there_is_not_is_refused_with_what_was_meant() -> None:
    with pytest.raises(UsageError, match="keep_ops") as told:
        halve(layers(), keep_ops=("Softmaxx",))
    assert "'Softmax'" in str(told.value.remedy)
