"""Each row of the placement table, and a near miss: what the pass writes, and what the runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.model import Constant, Model
from onnxopt.quantization import qdq
from onnxopt.runtime import Session
from tests.passes.quantizing import Array, nodes, normal, optimized, parse, qparams, quantize, weight

FEEDS = [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(4)]
I64 = np.int64


def ints(*values: int) -> Array:
    return np.array(values, I64)


def between(body: str, extra: dict[str, Array] | None = None, channels: int = 8, opset: int = 17) -> Model:
    """Conv -> `body` (reads c, and d of a second Conv; writes o) -> Conv -> Neg."""
    text = f"""
    g (float[1, 8, 6, 6] x) => (float[n, k, h, w] y) {{
      c = Conv(x, w1, b1)
      {"d = Conv(x, w2, b1)" if "(c, d)" in body else ""}
      {body}
      e = Conv(o, w3, b3)
      y = Neg(e)
    }}"""
    initializers = {
        "w1": weight(8, 8, 1, 1),
        "w2": weight(8, 8, 1, 1, seed=2),
        "w3": weight(4, channels, 1, 1, seed=3),
        "b1": normal(8, seed=4),
        "b3": normal(4, seed=5),
    }
    used = {name: values for name, values in initializers.items() if name in text}
    return parse(text, used | (extra or {}), opset)


# operator -> (body, extra initializers, channels of o, kernels expected besides the Convs)
ISLANDS: dict[str, tuple[str, dict[str, Array], int, dict[str, int]]] = {
    "Relu": ("o = Relu(c)", {}, 8, {}),
    "Clip": ("o = Clip(c, low, high)", {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}, 8, {}),
    "Add": ("o = Add(c, d)", {}, 8, {"QLinearAdd": 1}),
    "Mul": ("o = Mul(c, d)", {}, 8, {"QLinearMul": 1}),
    "Concat": ("o = Concat<axis = 1>(c, d)", {}, 16, {"QLinearConcat": 1}),
    "LeakyRelu": ("o = LeakyRelu<alpha = 0.1>(c)", {}, 8, {"QLinearLeakyRelu": 1}),
    "GlobalAveragePool": ("o = GlobalAveragePool(c)", {}, 8, {"QLinearGlobalAveragePool": 1}),
    "AveragePool": ("o = AveragePool<kernel_shape = [2, 2]>(c)", {}, 8, {"QLinearAveragePool": 1}),
    "MaxPool": ("o = MaxPool<kernel_shape = [2, 2]>(c)", {}, 8, {"NhwcMaxPool": 1}),
    "Resize": (
        'o = Resize<mode = "nearest">(c, , scales)',
        {"scales": np.array([1, 1, 2, 2], np.float32)},
        8,
        {"Resize": 1},
    ),
    "Reshape": ("o = Reshape(c, shape)", {"shape": ints(1, 8, 36, 1)}, 8, {"Reshape": 1}),
    "Transpose": ("o = Transpose<perm = [0, 1, 3, 2]>(c)", {}, 8, {"Transpose": 3}),
    "Flatten": ("p = Flatten<axis = 2>(c) o = Reshape(p, shape)", {"shape": ints(1, 8, 6, 6)}, 8, {"Flatten": 1}),
    "Squeeze": ("p = Squeeze(c, first) o = Unsqueeze(p, first)", {"first": ints(0)}, 8, {"Squeeze": 1}),
    "Unsqueeze": ("p = Squeeze(c, first) o = Unsqueeze(p, first)", {"first": ints(0)}, 8, {"Unsqueeze": 1}),
    "Slice": (
        "o = Slice(c, from, to, along)",
        {"from": ints(1), "to": ints(4), "along": ints(2)},
        8,
        {"Slice": 1},
    ),
    "Gather": ("o = Gather<axis = 2>(c, picks)", {"picks": ints(3, 0, 1)}, 8, {"Gather": 1}),
    "Split": (
        "p, q = Split<axis = 2>(c, halves) o = Add(p, q)",
        {"halves": ints(3, 3)},
        8,
        {"Split": 1, "QLinearAdd": 1},
    ),
    "Expand": ("o = Expand(c, shape)", {"shape": ints(2, 8, 6, 6)}, 8, {"Expand": 1}),
    "Tile": ("o = Tile(c, repeats)", {"repeats": ints(1, 1, 2, 1)}, 8, {"Tile": 1}),
    "DepthToSpace": ("o = DepthToSpace<blocksize = 2>(c)", {}, 2, {"DepthToSpace": 1}),
}
LAYERS = ("Conv", "MatMul", "Gemm")


def test_every_row_has_a_case() -> None:
    assert {row.operator for row in qdq.ROWS} == {*ISLANDS, *LAYERS, *qdq.LEFT_FLOAT}


def agrees(model: Model, steps: float = 1.01) -> None:
    """Optimized and unoptimized execution differ by at most one step of the last quantized tensor, in each Conv."""
    last = list(qparams(model).values())[-1][0]
    for feed in FEEDS:
        fast, slow = Session(model).run(feed)["y"], Session(model, optimize=False).run(feed)["y"]
        assert np.abs(fast - slow).max() <= steps * last


@pytest.mark.parametrize("operator", ISLANDS)
def test_islands_run_on_integers_throughout(operator: str, tmp_path: Path) -> None:
    body, extra, channels, kernels = ISLANDS[operator]
    model = between(body, extra, channels)
    result = quantize(model, FEEDS)
    ops, graph = optimized(model, tmp_path)
    assert ops["QLinearConv"] == len(nodes(model, "Conv"))
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1), graph.node
    assert ops["Conv"] + ops["FusedConv"] == 0
    for kernel, count in kernels.items():
        assert ops[kernel] == count, ops
    assert not result.skipped
    agrees(model, 2.01)


@pytest.mark.parametrize("operator", [o for o in ISLANDS if qdq.row(nodes(between(*ISLANDS[o][:3]), o)[0])])
def test_islands_lose_little(operator: str) -> None:
    body, extra, channels, _ = ISLANDS[operator]
    model = between(body, extra, channels)
    reference = Session(between(body, extra, channels))
    quantize(model, FEEDS)
    for feed in FEEDS:
        exact, got = reference.run(feed)["y"], Session(model).run(feed)["y"]
        assert np.square(exact - got).sum() < 1e-3 * np.square(exact).sum()


def test_codes_pass_through_with_one_scale() -> None:
    model = between("p = MaxPool<kernel_shape = [2, 2]>(c) o = Reshape(p, s)", {"s": ints(1, 8, 25, 1)})
    quantize(model, FEEDS)
    found = qparams(model)
    assert found["c"] == found["p"] == found["o"]
    assert found["c"] != found["x"]


def test_pooling_with_other_scales_would_not_fuse(tmp_path: Path) -> None:
    """Why scales are shared: the same model with a different scale behind the pool keeps Q and DQ around it."""
    model = between("o = MaxPool<kernel_shape = [2, 2]>(c)")
    quantize(model, FEEDS)
    other = next(node for node in nodes(model, "QuantizeLinear") if node.inputs[0].name == "o")
    scale = Constant("other_scale", np.array(other.inputs[1].values * 1.5, np.float32))
    other.inputs[1] = scale
    other.outputs[0].outputs[0].inputs[1] = scale
    ops, _ = optimized(model, tmp_path)
    assert ops["QuantizeLinear"] == 3


@pytest.mark.parametrize("operator", sorted(qdq.LEFT_FLOAT))
def test_probabilities_get_no_codes_of_their_own(operator: str, tmp_path: Path) -> None:
    model = between(f"p = {operator}(c)  d = Relu(c)  o = Mul(d, p)")
    quantize(model, FEEDS)
    assert "p" not in qparams(model)
    ops, _ = optimized(model, tmp_path)
    assert ops[operator] == 1


def test_a_gate_on_its_own_input_carries_codes(tmp_path: Path) -> None:
    model = between("p = Sigmoid(c)  o = Mul(p, c)")
    reference = model.clone().model
    quantize(model, FEEDS)
    assert {"p", "o"} <= set(qparams(model))
    ops, _ = optimized(model, tmp_path)
    assert (ops["QLinearSigmoid"], ops["QLinearMul"], ops["QuantizeLinear"]) == (1, 1, 1)
    for feed in FEEDS:
        for name, exact in Session(reference).run(feed).items():
            error = np.square(exact.astype(np.float64) - Session(model).run(feed)[name]).sum()
            assert error < 2e-3 * np.square(exact.astype(np.float64)).sum()


def test_a_gate_stays_float_where_that_is_asked_or_others_read_it(tmp_path: Path) -> None:
    asked = between("p = Sigmoid(c)  o = Mul(c, p)")
    quantize(asked, FEEDS, gates=False)
    assert "p" not in qparams(asked)
    shared = between("p = Sigmoid(c)  m = Mul(c, p)  o = Add(m, p)")
    quantize(shared, FEEDS)
    assert "p" not in qparams(shared)


@pytest.mark.parametrize("operator", sorted(qdq.LEFT_FLOAT))
def test_probabilities_that_a_layer_reads_fuse_for_free(operator: str, tmp_path: Path) -> None:
    model = between(f"o = {operator}(c)")
    quantize(model, FEEDS)
    ops, _ = optimized(model, tmp_path)
    assert ops[f"QLinear{operator}"] == 1
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)


# near misses: body, extra, the operator that must stay float, between float neighbours
NEAR: dict[str, tuple[str, dict[str, Array], str]] = {
    "hard swish": ("o = HardSwish(c)", {}, "HardSigmoid"),
    "clip above zero": (
        "o = Clip(c, low, high)",
        {"low": np.array(0.5, np.float32), "high": np.array(6, np.float32)},
        "Clip",
    ),
    "linear resize": ('o = Resize<mode = "linear">(c, , s)', {"s": np.array([1, 1, 2, 2], np.float32)}, "Resize"),
    "subtraction": ("o = Sub(c, d)", {}, "Sub"),
    "relu beside another reader": ("p = Relu(c) m = Neg(c) o = Max(p, m)", {}, "Max"),
    "addition of a vector": (
        "p = MaxPool<kernel_shape = [1, 1]>(c) o = Add(p, v)",
        {"v": normal(1, 8, 1, 1)},
        "Add",
    ),
    "tanh": ("o = Tanh(c)", {}, "Tanh"),
    "mean": ("o = ReduceMean<axes = [2, 3]>(c)", {}, "ReduceMean"),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay_float_and_the_layers_do_not(case: str, tmp_path: Path) -> None:
    body, extra, operator = NEAR[case]
    model = between(body, extra)
    quantize(model, FEEDS)
    ops, _ = optimized(model, tmp_path)
    assert ops[operator] == 1, ops
    assert ops["QLinearConv"] == len(nodes(model, "Conv"))
    agrees(model, 2.01)


def test_pooling_that_returns_indices_stays_float() -> None:
    model = between("o, indices = MaxPool<kernel_shape = [2, 2]>(c)  i = Cast<to = 1>(indices)  z = Neg(i)")
    node = nodes(model, "MaxPool")[0]
    assert "index output" in str(qdq.ROWS[[r.operator for r in qdq.ROWS].index("MaxPool")].refuses(node))
    assert qdq.island_row(node) is None


def test_a_conv_that_makes_an_output_stays_float(tmp_path: Path) -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y, float[1, 4, 6, 6] z) {
      y = Conv(x, w1)  e = Conv(y, w3)  z = Neg(e) }"""
    model = parse(text, {"w1": weight(8, 8, 1, 1), "w3": weight(4, 8, 1, 1)})
    result = quantize(model, FEEDS, storage=False)
    ops, _ = optimized(model, tmp_path)
    assert ops["QLinearConv"] == 1
    assert ops["Conv"] == 1
    assert [skip.reason for skip in result.skipped] == ["its output is an output of the model, which stays float"]


