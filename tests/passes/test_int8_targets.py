"""What each target makes of the int8 pass: types, zero-points, scales, operators, and that the result is right here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import UsageError
from onnxopt.model import Constant, Model
from onnxopt.numerics.affine import sqnr_db
from onnxopt.numerics.saturation import Layout, kernel_order, saturates, saturating_product
from onnxopt.passes.int8 import Int8
from onnxopt.quantization.layers import layout_of
from onnxopt.quantization.static import UNSIGNED_TIME, unsigned_weights
from onnxopt.runtime import Session
from onnxopt.target import TARGETS
from tests.passes.quantizing import Array, integer_weights, nodes, normal, optimized, parse, qparams, quantize, weight

NAMES = sorted(TARGETS)
HERE = [name for name in NAMES if TARGETS[name].runs_here]
F32 = np.float32

# Conv, depthwise and grouped Conv, Relu, Clip, residual Add, Concat, pooling, Gemm, MatMul
NETWORK = """
g (float[n, 8, 8, 8] x) => (float[n, 5] y, float[n, 4, 8, 8] heat) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  r = Relu(a)
  d = Conv<pads = [1, 1, 1, 1], group = 16>(r, w2, b2)
  k = Clip(d, low, high)
  e = Conv<group = 2>(k, w3)
  s = Add(e, r)
  j = Concat<axis = 1>(s, k)
  heat = Conv(j, w6)
  m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(j)
  p = GlobalAveragePool(m)
  f = Flatten(p)
  h = Gemm<transB = 1>(f, w4, b4)
  u = Relu(h)
  v = MatMul(u, w5)
  t = Relu(v)
  y = MatMul(t, w7)
}"""
WEIGHTS: dict[str, Array] = {
    "w1": weight(16, 8, 3, 3),
    "b1": normal(16, seed=11),
    "w2": weight(16, 1, 3, 3, seed=2),
    "b2": normal(16, seed=12),
    "w3": weight(16, 8, 1, 1, seed=3),
    "w4": weight(12, 32, seed=4),
    "b4": normal(12, seed=14),
    "w5": weight(12, 7, seed=5),
    "w6": weight(4, 32, 1, 1, seed=6),
    "w7": weight(7, 5, seed=7),
    "low": np.array(0, F32),
    "high": np.array(6, F32),
}
FEEDS = [{"x": normal(2, 8, 8, 8, seed=seed)} for seed in range(6)]


def network() -> Model:
    return parse(NETWORK, WEIGHTS)


def decibels(reference: Model, model: Model, feeds: list[dict[str, Array]], optimize: bool = True) -> list[float]:
    """SQNR of each output over all feeds."""
    one, other = Session(reference), Session(model, optimize=optimize)
    pairs = [(one.run(feed), other.run(feed)) for feed in feeds]
    return [
        sqnr_db(np.stack([exact[name] for exact, _ in pairs]), np.stack([found[name] for _, found in pairs]))
        for name in pairs[0][0]
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_every_target_gives_a_model_that_is_right_in_onnxruntime(name: str, opset: int) -> None:
    model = parse(NETWORK, WEIGHTS, opset)
    result = quantize(model, FEEDS, target=name)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    for optimize in (True, False):
        assert min(decibels(parse(NETWORK, WEIGHTS, opset), model, FEEDS, optimize)) > 25
    assert sum(change.kind == "quantized" for change in result.changes) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_bodies_zero_weights_constant_tensors_and_shared_weights(name: str) -> None:
    text = """
    g (float[n, 8, 4, 4] x, bool c) => (float[n, 8, 4, 4] y) {
      a = Conv(x, w)  r = Relu(a)
      z = If (c) <
        then_branch = g1 () => (float[n, 8, 4, 4] o) { b = Conv(r, w)  o = Add(b, one) },
        else_branch = g2 () => (float[n, 8, 4, 4] o) { b = Conv(r, zeros)  m = Mul(b, two)  o = Conv(m, w2) } >
      y = Tanh(z)
    }"""
    constants = {
        "w": weight(8, 8, 1, 1),
        "w2": weight(8, 8, 1, 1, seed=2),
        "zeros": np.zeros((8, 8, 1, 1), F32),
        "one": np.array(1, F32),
        "two": np.array(2, F32),
    }
    feeds = [{"x": normal(2, 8, 4, 4, seed=seed), "c": np.array(seed % 2 == 0)} for seed in range(6)]
    model = parse(text, constants)
    quantize(model, feeds, target=name)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    for optimize in (True, False):
        assert min(decibels(parse(text, constants), model, feeds, optimize)) > 30


@pytest.mark.parametrize("name", NAMES)
def test_types_zero_points_and_scales_are_the_target_s(name: str) -> None:
    model, target = network(), TARGETS[name]
    quantize(model, FEEDS, target=name, weights="s8")
    for node in nodes(model, "QuantizeLinear"):
        scale, zero = node.inputs[1], node.inputs[2]
        assert zero.dtype == target.activation
        assert scale.shape == () == zero.shape
        assert not target.symmetric or zero.values.item() == 0
    found = integer_weights_of_any_form(model)
    assert {node.op for node, _, _ in found} == {"Conv", "Gemm", "MatMul"}
    for node, codes, scales in found:
        assert codes.dtype == np.int8
        assert scales.shape == ((codes.shape[layout_of(node).axis],) if node.op in target.per_channel else ())
        assert np.abs(codes.astype(int)).max() <= 127


def integer_weights_of_any_form(model: Model) -> list[tuple[Any, Array, Array]]:
    """(layer, codes, scales) of every layer whose weight comes from a DequantizeLinear, per channel or not."""
    found = []
    for op in ("Conv", "Gemm", "MatMul"):
        for node in nodes(model, op):
            source = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
            if source is not None and source.op == "DequantizeLinear" and isinstance(source.inputs[0], Constant):
                assert source.inputs[2].shape == source.inputs[1].shape
                found.append((node, source.inputs[0].values, source.inputs[1].values))
    return found


@pytest.mark.parametrize("name", HERE)
def test_targets_of_this_machine_run_on_integer_kernels(name: str, tmp_path: Path) -> None:
    model = network()
    result = quantize(model, FEEDS, target=name)
    kernels, _ = optimized(model, tmp_path)
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearAdd"] == kernels["QLinearConcat"] == kernels["QGemm"] == 1
    assert "layers on integer kernels" in result.notes[0]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(HERE)))
def test_other_runtimes_are_not_spoken_for(name: str) -> None:
    result = quantize(network(), FEEDS, target=name)
    said = [*result.notes, *(change.detail for change in result.changes)]
    assert f"layers quantized ({name})" in result.notes[0]
    assert not [text for text in said if "kernel" in text or "QLinear" in text or "QGemm" in text]


@pytest.mark.parametrize("name", NAMES)
def test_costs_that_nobody_measured_are_said_to_be_so(name: str) -> None:
    notes = quantize(network(), FEEDS, target=name).notes
    assert any("not measurements" in note for note in notes) is not TARGETS[name].measured


def test_relu_and_clip_stay_right_before_symmetric_codes() -> None:
    model = network()
    quantize(model, FEEDS, target="tensorrt")
    assert {node.inputs[0].inputs[0].op for node in nodes(model, "QuantizeLinear") if node.inputs[0].inputs} >= {
        "Relu",
        "Clip",
    }
    scale, zero = qparams(model)["r"]
    largest = max(float(Session(network_with("r")).run(feed)["r"].max()) for feed in FEEDS)
    assert zero == 0
    assert scale == pytest.approx(largest / 127, rel=1e-5)


def network_with(tensor: str) -> Model:
    """The network with one more output."""
    return parse(NETWORK.replace("=> (", f"=> (float[n, 16, 8, 8] {tensor}, "), WEIGHTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_at_an_output_is_quantized_where_it_may_write_float(name: str) -> None:
    model = network()
    result = quantize(model, FEEDS, target=name)
    [heat] = [node for node in nodes(model, "Conv") if node.outputs[0].name == "heat"]
    quantized = heat.inputs[1].inputs[0].op == "DequantizeLinear" and heat.inputs[0].inputs[0].op == "DequantizeLinear"
    assert quantized is ("Conv" in TARGETS[name].float_outputs)
    assert any("output of the model" in skip.reason for skip in result.skipped) is not quantized


@pytest.mark.parametrize(("name", "coded"), [("x86", True), ("tensorrt", False), ("openvino", False)])
def test_codes_nobody_takes_are_not_written_where_float_may_leave(name: str, coded: bool) -> None:
    text = "g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) { a = Conv(x, w)  y = Tanh(a) }"
    model = parse(text, {"w": weight(8, 8, 1, 1)})
    quantize(model, [{"x": normal(1, 8, 6, 6)}], target=name)
    assert ("a" in qparams(model)) is coded
    assert len(nodes(model, "QuantizeLinear")) == 1 + coded


@pytest.mark.parametrize("name", NAMES)
def test_operators_without_codes_stay_float(name: str) -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
      a = Conv(x, w)  b = LeakyRelu<alpha = 0.1>(a)  c = Conv(b, w2)  y = Tanh(c) }"""
    model = parse(text, {"w": weight(8, 8, 1, 1), "w2": weight(8, 8, 1, 1, seed=2)})
    quantize(model, [{"x": normal(1, 8, 6, 6)}], target=name)
    leaky = nodes(model, "LeakyRelu")[0]
    source = leaky.inputs[0].inputs[0].op
    assert source == ("Conv" if name == "tensorrt" else "DequantizeLinear")


