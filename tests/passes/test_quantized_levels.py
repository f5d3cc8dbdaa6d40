"""Every quantizing pass on every layer and every operator of the table, executed at every level of optimization.

An operator may differ between optimized and unoptimized execution by one step of its output's codes, given the same
codes; a float output by the rounding of its sums. Over a whole network a tie rounded the other way would grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import onnxopt
from benchmarks.quantization.steps import Part, differences, part_model, part_of
from onnxopt.calibration import collect
from onnxopt.errors import PassError
from onnxopt.model import Constant, Model, load
from onnxopt.numerics.affine import sqnr_db
from onnxopt.passbase import Context, Pass, PassResult
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.quantization import qdq
from onnxopt.runtime import Session
from onnxopt.target import cpu, resolve
from tests.passes.quantizing import Array, nodes, normal, parse, samples, weight
from tests.passes.test_int8_placement import ISLANDS, LAYERS, NEAR, between

F32, I64 = np.float32, np.int64
Feed = Mapping[str, Array]

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# a pass and the target it is for; the dB it may lose on one layer of normal values
INTEGER = {
    ("int8:all_layers=true", "x86"): 25.0,
    ("int8:all_layers=true", "x86-vnni"): 25.0,
    ("int8:all_layers=true:weights=u8", "x86"): 25.0,
    ("int8:all_layers=true", "arm64"): 25.0,
    ("int8:all_layers=true", "tensorrt"): 22.0,
    ("int8:all_layers=true", "qnn"): 22.0,
    ("fixed:all_layers=true", "x86"): 20.0,
    ("fixed:all_layers=true", "arm64"): 20.0,
    ("fixed:all_layers=true:bits=6:per_channel=false", "x86"): 10.0,
}
WEIGHTS = {
    ("int8_dynamic:all_layers=true:min_weights=1", "x86"): 25.0,
    ("int8_dynamic:all_layers=true:min_weights=1", "arm64"): 25.0,
    ("int8_weights", "x86"): 30.0,
    ("int8_weights:save=memory", "x86"): 30.0,
    ("int4:save=file", "x86"): 12.0,
    ("int4:save=memory", "x86"): 12.0,
    ("fp8", "x86"): 20.0,
    ("fp8:form=e5m2", "x86"): 15.0,
}
EVERY = {**INTEGER, **WEIGHTS}
# those that are tried on everything
FULL = [("int8:all_layers=true", "x86"), ("fixed:all_layers=true", "x86")]


def made(text: str) -> Pass:
    (step,) = parse_passes(text)
    return step.pass_


def rewritten(model: Model, text: str, target: str, feeds: Sequence[Feed] | None) -> PassResult:
    """Run one pass on a model, in place, with what it wants to know of the feeds."""
    rewriting = made(text)
    needs = rewriting.needs(model)
    statistics = None if feeds is None or needs is None else collect(model, needs, samples(feeds))
    result = rewriting.run(model, Context(statistics=statistics, target=resolve(target)))
    model.normalize()
    return result


def session(model: bytes, level: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runs_right(target: str) -> bool:
    """Whether this processor computes what the target's does: without VNNI, sums of full weights may overflow."""
    return target != "x86-vnni" or cpu.has_dot_product(cpu.flags())


def agrees(model: Model, feed: Feed, target: str = "x86") -> None:
    """It passes the checker, runs at all levels, and each operator gives the same codes, or floats, at each."""
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    raw = proto.SerializeToString()
    found = {level: session(raw, level).run(None, dict(feed)) for level in LEVELS}
    for level, outputs in found.items():
        for values, plain in zip(outputs, found["none"], strict=True):
            assert values.shape == plain.shape, level
            assert np.isfinite(values).all() == np.isfinite(plain).all()
    if not runs_right(target):
        return
    apart = differences(proto, dict(feed))
    assert not {name: steps for name, steps in apart.items() if steps > 1}
    for output in proto.graph.output:
        floats_agree(proto, output.name, feed)