@pytest.mark.parametrize("attribute", ["beta = 0.5", "alpha = 2.0", "transA = 1"])
def test_a_gemm_that_scales_stays_float(attribute: str, tmp_path: Path) -> None:
    shape = "16, 2" if "transA" in attribute else "2, 16"
    text = f"g (float[{shape}] x) => (float[2, 8] y) {{ y = Gemm<{attribute}>(x, w, b) }}"
    model = parse(text, {"w": weight(16, 8), "b": normal(8)})
    rows, columns = map(int, shape.split(","))
    result = quantize(model, [{"x": normal(rows, columns)}], storage=False)
    assert optimized(model, tmp_path)[0]["QGemm"] == 0
    assert attribute.split(" ")[0] in result.skipped[0].reason


GEMMS: dict[str, tuple[str, dict[str, Array], dict[str, int]]] = {
    "gemm": ("y = Gemm(x, w, b)", {}, {"QGemm": 1, "QuantizeLinear": 1}),
    "gemm without bias": ("y = Gemm(x, w)", {}, {"QuantizeLinear": 1}),
    "gemm transposed": ("y = Gemm<transB = 1>(x, t, b)", {"t": weight(8, 16)}, {"QGemm": 1}),
    "matmul": ("y = MatMul(x, w)", {}, {"MatMulIntegerToFloat": 1, "QuantizeLinear": 1}),
    "matmul and bias": ("p = MatMul(x, w) y = Add(p, b)", {}, {"QGemm": 1, "QuantizeLinear": 1}),
    "two gemms": (
        "p = Gemm(x, w, b) r = Relu(p) y = Gemm(r, v, b)",
        {"v": weight(8, 8)},
        {"QGemm": 2, "QuantizeLinear": 1},
    ),
    "two matmuls": (
        "p = MatMul(x, w) y = MatMul(p, v)",
        {"v": weight(8, 8)},
        {"QLinearMatMul": 1, "QuantizeLinear": 1},
    ),
}


