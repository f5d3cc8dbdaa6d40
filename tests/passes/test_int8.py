from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt.model import Model, load
from onnxopt.numerics.affine import dequantize_weight
from onnxopt.numerics.saturation import Layout, saturates
from onnxopt.passbase import Context, Effect
from onnxopt.passes.int8 import Int8
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.passes.quantizing import (
    Array,
    integer_weights,
    nodes,
    normal,
    optimized,
    parse,
    qparams,
    quantize,
    weight,
)

CONVS = """
g (float[1, 4, 8, 8] x) => (float[1, 6, 8, 8] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  r = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(r, w2, b2)
  y = Neg(c)
}"""
CONV_FEEDS = [{"x": normal(1, 4, 8, 8, seed=seed)} for seed in range(6)]


def convs(scale: float = 1.0) -> Model:
    return parse(
        CONVS,
        {
            "w1": weight(8, 4, 3, 3) * np.float32(scale),
            "b1": normal(8),
            "w2": weight(6, 8, 3, 3, seed=2),
            "b2": normal(6, seed=3),
        },
    )


def error(reference: Model, model: Model, feeds: list[dict[str, Array]]) -> float:
    """Relative squared error over all feeds and outputs."""
    one, other = Session(reference), Session(model)
    noise = signal = 0.0
    for feed in feeds:
        for name, exact in one.run(feed).items():
            noise += float(np.square(exact - other.run(feed)[name]).sum())
            signal += float(np.square(exact).sum())
    return noise / signal


def test_it_is_lossy_and_close() -> None:
    model = convs()
    result = quantize(model, CONV_FEEDS)
    assert Int8().effect is Effect.LOSSY
    assert 0 < error(convs(), model, CONV_FEEDS) < 1e-3
    assert [change.kind for change in result.changes] == ["quantized", "quantized"]
    done = "on integer kernels" if resolve("x86").runs_here else "quantized"
    assert f"2 layers {done} (x86)" in result.notes[0]
    onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize(("target", "activation"), [("x86", np.uint8), ("x86-vnni", np.uint8), ("arm64", np.int8)])
def test_number_formats_follow_the_target(target: str, activation: type) -> None:
    model = convs()
    quantize(model, CONV_FEEDS, target=target)
    for node in nodes(model, "QuantizeLinear"):
        scale, zero = node.inputs[1], node.inputs[2]
        assert scale.shape == () and zero.shape == ()  # noqa: PT018  a shape of [1] blocks fusion
        assert zero.dtype == activation
    weights = integer_weights(model)
    assert len(weights) == 2
    for _, codes, scales, _ in weights:
        assert codes.dtype == np.int8 and codes.min() >= -127  # noqa: PT018
        assert scales.dtype == np.float32
    assert error(convs(), model, CONV_FEEDS) < 1e-3


def test_bias_is_int32_in_the_product_scale() -> None:
    model = convs()
    quantize(model, CONV_FEEDS, correct_bias=False)
    conv = nodes(model, "Conv")[0]
    bias = conv.inputs[2].inputs[0]
    codes, scales, zeros = (tensor.values for tensor in bias.inputs)
    (_, _, weight_scales, _), input_scale = integer_weights(model)[0], qparams(model)["x"][0]
    assert codes.dtype == np.int32 and zeros.dtype == np.int32 and not zeros.any()  # noqa: PT018
    assert np.array_equal(scales, np.float32(input_scale) * weight_scales)
    assert np.allclose(codes * scales.astype(np.float64), convs_bias(), atol=float(scales.max()))


def convs_bias() -> Array:
    return normal(8)


def test_a_bias_too_large_for_int32_enlarges_the_weight_scale() -> None:
    tiny = np.float32(1e-12)
    model = parse(CONVS, {"w1": weight(8, 4, 3, 3) * tiny, "b1": normal(8), "w2": weight(6, 8, 3, 3), "b2": normal(6)})
    same = parse(CONVS, {"w1": weight(8, 4, 3, 3) * tiny, "b1": normal(8), "w2": weight(6, 8, 3, 3), "b2": normal(6)})
    quantize(model, CONV_FEEDS)
    assert error(same, model, CONV_FEEDS) < 1e-3


