"""Weights and values that 8 bits do not serve: float values that other readers need, infinities, next to nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxopt.model import Model
from onnxopt.passbase import PassResult
from onnxopt.runtime import Session
from tests.passes.quantizing import Array, integer_weights, nodes, normal, optimized, parse, quantize, weight

ROWS = [{"x": normal(64, 128, seed=seed)} for seed in range(3)]


def skips(result: PassResult) -> list[tuple[str, str]]:
    return [(skip.node, skip.reason) for skip in result.skipped]


def close(reference: Model, model: Model, feeds: list[dict[str, Array]]) -> None:
    for feed in feeds:
        got = Session(model).run(feed)
        for name, exact in Session(reference).run(feed).items():
            error = np.square(exact.astype(np.float64) - got[name]).sum()
            assert error < 1e-3 * np.square(exact.astype(np.float64)).sum()


# weights with readers besides those that take codes

TIED = """g (int64[n, t] ids) => (float[n, t, 300] y) {
  f = Gather(table, ids)  t = Transpose<perm = [1, 0]>(table)  y = MatMul(f, t) }"""
KEPT = "its weight is read in float by t too, so its float values stay in the file"
SHOWN = "its weight is an output too, so its float values stay in the file"


@pytest.mark.parametrize("data", [True, False])
def test_a_table_that_another_operator_reads_is_not_stored_twice(data: bool) -> None:
    model = parse(TIED, {"table": normal(300, 64)})
    before = model.digest()
    result = quantize(model, [{"ids": np.array([[0, 299, 5]])}] if data else None)
    assert model.digest() == before
    assert ("f, weight table", KEPT) in skips(result)


def test_a_table_whose_readers_all_take_codes_is_stored() -> None:
    text = (
        "g (int64[n] i, float[n, 64] x) => (float y, float z) { y = Gather(table, i)  z = Gemm<transB = 1>(x, table) }"
    )
    model = parse(text, {"table": normal(300, 64)})
    quantize(model, None)
    assert model.nbytes() < 0.3 * 300 * 64 * 4
    feed = {"i": np.array([1, 7]), "x": normal(2, 64)}
    close(parse(text, {"table": normal(300, 64)}), model, [feed])


@pytest.mark.parametrize("all_layers", [True, False])
def test_a_weight_that_is_an_output_too_stays_float(all_layers: bool) -> None:
    text = "g (float[64, 128] x) => (float[64, 128] y, float[128, 128] w) { y = MatMul(x, w) }"
    model = parse(text, {"w": weight(128, 128)})
    before = model.digest()
    result = quantize(model, ROWS, all_layers=all_layers)
    assert model.digest() == before
    assert skips(result) == [("y", SHOWN)]
    assert skips(quantize(model, None)) == [("y", "no real inputs"), ("y, weight w", SHOWN)]


def test_a_weight_that_a_branch_reads_stays_float() -> None:
    text = """g (float[64, 128] x, bool which) => (float[128, 128] z, float[64, 128] y) {
      y = MatMul(x, w)
      z = If (which) < then_branch = t () => (float[128, 128] tt) { tt = Identity(w) },
                       else_branch = e () => (float[128, 128] ee) { ee = Neg(w) }> }"""
    model = parse(text, {"w": weight(128, 128)})
    before = model.digest()
    result = quantize(model, [{**feed, "which": np.array(True)} for feed in ROWS])
    assert model.digest() == before
    assert skips(result) == [("y", KEPT.replace("by t", "by ee"))]


SHARED = "g (float[64, 128] x) => (float y) { a = MatMul(x, w)  t = Transpose(w)  b = MatMul(a, t)  y = Neg(b) }"


def test_a_layer_whose_weight_stays_for_another_reader_is_left_float() -> None:
    model = parse(SHARED, {"w": weight(128, 128)})
    before = model.digest()
    result = quantize(model, ROWS)
    assert model.digest() == before
    assert skips(result) == [("b", "its weight is not a constant"), ("a", KEPT)]


def test_a_small_second_copy_is_worth_an_integer_kernel() -> None:
    model = parse(SHARED.replace("128", "32"), {"w": weight(32, 32)})
    quantize(model, [{"x": normal(64, 32)}])
    assert [node.name for node, *_ in integer_weights(model)] == [nodes(model, "MatMul")[0].name]


MIXED = "g (float[64, 128] x) => (float y) { a = MatMul(x, w)  b = Neg(a)  c = MatMul(b, w)  y = Log(c) }"


def test_a_weight_that_a_float_layer_stores_may_go_to_an_integer_layer_too() -> None:
    model, original = parse(MIXED, {"w": weight(128, 128)}), parse(MIXED, {"w": weight(128, 128)})
    result = quantize(model, ROWS)
    assert [change.kind for change in result.changes] == ["quantized", "stored"]
    assert model.nbytes() < 0.6 * original.nbytes()


def test_without_storage_a_float_layer_keeps_its_integer_neighbour_float() -> None:
    model = parse(MIXED, {"w": weight(128, 128)})
    before = model.digest()
    result = quantize(model, ROWS, storage=False)
    assert model.digest() == before
    assert skips(result)[1] == ("a", KEPT.replace("by t", "by c"))


def test_layers_that_share_a_weight_take_it_together() -> None:
    text = "g (float[64, 128] x) => (float y) { a = MatMul(x, w)  b = Tanh(a)  c = MatMul(b, w)  y = Neg(c) }"
    model, original = parse(text, {"w": weight(128, 128)}), parse(text, {"w": weight(128, 128)})
    result = quantize(model, ROWS, storage=False)
    assert not result.skipped
    assert model.nbytes() < 0.4 * original.nbytes()


# biases of layers that are only stored

STORED: dict[str, tuple[str, tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "conv": ("Conv<pads = [1, 1, 1, 1]>(x, w, b)", (1, 16, 24, 24), {"w": (32, 16, 3, 3), "b": (32,)}),
    "conv without bias": ("Conv(x, w)", (1, 16, 24, 24), {"w": (32, 16, 3, 3)}),
    "grouped conv": ("Conv<group = 4>(x, w, b)", (1, 16, 24, 24), {"w": (32, 4, 3, 3), "b": (32,)}),
    "gemm": ("Gemm(x, w, b)", (16, 64), {"w": (64, 32), "b": (32,)}),
    "gemm with a row as bias": ("Gemm(x, w, b)", (16, 64), {"w": (64, 32), "b": (1, 32)}),
    "transposed gemm": ("Gemm<transB = 1>(x, w, b)", (16, 64), {"w": (32, 64), "b": (32,)}),
}


def mean_error(original: Model, model: Model, feed: dict[str, Array], axis: int) -> float:
    """Largest mean error of any channel."""
    difference = Session(model).run(feed)["y"] - Session(original).run(feed)["y"]
    others = tuple(i for i in range(difference.ndim) if i != axis)
    return float(np.abs(difference.mean(axis=others)).max())


@pytest.mark.parametrize("kind", STORED)
def test_the_mean_error_of_stored_weights_goes_into_the_bias(kind: str) -> None:
    layer, shape, sizes = STORED[kind]
    dims = ", ".join(map(str, shape))
    text = f"g (float[{dims}] x) => (float y) {{ s = {layer}  m = Mul(s, k)  y = Neg(m) }}"
    values = {name: weight(*size) for name, size in sizes.items()} | {"k": np.array(2, np.float32)}
    feeds = [{"x": normal(*shape, seed=seed) + np.float32(3)} for seed in range(4)]
    errors = []
    for correct in (True, False):
        model = parse(text, values)
        result = quantize(model, feeds, min_sqnr=1000.0, correct_bias=correct)
        assert [change.detail for change in result.changes] == ["int8, bias corrected" if correct else "int8"]
        errors.append(mean_error(parse(text, values), model, feeds[0], 1))
    assert errors[0] < 0.3 * errors[1]


def test_a_bias_that_would_cost_what_storage_saves_is_not_added() -> None:
    text = "g (float[1, 256, 40] x) => (float y) { a = Conv<group = 256>(x, w)  y = Neg(a) }"
    feeds = [{"x": normal(1, 256, 40) + np.float32(3)}]
    model = parse(text, {"w": weight(256, 1, 3)})
    assert [change.detail for change in quantize(model, feeds, min_sqnr=1000.0).changes] == ["int8"]
    model = parse(text, {"w": weight(256, 1, 9)})
    assert [change.detail for change in quantize(model, feeds, min_sqnr=1000.0).changes] == ["int8, bias corrected"]


def test_without_a_known_mean_a_bias_stays_as_it_is() -> None:
    text = """g (float[16, 64] x, bool which) => (float y) {
      y = If (which) < then_branch = t () => (float u) { u = Gemm(x, w, b) },
                       else_branch = e () => (float v) { v = Neg(x) }> }"""
    values = {"w": weight(64, 32), "b": normal(32)}
    model = parse(text, values)
    result = quantize(model, [{"x": normal(16, 64), "which": np.array(True)}], min_sqnr=1000.0)
    assert [change.detail for change in result.changes] == ["int8"]
    assert np.array_equal(nodes(model, "Gemm")[0].inputs[2].values, values["b"])
    plain = parse("g (float[16, 64] x) => (float y) { y = Gemm(x, w, b) }", values)
    assert [change.detail for change in quantize(plain, None).changes] == ["int8"]


# infinities

GEMM = "g (float[2, 192] x) => (float y, float z) { %s  z = Gemm(x, g) }"


def test_one_infinite_weight_costs_its_own_layer_only(tmp_path: Path) -> None:
    text = GEMM % "a = Gemm(x, w)  r = Relu(a)  y = Gemm(r, v)"
    broken = weight(192, 64)
    broken[3, 3] = np.inf
    model = parse(text, {"w": broken, "v": weight(64, 64), "g": weight(192, 64)})
    result = quantize(model, [{"x": normal(2, 192)}])
    assert ("a", "its weight holds NaN or infinity") in skips(result)
    assert ("y", "its input holds infinities (feed 0)") in skips(result)
    assert len(result.skipped) == 2
    assert len(integer_weights(model)) == 1


def test_a_mask_of_infinities_in_front_of_a_layer_costs_that_layer_only() -> None:
    text = """g (float[4, 64] x) => (float[4, 64] y) {
      m = Add(x, mask)  a = MatMul(m, w)  b = Neg(x)  c = MatMul(b, w)  y = Max(a, c) }"""
    mask = np.where(np.eye(4, 64) > 0, -np.inf, 0).astype(np.float32)
    model = parse(text, {"mask": mask, "w": np.abs(weight(64, 64))})
    result = quantize(model, [{"x": normal(4, 64, seed=seed)} for seed in range(2)])
    assert skips(result) == [("a", "its input holds infinities (feed 0)")]
    assert len(integer_weights(model)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_stored(bad: float) -> None:
    table = normal(100, 64)
    table[7, 7] = bad
    model = parse("g (int64[n] i) => (float[n, 64] y) { y = Gather(t, i) }", {"t": table})
    before = model.digest()
    assert skips(quantize(model, None)) == [("y, weight t", "its weight holds NaN or infinity")]
    assert model.digest() == before


def test_a_bias_that_is_not_finite_keeps_its_layer_float() -> None:
    bias = normal(64)
    bias[0] = -np.inf
    model = parse("g (float[2, 192] x) => (float y) { y = Gemm(x, w, b) }", {"w": weight(192, 64), "b": bias})
    assert skips(quantize(model, [{"x": normal(2, 192)}])) == [("y", "its bias holds NaN or infinity")]


def test_a_scale_that_takes_a_weight_to_infinity_keeps_it_float() -> None:
    text = "g (float[2, 64] x) => (float y) { a = MatMul(x, w)  s = Mul(a, k)  y = Neg(s) }"
    values = {"w": weight(64, 64) * np.float32(1e20), "k": np.array(1e20, np.float32)}
    model = parse(text, values)
    result = quantize(model, [{"x": np.zeros((2, 64), np.float32)}])
    assert skips(result) == [("a", "its weight, with what scales its output, holds NaN or infinity")]


# next to nothing


def test_tiny_weights_cost_their_own_layers_only() -> None:
    text = GEMM % "a = Gemm(x, w)  r = Relu(a)  y = Gemm(r, v)"
    values = {"w": weight(192, 64) * np.float32(1e-35), "v": weight(64, 64), "g": weight(192, 64)}
    model, feeds = parse(text, values), [{"x": normal(2, 192, seed=seed)} for seed in range(3)]
    result = quantize(model, feeds)
    assert [node for node, _ in skips(result)] == ["a", "y"]
    assert "its weight is too small for 8 bits" in result.skipped[0].reason
    assert "its input is too small for 8 bits" in result.skipped[1].reason
    assert len(integer_weights(model)) == 1
    close(parse(text, values), model, feeds)


def test_an_output_of_next_to_nothing_gets_no_codes() -> None:
    """A Conv has no integer kernel without codes of its output."""
    text = "g (float[1, 8, 4, 4] x) => (float y) { t = Mul(x, k)  a = Conv(t, w)  y = Neg(a) }"
    values = {"w": weight(8, 8, 1, 1) * np.float32(1e-20), "k": np.array(1e-15, np.float32)}
    result = quantize(parse(text, values), [{"x": normal(1, 8, 4, 4)}])
    assert [node for node, _ in skips(result)] == ["a"]
    assert "its output is too small for 8 bits" in result.skipped[0].reason


def test_a_channel_of_next_to_nothing_does_not_keep_a_layer_float() -> None:
    values = weight(64, 64)
    values[:, 3] *= np.float32(1e-37)
    text = "g (float[2, 64] x) => (float y) { y = MatMul(x, w) }"
    model, feeds = parse(text, {"w": values}), [{"x": normal(2, 64)}]
    assert not quantize(model, feeds).skipped
    close(parse(text, {"w": values}), model, feeds)


def test_a_weight_of_zeros_is_quantized() -> None:
    text = "g (float[2, 64] x) => (float y) { y = MatMul(x, w) }"
    model = parse(text, {"w": np.zeros((64, 64), np.float32)})
    assert not quantize(model, [{"x": normal(2, 64)}]).skipped
    assert len(integer_weights(model)) == 1


# bodies of other nodes


def test_layers_in_bodies_that_are_not_measured_are_only_stored(tmp_path: Path) -> None:
    text = """g (float[3, 4, 16] x) => (float[n, 4, 16] y) {
      s = SplitToSequence<axis = 0>(x)
      t = SequenceMap(s) <body = b (float[1, 4, 16] e) => (float[1, 4, 16] q) { q = MatMul(e, w) }>
      u = ConcatFromSequence<axis = 0>(t)  y = MatMul(u, v) }"""
    values = {"w": weight(16, 16), "v": weight(16, 16, seed=2)}
    model, feeds = parse(text, values), [{"x": normal(3, 4, 16, seed=seed)} for seed in range(3)]
    result = quantize(model, feeds)
    assert skips(result) == [("q", "its input is in the body of a SequenceMap, which is not measured")]
    assert optimized(model, tmp_path)[0]["MatMulIntegerToFloat"] == 1
    close(parse(text, values), model, feeds)