@pytest.mark.parametrize("case", GEMMS)
def test_matrix_products(case: str, tmp_path: Path) -> None:
    body, extra, kernels = GEMMS[case]
    initializers = {"w": weight(16, 8), "b": normal(8)} | extra
    used: dict[str, Any] = {name: values for name, values in initializers.items() if f", {name}" in body}
    model = parse(f"g (float[4, 16] x) => (float[4, 8] y) {{ {body} }}", used)
    feeds = [{"x": normal(4, 16, seed=seed)} for seed in range(3)]
    reference = Session(parse(f"g (float[4, 16] x) => (float[4, 8] y) {{ {body} }}", used))
    quantize(model, feeds)
    ops, _ = optimized(model, tmp_path)
    assert ops["MatMul"] + ops["Gemm"] + ops["DequantizeLinear"] == 0, ops
    for kernel, count in kernels.items():
        assert ops[kernel] == count, ops
    exact, got = reference.run(feeds[0])["y"], Session(model).run(feeds[0])["y"]
    assert np.square(exact - got).sum() < 1e-3 * np.square(exact).sum()


@pytest.mark.parametrize("shape", ["2, 5, 16", "n, t, 16"])
def test_matrix_products_of_rank_3(shape: str, tmp_path: Path) -> None:
    """The float bias of a MatMul of static shape would become a float Gemm with weights dequantized in every run."""
    text = f"g (float[{shape}] x) => (float[a, c, 8] y) {{ p = MatMul(x, w) q = Add(b, p) y = Neg(q) }}"
    model = parse(text, {"w": weight(16, 8), "b": normal(8)})
    quantize(model, [{"x": normal(2, 5, 16)}])
    ops, _ = optimized(model, tmp_path)
    assert ops["QGemm"] + ops["MatMulIntegerToFloat"] == 1
    assert ops["MatMul"] + ops["Gemm"] == 0