def test_saturation_is_ruled_out_on_x86_only() -> None:
    rng = np.random.default_rng(0)
    flat: dict[str, Array] = {"w1": rng.uniform(-1, 1, (8, 4, 3, 3)), "w2": rng.uniform(-1, 1, (6, 8, 3, 3))}
    text = CONVS.replace(", b1", "").replace(", b2", "")
    weights = {name: values.astype(np.float32) for name, values in flat.items()}
    found = {}
    for target in ("x86", "x86-vnni"):
        model = parse(text, weights)
        result = quantize(model, CONV_FEEDS, target=target)
        found[target] = [saturates(codes, Layout.CONV) for _, codes, _, _ in integer_weights(model)]
        assert ("largest pair sum" in result.changes[0].detail) is (target == "x86")
    assert found == {"x86": [False, False], "x86-vnni": [True, True]}


def test_depthwise_layers_keep_their_full_range() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 4, 4] y) { a = Conv<group = 8>(x, w)  y = Neg(a) }"""
    model = parse(text, {"w": np.full((8, 1, 3, 3), 0.5, np.float32)})
    quantize(model, [{"x": normal(1, 8, 6, 6)}])
    [(_, codes, _, _)] = integer_weights(model)
    assert (codes == 127).all()


def test_bias_correction_takes_out_the_mean_error() -> None:
    rng = np.random.default_rng(1)
    feeds = [{"x": (5 + rng.standard_normal((1, 4, 8, 8))).astype(np.float32)} for _ in range(8)]
    means = {}
    for correct in (True, False):
        model = convs()
        quantize(model, feeds, correct_bias=correct)
        one, other = Session(convs()), Session(model)
        means[correct] = np.abs(np.mean([one.run(f)["y"] - other.run(f)["y"] for f in feeds], axis=(0, 1, 3, 4))).mean()
    assert means[True] < 0.7 * means[False]


def test_shared_weights_are_quantized_once() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) { a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, w)  y = Neg(b) }"""
    model = parse(text, {"w": weight(8, 8)})
    quantize(model, [{"x": normal(2, 8, seed=s)} for s in range(3)])
    one, other = integer_weights(model)
    assert one[1] is other[1]
    assert sum(c.dtype == np.int8 and c.data.size > 8 for c in model.constants()) == 1
    assert all(c.name != "w" for c in model.constants())