@pytest.mark.parametrize("name", NAMES)
def test_weights_alone_are_stored_as_the_target_reads_them(name: str) -> None:
    text = "g (float[1, 64] x) => (float[1, 64] y) { a = MatMul(x, w)  y = Tanh(a) }"
    model = parse(text, {"w": weight(64, 64)})
    quantize(model, None, target=name)
    assert len(nodes(model, "DequantizeLinear")) == (0 if TARGETS[name].folds else 1)
    assert len(nodes(model, "Mul")) == (1 if TARGETS[name].folds else 0)
    assert min(decibels(parse(text, {"w": weight(64, 64)}), model, [{"x": normal(1, 64)}])) > 35


# --- saturation -------------------------------------------------------------------------------------------------------

FLAT = """
g (float[2, 6, 5, 5] x) => (float[2, 4, 5, 5] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1)
  b = Conv<group = 2>(a, w2)
  y = Tanh(b)
}"""


def flat(seed: int, low: float = -1.0) -> dict[str, Array]:
    """Weights of evenly spread values: the worst case of pairs."""
    rng = np.random.default_rng(seed)
    return {"w1": rng.uniform(low, 1, (8, 6, 3, 3)).astype(F32), "w2": rng.uniform(low, 1, (4, 4, 1, 1)).astype(F32)}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    low=st.sampled_from([-1.0, 0.0, 0.9]),
    name=st.sampled_from(["x86", "openvino"]),
    choice=st.sampled_from(["auto", "s8", "u8"]),
)
def test_no_input_saturates_where_sums_are_narrow(seed: int, low: float, name: str, choice: str) -> None:
    model = parse(FLAT, flat(seed, low))
    quantize(model, [{"x": normal(2, 6, 5, 5, seed=seed)}], target=name, weights=choice)
    found = integer_weights(model)
    assert len(found) == 2
    rng = np.random.default_rng(seed)
    for _, codes, _, _ in found:
        if codes.dtype == np.uint8:
            continue  # that kernel adds in 32 bits
        ordered = np.asarray(kernel_order(codes, Layout.CONV), np.int8)
        extreme = rng.choice(np.array([0, 1, 254, 255], np.uint8), (16, ordered.shape[1]))
        exact = extreme.astype(np.int64) @ ordered.T.astype(np.int64)
        assert np.array_equal(saturating_product(extreme, ordered), exact)
        assert not saturates(codes, Layout.CONV)