@pytest.mark.parametrize("shape", ["2, 16", "n, t, 16"])
@pytest.mark.parametrize("layer", ["p = MatMul(x, w)", "q = MatMul(x, w) p = Add(q, b)"])
@pytest.mark.parametrize("activation", ["Relu(p)", "Clip(p, low)", "Clip(p, low, high)", "Clip(p, , high)", "Clip(p)"])
def test_an_activation_behind_a_matrix_product_does_not_keep_it_float(
    shape: str, layer: str, activation: str, tmp_path: Path
) -> None:
    """Relu or Clip between a MatMul or Gemm and a float operator: the runtime would run the layer in float."""
    text = f"g (float[{shape}] x) => (float y) {{ {layer} r = {activation} y = Neg(r) }}"
    values: dict[str, Array] = {
        "w": weight(16, 8),
        "b": normal(8),
        "low": np.array(-0.5, np.float32),
        "high": np.array(0.5, np.float32),
    }
    used = {name: array for name, array in values.items() if f", {name}" in text}
    model = parse(text, used)
    feeds = [{"x": normal(*((2, 16) if shape == "2, 16" else (2, 3, 16)), seed=seed)} for seed in range(3)]
    quantize(model, feeds)
    ops, _ = optimized(model, tmp_path)
    assert ops["MatMulIntegerToFloat"] + ops["QGemm"] == 1, ops
    assert ops["MatMul"] + ops["Gemm"] + ops["FusedGemm"] == 0
    for feed in feeds:
        exact, got = Session(parse(text, used)).run(feed)["y"], Session(model).run(feed)["y"]
        assert np.abs(exact - got).max() < 0.1