def test_a_weight_that_a_float_node_reads_too_stays_for_it() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y, float[8, 8] z) { a = MatMul(x, w)  y = Neg(a)  z = Neg(w) }"""
    model = parse(text, {"w": weight(8, 8)})
    quantize(model, [{"x": normal(2, 8)}])
    assert any(c.name == "w" and c.dtype == np.float32 for c in model.constants())
    assert np.array_equal(Session(model).run({"x": normal(2, 8)})["z"], -weight(8, 8))


def test_overridable_initializers_are_left_alone() -> None:
    text = """g (float[2, 8] x, float[8, 8] w) => (float[2, 8] y) { a = MatMul(x, w)  y = Neg(a) }"""
    model = parse(text, {"w": weight(8, 8)})
    result = quantize(model, [{"x": normal(2, 8)}])
    assert [skip.reason for skip in result.skipped] == ["its weight is not a constant"]
    assert not result.changes


def test_float_readers_of_a_float_tensor_keep_reading_it() -> None:
    """LayerNormalization -> {MatMul, residual Add}: only the MatMul reads rounded values."""
    text = """g (float[2, 8] x) => (float[2, 8] y) { n = Tanh(x)  a = MatMul(n, w)  y = Add(a, n) }"""
    model = parse(text, {"w": weight(8, 8)})
    quantize(model, [{"x": normal(2, 8)}])
    add = next(node for node in nodes(model, "Add") if node.outputs[0].name == "y")
    assert "n" in [tensor.name for tensor in add.inputs]


def test_every_reader_of_an_integer_layer_reads_its_codes(tmp_path: Path) -> None:
    text = """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y, float[1, 6, 8, 8] z) {
      a = Conv(x, w1)  y = Neg(a)  c = Conv(a, w2)  z = Neg(c) }"""
    model = parse(text, {"w1": weight(8, 4, 1, 1), "w2": weight(6, 8, 1, 1)})
    quantize(model, CONV_FEEDS)
    assert optimized(model, tmp_path)[0]["QLinearConv"] == 2


# what layers take in


def test_scaling_shifting_and_padding_go_into_the_layer(tmp_path: Path) -> None:
    text = """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {
      p = Pad(x, amounts)  a = Conv(p, w, b)
      m = Mul(a, two)  s = Sub(m, v)  d = Div(s, v)  q = Add(one, d)  y = Neg(q) }"""
    values: dict[str, Array] = {
        "w": weight(8, 4, 3, 3),
        "b": normal(8),
        "amounts": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "two": np.array(2, np.float32),
        "one": np.array([1], np.float32),
        "v": np.abs(normal(8, 1, 1)) + np.float32(0.5),
    }
    model = parse(text, values)
    result = quantize(model, CONV_FEEDS)
    ops, _ = optimized(model, tmp_path)
    assert (ops["QLinearConv"], ops["Pad"], ops["Mul"], ops["Add"]) == (1, 0, 0, 0)
    assert error(parse(text, values), model, CONV_FEEDS) < 1e-3
    assert [change.where for change in result.changes if change.kind == "absorbed"] == ["p", "m", "s", "d", "q"]


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        ("m = Mul(a, x)", {}),  # no constant
        ("m = Mul(a, v)", {"v": normal(1, 8, 8, 8)}),  # one number per element
        ("m = Sub(v, a)", {"v": np.array(1, np.float32)}),  # turns the sign
        ("k = Neg(a)  l = Mul(a, v)  m = Add(k, l)", {"v": np.array(2, np.float32)}),  # another reader
    ],
)
def test_what_is_not_a_scale_per_channel_stays(body: str, extra: dict[str, Array]) -> None:
    text = f"g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {{ a = Conv(x, w)  {body}  y = Neg(m) }}"
    model = parse(text, {"w": weight(8, 8, 1, 1), **extra})
    feeds = [{"x": normal(1, 8, 8, 8)}]
    before = model.node_count()
    result = quantize(model, feeds)
    assert not [change for change in result.changes if change.kind == "absorbed"]
    assert model.node_count() == before + 6
    assert error(parse(text, {"w": weight(8, 8, 1, 1), **extra}), model, feeds) < 1e-3


@pytest.mark.parametrize(
    "pad",
    [
        "Pad(x, amounts, one)",
        'Pad<mode = "reflect">(x, amounts)',
        "Pad(x, channels)",
        "Pad(x, negative)",
    ],
)
def test_other_padding_stays_in_front(pad: str) -> None:
    text = f"g (float[1, 4, 8, 8] x) => (float[1, 8, h, w] y) {{ p = {pad}  a = Conv(p, w)  y = Neg(a) }}"
    channels = 6 if "channels" in pad else 4
    values: dict[str, Array] = {
        "w": weight(8, channels, 1, 1),
        "amounts": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "channels": np.array([0, 1, 0, 0, 0, 1, 0, 0], np.int64),
        "negative": np.array([0, 0, -1, 0, 0, 0, 0, 0], np.int64),
        "one": np.array(1, np.float32),
    }
    used = {name: array for name, array in values.items() if f", {name}" in text}
    model = parse(text, used)
    quantize(model, CONV_FEEDS)
    assert len(nodes(model, "Pad")) == 1
    assert error(parse(text, used), model, CONV_FEEDS) < 1e-3


CONV_KINDS = {
    "1d": ("", (1, 8, 20), (16, 8, 3)),
    "3d": ("", (1, 4, 5, 6, 7), (8, 4, 2, 3, 3)),
    "grouped": ("group = 4", (1, 16, 8, 8), (8, 4, 3, 3)),
    "depthwise": ("group = 16", (1, 16, 8, 8), (16, 1, 3, 3)),
    "multiplied": ("group = 8", (1, 8, 8, 8), (16, 1, 3, 3)),
    "strided": ("strides = [2, 2], pads = [1, 0, 0, 1]", (1, 8, 9, 9), (8, 8, 3, 3)),
    "dilated": ("dilations = [2, 2]", (1, 8, 9, 9), (8, 8, 3, 3)),
    "same": ('auto_pad = "SAME_UPPER"', (1, 8, 9, 9), (8, 8, 3, 3)),
    "odd": ("", (2, 3, 9, 9), (5, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", CONV_KINDS)
@pytest.mark.parametrize("target", ["x86", "arm64"])
def test_convolutions_of_all_kinds(kind: str, target: str, tmp_path: Path) -> None:
    attributes, shape, kernel = CONV_KINDS[kind]
    dims = ", ".join(map(str, shape))
    listed = f"<{attributes}>" if attributes else ""
    text = f"g (float[{dims}] x) => (float y) {{ a = Conv{listed}(x, w, b)  y = Neg(a) }}"
    weights = {"w": weight(*kernel), "b": normal(kernel[0])}
    model = parse(text, weights)
    feeds = [{"x": normal(*shape, seed=seed)} for seed in range(4)]
    quantize(model, feeds, target=target)
    assert optimized(model, tmp_path)[0]["QLinearConv"] == 1
    assert error(parse(text, weights), model, feeds) < 1e-3
    step = qparams(model)["a"][0]
    for feed in feeds:
        fast, slow = Session(model).run(feed)["y"], Session(model, optimize=False).run(feed)["y"]
        assert np.abs(fast - slow).max() <= 1.01 * step


# what stays float, and why


def reasons(model: Model, feeds: list[dict[str, Array]], **options: Any) -> list[str]:
    return [skip.reason for skip in quantize(model, feeds, **options).skipped]


def test_layers_before_a_logarithm_stay_float() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y) {
      a = MatMul(x, w)  p = Mul(a, a)  l = Log(p)  b = MatMul(l, w)  e = Exp(b)  y = Log(e) }"""
    model = parse(text, {"w": weight(8, 8)})
    assert reasons(model, [{"x": normal(2, 8)}]) == ["its output goes into a logarithm, which needs relative accuracy"]
    assert len(integer_weights(model)) == 1