def test_the_whole_range_would_saturate() -> None:
    model = parse(FLAT, flat(0))
    quantize(model, [{"x": normal(2, 6, 5, 5)}], target="x86-vnni")
    assert all(saturates(codes, Layout.CONV) for _, codes, _, _ in integer_weights(model))


# layer -> (network, its weights, the kernels that run it)
UNSIGNED: dict[str, tuple[str, dict[str, Array], str]] = {
    "Conv": ("y = Tanh(c) c = Conv<pads = [1, 1, 1, 1]>(x, w, b)", {"w": weight(8, 6, 3, 3)}, "QLinearConv"),
    "grouped": ("y = Tanh(c) c = Conv<group = 2>(x, w, b)", {"w": weight(8, 3, 3, 3)}, "QLinearConv"),
    "strided": ("y = Tanh(c) c = Conv<strides = [2, 2]>(x, w, b)", {"w": weight(8, 6, 3, 3)}, "QLinearConv"),
    "MatMul": ("y = Tanh(c) c = MatMul(x, w)", {"w": weight(5, 8)}, "MatMulIntegerToFloat"),
    "Gemm": ("f = Flatten(x) c = Gemm(f, w, b) y = Tanh(c)", {"w": weight(150, 8)}, "QGemm"),
    "transposed": ("f = Flatten(x) c = Gemm<transB = 1>(f, w, b) y = Tanh(c)", {"w": weight(8, 150)}, "QGemm"),
}