def floats_agree(proto: onnx.ModelProto, output: str, feed: Feed) -> None:
    """One output at all levels, on the codes that unoptimized execution has in front of it."""
    part = part_of(proto, output)
    wanted = [name for name in part.inputs if name not in feed]
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in [*wanted, output])
    values = {**feed, **Session(whole.SerializeToString(), optimize=False).run(dict(feed))}
    given = {name: values[name] for name in part.inputs}
    if output in given:
        return
    raw = part_model(proto, part, given).SerializeToString()
    largest = float(np.abs(values[output]).max(initial=0.0))
    for level in LEVELS:
        (found,) = session(raw, level).run([output], given)
        np.testing.assert_allclose(found, values[output], rtol=0, atol=(2e-2 if _finds_codes(part) else 2e-5) * largest)


def _finds_codes(part: Part) -> bool:
    """Whether codes of activations are found while it runs, so that one that is tied may fall the other way.

    The runtime does so where a MatMul reads a DequantizeLinear of weights alone: MatMulNBits, 8 bits for each block.
    """
    made = {name: node.op_type for node in part.nodes for name in node.output}
    weights = any(
        made.get(name) == "DequantizeLinear" and made.get(node.input[0]) != "DequantizeLinear"
        for node in part.nodes
        if node.op_type in ("MatMul", "Gemm")
        for name in node.input[1:2]
    )
    return weights or any(node.op_type in ("DynamicQuantizeLinear", "MatMulNBits") for node in part.nodes)


def close(reference: Model, model: Model, feed: Feed, decibels: float) -> None:
    """What the pass costs: SQNR of each float output."""
    exact, found = Session(reference).run(dict(feed)), Session(model).run(dict(feed))
    for name, values in exact.items():
        if values.size and values.any():
            assert sqnr_db(values, found[name]) > decibels, name


# every row of the table of operators


@pytest.mark.parametrize("operator", ISLANDS)
@pytest.mark.parametrize(("text", "target"), INTEGER)
def test_every_row_of_the_table(operator: str, text: str, target: str) -> None:
    body, extra, channels, _ = ISLANDS[operator]
    model = between(body, extra, channels)
    reference = model.clone().model
    feeds = [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(4)]
    result = rewritten(model, text, target, feeds)
    assert len([change for change in result.changes if change.kind == "quantized"]) == len(nodes(reference, "Conv"))
    agrees(model, feeds[0], target)
    agrees(model, {"x": 5 * normal(1, 8, 6, 6, seed=77)}, target)
    close(reference, model, feeds[0], INTEGER[text, target] - 6)


def test_no_row_is_left_out() -> None:
    assert {row.operator for row in qdq.ROWS} == {*ISLANDS, *LAYERS, *qdq.LEFT_FLOAT}


@pytest.mark.parametrize("case", [*NEAR, "probabilities", "gates"])
@pytest.mark.parametrize(("text", "target"), FULL)
def test_operators_that_stay_float(case: str, text: str, target: str) -> None:
    gates = {"probabilities": "p = Softmax(c) o = Mul(c, p)", "gates": "p = Sigmoid(c) o = Mul(c, p)"}
    body, extra, _ = NEAR[case] if case in NEAR else (gates[case], {}, "")
    model = between(body, extra)
    feeds = [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(4)]
    rewritten(model, text, target, feeds)
    agrees(model, feeds[0], target)


# every kind of layer: text, initializers, feed

