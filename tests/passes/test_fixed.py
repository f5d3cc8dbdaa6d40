"""Fixed-point numbers: every scale is a power of two, and integer kernels give the bits that float gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxopt
from onnxopt.calibration import collect
from onnxopt.errors import UsageError
from onnxopt.model import Constant, Model
from onnxopt.numerics.affine import sqnr_db
from onnxopt.passbase import Context, Pass, PassResult
from onnxopt.passes.fixed import Fixed
from onnxopt.runtime import Session
from onnxopt.target import TARGETS, resolve
from tests.passes.quantizing import (
    Array,
    integer_weights,
    nodes,
    normal,
    optimized,
    parse,
    qparams,
    quantize,
    samples,
    weight,
)
from tests.passes.test_int8_placement import ISLANDS, between

F32 = np.float32
HERE = [name for name in sorted(TARGETS) if TARGETS[name].integer_kernels and name != "x86-vnni"]


def fixed(model: Model, feeds: Iterable[Mapping[str, Array]] | None, target: str = "x86", **options: Any) -> PassResult:
    """Calibrate and run the pass, in place; every layer unless options say otherwise."""
    quantizer = Fixed(**{"all_layers": True, **options})
    statistics = None if feeds is None else collect(model, quantizer.needs(model), samples(feeds))
    result = quantizer.run(model, Context(statistics=statistics, target=resolve(target)))
    model.normalize()
    return result


def scales(model: Model) -> list[Array]:
    """The scales of all Q, DQ and Mul nodes."""
    found = []
    for node in [*nodes(model, "QuantizeLinear"), *nodes(model, "DequantizeLinear")]:
        assert isinstance(node.inputs[1], Constant)
        found.append(node.inputs[1].values)
    scaled = [node for node in nodes(model, "Mul") if node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Cast"]
    return found + [node.inputs[1].values for node in scaled]


def is_power(values: Array) -> bool:
    return bool((np.frexp(values)[0] == 0.5).all())


def network(rng: np.random.Generator, blocks: int = 6) -> Model:
    """Convolutions, additions, joins, pools and moves at random, then Gemm or MatMul; nothing that isn't exact."""
    lines, initializers = [], {}
    tensors, widths = ["x"], [8]
    for at in range(blocks):
        source = int(rng.integers(max(0, len(tensors) - 2), len(tensors)))
        name, channels = f"t{at}", widths[source]
        kind = rng.choice(["conv", "conv", "depthwise", "grouped", "add", "concat", "max"])
        if kind == "add" and not any(widths[i] == channels for i in range(1, len(tensors)) if i != source):
            kind = "conv"
        if source == 0 and kind in ("add", "concat", "max"):
            kind = "conv"
        if kind in ("conv", "depthwise", "grouped"):
            group = {"conv": 1, "depthwise": channels, "grouped": 2}[kind]
            out = channels if kind == "depthwise" else int(rng.choice([6, 8, 16, 32]))
            size = int(rng.choice([1, 3]))
            pads = f"pads = [{size // 2}, {size // 2}, {size // 2}, {size // 2}], " if size > 1 else ""
            initializers[f"w{at}"] = weight(out, channels // group, size, size, seed=int(rng.integers(1 << 30)))
            bias = ""
            if rng.random() < 0.7:
                initializers[f"b{at}"], bias = normal(out, seed=int(rng.integers(1 << 30))), f", b{at}"
            conv = f"Conv<{pads}group = {group}>({tensors[source]}, w{at}{bias})"
            follow = str(rng.choice(["Relu", "Clip", ""]))
            initializers |= {"low": np.array(0, F32), "high": np.array(rng.choice([1.7, 6.0]), F32)}
            if follow:
                lines += [f"c{at} = {conv}", f"{name} = {follow}(c{at}{', low, high' if follow == 'Clip' else ''})"]
            else:
                lines.append(f"{name} = {conv}")
            widths.append(out)
        elif kind == "max":
            lines.append(
                f"{name} = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>({tensors[source]})"
            )
            widths.append(channels)
        else:
            others = [i for i in range(1, len(tensors)) if i != source and (kind == "concat" or widths[i] == channels)]
            other = int(rng.choice(others)) if others else source
            op = "Add" if kind == "add" else "Concat<axis = 1>"
            lines.append(f"{name} = {op}({tensors[source]}, {tensors[other]})")
            widths.append(channels if kind == "add" else channels + widths[other])
        tensors.append(name)
    initializers |= {
        "wh": weight(6, widths[-1], 1, 1, seed=90),
        "wg": weight(12, 6 * 36, seed=91),
        "bg": normal(12, seed=92),
        "wm": weight(12, 5, seed=93),
    }
    lines += [
        f"h = Conv({tensors[-1]}, wh)",
        "f = Flatten(h)",
        "g1 = Gemm<transB = 1>(f, wg, bg)",
        "u = Relu(g1)",
        "y = MatMul(u, wm)",
    ]
    text = "g (float[n, 8, 6, 6] x) => (float[n, 5] y) {\n" + "\n".join(lines) + "\n}"
    used = {name: values for name, values in initializers.items() if name in text}
    return parse(text, used)


FEEDS = [{"x": normal(2, 8, 6, 6, seed=seed)} for seed in range(6)]


@pytest.mark.parametrize("target", HERE)
@pytest.mark.parametrize("seed", range(12))
def test_integers_and_float_give_the_same_bits(target: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = network(rng)
    reference = model.clone().model
    options: dict[str, Any] = {"per_channel": bool(seed % 3), "bits": int(rng.choice([4, 8, 8]))}
    fixed(model, FEEDS, target, **options)
    assert all(is_power(values) for values in scales(model))
    fast, plain, exact = Session(model), Session(model, optimize=False), Session(reference)
    for feed in [*FEEDS, {"x": 3 * normal(1, 8, 6, 6, seed=50)}]:
        found, expected = fast.run(feed)["y"], plain.run(feed)["y"]
        np.testing.assert_array_equal(found, expected)
    if options["bits"] == 8:
        assert sqnr_db(exact.run(FEEDS[0])["y"], fast.run(FEEDS[0])["y"]) > 10


@pytest.mark.parametrize("operator", ISLANDS)
def test_every_operator_of_the_table_gives_the_same_bits(operator: str) -> None:
    body, extra, channels, _ = ISLANDS[operator]
    model = between(body, extra, channels)
    feeds = [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(4)]
    fixed(model, feeds)
    for feed in [*feeds, {"x": 4 * normal(1, 8, 6, 6, seed=50)}]:
        np.testing.assert_array_equal(Session(model).run(feed)["y"], Session(model, optimize=False).run(feed)["y"])


def test_other_scales_do_not_give_the_same_bits() -> None:
    """Why powers of two: the scales of int8 leave ties that fall either way, and sums that are not exact."""
    different = 0
    for seed in range(6):
        model = network(np.random.default_rng(seed))
        quantize(model, FEEDS)
        fast, plain = (Session(model, optimize=flag).run(FEEDS[0])["y"] for flag in (True, False))
        different += not np.array_equal(fast, plain)
    assert different > 3


def test_all_of_a_network_runs_on_integer_kernels(tmp_path: Path) -> None:
    model = network(np.random.default_rng(3))
    layers = len(nodes(model, "Conv")) + 2
    fixed(model, FEEDS)
    kernels, _ = optimized(model, tmp_path)
    assert kernels["QLinearConv"] + kernels["QGemm"] + kernels["MatMulIntegerToFloat"] == layers
    assert not kernels["Conv"] + kernels["FusedConv"] + kernels["Gemm"] + kernels["MatMul"]


CLIPPED = """
g (float[1, 8, 6, 6] x) => (float[1, 4, 6, 6] y) {
  a = Conv(x, w1)
  k = Clip(a, low, high)
  c = Conv(k, w2)
  y = Neg(c)
}"""


@pytest.mark.parametrize("target", HERE)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (-1.1, 1.1), (0.25, 2.0), (None, 0.7), (-0.3, None)])
def test_codes_are_clipped_where_no_power_of_two_ends_at_the_bounds(
    target: str, low: float | None, high: float | None, tmp_path: Path
) -> None:
    given = {name: np.array(at, F32) for name, at in (("low", low), ("high", high)) if at is not None}
    text = CLIPPED.replace("low, high", ", ".join(("low" if low is not None else "", "high" if high else "")))
    model = parse(
        text.replace("(a, low, )", "(a, low)"), {"w1": weight(16, 8, 1, 1), "w2": weight(4, 16, 1, 1)} | given
    )
    reference = model.clone().model
    feeds = [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(4)]
    result = fixed(model, feeds, target)
    (clip,) = nodes(model, "Clip")
    assert clip.inputs[0].dtype == TARGETS[target].activation
    assert any(change.detail == "Clip of codes" for change in result.changes)
    kernels, _ = optimized(model, tmp_path)
    if TARGETS[target].runs_here:
        assert kernels["QLinearConv"] == 2
        assert not kernels["Conv"]
    for feed in [*feeds, {"x": 20 * normal(1, 8, 6, 6, seed=9)}]:
        np.testing.assert_array_equal(Session(model).run(feed)["y"], Session(model, optimize=False).run(feed)["y"])
    for feed in feeds:
        assert sqnr_db(Session(reference).run(feed)["y"], Session(model).run(feed)["y"]) > 20