@pytest.mark.parametrize("case", sorted(UNSIGNED))
def test_unsigned_weights_run_on_integer_kernels_and_cost_no_accuracy(case: str, tmp_path: Path) -> None:
    body, constants, kernel = UNSIGNED[case]
    lines = body.replace("y = Tanh(c) ", "") + (" y = Tanh(c)" if body.startswith("y") else "")
    shape = "1, 6, 5, 5"
    text = f"g (float[{shape}] x) => (float[p, q] y) {{ {lines} }}"
    rank = 2 if "Flatten" in body else 4
    text = text.replace("[p, q]", "[p, q]" if rank == 2 else "[p, q, r, s]")
    given = constants | ({"b": normal(8)} if "b)" in body else {})
    feeds = [{"x": normal(1, 6, 5, 5, seed=seed)} for seed in range(4)]
    results = {}
    for choice in ("s8", "u8"):
        model = parse(text, given)
        result = quantize(model, feeds, target="x86", weights=choice)
        [(_, codes, scales, _)] = integer_weights(model)
        assert codes.dtype == (np.uint8 if choice == "u8" else np.int8)
        assert ("unsigned weights" in result.changes[0].detail) is (choice == "u8")
        assert scales.dtype == F32
        found, _ = optimized(model, tmp_path)
        assert found[kernel] == 1
        step = max(scale for scale, _ in qparams(model).values())
        runs = [Session(model, optimize=optimize).run(feeds[0])["y"] for optimize in (True, False)]
        assert np.abs(runs[0] - runs[1]).max() <= step
        [results[choice]] = decibels(parse(text, given), model, feeds)
    assert results["u8"] > results["s8"] - 1.5


def test_depthwise_layers_stay_signed() -> None:
    text = "g (float[1, 8, 6, 6] x) => (float[1, 8, 4, 4] y) { a = Conv<group = 8>(x, w)  y = Neg(a) }"
    model = parse(text, {"w": weight(8, 1, 3, 3)})
    quantize(model, [{"x": normal(1, 8, 6, 6)}], weights="u8")
    [(_, codes, _, _)] = integer_weights(model)
    assert codes.dtype == np.int8


@pytest.mark.parametrize("name", ["arm64", "tensorrt", "openvino", "qnn"])
def test_unsigned_weights_only_where_there_is_a_kernel(name: str) -> None:
    model = network()
    result = quantize(model, FEEDS, target=name, weights="u8")
    assert f"{name} has no kernels for unsigned weights: signed ones were written" in result.notes
    assert {codes.dtype for _, codes, _ in integer_weights_of_any_form(model)} == {np.dtype(np.int8)}


def test_auto_takes_unsigned_weights_for_small_layers_that_lose_much() -> None:
    text = """g (float[1, 16, 24, 24] x) => (float[1, 8] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, w1)
      b = Conv<pads = [1, 1, 1, 1]>(a, w2)
      p = GlobalAveragePool(b)  f = Flatten(p)
      g = Gemm(f, w3, b3)  y = Tanh(g) }"""
    rng = np.random.default_rng(0)
    constants = {
        "w1": weight(32, 16, 3, 3),
        "w2": rng.uniform(-1, 1, (32, 32, 3, 3)).astype(F32),
        "w3": rng.uniform(-1, 1, (32, 8)).astype(F32),
        "b3": normal(8),
    }
    feeds = [{"x": normal(1, 16, 24, 24, seed=seed)} for seed in range(3)]
    for name, small in (("x86", np.uint8), ("x86-vnni", np.int8)):
        model = parse(text, constants)
        quantize(model, feeds, target=name)
        kinds = {node.outputs[0].name: codes.dtype for node, codes, _, _ in integer_weights(model)}
        # the Gemm is next to no time, the second Conv two thirds of it, and the first loses too little
        assert kinds == {"a": np.int8, "b": np.int8, "g": small}


def test_the_rule_of_unsigned_weights() -> None:
    x86 = TARGETS["x86"]
    whole = 1e9
    slower = x86.costs.unsigned_mac / x86.costs.integer_mac - 1
    fits = whole * UNSIGNED_TIME / slower
    gains: dict[tuple[int, ...], tuple[float, float]] = {
        (0,): (1.0, whole),
        (1,): (6.0, 0.6 * fits),
        (2,): (5.0, 0.6 * fits),
        (3,): (float("nan"), 10.0),
    }
    assert unsigned_weights(gains, x86, "auto") == [(1,)]
    assert unsigned_weights(gains, x86, "s8") == []
    assert unsigned_weights(gains, x86, "u8") == [(0,), (1,), (2,)]
    assert unsigned_weights(gains, TARGETS["arm64"], "u8") == []


def test_an_unknown_type_of_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown type of weights 's4'"):
        Int8(weights="s4")