KINDS: dict[str, tuple[str, dict[str, Array], dict[str, tuple[int, ...]]]] = {
    "conv": ("a = Conv(x, w, b)", {"w": weight(16, 8, 3, 3), "b": normal(16)}, {"x": (2, 8, 7, 7)}),
    "conv padded": (
        "a = Conv<pads = [1, 2, 0, 1], dilations = [2, 1]>(x, w, b)",
        {"w": weight(12, 7, 2, 3), "b": normal(12)},
        {"x": (1, 7, 9, 8)},
    ),
    "conv strided": (
        'a = Conv<strides = [2, 3], auto_pad = "SAME_UPPER">(x, w, b)',
        {"w": weight(8, 8, 3, 3), "b": normal(8)},
        {"x": (1, 8, 10, 11)},
    ),
    "conv grouped": ("a = Conv<group = 3>(x, w)", {"w": weight(9, 4, 3, 3)}, {"x": (2, 12, 6, 6)}),
    "depthwise": (
        "a = Conv<group = 8, pads = [1, 1, 1, 1]>(x, w, b)",
        {"w": weight(8, 1, 3, 3), "b": normal(8)},
        {"x": (1, 8, 6, 6)},
    ),
    "depthwise, two of each": ("a = Conv<group = 8>(x, w)", {"w": weight(16, 1, 3, 3)}, {"x": (1, 8, 6, 6)}),
    "conv 1-d": ("a = Conv<pads = [1, 1]>(x, w, b)", {"w": weight(12, 8, 3), "b": normal(12)}, {"x": (2, 8, 20)}),
    "conv 3-d": ("a = Conv(x, w)", {"w": weight(6, 4, 2, 2, 2)}, {"x": (1, 4, 5, 5, 5)}),
    "conv of one channel": ("a = Conv(x, w)", {"w": weight(1, 1, 3, 3)}, {"x": (1, 1, 8, 8)}),
    "gemm": ("a = Gemm(x, w, b)", {"w": weight(40, 12), "b": normal(12)}, {"x": (5, 40)}),
    "gemm without bias": ("a = Gemm(x, w)", {"w": weight(40, 12)}, {"x": (5, 40)}),
    "gemm transposed": ("a = Gemm<transB = 1>(x, w, b)", {"w": weight(12, 40), "b": normal(1, 12)}, {"x": (5, 40)}),
    "gemm scaled": (
        "a = Gemm<alpha = 0.5, beta = 2.0>(x, w, b)",
        {"w": weight(40, 12), "b": normal(12)},
        {"x": (5, 40)},
    ),
    "gemm of one number's bias": ("a = Gemm(x, w, b)", {"w": weight(40, 12), "b": normal(1)}, {"x": (5, 40)}),
    "gemm of a turned input": ("a = Gemm<transA = 1>(x, w)", {"w": weight(40, 12)}, {"x": (40, 5)}),
    "matmul": ("a = MatMul(x, w)", {"w": weight(40, 12)}, {"x": (5, 40)}),
    "matmul of odd sizes": ("a = MatMul(x, w)", {"w": weight(37, 5)}, {"x": (3, 37)}),
    "matmul 3-d": ("a = MatMul(x, w)", {"w": weight(40, 12)}, {"x": (2, 5, 40)}),
    "matmul and bias": ("p = MatMul(x, w) a = Add(p, b)", {"w": weight(40, 12), "b": normal(12)}, {"x": (2, 5, 40)}),
    "matmul batched": ("a = MatMul(x, w)", {"w": weight(3, 40, 12)}, {"x": (3, 5, 40)}),
    "matmul from the left": ("a = MatMul(w, x)", {"w": weight(12, 40)}, {"x": (40, 5)}),
    "matmul of a vector": ("a = MatMul(x, w)", {"w": weight(40, 12)}, {"x": (40,)}),
    "matmul of two activations": ("a = MatMul(x, z)", {}, {"x": (2, 5, 40), "z": (2, 40, 7)}),
    "transposed conv": (
        "a = ConvTranspose<strides = [2, 2]>(x, w)",
        {"w": weight(8, 12, 2, 2)},
        {"x": (1, 8, 5, 5)},
    ),
    "lstm": (
        "a, h, c = LSTM<hidden_size = 24>(x, w, r, b)",
        {"w": weight(1, 96, 16), "r": weight(1, 96, 24), "b": normal(1, 192)},
        {"x": (6, 2, 16)},
    ),
    "gru": (
        "a, h = GRU<hidden_size = 24>(x, w, r)",
        {"w": weight(1, 72, 16), "r": weight(1, 72, 24)},
        {"x": (6, 2, 16)},
    ),
}
# what follows: nothing that computes, activations, another layer with codes between
TAILS = {
    "float": "y = Neg(a)",
    "output": "y = Identity(a)",
    "relu": "k = Relu(a) y = Neg(k)",
    "clip": "k = Clip(a, low, high) y = Neg(k)",
    "leaky": "k = LeakyRelu<alpha = 0.1>(a) y = Neg(k)",
    "codes": "k = Relu(a) f = Reshape(k, flat) o = MatMul(f, v) y = Neg(o)",
    "sum": "k = Add(a, a) f = Reshape(k, flat) o = MatMul(f, v) y = Neg(o)",
    "product": "k = Mul(a, two) f = Reshape(k, flat) o = MatMul(f, v) y = Neg(o)",
}