def test_outliers_keep_a_layer_float() -> None:
    x = normal(2000, 8)
    x[0, 0] = 10000
    text = "g (float[2000, 8] x) => (float[2000, 8] y) { y = MatMul(x, w) }"
    found = reasons(parse(text, {"w": weight(8, 8)}), [{"x": x}])
    assert "outliers of x" in found[0]
    assert reasons(parse(text, {"w": weight(8, 8)}), [{"x": x}], min_sqnr=-100.0) == []


def test_small_layers_do_not_pay() -> None:
    text = "g (float[1, 8] x) => (float[1, 8] y) { y = MatMul(x, w) }"
    found = reasons(parse(text, {"w": weight(8, 8)}), [{"x": normal(1, 8)}], all_layers=False)
    assert found == ["converting its borders would cost more than QLinearMatMul saves"]
    wide = "g (float[64, 512] x) => (float[64, 512] y) { y = MatMul(x, w) }"
    assert reasons(parse(wide, {"w": weight(512, 512)}), [{"x": normal(64, 512)}], all_layers=False) == []


def test_a_losing_layer_between_integer_layers_is_quantized_all_the_same() -> None:
    """The runtime would quantize its weight by itself, with a single scale."""
    text = """g (float[1, 64, 32, 32] x) => (float[1, 64, 28, 28] y) {
      a = Conv(x, w1)  d = Conv<group = 64>(a, w2)  c = Conv(d, w3)  n = Neg(d)  y = Neg(c) }"""
    weights = {"w1": weight(64, 64, 3, 3), "w2": weight(64, 1, 3, 3), "w3": weight(64, 64, 1, 1)}
    model = parse(text, weights)
    quantize(model, [{"x": normal(1, 64, 32, 32)}], all_layers=False)
    assert len(integer_weights(model)) == 3