def test_a_clip_that_its_codes_imply_goes() -> None:
    model = parse(
        CLIPPED.replace("low, high", "low"),
        {"w1": weight(16, 8, 1, 1), "w2": weight(4, 16, 1, 1), "low": np.array(0, F32)},
    )
    result = fixed(model, [{"x": normal(1, 8, 6, 6)}])
    assert not any("codes" in change.detail for change in result.changes)


def test_formats_follow_the_sign_and_are_told() -> None:
    text = """
    g (float[1, 8, 6, 6] x) => (float[1, 4, 6, 6] y) {
      a = Conv(x, w1)
      r = Relu(a)
      c = Conv(r, w2)
      y = Neg(c)
    }"""
    for target, zeros in (("x86", (128, 0)), ("arm64", (0, -128)), ("tensorrt", (0, 0))):
        model = parse(text, {"w1": weight(16, 8, 1, 1), "w2": weight(4, 16, 1, 1)})
        result = fixed(model, [{"x": normal(1, 8, 6, 6)}], target)
        params = qparams(model)
        assert (params["x"][1], params["r"][1]) == zeros
        assert [change for change in result.changes if "weights" in change.detail and "Q" in change.detail]


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_weights_and_activations_keep_to_their_bits(bits: int) -> None:
    model = network(np.random.default_rng(5))
    fixed(model, FEEDS, bits=bits, activation_bits=bits, min_sqnr=-100.0)
    assert integer_weights(model)
    for _, codes, _, _ in integer_weights(model):
        wide = codes.astype(int) - (128 if codes.dtype == np.uint8 else 0)
        assert np.abs(wide).max() <= 2 ** (bits - 1) - 1
    for name, (scale, zero) in qparams(model).items():
        if name == "x":
            largest = max(float(np.abs(feed["x"]).max()) for feed in FEEDS)
            top = 2 ** (bits - 1)
            assert zero == 128
            # 8 bits may clip, fewer never
            assert largest <= scale * top * (2 if bits == 8 else 1)


