"""Layers whose inputs are quantized at run time: what the runtime makes of them, and what stays float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnxruntime
import pytest

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.numerics.affine import sqnr_db
from onnxopt.numerics.saturation import Layout, saturates
from onnxopt.passbase import Context, Effect, PassResult
from onnxopt.passes.int8_dynamic import Int8Dynamic
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.passes.quantizing import Array, nodes, normal, optimized, parse, weight

Feed = dict[str, Array]


def dynamic(model: Model, target: str = "x86", **options: Any) -> PassResult:
    """Run the pass in place; every layer unless options say otherwise."""
    pass_ = Int8Dynamic(**{"all_layers": True, "min_weights": 1, **options})
    result = pass_.run(model, Context(target=resolve(target)))
    model.normalize()
    onnx.checker.check_model(model.to_proto())
    return result


def skips(result: PassResult) -> list[tuple[str, str]]:
    return [(skip.node, skip.reason) for skip in result.skipped]


def assert_close(reference: Model, model: Model, feed: Feed, decibels: float = 30.0) -> None:
    """The result is near the reference, and the same whether the runtime optimizes it or not."""
    exact, fast, plain = (
        Session(each, optimize=fast).run(feed) for each, fast in ((reference, True), (model, True), (model, False))
    )
    for name, values in exact.items():
        assert fast[name].shape == plain[name].shape == values.shape
        assert fast[name].dtype == values.dtype
        assert sqnr_db(values, fast[name]) >= decibels
        assert sqnr_db(plain[name], fast[name]) >= sqnr_db(values, fast[name]) + 10


def w(rows: int, columns: int, seed: int = 1) -> Array:
    return np.asarray(normal(rows, columns, seed=seed) / rows**0.5, np.float32)


# MatMul and Gemm

PRODUCTS = {
    "plain": "y = MatMul(x, w)",
    "bias": "m = MatMul(x, w) y = Add(m, b)",
    "bias first": "m = MatMul(x, w) y = Add(b, m)",
    "relu": "m = MatMul(x, w) a = Add(m, b) y = Relu(a)",
}


@pytest.mark.parametrize("dims", ["n, t, 40", "2, 3, 40", "n, 40"])
@pytest.mark.parametrize("form", PRODUCTS)
def test_a_matmul_becomes_one_fused_node(form: str, dims: str, tmp_path: Path) -> None:
    text = f"g (float[{dims}] x) => (float y) {{ {PRODUCTS[form]} }}"
    weights = {"w": w(40, 24), "b": normal(24)}
    model = parse(text, weights)
    result = dynamic(model)
    ops, _ = optimized(model, tmp_path)
    assert ops == {"DynamicQuantizeMatMul": 1} | ({"Relu": 1} if form == "relu" else {})
    assert [(change.kind, change.where) for change in result.changes] == [("quantized", "m" if "m =" in text else "y")]
    assert_close(parse(text, weights), model, {"x": normal(*((2, 3, 40) if "," in dims[3:] else (5, 40)))})


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize(
    ("shape", "fused"), [((24,), True), ((1, 24), True), ((), False), ((1,), False), ((5, 24), False)]
)
def test_a_gemm_with_any_bias(trans: int, shape: tuple[int, ...], fused: bool, tmp_path: Path) -> None:
    text = f"g (float[5, 40] x) => (float[5, 24] y) {{ y = Gemm<transB = {trans}>(x, w, b) }}"
    weights = {"w": w(24, 40) if trans else w(40, 24), "b": normal(*shape)}
    model = parse(text, weights)
    dynamic(model)
    assert optimized(model, tmp_path)[0] == {"DynamicQuantizeMatMul": 1} | ({} if fused else {"Add": 1})
    assert_close(parse(text, weights), model, {"x": normal(5, 40)})


def test_a_gemm_whose_bias_is_computed_or_left_out() -> None:
    text = """g (float[5, 40] x, float[24] b) => (float[5, 24] y, float[5, 24] z) {
      y = Gemm(x, w, b)  z = Gemm<transB = 1>(x, v) }"""
    weights = {"w": w(40, 24), "v": w(24, 40)}
    model = parse(text, weights)
    dynamic(model)
    assert not nodes(model, "Gemm")
    assert_close(parse(text, weights), model, {"x": normal(5, 40), "b": normal(24)})


def test_the_bound_on_closeness_would_notice_a_wrong_scale() -> None:
    text, weights = "g (float[5, 40] x) => (float[5, 24] y) { y = MatMul(x, w) }", {"w": w(40, 24)}
    model = parse(text, weights)
    dynamic(model)
    scale = nodes(model, "Mul")[0].inputs[1]
    scale.values = scale.values * np.float32(1.1)
    with pytest.raises(AssertionError):
        assert_close(parse(text, weights), model, {"x": normal(5, 40)})


def test_weights_in_constant_nodes_and_the_name_of_the_output() -> None:
    values = ", ".join(f"{number:.4f}" for number in w(8, 4).reshape(-1))
    text = f"""g (float[n, 8] x) => (float[n, 4] y) {{
      w = Constant<value = float[8, 4] {{{values}}}>()  y = MatMul(x, w) }}"""
    model = parse(text)
    dynamic(model)
    assert [output.name for output in Session(model).outputs] == ["y"]
    assert_close(parse(text), model, {"x": normal(3, 8)})


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 17, 19, 21])
def test_every_operator_set_that_has_the_operators(opset: int, tmp_path: Path) -> None:
    text = "g (float[n, 40] x) => (float[n, 24] y) { m = MatMul(x, w) y = Add(m, b) }"
    weights = {"w": w(40, 24), "b": normal(24)}
    model = parse(text, weights, opset)
    dynamic(model)
    assert optimized(model, tmp_path)[0] == {"DynamicQuantizeMatMul": 1}
    assert_close(parse(text, weights, opset), model, {"x": normal(3, 40)})


def test_older_operator_sets_are_raised_by_the_pipeline() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }"
    model = parse(text, {"w": w(64, 64)}, opset=9)
    assert skips(dynamic(parse(text, {"w": w(64, 64)}, opset=9))) == [
        ("y", "operator set 9 has no DynamicQuantizeLinear; 11 has")
    ]
    result = onnxopt.optimize(model, passes="int8_dynamic", latency_seconds=0)
    assert result.model.opset == 13
    assert len(nodes(result.model, "MatMulInteger")) == 1


def test_layers_that_read_one_tensor_share_its_codes(tmp_path: Path) -> None:
    text = """g (float[n, 40] x) => (float[n, 24] q, float[n, 24] k, float[n, 24] v) {
      a = MatMul(x, w1) q = Add(b, a)  c = MatMul(x, w2) k = Add(c, b)  v = Gemm(x, w3, b) }"""
    weights = {"w1": w(40, 24), "w2": w(40, 24, 2), "w3": w(40, 24, 3), "b": normal(24)}
    model = parse(text, weights)
    result = dynamic(model)
    assert len(nodes(model, "DynamicQuantizeLinear")) == 1
    assert optimized(model, tmp_path)[0] == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}
    assert all("MatMulIntegerToFloat" in change.detail for change in result.changes)
    assert_close(parse(text, weights), model, {"x": normal(3, 40)})


def test_the_runtime_joins_equal_quantizers_so_sharing_costs_no_fusion(tmp_path: Path) -> None:
    part = (
        "c{0}, s{0}, z{0} = DynamicQuantizeLinear(x) p{0} = MatMulInteger(c{0}, w{0}, z{0}) f{0} = Cast<to = 1>(p{0})"
    )
    part += " m{0} = Mul(s{0}, k{0}) y{0} = Mul(f{0}, m{0}) "
    text = f"g (float[n, 8] x) => (float[n, 4] y1, float[n, 4] y2) {{ {part.format(1)} {part.format(2)} }}"
    codes = {f"w{i}": np.full((8, 4), i, np.int8) for i in (1, 2)}
    model = parse(text, codes | {f"k{i}": np.full(4, i, np.float32) for i in (1, 2)})
    assert optimized(model, tmp_path)[0] == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2}


# values at the edges


def both(model: Model, feed: Feed) -> Array:
    """The output, which must be the same optimized and not, to one part in a million of the largest value."""
    fast, plain = (next(iter(Session(model, optimize=each).run(feed).values())) for each in (True, False))
    assert fast.shape == plain.shape
    assert np.allclose(fast, plain, rtol=0, atol=1e-6 * max(1e-30, float(np.abs(plain).max(initial=0.0))))
    return np.asarray(fast)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_agree_with_the_reference_evaluator(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 5))
    k, n = (int(size) for size in rng.integers(1, 71, 2))
    ahead = [int(size) for size in rng.integers(1, 5, rank - 1)]
    if seed % 8 == 0:
        k, n = (1, n) if seed % 16 else (k, 1)
    names = ", ".join([*(f"d{i}" for i in range(rank - 1)), str(k)])
    bias = n > 1 and seed % 2 == 0
    text = f"g (float[{names}] x) => (float y) {{ {PRODUCTS['bias' if bias else 'plain']} }}"
    model = parse(text, {"w": w(k, n, seed), "b": normal(n)} if bias else {"w": w(k, n, seed)})
    assert len(dynamic(model).changes) == 1
    x = (rng.standard_normal([*ahead, k]) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    expected = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, {"x": x})[0]
    found = both(model, {"x": x})
    step = float(np.abs(expected).max(initial=0.0)) / 100  # a tie may be rounded either way: a step of one input code
    assert np.allclose(found, expected, rtol=0, atol=step)


EDGES = {
    "zeros": np.zeros((3, 40)),
    "one value": np.full((3, 40), 2.5),
    "negative": np.full((3, 40), -2.5),
    "whole numbers": np.arange(120.0).reshape(3, 40),
    "no rows": np.zeros((0, 40)),
    "large": np.full((3, 40), 1e30),
}


@pytest.mark.parametrize("case", EDGES)
def test_inputs_at_the_edges(case: str) -> None:
    text, weights = "g (float[n, 40] x) => (float[n, 24] y) { y = MatMul(x, w) }", {"w": w(40, 24)}
    model = parse(text, weights)
    dynamic(model)
    feed = {"x": EDGES[case].astype(np.float32)}
    found, exact = both(model, feed), next(iter(Session(parse(text, weights)).run(feed).values()))
    assert found.shape == exact.shape
    assert np.abs(found - exact).max(initial=0.0) <= 0.03 * np.abs(exact).max(initial=0.0)


def test_an_input_of_whole_numbers_from_other_operators() -> None:
    text = """g (int64[n] ids) => (float[n, 24] y) {
      depth = Constant<value = int64 {40}>()  pair = Constant<value = float[2] {0, 1}>()
      hot = OneHot(ids, depth, pair)  y = MatMul(hot, w) }"""
    model = parse(text, {"w": w(40, 24)})
    dynamic(model)
    assert_close(parse(text, {"w": w(40, 24)}), model, {"ids": np.array([3, 0, 39])})


def test_channels_of_zeros() -> None:
    values = w(40, 24)
    values[:, 3] = 0
    text = "g (float[n, 40] x) => (float[n, 24] y) { y = MatMul(x, w) }"
    model = parse(text, {"w": values})
    dynamic(model)
    assert not both(model, {"x": normal(3, 40)})[:, 3].any()
    assert_close(parse(text, {"w": values}), model, {"x": normal(3, 40)})


MISREAD = "the runtime would take what y adds for its bias, which has another shape"


@pytest.mark.parametrize(
    ("dims", "columns", "shape", "refused"),
    [
        ("n, 40", 1, (5,), True),
        ("n, 40", 1, (1,), False),
        ("n, 40", 1, (3, 5), False),
        ("n, 40", 24, (1, 1, 24), True),
        ("n, 40", 24, (1, 24), False),
        ("n, 40", 24, (3, 24), False),
        ("40", 24, (1, 24), True),
        ("40", 24, (24,), False),
    ],
)
def test_an_addition_that_the_runtime_would_mistake_for_a_bias(
    dims: str, columns: int, shape: tuple[int, ...], refused: bool
) -> None:
    text = f"g (float[{dims}] x) => (float y) {{ m = MatMul(x, w)  y = Add(m, b) }}"
    weights = {"w": w(40, columns), "b": normal(*shape)}
    model = parse(text, weights)
    result = dynamic(model)
    assert skips(result) == ([("m", MISREAD)] if refused else [])
    feed = {"x": normal(3, 40) if "n" in dims else normal(40)}
    found = both(model, feed)
    assert found.shape == next(iter(Session(parse(text, weights)).run(feed).values())).shape


# saturation


def integer_weights(model: Model) -> list[Array]:
    """Int8 codes [K, N] of every product, those of an LSTM one a direction."""
    found = [np.asarray(node.inputs[1].values) for node in nodes(model, "MatMulInteger")]
    recurrent = [node.inputs[at].values for node in nodes(model, "DynamicQuantizeLSTM") for at in (1, 2)]
    return found + [np.asarray(direction) for codes in recurrent for direction in codes]


def flat(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(("target", "bounded"), [("x86", True), ("x86-vnni", False), ("arm64", False)])
def test_saturation_is_ruled_out_where_it_could_happen(target: str, bounded: bool) -> None:
    text = """g (float[3, 2, 9] x, float[4, 9] z) => (float y, float p, float q) {
      y, h, c = LSTM<hidden_size = 8, direction = "bidirectional">(x, wx, r)
      p = MatMul(z, w)  q = Gemm<transB = 1>(z, v) }"""
    weights = {"wx": flat(2, 32, 9), "r": flat(2, 32, 8), "w": flat(9, 33), "v": flat(33, 9)}
    model = parse(text, weights)
    result = dynamic(model, target=target)
    found = integer_weights(model)
    assert len(found) == 6
    assert [saturates(codes, Layout.ROWS) for codes in found] == [not bounded] * 6
    assert all(("of 128" in change.detail) is bounded for change in result.changes)
    feed = {"x": normal(3, 2, 9), "z": normal(4, 9)}
    assert_close(parse(text, weights), model, feed)


# LSTM

LSTM_INPUTS = "float[s, n, 12] x, int32[n] lens, float[D, n, 16] h0, float[D, n, 16] c0"
LSTM_CASES = {
    "plain": ("", "x, w, r"),
    "bias": ("", "x, w, r, b"),
    "lengths": ("", "x, w, r, b, lens"),
    "states": ("", "x, w, r, b, , h0, c0"),
    "cell only": ("", "x, w, r, , , , c0"),
    "everything": ("", "x, w, r, b, lens, h0, c0, p"),
    "peepholes": ("", "x, w, r, , , , , p"),
    "clip": (", clip = 0.3", "x, w, r, b"),
    "coupled": (", input_forget = 1", "x, w, r, b"),
    "layout 0": (", layout = 0", "x, w, r, b"),
    "activations": (', activations = ["Sigmoid", "Relu", "Tanh"]', "x, w, r, b"),
    "parameters": (
        ', activations = ["HardSigmoid", "Tanh", "Softsign"], activation_alpha = [0.25], activation_beta = [0.5]',
        "x, w, r, b",
    ),
}


def lstm(case: str, direction: str) -> tuple[str, dict[str, Array]]:
    attributes, inputs = LSTM_CASES[case]
    d = 2 if direction == "bidirectional" else 1
    if d == 2:  # one list a direction
        attributes = attributes.replace('"Tanh"]', '"Tanh", "Sigmoid", "Relu", "Tanh"]')
        attributes = attributes.replace('"Softsign"]', '"Softsign", "HardSigmoid", "Tanh", "Softsign"]')
        attributes = attributes.replace("[0.25]", "[0.25, 0.25]").replace("[0.5]", "[0.5, 0.5]")
    text = f"""g ({LSTM_INPUTS.replace("D", str(d))}) => (float[s, {d}, n, 16] y, float h, float c) {{
      y, h, c = LSTM<hidden_size = 16, direction = "{direction}"{attributes}>({inputs}) }}"""
    shapes = {"w": (d, 64, 12), "r": (d, 64, 16), "b": (d, 128), "p": (d, 48)}
    weights = {
        name: flat(*shape, seed=at) / 4 for at, (name, shape) in enumerate(shapes.items()) if f", {name}" in inputs
    }
    return text, weights


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("case", LSTM_CASES)
def test_an_lstm_keeps_everything_but_its_weights(case: str, direction: str) -> None:
    text, weights = lstm(case, direction)
    model = parse(text, weights)
    result = dynamic(model)
    assert [change.detail.split(",")[0] for change in result.changes] == ["LSTM to DynamicQuantizeLSTM"]
    assert model.opset_imports["com.microsoft"] == 1
    d = 2 if direction == "bidirectional" else 1
    states = {"h0": normal(d, 3, 16) / 4, "c0": normal(d, 3, 16, seed=5) / 4}
    feed = {"x": normal(9, 3, 12), "lens": np.array([9, 4, 1], np.int32), **states}
    assert_close(parse(text, weights), model, feed)


def test_an_lstm_gets_a_scale_for_each_gate_of_each_direction() -> None:
    text, weights = lstm("bias", "bidirectional")
    model = parse(text, weights)
    dynamic(model)
    node = nodes(model, "DynamicQuantizeLSTM")[0]
    assert [node.inputs[at].shape for at in (1, 2)] == [(2, 12, 64), (2, 16, 64)]
    assert [node.inputs[at].shape for at in (8, 9, 10, 11)] == [(2, 64)] * 4
    assert [node.inputs[at].dtype for at in (1, 9)] == [np.int8, np.int8]


def test_the_hidden_size_is_taken_from_the_weights() -> None:
    text, weights = lstm("bias", "forward")
    model = parse(text.replace("hidden_size = 16, ", ""), weights)
    dynamic(model)
    feed = {"x": normal(9, 3, 12), "lens": np.array([9, 4, 1], np.int32)}
    feed |= {"h0": normal(1, 3, 16), "c0": normal(1, 3, 16)}
    assert_close(parse(text, weights), model, feed)


def test_an_lstm_that_the_kernel_does_not_know() -> None:
    text, weights = lstm("bias", "forward")
    weights["r"] = np.full_like(weights["r"], np.nan)
    assert skips(dynamic(parse(text, weights))) == [("y", "its weight R holds NaN or infinity")]
    first = """g (float[2, 9, 12] x) => (float y) { y = LSTM<hidden_size = 16, layout = 1>(x, w, r) }"""
    text, weights = lstm("plain", "forward")
    reason = "its batch comes first (layout 1), which the integer LSTM does not know"
    assert skips(dynamic(parse(first, weights))) == [("y", reason)]
    given = "g (float[9, 2, 12] x, float[1, 64, 12] w) => (float y) { y = LSTM<hidden_size = 16>(x, w, r) }"
    assert skips(dynamic(parse(given, {"r": weights["r"]}))) == [("y", "its weight W is not a constant")]


def test_small_lstms_stay_float() -> None:
    text, weights = lstm("bias", "forward")
    reason = "its 1792 weights are less than the 4000 that pay (min_weights)"
    assert skips(dynamic(parse(text, weights), min_weights=1000)) == [("y", reason)]
    assert not dynamic(parse(text, weights), min_weights=448).skipped


# what stays float


def test_what_has_no_kernel_is_named_once() -> None:
    text = """g (float[1, 4, 8, 8] x, float[3, 2, 12] s) => (float y, float z, float t) {
      y = Conv(x, w)  z = GRU<hidden_size = 16>(s, gw, gr)  t = ConvTranspose(x, w) }"""
    weights = {"w": weight(4, 4, 3, 3), "gw": flat(1, 48, 12), "gr": flat(1, 48, 16)}
    model = parse(text, weights)
    before = model.digest()
    result = dynamic(model)
    assert model.digest() == before
    assert skips(result) == [
        ("y", "ConvInteger is slower than the float Conv; the pass int8 quantizes Conv with data"),
        ("z", "the runtime has no integer GRU"),
        ("t", "the runtime has no integer ConvTranspose"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y = MatMul(x, x)", "its weight is not a constant"),
        ("y = MatMul(w, x)", "its weight is the first operand; the integer kernels take the second"),
        ("y = MatMul(w, v)", "its input is a constant"),
        ("y = MatMul(x, nan)", "its weight holds NaN or infinity"),
        ("y = MatMul(x, cube)", "its weight has 3 axes; the integer kernel takes 2"),
        ("y = Gemm<alpha = 0.5>(x, w)", "alpha is 0.5, and the integer Gemm knows only 1"),
        ("y = Gemm<transA = 1>(x, w)", "transA is 1, and the integer Gemm knows only 0"),
        ("a = DequantizeLinear(codes, one) y = MatMul(x, a)", "it is quantized already"),
        ("c = QuantizeLinear(x, one) a = DequantizeLinear(c, one) y = MatMul(a, w)", "it is quantized already"),
        ("d = Cast<to = 10>(x) e = MatMul(d, half) y = Cast<to = 1>(e)", "its weight is float16, not float32"),
    ],
)
def test_reasons(line: str, reason: str) -> None:
    weights: dict[str, Array] = {
        "w": w(8, 8),
        "v": w(8, 8, 2),
        "nan": np.full((8, 8), np.nan, np.float32),
        "cube": normal(2, 8, 8),
        "codes": np.ones((8, 8), np.int8),
        "one": np.array(1, np.float32),
        "half": w(8, 8).astype(np.float16),
    }
    used = {
        name: values
        for name, values in weights.items()
        if name in line.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    model = parse(f"g (float[8, 8] x) => (float y) {{ {line} }}", used)
    before = model.digest()
    assert [reason for _, reason in skips(dynamic(model))] == [reason]
    assert model.digest() == before


def test_local_functions_are_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "d" : 1]>
      g (float[3, 8] x) => (float[3, 8] y) { y = d.f(x, w) }
      <domain: "d", opset_import: ["" : 17]> f (a, u) => (b) { b = MatMul(a, u) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w(8, 8), "w"))
    assert skips(dynamic(load(proto))) == [("b", "it is in a local function, which several callers share")]


def test_layers_that_already_run_on_integers_are_counted_and_left() -> None:
    text = "g (float[n, 40] x) => (float[n, 24] y) { m = MatMul(x, w) y = Add(m, b) }"
    lstm_text, weights = lstm("everything", "bidirectional")
    for model in (parse(text, {"w": w(40, 24), "b": normal(24)}), parse(lstm_text, weights)):
        dynamic(model)
        before = model.digest()
        again = dynamic(model)
        assert model.digest() == before
        assert not again.changes
        assert "already quantized: 1 nodes left as they are" in again.notes


# weights with several readers


def test_a_shared_weight_is_quantized_once() -> None:
    text = """g (float[n, 40] x) => (float y, float z) {
      a = MatMul(x, w)  b = MatMul(a, w)  y = Gemm<transB = 1>(b, w)  z = Gemm(y, w) }"""
    model = parse(text, {"w": w(40, 40)})
    dynamic(model)
    products = nodes(model, "MatMulInteger")
    assert len({id(node.inputs[1]) for node in products}) == 2  # rows, and columns
    assert sum(constant.dtype == np.int8 for constant in model.constants()) == 2
    assert not any(constant.shape == (40, 40) and constant.dtype == np.float32 for constant in model.constants())
    assert_close(parse(text, {"w": w(40, 40)}), model, {"x": normal(3, 40)}, 25)


def test_a_tied_table_stays_float_and_a_small_one_is_copied() -> None:
    text = "g (int64[n] ids) => (float[n, R] y) { f = Gather(t, ids)  y = Gemm<transB = 1>(f, t) }"
    large, small = (parse(text.replace("R", str(rows)), {"t": normal(rows, 64)}) for rows in (300, 16))
    reason = "its weight is read in float by f too, so its float values stay in the file"
    assert skips(dynamic(large)) == [("y", reason)]
    assert not dynamic(small).skipped
    shown = parse("g (float[n, 64] x) => (float y, float[64, 64] w) { y = MatMul(x, w) }", {"w": w(64, 64)})
    assert skips(dynamic(shown)) == [("y", "its weight is an output too, so its float values stay in the file")]


def test_a_weight_that_one_layer_keeps_in_float_is_kept_by_all() -> None:
    text = "g (float[n, 64] x) => (float y, float z) { y = MatMul(x, w)  z = Gemm<alpha = 2.0>(x, w) }"
    found = skips(dynamic(parse(text, {"w": w(64, 64)})))
    assert [node for node, _ in found] == ["z", "y"]
    assert found[1][1] == "its weight is read in float by z too, so its float values stay in the file"


# bodies


def test_branches_and_loops_are_quantized() -> None:
    text = """g (float[2, 40] x, bool which, int64 trips) => (float[2, 40] y) {
      s = MatMul(x, w)
      yes = Constant<value: tensor = bool {1}>()
      l = Loop (trips, yes, s) < body = b (int64 i, bool go, float[2, 40] s1) => (bool again, float[2, 40] next) {
        again = Identity(go)  a = MatMul(s1, w)  o = MatMul(x, v)  t = Add(a, o)  next = Tanh(t) }>
      y = If (which) <
        then_branch = t () => (float[2, 40] tt) { tt = MatMul(l, v) },
        else_branch = e () => (float[2, 40] ee) { d = Neg(x)  c = MatMul(d, v)  ee = Neg(c) }> }"""
    weights = {"w": w(40, 40), "v": w(40, 40, 2)}
    model = parse(text, weights)
    assert len(dynamic(model).changes) == 5
    assert not nodes(model, "MatMul")
    assert sum(constant.dtype == np.int8 for constant in model.constants()) == 2
    for which in (True, False):
        feed = {"x": normal(2, 40), "which": np.array(which), "trips": np.array(3)}
        assert_close(parse(text, weights), model, feed, 25)


def test_weights_within_a_branch() -> None:
    values = ", ".join(f"{number:.4f}" for number in w(8, 4).reshape(-1))
    text = f"""g (float[2, 8] x, bool which) => (float[2, 4] y) {{
      y = If (which) <
        then_branch = t () => (float[2, 4] tt) {{
          u = Constant<value = float[8, 4] {{{values}}}>()  tt = MatMul(x, u) }},
        else_branch = e () => (float[2, 4] ee) {{
          v = Constant<value = float[8, 4] {{{values}}}>()  ee = Gemm(x, v) }}> }}"""
    model = parse(text)
    assert len(dynamic(model).changes) == 2
    for which in (True, False):
        assert_close(parse(text), model, {"x": normal(2, 8), "which": np.array(which)})


# options


THREE = """g (float[n, 64] x) => (float y) {
  [first] a = MatMul(x, w)  [layer_1] b = MatMul(a, w2)  [layer_2] y = MatMul(b, w3) }"""


def three() -> Model:
    return parse(THREE, {"w": w(64, 64), "w2": w(64, 64, 2), "w3": w(64, 64, 3)})


def test_exclude_and_only_take_names_and_patterns() -> None:
    assert [change.where for change in dynamic(three(), exclude=("first",)).changes] == ["layer_1", "layer_2"]
    found = dynamic(three(), only=("layer_*",), exclude=("*_2",))
    assert [change.where for change in found.changes] == ["layer_1"]
    assert skips(found) == [("first", "not among only=layer_*"), ("layer_2", "excluded by '*_2'")]
    with pytest.raises(UsageError, match="no node is called 'tail'"):
        dynamic(three(), exclude=("tail",))
    parsed = Int8Dynamic.parse({"exclude": "first+layer_2", "min_weights": "9"})
    assert parsed == Int8Dynamic(exclude=("first", "layer_2"), min_weights=9)
    assert str(parsed) == "int8_dynamic:exclude=first+layer_2:min_weights=9"


def test_brackets_in_a_name_are_read_as_they_stand() -> None:
    model = three()
    model.graph.nodes[0].name = "block[0]"
    assert [change.where for change in dynamic(model, only=("block[0]",)).changes] == ["block[0]"]


def test_descriptions_of_tensors_stay_true() -> None:
    text = "g (float[n, 40] x) => (float[n, 24] y) { m = Gemm<transB = 1>(x, w, b) y = Relu(m) }"
    model = parse(text, {"w": w(24, 40), "b": normal(24)})
    dynamic(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_small_layers_stay_float() -> None:
    assert len(dynamic(three(), min_weights=4096).changes) == 3
    found = dynamic(three(), min_weights=4097)
    assert skips(found)[0] == ("first", "its 4096 weights are less than the 4097 that pay (min_weights)")


NARROW = "quantizing its input would cost more than the integer kernel saves"


def test_narrow_layers_pay_only_beside_others_that_read_the_same() -> None:
    alone = "g (float[n, 512] x) => (float y) { y = MatMul(x, w) }"
    weights = {"w": w(512, 8), "v": w(512, 256)}
    assert skips(dynamic(parse(alone, {"w": weights["w"]}), all_layers=False)) == [("y", NARROW)]
    beside = "g (float[n, 512] x) => (float y, float z) { y = MatMul(x, w)  z = MatMul(x, v) }"
    assert len(dynamic(parse(beside, weights), all_layers=False).changes) == 2
    few = beside.replace("[n,", "[1,").replace("512", "64")
    square = {"w": w(64, 64), "v": w(64, 64, 2)}
    assert skips(dynamic(parse(few, square), all_layers=False)) == [("y", NARROW), ("z", NARROW)]
    assert len(dynamic(parse(few.replace("[1,", "[99,"), square), all_layers=False).changes) == 2


# as a pass


def test_it_is_lossy_needs_no_data_and_is_deterministic(tmp_path: Path) -> None:
    assert Int8Dynamic().effect is Effect.LOSSY
    assert Int8Dynamic().needs(three()) is None
    files = []
    for at in range(2):
        model = three()
        result = dynamic(model)
        path = tmp_path / f"{at}.onnx"
        model.save(path)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert result.notes == ["3 layers on dynamic integer kernels (x86), 0 left float"]


def test_every_level_of_optimization_loads_and_agrees() -> None:
    text, weights = lstm("everything", "bidirectional")
    models = [three(), parse(text, weights)]
    level = onnxruntime.GraphOptimizationLevel
    d = {"h0": normal(2, 3, 16), "c0": normal(2, 3, 16), "lens": np.array([9, 4, 1], np.int32)}
    feeds: list[Feed] = [{"x": normal(3, 64)}, {"x": normal(9, 3, 12), **d}]
    for model, feed in zip(models, feeds, strict=True):
        dynamic(model)
        found = []
        for each in (level.ORT_DISABLE_ALL, level.ORT_ENABLE_BASIC, level.ORT_ENABLE_EXTENDED, level.ORT_ENABLE_ALL):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = each
            session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options)
            found.append(session.run(None, feed)[0])
        assert all(sqnr_db(found[0], other) > 60 for other in found[1:])


def test_the_whole_command_on_names_with_colons(tmp_path: Path) -> None:
    text = "g (float[n, 64] x) => (float[n, 64] y) { m = MatMul(x, w)  y = Relu(m) }"
    model = parse(text, {"w": w(64, 64)})
    nodes(model, "MatMul")[0].outputs[0].name = "scope/m:0"
    result = onnxopt.optimize(model, passes="int8_dynamic", latency_seconds=0)
    assert optimized(result.model, tmp_path)[0] == {"DynamicQuantizeMatMul": 1, "Relu": 1}