def test_a_transposed_convolution_between_integer_layers_keeps_one_scale_a_channel(tmp_path: Path) -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, n, m] y) {
      a = Conv(x, w1)  t = ConvTranspose(a, w2)  c = Conv(t, w3)  y = Neg(c) }"""
    spread = weight(8, 8, 2, 2) * (10.0 ** np.linspace(-3, 0, 8)).astype(np.float32).reshape(1, 8, 1, 1)
    weights = {"w1": weight(8, 8, 1, 1), "w2": spread, "w3": weight(8, 8, 1, 1)}
    for storage in (True, False):
        model = parse(text, weights)
        quantize(model, [{"x": normal(1, 8, 6, 6)}], storage=storage)
        source = nodes(model, "ConvTranspose")[0].inputs[1].inputs[0]
        assert source.op == "DequantizeLinear"
        restored = dequantize_weight(source.inputs[0].values, source.inputs[1].values, 1)
        assert (np.abs(restored - spread).max(axis=(0, 2, 3)) <= np.abs(spread).max(axis=(0, 2, 3)) / 253).all()


def test_a_refused_layer_between_integer_layers_cannot_saturate() -> None:
    """Its bias is computed, so it is no layer to us; the runtime may still find an integer kernel for it."""
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
      a = Conv(x, w)  v = Neg(b)  m = Conv(a, w2, v)  c = Conv(m, w)  y = Neg(c) }"""
    flat = np.random.default_rng(0).uniform(-1, 1, (8, 8, 1, 1)).astype(np.float32)
    model = parse(text, {"w": weight(8, 8, 1, 1), "w2": flat, "b": normal(8)})
    quantize(model, [{"x": normal(1, 8, 6, 6)}])
    assert len(integer_weights(model)) == 3
    assert not any(saturates(codes, Layout.CONV) for _, codes, _, _ in integer_weights(model))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_weights_are_left_alone(bad: float) -> None:
    values = weight(8, 8)
    values[3, 3] = bad
    model = parse("g (float[2, 8] x) => (float[2, 8] y) { y = MatMul(x, w) }", {"w": values})
    assert reasons(model, [{"x": normal(2, 8)}]) == ["its weight holds NaN or infinity"]
    assert nodes(model, "Cast") == []


def test_old_operator_sets_are_refused_layer_by_layer() -> None:
    model = parse("g (float[2, 8] x) => (float[2, 8] y) { y = MatMul(x, w) }", {"w": weight(8, 8)}, opset=12)
    assert "operator set 12" in reasons(model, [{"x": normal(2, 8)}])[0]


# bodies

BRANCHES = """
g (float[2, 8] x, bool which) => (float[2, 8] y) {
  y = If (which) <
    then_branch = t () => (float[2, 8] tt) { a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, w)  tt = Neg(b) },
    else_branch = e () => (float[2, 8] ee) { d = Neg(x)  c = MatMul(d, v)  ee = Neg(c) }>
}"""


def test_branches_are_quantized_where_samples_went(tmp_path: Path) -> None:
    weights = {"w": weight(8, 8), "v": weight(8, 8, seed=9)}
    model = parse(BRANCHES, weights)
    feeds = [{"x": normal(2, 8, seed=s), "which": np.array(True)} for s in range(3)]
    result = quantize(model, feeds)
    ops, _ = optimized(model, tmp_path)
    assert ops["QLinearMatMul"] + ops["MatMulIntegerToFloat"] == 2
    assert [skip.reason for skip in result.skipped] == ["no sample reached it"]
    assert error(parse(BRANCHES, weights), model, feeds) < 1e-3
    other = {"x": normal(2, 8), "which": np.array(False)}
    assert np.allclose(Session(model).run(other)["y"], Session(parse(BRANCHES, weights)).run(other)["y"], atol=1e-5)


def test_loop_bodies_are_quantized() -> None:
    text = """g (float[2, 8] x, int64 trips) => (float[2, 8] y) {
      yes = Constant<value: tensor = bool {1}>()
      y = Loop (trips, yes, x) < body = b (int64 i, bool go, float[2, 8] s) => (bool again, float[2, 8] next) {
        again = Identity(go)  a = MatMul(s, w)  next = Tanh(a) }> }"""
    model, same = parse(text, {"w": weight(8, 8)}), parse(text, {"w": weight(8, 8)})
    feeds = [{"x": normal(2, 8, seed=s), "trips": np.array(3, np.int64)} for s in range(3)]
    quantize(model, feeds)
    assert len(integer_weights(model)) == 1
    assert error(same, model, feeds) < 1e-2