def test_stored_weights_take_powers_of_two_as_well() -> None:
    text = """
    g (int64[n] ids, float[5, 2, 16] s) => (float[n, 64] rows, float[5, 1, 2, 12] y) {
      rows = Gather(table, ids)
      y, h, c = LSTM<hidden_size = 12>(s, w, r)
    }"""
    for bits in (4, 8):
        model = parse(
            text,
            {"table": normal(200, 64), "w": weight(1, 48, 16), "r": weight(1, 48, 12)},
        )
        result = fixed(model, None, bits=bits)
        assert len([change for change in result.changes if change.kind == "stored"]) == 3
        constants = {
            tensor.name: tensor.values
            for body in model.bodies()
            for node in body.nodes
            for tensor in node.inputs
            if isinstance(tensor, Constant)
        }
        for name in ("table", "w", "r"):
            assert is_power(constants[f"{name}_scale"])
            assert np.abs(constants[f"{name}_codes"].astype(int)).max() <= 2 ** (bits - 1) - 1
        Session(model)


def test_named_nodes_are_left_alone() -> None:
    model = network(np.random.default_rng(0))
    names = [node.name or node.outputs[0].name for node in nodes(model, "Conv")]
    result = fixed(model, FEEDS, exclude=(names[1],))
    assert any("excluded" in skip.reason for skip in result.skipped)
    with pytest.raises(UsageError, match="no node is called"):
        fixed(network(np.random.default_rng(0)), FEEDS, only=("nothing",))


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown calibrator"):
        Fixed(calibrator=("best",))
    with pytest.raises(UsageError, match="no calibrator"):
        Fixed(calibrator=())
    with pytest.raises(UsageError, match="bits"):
        Fixed.parse({"bits": "1"})
    parsed: Pass = Fixed.parse({"bits": "4", "activation_bits": "6", "per_channel": "no", "calibrator": "mse+minmax"})
    assert parsed == Fixed(bits=4, activation_bits=6, per_channel=False, calibrator=("mse", "minmax"))


def test_a_trained_network_gives_the_same_bits() -> None:
    folder = Path("models/digits_cnn")
    with np.load(folder / "feeds" / "fit.npz") as stored:
        images = stored["image"]
    feeds = [{"image": image[None]} for image in images[:60]]
    for text in ("fixed", "fixed:bits=4:per_channel=false"):
        model = onnxopt.optimize(folder / "digits_cnn.onnx", text, feeds, latency_seconds=0.05).model
        assert len(integer_weights(model)) == 16
        fast, plain = (Session(model, optimize=flag).run({"image": images[60:]}) for flag in (True, False))
        np.testing.assert_array_equal(fast["logits"], plain["logits"])