@pytest.mark.parametrize(
    ("shape", "addend"),
    [(shape, addend) for shape in ("2, 16", "n, 16") for addend in ("vector", "row", "matrix", "other")]
    + [("2, 3, 16", "vector"), ("2, 3, 16", "row")],
)
def test_a_sum_behind_a_matrix_product_does_not_keep_it_float(shape: str, addend: str, tmp_path: Path) -> None:
    """MatMul and Add of rank 2 become a Gemm, whose bias would have to be int32 codes."""
    text = f"""g (float[{shape}] x, float[2, 8] other) => (float y) {{
      p = MatMul(x, w) r = Add(p, {addend}) y = Neg(r) }}"""
    values = {"w": weight(16, 8), "vector": normal(8), "row": normal(1, 8), "matrix": normal(2, 8)}
    used = {name: array for name, array in values.items() if f", {name})" in text}
    model = parse(text, used)
    rows = (2, 3, 16) if shape == "2, 3, 16" else (2, 16)
    feeds = [{"x": normal(*rows, seed=seed), "other": normal(2, 8, seed=9)} for seed in range(3)]
    quantize(model, feeds)
    ops, _ = optimized(model, tmp_path)
    assert ops["MatMulIntegerToFloat"] + ops["QGemm"] == 1, ops
    for feed in feeds:
        exact, got = Session(parse(text, used)).run(feed)["y"], Session(model).run(feed)["y"]
        assert np.abs(exact - got).max() < 0.1


def test_nothing_behind_the_last_layer_is_quantized() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 16, 5, 5] y) {
      a = Conv(x, w1)  b = Conv(a, w2)  c = Conv(a, w3)
      p = MaxPool<kernel_shape = [2, 2]>(b)  q = MaxPool<kernel_shape = [2, 2]>(c)
      y = Concat<axis = 1>(p, q) }"""
    model = parse(text, {f"w{i}": weight(8, 8, 1, 1, seed=i) for i in (1, 2, 3)})
    quantize(model, FEEDS)
    assert set(qparams(model)) == {"x", "a", "b", "c"}


def test_islands_can_be_turned_off() -> None:
    model = between("p = MaxPool<kernel_shape = [2, 2]>(c) q = Add(p, p) o = Mul(q, q)")
    quantize(model, FEEDS, islands=False)
    assert set(qparams(model)) == {"x", "c", "o", "e"}