def test_layers_in_a_branch_read_what_layers_outside_made(tmp_path: Path) -> None:
    text = """g (float[1, 4, 8, 8] x, bool which) => (float[1, 8, 8, 8] y) {
      a = Conv(x, w)
      y = If (which) <
        then_branch = t () => (float[1, 8, 8, 8] tt) { b = Conv(a, v)  tt = Neg(b) },
        else_branch = e () => (float[1, 8, 8, 8] ee) { ee = Neg(a) }> }"""
    weights = {"w": weight(8, 4, 1, 1), "v": weight(8, 8, 1, 1)}
    model = parse(text, weights)
    feeds = [{**feed, "which": np.array(i % 2 == 0)} for i, feed in enumerate(CONV_FEEDS)]
    quantize(model, feeds)
    ops, _ = optimized(model, tmp_path)
    assert (ops["QLinearConv"], ops["Conv"]) == (2, 0)
    assert error(parse(text, weights), model, feeds) < 1e-3


def test_an_activation_inside_a_branch_is_not_taken_into_a_layer_outside(tmp_path: Path) -> None:
    text = """g (float[1, 4, 8, 8] x, bool which) => (float[1, 8, 8, 8] y) {
      a = Conv(x, w)
      y = If (which) <
        then_branch = t () => (float[1, 8, 8, 8] tt) { r = Relu(a)  b = Conv(r, v)  tt = Neg(b) },
        else_branch = e () => (float[1, 8, 8, 8] ee) { ee = Neg(x2) }> }"""
    text = text.replace("bool which", "float[1, 8, 8, 8] x2, bool which")
    weights = {"w": weight(8, 4, 1, 1), "v": weight(8, 8, 1, 1)}
    model = parse(text, weights)
    other = {"x2": normal(1, 8, 8, 8)}
    feeds = [{**feed, **other, "which": np.array(i % 2 == 0)} for i, feed in enumerate(CONV_FEEDS)]
    quantize(model, feeds)
    assert optimized(model, tmp_path)[0]["QLinearConv"] == 2
    assert error(parse(text, weights), model, feeds) < 1e-3


def test_a_branch_may_hand_out_what_an_integer_layer_makes(tmp_path: Path) -> None:
    text = """g (float[1, 4, 8, 8] x, bool which) => (float[1, 8, 8, 8] y) {
      y = If (which) <
        then_branch = t () => (float[1, 8, 8, 8] tt) { tt = Conv(x, w) },
        else_branch = e () => (float[1, 8, 8, 8] ee) { a = Conv(x, w)  ee = Relu(a) }> }"""
    weights = {"w": weight(8, 4, 1, 1)}
    model = parse(text, weights)
    feeds = [{**feed, "which": np.array(i % 2 == 0)} for i, feed in enumerate(CONV_FEEDS)]
    quantize(model, feeds)
    assert optimized(model, tmp_path)[0]["QLinearConv"] == 2
    assert error(parse(text, weights), model, feeds) < 1e-3


# storage


def test_recurrent_weights_are_stored_and_run_as_before(tmp_path: Path) -> None:
    text = """g (float[7, 1, 16] x) => (float[7, 1, 1, 32] y, float[1, 1, 32] h, float[1, 1, 32] c) {
      y, h, c = LSTM<hidden_size = 32>(x, w, r, b) }"""
    weights = {"w": normal(1, 128, 16) / 4, "r": normal(1, 128, 32) / 6, "b": normal(1, 256)}
    model = parse(text, weights)
    feeds = [{"x": normal(7, 1, 16)}]
    result = quantize(model, feeds)
    assert {change.kind for change in result.changes} == {"stored"}
    assert error(parse(text, weights), model, feeds) < 1e-3
    ops, _ = optimized(model, tmp_path)
    assert (ops["Cast"], ops["Mul"], ops["LSTM"]) == (0, 0, 1)
    assert model.nbytes() < 0.45 * parse(text, weights).nbytes()