def layer_model(kind: str, tail: str) -> tuple[Model, list[dict[str, Array]]]:
    body, initializers, shapes = KINDS[kind]
    extra: dict[str, Array] = {
        "low": np.array(-0.5, F32),
        "high": np.array(1.3, F32),
        "two": np.array(1.7, F32),
        "flat": np.array([-1, 5], I64),
        "v": weight(5, 33),
    }
    ends = TAILS[tail]
    used = {name: values for name, values in extra.items() if any(f"{name}{end}" in ends for end in ",)")}
    ports = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    feeds = [
        {name: normal(*shape, seed=10 * seed + at) for at, (name, shape) in enumerate(shapes.items())}
        for seed in range(4)
    ]
    size = result_of(f"g ({ports}) => (float a) {{ {body} }}", initializers, feeds[0]).size
    if size % 5:
        used |= {"flat": np.array([1, -1], I64), "v": weight(size, 33)} if "v" in used else {}
    text = f"g ({ports}) => (float y) {{ {body} {ends} }}"
    rank = result_of(text, initializers | used, feeds[0]).ndim
    dims = ", ".join(f"d{axis}" for axis in range(rank))
    return parse(text.replace("(float y)", f"(float[{dims}] y)"), initializers | used, 19), feeds


def result_of(text: str, initializers: Mapping[str, Array], feed: Feed) -> Array:
    """The one output of a model."""
    (found,) = Session(parse(text, initializers, 19)).run(dict(feed)).values()
    return np.asarray(found)


CASES = [(*each, tail) for each in EVERY for tail in (TAILS if each in FULL else ("codes",))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "target", "tail"), CASES)
def test_every_kind_of_layer(kind: str, tail: str, text: str, target: str) -> None:
    model, feeds = layer_model(kind, tail)
    reference = model.clone().model
    result = rewritten(model, text, target, feeds)
    agrees(model, feeds[0], target)
    close(reference, model, feeds[0], EVERY[text, target] - 8)
    if not result.changes:
        assert model.digest() == reference.digest()


def test_what_these_tests_hold_can_break() -> None:
    model, feeds = layer_model("conv", "codes")
    reference = model.clone().model
    rewritten(model, "int8:all_layers=true", "x86", feeds)
    close(reference, model, feeds[0], 20.0)
    first = nodes(model, "QuantizeLinear")[0]
    first.inputs[1] = Constant("other_scale", np.array(1.5 * first.inputs[1].values, F32))
    agrees(model, feeds[0])
    with pytest.raises(AssertionError):
        close(reference, model, feeds[0], 20.0)


# models that are quantized already

NETWORK = """g (float[n, 8, 6, 6] x) => (float[n, 5] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) r = Relu(a) d = Conv(r, w2, b2) s = Relu(d)
  m = GlobalAveragePool(s) f = Flatten(m) y = Gemm<transB = 1>(f, w4, b4) }"""
WEIGHT: dict[str, Array] = {
    "w1": weight(16, 8, 3, 3),
    "b1": normal(16),
    "w2": weight(64, 16, 1, 1),
    "b2": normal(64),
    "w4": weight(40, 64),
    "b4": normal(40),
}
FEEDS = [{"x": normal(2, 8, 6, 6, seed=seed)} for seed in range(4)]
QUANTIZING = (
    "int8:all_layers=true",
    "fixed:all_layers=true",
    "int8_dynamic:all_layers=true:min_weights=1",
    "int8_weights",
    "int8_weights:save=memory",
    "int4",
    "int4:save=memory",
    "fp8",
)
TOOLS = ("qdq", "qdq of int8", "qoperator", "dynamic")