def test_tables_are_gathered_as_int8_rows(tmp_path: Path) -> None:
    text = "g (int64[n, t] ids) => (float[n, t, 64] y) { y = Gather(table, ids) }"
    table = normal(1000, 64) * (10.0 ** np.linspace(-2, 2, 1000)).astype(np.float32)[:, None]
    model = parse(text, {"table": table})
    quantize(model, [{"ids": np.array([[0, 999, 5]])}])
    ops, _ = optimized(model, tmp_path)
    assert ops["Gather"] == 2
    ids = np.arange(1000).reshape(2, 500)
    got = Session(model).run({"ids": ids})["y"].reshape(1000, 64)
    assert (np.abs(got - table) <= np.abs(table).max(axis=1, keepdims=True) / 253).all()
    assert model.nbytes() < 0.3 * table.nbytes


def test_small_weights_are_not_worth_their_nodes() -> None:
    model = parse("g (float[2, 4] x) => (float[2, 4] y) { y = MatMul(x, w) }", {"w": weight(4, 4)})
    before = model.digest()
    result = quantize(model, None)
    assert model.digest() == before
    assert not result.changes


def test_without_data_weights_are_only_stored(tmp_path: Path) -> None:
    model = convs()
    result = quantize(model, None)
    assert {change.kind for change in result.changes} == {"stored"}
    assert any("no real inputs" in note for note in result.notes)
    assert optimized(model, tmp_path)[0]["QuantizeLinear"] == 0
    assert error(convs(), model, CONV_FEEDS) < 1e-3


def test_storage_can_be_turned_off() -> None:
    model = convs()
    before = model.digest()
    assert not quantize(model, None, storage=False).changes
    assert model.digest() == before


# the pass as a whole


def test_same_input_same_bytes() -> None:
    one, other = convs(), convs()
    quantize(one, CONV_FEEDS)
    quantize(other, list(reversed(CONV_FEEDS)), correct_bias=True)
    again = convs()
    quantize(again, CONV_FEEDS)
    assert one.to_proto().SerializeToString() == again.to_proto().SerializeToString()
    assert qparams(one) == qparams(other)


def test_a_second_run_changes_nothing() -> None:
    model = convs()
    quantize(model, CONV_FEEDS)
    before = model.digest()
    result = quantize(load(model.to_proto()), CONV_FEEDS)
    assert not result.changes
    quantize(model, CONV_FEEDS)
    assert model.digest() == before


def test_names_that_are_taken_stay_unique() -> None:
    text = CONVS.replace("a = Conv", "x_codes = Conv").replace("Relu(a)", "Relu(x_codes)")
    model = parse(text, {"w1": weight(8, 4, 3, 3), "b1": normal(8), "w2": weight(6, 8, 3, 3), "b2": normal(6)})
    quantize(model, CONV_FEEDS)
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_statistics_of_a_constant_input() -> None:
    model = convs()
    zeros = [{"x": np.zeros((1, 4, 8, 8), np.float32)}]
    quantize(model, zeros)
    assert error(convs(), model, zeros) < 1e-3


def test_time_is_linear_in_nodes() -> None:
    body = "".join(f"t{i + 1} = Relu(t{i}) " for i in range(1499))
    layers = "".join(f"m{i + 1} = MatMul(m{i}, w) n{i} = Tanh(m{i}) " for i in range(750))
    text = f"g (float[1, 4] t0, float[1, 4] m0) => (float[1, 4] t1499, float[1, 4] n749) {{ {body} {layers} }}"
    model = parse(text, {"w": np.eye(4, dtype=np.float32)})
    started = time.perf_counter()
    quantize(model, [{"t0": normal(1, 4), "m0": normal(1, 4)} for _ in range(4)])
    assert time.perf_counter() - started < 10
    assert len(integer_weights(model)) == 750


def test_options_are_parsed() -> None:
    found = Int8.parse({"storage": "false", "min_sqnr": "20"})
    assert found == Int8(storage=False, min_sqnr=20.0)


def test_nothing_to_do_is_said() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    result = Int8().run(model, Context(target=resolve("x86")))
    assert not result.changes
    assert not result.skipped