class Reader(CalibrationDataReader):
    """The feeds, for onnxruntime's tools."""

    def __init__(self) -> None:
        self.left = iter(FEEDS)

    def get_next(self) -> dict[str, Array] | None:
        """The next feed."""
        return next(self.left, None)


def network(opset: int = 19) -> Model:
    return parse(NETWORK, WEIGHT, opset)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Models quantized by a pass or by a tool of onnxruntime, each made once."""
    folder = tmp_path_factory.mktemp("quantized")
    source = folder / "float.onnx"
    network(17).save(source)
    made: dict[str, Path] = {}

    def by(who: str) -> Model:
        if who not in made:
            path = made[who] = folder / f"{len(made)}.onnx"
            if who == "qdq":
                quantize_static(source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
            elif who == "qdq of int8":
                types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
                quantize_static(source, path, Reader(), quant_format=QuantFormat.QDQ, **types)
            elif who == "qoperator":
                quantize_static(source, path, Reader(), quant_format=QuantFormat.QOperator)
            elif who == "dynamic":
                quantize_dynamic(source, path)
            else:
                model = network()
                rewritten(model, who, "x86", FEEDS)
                model.save(path)
        return load(made[who])

    return by


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", QUANTIZING)
@pytest.mark.parametrize("who", [*TOOLS, *(text for text in QUANTIZING if "dynamic" not in text)])
def test_what_is_quantized_already_is_left_and_said(who: str, again: str, quantized: Callable[[str], Model]) -> None:
    model = quantized(who)
    before = model.digest()
    result = rewritten(model, again, "x86", FEEDS)
    assert model.digest() == before
    assert not result.changes
    assert "already quantized: 3 nodes left as they are" in result.notes
    assert {skip.reason for skip in result.skipped} <= {"it is quantized already"}
    if "weights" not in again and again[:4] in ("int8", "fixe") and who not in ("qoperator", "dynamic"):
        assert len(result.skipped) == (2 if who == "int4:save=memory" else 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("again", QUANTIZING)
def test_the_pipeline_leaves_what_is_quantized_too(again: str, quantized: Callable[[str], Model]) -> None:
    for who in ("qdq", "int4"):
        model = quantized(who)
        found = onnxopt.optimize(model, again, FEEDS * 6, latency_seconds=0.05)
        assert found.model.digest() == model.digest(), who


def test_a_layer_of_one_quantized_part_keeps_the_codes_it_reads() -> None:
    model = network()
    rewritten(model, "int8:all_layers=true:storage=false", "x86", FEEDS)
    float_layer = parse(
        "g (float[n, 16] x) => (float[n, 4] y) { c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z) "
        "y = MatMul(d, w) }",
        {"s": np.array(0.02, F32), "z": np.array(128, np.uint8), "w": weight(16, 4)},
    )
    before = float_layer.digest()
    result = rewritten(float_layer, "int8:all_layers=true", "x86", [{"x": normal(3, 16)}])
    assert float_layer.digest() == before
    assert [skip.reason for skip in result.skipped] == ["it is quantized already"]


def test_layers_beside_quantized_ones_are_quantized() -> None:
    text = """g (float[n, 16] x) => (float[n, 40] y) {
      d = DequantizeLinear(c, s, z) a = MatMul(x, d) r = Relu(a) m = MatMul(r, w) y = Neg(m) }"""
    codes = np.random.default_rng(0).integers(-127, 128, (16, 32)).astype(np.int8)
    given: dict[str, Array] = {"c": codes, "s": np.array(0.004, F32), "z": np.array(0, np.int8), "w": weight(32, 40)}
    model = parse(text, given)
    result = rewritten(model, "int8:all_layers=true", "x86", [{"x": normal(3, 16, seed=seed)} for seed in range(3)])
    assert [change.where for change in result.changes if change.kind == "quantized"] == ["m"]
    assert "already quantized: 1 nodes left as they are" in result.notes
    agrees(model, {"x": normal(3, 16)})


# float16

HALF = """g (float16[n, 64] x, int64[k] i) => (float16[n, 64] y, float16[k, 64] e) {
  a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v) e = Gather(t, i) }"""


@pytest.mark.parametrize("text", QUANTIZING)
def test_float16_is_refused_layer_by_layer(text: str) -> None:
    shapes = {"w": (64, 64), "v": (64, 64), "b": (64,), "t": (90, 64)}
    model = parse(HALF, {name: weight(*shape).astype(np.float16) for name, shape in shapes.items()}, 19)
    before = model.digest()
    feeds = [{"x": normal(5, 64).astype(np.float16), "i": np.array([1, 2])}]
    result = rewritten(model, text, "x86", feeds)
    assert model.digest() == before
    assert not result.changes
    reasons = [skip.reason for skip in result.skipped]
    assert set(reasons) == {"its weight is float16, not float32"}
    assert len(reasons) == (2 if "dynamic" in text else 3)


@pytest.mark.parametrize("text", QUANTIZING)
def test_float32_layers_beside_float16_ones_are_served(text: str) -> None:
    model = parse(
        """g (float[n, 64] x) => (float[n, 64] y) {
          h = Cast<to = 10>(x) a = Gemm(h, w, b) q = Cast<to = 1>(a) y = MatMul(q, v) }""",
        {"w": weight(64, 64).astype(np.float16), "b": normal(64).astype(np.float16), "v": weight(64, 64)},
        19,
    )
    feeds = [{"x": normal(5, 64, seed=seed)} for seed in range(3)]
    result = rewritten(model, text, "x86", feeds)
    assert len([change for change in result.changes if change.kind in ("quantized", "stored")]) == 1
    assert "its weight is float16, not float32" in [skip.reason for skip in result.skipped]
    agrees(model, feeds[0])


# versions of ONNX

OLD = "g (float[n, 32] x) => (float[n, 40] y) { a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v) }"
OLD_WEIGHTS: dict[str, Array] = {"w": weight(32, 64), "v": weight(64, 40), "b": normal(64)}
OLD_FEEDS = [{"x": normal(5, 32, seed=seed)} for seed in range(24)]


@pytest.mark.parametrize("opset", [7, 11])
@pytest.mark.parametrize("text", QUANTIZING)
def test_the_pipeline_raises_old_operator_sets(text: str, opset: int) -> None:
    found = onnxopt.optimize(parse(OLD, OLD_WEIGHTS, opset), text, OLD_FEEDS, latency_seconds=0.05)
    assert found.model.opset == (19 if text == "fp8" else 13)
    assert found.model.opset_imports[""] == found.model.opset
    assert len(nodes(found.model, "QuantizeLinear")) == (2 if text.split(":")[0] in ("int8", "fixed") else 0)
    agrees(found.model, OLD_FEEDS[0])


@pytest.mark.parametrize("opset", [9, 11, 12])
@pytest.mark.parametrize("text", QUANTIZING)
def test_a_pass_alone_writes_nothing_that_an_old_operator_set_lacks(text: str, opset: int) -> None:
    model = parse(OLD, OLD_WEIGHTS, opset)
    result = rewritten(model, text, "x86", OLD_FEEDS[:3])
    onnx.checker.check_model(model.to_proto(), full_check=True)
    Session(model).run(OLD_FEEDS[0])
    if text == "fp8" or "memory" in text or (text == "int4" and opset == 9):
        assert not result.changes
        assert all(f"operator set {opset} has no" in skip.reason for skip in result.skipped)
        assert len(result.skipped) == 2


@pytest.mark.parametrize("text", QUANTIZING)
def test_what_cannot_be_raised_is_refused_with_a_remedy(text: str) -> None:
    source = """g (float[1, 4, 4, 4] x, float[4] s) => (float y) {
      a = Conv(x, w) t = Neg(s) m = Neg(t) r = Resize(a, m) y = Conv(r, v) }"""
    model = parse(source, {"w": weight(4, 4, 1, 1), "v": weight(16, 4, 3, 3)}, 10)
    feeds = [{"x": normal(1, 4, 4, 4, seed=seed), "s": np.array([1, 1, 2, 2], F32)} for seed in range(24)]
    with pytest.raises(PassError) as caught:
        onnxopt.optimize(model, text, feeds, latency_seconds=0.05)
    assert "convert_opset" in str(caught.value)
    assert caught.value.remedy


# bodies, shapes and values

BODIES: dict[str, tuple[str, dict[str, Array], list[dict[str, Array]]]] = {
    "if": (
        """g (float[n, 32] x, bool c) => (float[n, 40] y) {
          a = Gemm(x, w, b) r = Relu(a)
          y = If(c) <then_branch = t () => (float[n, 40] y1) { y1 = MatMul(r, v) },
                     else_branch = e () => (float[n, 40] y2) { q = Neg(r) s = Relu(q) p = Add(s, r) y2 = MatMul(p, u) }>
        }""",
        {"w": weight(32, 64), "v": weight(64, 40), "b": normal(64), "u": weight(64, 40, seed=9)},
        [{"x": normal(5, 32, seed=seed), "c": np.array(seed % 2 == 0)} for seed in range(4)],
    ),
    "loop": (
        """g (float[n, 32] x, int64 k) => (float[n, 32] y) {
          c = Constant<value = bool {1}>()
          y = Loop(k, c, x) <body = o (int64 i, bool ci, float[n, 32] s) => (bool co, float[n, 32] so) {
            co = Identity(ci) a = MatMul(s, w) r = Relu(a) d = MatMul(r, v) so = Tanh(d) }>
        }""",
        {"w": weight(32, 64), "v": weight(64, 32)},
        [{"x": normal(5, 32, seed=seed), "k": np.array(seed)} for seed in (3, 2, 0)],
    ),
    "scan": (
        """g (float[t, 32] x, float[32] z) => (float[32] h, float[t, 40] y) {
          h, y = Scan(z, x) <num_scan_inputs = 1, body = o (float[32] s, float[32] xi) => (float[32] so, float[40] yo) {
            u = Add(s, xi) a = MatMul(u, w) so = Tanh(a) r = Relu(a) yo = MatMul(r, v) }>
        }""",
        {"w": weight(32, 32), "v": weight(32, 40)},
        [{"x": normal(6, 32, seed=seed), "z": np.zeros(32, F32)} for seed in range(3)],
    ),
}


@pytest.mark.parametrize(("text", "target"), EVERY)
@pytest.mark.parametrize("case", BODIES)
def test_layers_of_bodies(case: str, text: str, target: str) -> None:
    source, initializers, feeds = BODIES[case]
    model = parse(source, initializers, 19)
    reference = model.clone().model
    result = rewritten(model, text, target, feeds)
    layers = len(nodes(reference, "MatMul")) + len(nodes(reference, "Gemm"))
    assert len([change for change in result.changes if change.kind in ("quantized", "stored")]) == layers
    onnx.checker.check_model(model.to_proto(), full_check=True)
    raw = model.to_proto().SerializeToString()
    for feed in feeds:
        exact = Session(reference).run(feed)
        for level in LEVELS:
            found = dict(zip(exact, session(raw, level).run(list(exact), dict(feed)), strict=True))
            for name, values in exact.items():
                assert sqnr_db(values, found[name]) > EVERY[text, target] - 10, (level, name)


VALUES: dict[str, tuple[dict[str, Array], list[dict[str, Array]], dict[str, Array]]] = {
    "a weight of zeros": ({"w": np.zeros((32, 64), F32)}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "all zero": ({name: np.zeros_like(values) for name, values in OLD_WEIGHTS.items()}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "a channel of zeros": ({"w": weight(32, 64) * (np.arange(64) != 3).astype(F32)}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "inputs of zeros": ({}, [{"x": np.zeros((5, 32), F32)}], OLD_FEEDS[5]),
    "constant inputs": ({}, [{"x": np.full((5, 32), 2.5, F32)}], OLD_FEEDS[5]),
    "negative inputs": ({}, [{"x": np.full((5, 32), -2.5, F32)}], OLD_FEEDS[5]),
    "an empty batch": ({}, OLD_FEEDS[:3], {"x": np.zeros((0, 32), F32)}),
    "only an empty batch": ({}, [{"x": np.zeros((0, 32), F32)}], OLD_FEEDS[5]),
    "tiny weights": ({name: values * F32(1e-6) for name, values in OLD_WEIGHTS.items()}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "hardly any weight": ({"w": weight(32, 64) * F32(1e-36)}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "large weights": ({name: values * F32(1e7) for name, values in OLD_WEIGHTS.items()}, OLD_FEEDS[:3], OLD_FEEDS[5]),
    "batches of any size": ({}, [{"x": normal(n, 32, seed=n)} for n in (1, 7, 3)], {"x": normal(11, 32)}),
}


@pytest.mark.parametrize(("text", "target"), EVERY)
@pytest.mark.parametrize("case", VALUES)
def test_values_and_shapes_at_the_edge(case: str, text: str, target: str) -> None:
    changed, feeds, other = VALUES[case]
    model = parse(OLD, OLD_WEIGHTS | changed, 19)
    reference = model.clone().model
    rewritten(model, text, target, feeds)
    agrees(model, feeds[0], target)
    agrees(model, other, target)
    close(reference, model, feeds[0], EVERY[text, target] - 8)


@pytest.mark.parametrize(("text", "target"), EVERY)
def test_a_layer_of_constants_alone_stays(text: str, target: str) -> None:
    constant = ", ".join(str(number % 7 - 3) for number in range(32))
    source = f"""g (float[n, 32] x) => (float[n, 40] y) {{
      c = Constant<value = float[1, 32] {{{constant}}}>() a = Gemm(c, w, b) r = Relu(a) p = MatMul(r, v)
      q = MatMul(x, z) y = Add(q, p) }}"""
    model = parse(source, OLD_WEIGHTS | {"z": weight(32, 40)}, 19)
    reference = model.clone().model
    rewritten(model, text, target, OLD_FEEDS[:3])
    agrees(model, OLD_FEEDS[0], target)
    close(reference, model, OLD_FEEDS[0], EVERY[text, target] - 10)


# weights with several readers


@pytest.mark.parametrize(("text", "target"), EVERY)
def test_shared_weights_are_coded_once_for_each_axis(text: str, target: str) -> None:
    source = """g (float[n, 64] x) => (float[a, b] y, float[c, d] z, float[e, f] q) {
      a = Gemm(x, w) b = Relu(a) c = Gemm<transB = 1>(b, w) y = Neg(c)
      d = MatMul(x, w) z = Neg(d) f = MatMul(z, w) q = Neg(f) }"""
    model = parse(source, {"w": weight(64, 64)}, 19)
    reference = model.clone().model
    feeds = [{"x": normal(5, 64, seed=seed)} for seed in range(3)]
    rewritten(model, text, target, feeds)
    agrees(model, feeds[0], target)
    close(reference, model, feeds[0], EVERY[text, target] - 12)
    large = [constant.data.size for constant in model.constants() if constant.data.size >= 64 * 32]
    assert len(large) <= 2


@pytest.mark.parametrize(("text", "target"), EVERY)
def test_tied_embeddings_are_stored_once(text: str, target: str) -> None:
    source = """g (int64[n] i) => (float[n, 300] y) {
      e = Gather(table, i) h = Gemm(e, w, b) r = Relu(h) y = Gemm<transB = 1>(r, table, c) }"""
    given = {"table": weight(300, 64), "w": weight(64, 64), "b": normal(64), "c": normal(300)}
    model = parse(source, given, 19)
    reference = model.clone().model
    feeds = [{"i": np.random.default_rng(seed).integers(0, 300, 7)} for seed in range(4)]
    result = rewritten(model, text, target, feeds)
    agrees(model, feeds[0], target)
    close(reference, model, feeds[0], EVERY[text, target] - 8)
    tables = [constant for constant in model.constants() if constant.data.size >= 300 * 32]
    # a Gather knows no float8 and no unsigned or single scale, and kernels that unpack codes ask for another order
    once = not any(word in text for word in ("fp8", "weights=u8", "per_channel=false", "memory"))
    if "dynamic" in text or target == "qnn":
        return
    assert len(tables) <= (1 if once else 2), result.changes
    assert all(constant.dtype != F32 for constant in tables)
