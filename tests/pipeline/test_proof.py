from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from ml_dtypes import int4

from onnxopt import api
from onnxopt.errors import PassError
from onnxopt.model import Model, load
from onnxopt.numerics.saturation import Layout, kernel_order, saturating_product
from onnxopt.pipeline import footprint, proof
from onnxopt.pipeline.proof import exposed
from onnxopt.pipeline.proof.kernels import kernel_figures
from onnxopt.pipeline.proof.noise import layer_figures
from onnxopt.pipeline.proof.pairs import _rows, saturation_figures
from onnxopt.report import KernelFigures, SaturationFigures
from onnxopt.runtime import Session
from onnxopt.runtime.optimized import optimized_graph
from tests.passes.quantizing import nodes, normal, parse, quantize, samples, weight
from tests.pipeline.builders import Example, bad, run

CHAIN = """g (float[1, 8, 6, 6] x) => (float[1, 4] y) {
    a = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w1)
    r = Relu(a)
    b = Conv <kernel_shape = [1, 1]> (r, w2)
    p = GlobalAveragePool(b)
    f = Flatten(p)
    y = Gemm(f, w3)
}"""
WEIGHTS: dict[str, Any] = {"w1": weight(8, 8, 3, 3), "w2": weight(8, 8, 1, 1, seed=2), "w3": weight(8, 4, seed=3)}


def feeds(count: int = 4) -> list[Mapping[str, Any]]:
    return [{"x": normal(1, 8, 6, 6, seed=seed)} for seed in range(count)]


def chain() -> Model:
    """Two convolutions and a Gemm, quantized."""
    model = parse(CHAIN, WEIGHTS)
    quantize(model, feeds())
    return model


def kernels(model: Model) -> KernelFigures:
    return kernel_figures(model, optimized_graph(model))


def rewire(node: Any, old: Any, new: Any) -> None:
    for at, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[at] = new


def without_pair_behind(model: Model, tensor: str) -> None:
    """Take the Q and DQ off a tensor: its readers get floats."""
    quantizer = next(node for node in nodes(model, "QuantizeLinear") if node.inputs[0].name == tensor)
    for back in list(quantizer.outputs[0].outputs):
        for reader in list(back.outputs[0].outputs):
            rewire(reader, back.outputs[0], quantizer.inputs[0])
        model.graph.nodes.remove(back)
        back.inputs.clear()
    model.graph.nodes.remove(quantizer)
    quantizer.inputs.clear()


# kernels


def test_every_layer_of_a_sound_result_runs_on_an_integer_kernel() -> None:
    figures = kernels(chain())
    assert (figures.layers, figures.integer, figures.unfused) == (3, 3, ())
    assert figures.kernels["QLinearConv"] == 2
    assert figures.kernels["QGemm"] == 1
    assert (figures.float_layers, figures.quantize_nodes, figures.dequantize_nodes) == (0, 1, 0)


@pytest.mark.parametrize(("tensor", "name"), [("r", "a"), ("b", "b")])
def test_a_convolution_without_quantized_output_is_named(tensor: str, name: str) -> None:
    model = chain()
    without_pair_behind(model, tensor)
    figures = kernels(model)
    assert name in [layer.name for layer in figures.unfused]
    layer = next(layer for layer in figures.unfused if layer.name == name)
    assert (layer.operator, layer.reason) == ("Conv", "its output is not quantized")
    assert figures.integer == figures.layers - len(figures.unfused)
    assert figures.dequantize_nodes > 0


def test_names_survive_whatever_the_nodes_are_called() -> None:
    model = chain()
    without_pair_behind(model, "r")
    for number, node in enumerate(model.graph.nodes):
        node.name = f"node/{number}"
    first = nodes(model, "Conv")[0]
    assert first.name in [layer.name for layer in kernels(model).unfused]


def test_a_float_layer_is_counted_and_not_blamed() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
        a = Conv <kernel_shape = [1, 1]> (x, w)
        h = HardSwish(a)
        y = Conv <kernel_shape = [1, 1]> (h, v)
    }"""
    model = parse(text, {"w": weight(8, 8, 1, 1), "v": weight(8, 8, 1, 1, seed=5)})
    quantize(model, feeds())
    figures = kernels(model)
    assert figures.unfused == ()
    assert (figures.layers, figures.float_layers) == (1, 1)


def qdq(tensor: str, name: str) -> str:
    return f"{name}_q = QuantizeLinear({tensor}, s, z) {name} = DequantizeLinear({name}_q, s, z)"


SCALES: dict[str, Any] = {
    "s": np.array(0.05, np.float32),
    "z": np.array(128, np.uint8),
    "t": np.full(8, 0.01, np.float32),
}


def test_a_convolution_with_stored_weights_alone_is_told_to_dequantize_at_every_run() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
        w = DequantizeLinear <axis = 0> (w_codes, t)
        y = Conv <kernel_shape = [1, 1]> (x, w)
    }"""
    codes = np.random.default_rng(0).integers(-100, 100, (8, 8, 1, 1)).astype(np.int8)
    figures = kernels(parse(text, {**SCALES, "w_codes": codes}))
    assert [(layer.name, layer.reason) for layer in figures.unfused] == [
        ("y", "its weight is dequantized at every run")
    ]
    assert (figures.layers, figures.integer, figures.float_layers) == (1, 0, 0)


def test_a_matmul_with_stored_weights_alone_becomes_a_kernel() -> None:
    text = "g (float[n, 64] x) => (float[n, 32] y) { w = DequantizeLinear <axis = 1> (c, t) y = MatMul(x, w) }"
    codes = np.random.default_rng(0).integers(-100, 100, (64, 32)).astype(np.int8)
    figures = kernels(parse(text, {"c": codes, "t": np.full(32, 0.01, np.float32)}, opset=21))
    assert (figures.layers, figures.integer, figures.kernels) == (1, 1, {"MatMulNBits": 1})


def test_a_dequantized_table_is_named() -> None:
    text = "g (int64[n] x) => (float[n, 32] y) { w = DequantizeLinear(c, s) y = Gather(w, x) }"
    figures = kernels(parse(text, {"c": np.ones((64, 32), np.int8), "s": SCALES["s"]}))
    assert [(layer.operator, layer.reason) for layer in figures.unfused] == [
        ("Gather", "its weight is dequantized at every run")
    ]


def test_a_recurrent_layer_and_a_gemm_with_float_bias_say_why() -> None:
    text = f"""g (float[2, 1, 8] x, float[1, 8] v) => (float[2, 1, 1, 4] y, float[1, 8] u) {{
        w = DequantizeLinear(wc, s8)
        y = GRU <hidden_size = 4> (x, w, r)
        {qdq("v", "d")}
        k = DequantizeLinear <axis = 1> (kc, t, zeros)
        u = Gemm(d, k, bias)
    }}"""
    given: dict[str, Any] = {
        **SCALES,
        "s8": np.array(0.01, np.float32),
        "wc": np.ones((1, 12, 8), np.int8),
        "r": normal(1, 12, 4),
        "kc": np.random.default_rng(0).integers(-60, 60, (8, 8)).astype(np.int8),
        "zeros": np.zeros(8, np.int8),
        "bias": normal(8),
    }
    figures = kernels(parse(text, given))
    reasons = {layer.operator: layer.reason for layer in figures.unfused}
    assert reasons["GRU"] == "its weight is dequantized at every run"
    assert reasons["Gemm"] == "its bias is float and its output is not quantized"


def test_codes_of_sixteen_bits_are_no_kernels() -> None:
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        {qdq("x", "d")}
        w = DequantizeLinear <axis = 0> (w_codes, t)
        a = Conv <kernel_shape = [1, 1]> (d, w)
        {qdq("a", "y")}
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    figures = kernels(parse(text, {**SCALES, "z": np.array(9, np.uint16), "w_codes": codes}, opset=21))
    assert [(layer.name, layer.reason) for layer in figures.unfused] == [("a", "no integer kernel takes uint16 codes")]
    assert figures.integer == 0


def test_signed_codes_and_a_relu_that_codes_do_not_imply_are_told() -> None:
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        {qdq("x", "d")}
        w = DequantizeLinear <axis = 0> (w_codes, t, zeros)
        a = Conv <kernel_shape = [1, 1]> (d, w)
        r = Relu(a)
        {qdq("r", "y")}
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    given: dict[str, Any] = {**SCALES, "w_codes": codes, "zeros": np.zeros(8, np.int8)}
    (layer,) = kernels(parse(text, given)).unfused
    assert (layer.name, layer.reason) == ("a", "the codes of its output do not imply the Relu in front of them")


def test_two_layers_of_one_weight_are_told_apart() -> None:
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y, float[1, 8, 6, 6] u) {{
        {qdq("x", "d")}
        w = DequantizeLinear <axis = 0> (w_codes, t, zeros)
        v = DequantizeLinear <axis = 0> (w_codes, t, zeros)
        a = Conv <kernel_shape = [1, 1]> (d, w)
        {qdq("a", "y")}
        u = Conv <kernel_shape = [1, 1], pads = [0, 0, 0, 0]> (d, v)
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    figures = kernels(parse(text, {**SCALES, "w_codes": codes, "zeros": np.zeros(8, np.int8)}))
    assert [layer.name for layer in figures.unfused] == ["u"]
    assert (figures.layers, figures.integer) == (2, 1)


def test_an_operator_on_floats_between_codes_is_named() -> None:
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        {qdq("x", "d")}
        a = Tanh(d)
        {qdq("a", "e")}
        y = Identity(e)
    }}"""
    figures = kernels(parse(text, SCALES))
    assert figures.between_codes == ("a",)
    assert (figures.quantize_nodes, figures.dequantize_nodes) == (2, 2)


IF = """g (bool c, float[1, 8] x) => (float[1, 8] y) {
    y = If (c) <
        then_branch = t () => (float[1, 8] p) { m = MatMul(x, w) r = Relu(m) p = MatMul(r, v) },
        else_branch = e () => (float[1, 8] q) { q = MatMul(x, v) }
    >
}"""
SQUARE: dict[str, Any] = {"w": weight(8, 8), "v": weight(8, 8, seed=4)}


def if_feeds() -> list[Mapping[str, Any]]:
    return [{"c": np.array(seed % 2 == 0), "x": normal(1, 8, seed=seed)} for seed in range(4)]


def test_bodies_are_counted() -> None:
    model = parse(IF, SQUARE)
    quantize(model, if_feeds())
    figures = kernels(model)
    assert figures.layers == figures.integer == 3
    assert figures.kernels["MatMulIntegerToFloat"] >= 1


def test_a_layer_that_did_not_fuse_in_a_body_is_named() -> None:
    text = f"""g (bool c, float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        y = If (c) <
            then_branch = t () => (float[1, 8, 6, 6] p) {{
                {qdq("x", "d")}
                w = DequantizeLinear <axis = 0> (w_codes, t, zeros)
                p = Conv <kernel_shape = [1, 1]> (d, w)
            }},
            else_branch = e () => (float[1, 8, 6, 6] q) {{ q = Identity(x) }}
        >
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    figures = kernels(parse(text, {**SCALES, "w_codes": codes, "zeros": np.zeros(8, np.int8)}))
    assert [layer.name for layer in figures.unfused] == ["p"]
    assert (figures.layers, figures.integer) == (1, 0)


@pytest.mark.parametrize("unpacking", ["Cast <to = 3> (packed)", "Gather(book, at)", "Identity(plain)"])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_are_unpacked_at_load_keep_their_layer(unpacking: str, fused: bool) -> None:
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        {qdq("x", "d")}
        k = {unpacking}
        w = DequantizeLinear <axis = 0> (k, t, zeros)
        a = Conv <kernel_shape = [1, 1]> (d, w)
        {qdq("a", "y") if fused else "y = Relu(a)"}
    }}"""
    codes = np.random.default_rng(0).integers(-8, 8, (8, 8, 1, 1)).astype(np.int8)
    given: dict[str, Any] = {**SCALES, "zeros": np.zeros(8, np.int8), "plain": codes, "packed": codes.astype(int4)}
    given |= {"book": np.arange(16).astype(np.int8), "at": codes.astype(np.int64) + 8}
    figures = kernels(parse(text, given, opset=21))
    assert (figures.layers, figures.integer) == (1, int(fused))
    assert [layer.name for layer in figures.unfused] == ([] if fused else ["a"])


def test_branches_that_the_runtime_inlines_and_names_used_twice() -> None:
    branch = f"""float[1, 8, 6, 6] p) {{
        {qdq("x", "d")} w = DequantizeLinear(c, s) p = Conv <kernel_shape = [1, 1]> (d, w) }}"""
    text = f"""g (bool b, float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {{
        y = If (b) < then_branch = t () => ({branch}, else_branch = e () => ({branch} >
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    both = kernels(parse(text, {**SCALES, "c": codes}, opset=12))
    assert [layer.name for layer in both.unfused] == ["p", "p"]
    assert (both.layers, both.integer) == (2, 0)
    inlined = parse(text.replace("bool b, ", ""), {**SCALES, "c": codes, "b": np.array(True)}, opset=12)
    assert [layer.name for layer in kernels(inlined).unfused] == ["p"]


def test_a_layer_of_a_loop_counts() -> None:
    text = f"""g (float[1, 8] x, int64 n, bool b) => (float[1, 8] y) {{
        y = Loop (n, b, x) <
            body = l (int64 i, bool k, float[1, 8] v) => (bool k2, float[1, 8] o) {{
                k2 = Identity(k)
                {qdq("v", "d")}
                w = DequantizeLinear <axis = 1> (c, t, zeros)
                o = MatMul(d, w)
            }}
        >
    }}"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8)).astype(np.int8)
    figures = kernels(parse(text, {**SCALES, "c": codes, "zeros": np.zeros(8, np.int8)}))
    assert (figures.layers, figures.kernels) == (1, {"MatMulIntegerToFloat": 1})


def test_what_the_runtime_inlines_from_a_function_is_named_too() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) { y = own.part(x, c, t) }
    <domain: "own", opset_import: ["" : 17]>
    part (v, k, f) => (o) { w = DequantizeLinear <axis = 0> (k, f) o = Conv <kernel_shape = [1, 1]> (v, w) }"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 8, 1, 1)).astype(np.int8)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "own" : 1]> {text}')
    for name, values in {"c": codes, "t": SCALES["t"]}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    figures = kernels(load(proto))
    assert [(layer.operator, layer.reason) for layer in figures.unfused] == [
        ("Conv", "its weight is dequantized at every run")
    ]
    assert (figures.layers, figures.integer) == (1, 0)


def test_kernels_that_a_file_came_with_count() -> None:
    text = """g (uint8[n, 8] x) => (int32[n, 4] y) { y = MatMulInteger(x, w) }"""
    figures = kernels(parse(text, {"w": np.ones((8, 4), np.int8)}))
    assert (figures.layers, figures.integer) == (1, 1)


# saturation


def risky(model: Model, inputs: list[Mapping[str, Any]]) -> SaturationFigures:
    return saturation_figures(model, samples(inputs))


def saturating_matmul(codes: Any, zero: int = 0, dtype: Any = np.uint8) -> Model:
    text = """g (float[n, K] x) => (float[n, N] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis = 1> (c, t, zeros)
        y = MatMul(d, w)
    }"""
    channels = codes.shape[1]
    return parse(
        text,
        {
            "s": np.array(1, np.float32),
            "z": np.array(zero, dtype),
            "c": codes,
            "t": np.full(channels, 0.5, np.float32),
            "zeros": np.zeros(channels, np.int8),
        },
    )


def test_a_bounded_result_can_saturate_nowhere() -> None:
    figures = risky(chain(), feeds())
    assert figures == SaturationFigures(checked=3)


def test_saturation_is_predicted_and_counted_on_crafted_inputs() -> None:
    codes = np.array([[127, 10], [127, 10], [1, 127], [1, -127]], np.int8)
    model = saturating_matmul(codes)
    full = {"x": np.array([[255, 255, 0, 0], [1, 1, 1, 1], [255, 0, 255, 255]], np.float32)}
    figures = risky(model, [full])
    (risk,) = figures.risks
    assert (risk.name, risk.largest_code, risk.reachable) == ("y", 255, True)
    assert (risk.outputs, risk.differing) == (6, 1)
    low = risky(model, [{"x": np.full((5, 4), 20, np.float32)}]).risks[0]
    assert (low.largest_code, low.reachable, low.outputs, low.differing) == (20, False, 10, 0)


@pytest.mark.parametrize(("zero", "dtype"), [(0, np.uint8), (131, np.uint8), (-3, np.int8)])
def test_counts_equal_those_of_the_model_of_the_kernel(zero: int, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (9, 6)).astype(np.int8)
    x = rng.integers(-128 - zero, 128 - zero, (40, 9)) if dtype is np.int8 else rng.integers(-zero, 256 - zero, (40, 9))
    (risk,) = risky(saturating_matmul(codes, zero, dtype), [{"x": x.astype(np.float32)}]).risks
    raw = (x + zero + (128 if dtype is np.int8 else 0)).astype(np.uint8)
    differ = saturating_product(raw, codes.T) != raw.astype(np.int64) @ codes.astype(np.int64)
    assert differ.any()
    assert (risk.outputs, risk.differing) == (differ.size, int(differ.sum()))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "layout", ["pads = [1, 0, 1, 0]", "strides = [2, 1], dilations = [1, 2]", 'auto_pad = "SAME_UPPER"']
)
def test_patches_of_convolutions_are_those_of_the_runtime(group: int, layout: str) -> None:
    """Where nothing saturates in exact arithmetic the codes' product is the unoptimized output; so are the patches."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (4, 6 // group, 3, 2)).astype(np.int8)
    text = f"""g (float[1, 6, 7, 5] x) => (float[1, 4, h, v] y) {{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis = 0> (c, t, zeros)
        y = Conv <group = {group}, {layout}> (d, w)
    }}"""
    given: dict[str, Any] = {"s": np.array(1, np.float32), "z": np.array(7, np.uint8), "c": codes}
    model = parse(text, {**given, "t": np.ones(4, np.float32), "zeros": np.zeros(4, np.int8)})
    x = rng.integers(-7, 249, (1, 6, 7, 5)).astype(np.float32)
    y = Session(model, optimize=False).run({"x": x})["y"]
    groups = _rows(nodes(model, "Conv")[0], codes.shape, x + 7, 7)
    ordered = kernel_order(codes, Layout.CONV).reshape(group, 4 // group, -1).astype(np.int64)
    made = [rows.astype(np.int64) @ part.T - 7 * part.sum(1) for rows, part in zip(groups, ordered, strict=True)]
    assert sorted(np.concatenate([part.ravel() for part in made])) == sorted(y.ravel().astype(np.int64))


def test_depthwise_and_unsigned_weights_never_saturate() -> None:
    text = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(c, s)
        y = Conv <group = 8, kernel_shape = [1, 2], pads = [0, 1, 0, 0]> (d, w)
    }"""
    deep = parse(text, {**SCALES, "c": np.full((8, 1, 1, 2), 127, np.int8)})
    assert risky(deep, feeds()) == SaturationFigures(checked=1)
    unsigned = saturating_matmul(np.full((4, 2), 255, np.uint8))
    nodes(unsigned, "DequantizeLinear")[1].inputs.pop()
    assert risky(unsigned, []) == SaturationFigures(checked=1)


def test_a_layer_in_a_body_is_predicted_and_not_measured() -> None:
    text = """g (bool b, float[2, 4] x) => (float[2, 2] y) {
        y = If (b) <
            then_branch = t () => (float[2, 2] p) {
                q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
                w = DequantizeLinear <axis = 1> (c, t, zeros)
                p = MatMul(d, w)
            },
            else_branch = e () => (float[2, 2] r) { r = MatMul(x, v) }
        >
    }"""
    given: dict[str, Any] = {
        "c": np.full((4, 2), 127, np.int8),
        "t": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.int8),
    }
    model = parse(text, {**SCALES, **given, "v": normal(4, 2)})
    (risk,) = risky(model, [{"b": np.array(True), "x": normal(2, 4)}]).risks
    assert (risk.name, risk.outputs, risk.differing) == ("p", None, None)


def test_weights_that_kernels_hide_are_predicted() -> None:
    text = "g (uint8[n, 4] x) => (int32[n, 2] y) { y = MatMulInteger(x, w) }"
    model = parse(text, {"w": np.full((4, 2), 127, np.int8)})
    (risk,) = risky(model, [{"x": np.full((3, 4), 200, np.uint8)}]).risks
    assert (risk.outputs, risk.differing) == (6, 6)


def test_a_weight_behind_a_cast_is_read_and_one_behind_a_codebook_is_told() -> None:
    model = saturating_matmul(np.full((4, 2), 127, np.int8))
    text = """g (float[n, 4] x) => (float[n, 2] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        k = MAKE
        w = DequantizeLinear <axis = 1> (k, t, zeros)
        y = MatMul(d, w)
    }"""
    given: dict[str, Any] = {
        "t": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.int8),
        "wide": np.full((4, 2), 127, np.int32),
    }
    given |= {"book": np.array([127], np.int8), "at": np.zeros((4, 2), np.int64)}
    cast = parse(text.replace("MAKE", "Cast <to = 3> (wide)"), {**SCALES, **given})
    assert len(risky(cast, []).risks) == len(risky(model, []).risks) == 1
    book = parse(text.replace("MAKE", "Gather(book, at)"), {**SCALES, **given})
    assert risky(book, []) == SaturationFigures(checked=0, unread=1)


def test_weights_multiplied_from_the_left_are_told() -> None:
    text = """g (float[2, n] x) => (float[4, n] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(c, s)
        y = MatMul(w, d)
    }"""
    assert risky(parse(text, {**SCALES, "c": np.full((4, 2), 127, np.int8)}), []) == SaturationFigures(0, unread=1)


# noise of layers


def test_a_destroyed_weight_is_the_worst_layer() -> None:
    reference, model = parse(CHAIN, WEIGHTS), chain()
    before, unmeasured = layer_figures(reference, model, samples(feeds()))
    assert [layer.name for layer in before] == ["a", "b", "y"]
    assert unmeasured == 0
    assert all(layer.sqnr_db > 25 for layer in before)
    second = nodes(model, "Conv")[1].inputs[1].inputs[0].inputs[0]
    second.values = np.roll(second.values, 1, axis=0)
    after, _ = layer_figures(reference, model, samples(feeds()))
    assert after[0].sqnr_db == before[0].sqnr_db
    assert after[1].sqnr_db < 3
    assert after[1].input_db is not None
    assert after[1].input_db > 25


def test_figures_are_those_of_all_elements_together_however_memory_divides_them() -> None:
    reference, model = parse(CHAIN, WEIGHTS), chain()
    whole, _ = layer_figures(reference, model, samples(feeds()))
    parts, _ = layer_figures(reference, model, samples(feeds()), memory=1)
    assert parts == whole
    sessions = [exposed.exposing(each, ["b"], 1) for each in (reference, model)]
    one, other = (np.stack([session.run(feed)["b"] for feed in feeds()]).astype(np.float64) for session in sessions)
    expected = 10 * math.log10(np.square(one).sum() / np.square(one - other).sum())
    assert whole[1].sqnr_db == pytest.approx(expected, rel=1e-9)


def test_the_sum_behind_a_product_is_compared_where_the_bias_was_quantized() -> None:
    text = "g (float[n, 64] x) => (float[n, 16] y) { m = MatMul(x, w) a = Add(m, b) y = HardSwish(a) }"
    given: dict[str, Any] = {"w": weight(64, 16), "b": normal(16, seed=9)}
    inputs = [{"x": normal(3, 64, seed=seed)} for seed in range(3)]
    reference, model = parse(text, given), parse(text, given)
    quantize(model, inputs)
    (layer,), _ = layer_figures(reference, model, samples(inputs))
    assert layer.tensor in ("a", "m")
    assert layer.sqnr_db > 25


def test_a_dynamic_product_is_compared_behind_its_scale() -> None:
    text = """g (float[n, 8] x) => (float[n, 4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, c, z)
        f = Cast <to = 1> (i)
        k = Mul(s, t)
        m = Mul(f, k)
        y = Identity(m)
    }"""
    codes = np.random.default_rng(0).integers(-60, 60, (8, 4)).astype(np.int8)
    reference = parse(
        "g (float[n, 8] x) => (float[n, 4] y) { m = MatMul(x, w) y = Identity(m) }", {"w": codes * np.float32(0.1)}
    )
    model = parse(text, {"c": codes, "t": np.array(0.1, np.float32)})
    (layer,), unmeasured = layer_figures(reference, model, samples([{"x": normal(3, 8)}]))
    assert (layer.tensor, layer.input_db, unmeasured) == ("m", math.inf, 0)
    assert 25 < layer.sqnr_db < 60


def test_tensors_of_another_shape_and_in_bodies_are_not_measured() -> None:
    narrow = {"w1": WEIGHTS["w1"][:4], "w2": WEIGHTS["w2"][:, :4], "w3": WEIGHTS["w3"]}
    model = parse(CHAIN, narrow)
    quantize(model, feeds())
    figures, unmeasured = layer_figures(parse(CHAIN, WEIGHTS), model, samples(feeds()))
    assert [layer.name for layer in figures] == ["b", "y"]
    assert unmeasured == 1
    inner = parse(IF, SQUARE)
    quantize(inner, if_feeds())
    assert layer_figures(parse(IF, SQUARE), inner, samples(if_feeds())) == ((), 3)


def test_values_that_are_not_finite_make_no_figure_of_their_own() -> None:
    reference, model = parse(CHAIN, WEIGHTS), chain()
    holes = [dict(feed) for feed in feeds(2)]
    x = holes[0]["x"].copy()
    x[0, 0, 0, 0] = np.inf
    holes[0]["x"] = x
    figures, _ = layer_figures(reference, model, samples(holes))
    assert not any(math.isnan(layer.sqnr_db) for layer in figures)


def test_sizes_that_only_a_run_tells_are_run_for() -> None:
    text = """g (float[n, 8] x) => (float[a, b] y) {
        s = NonZero(x)
        t = Transpose(s)
        y = GatherND(x, t)
    }"""
    model = parse(text.replace("float[a, b] y", "float[a] y"), {})
    held = exposed.sizes(model, ["x", "y"], {"x": np.ones((3, 8), np.float32)})
    assert held == {"x": 96, "y": 96}
    assert exposed.grouped(["x", "y"], held, 100) == [["x"], ["y"]]
    assert exposed.grouped(["x", "y"], held, 200) == [["x", "y"]]


# the whole


def test_a_run_proves_a_quantized_result_and_says_nothing_of_another(example: Example) -> None:
    report = run(example, "int8:all_layers=true").report
    figures = report.quantization
    assert figures is not None
    assert figures.kernels is not None
    assert (figures.kernels.layers, figures.kernels.integer) == (2, 2)
    assert figures.saturation == SaturationFigures(checked=2)
    assert [layer.tensor for layer in figures.layers] == ["h", "logits"]
    assert figures.samples == proof.PROOF_FEEDS
    assert figures.notes == ()
    assert "2 of 2 quantized layers run on integer kernels" in report.to_text()
    assert run(example, bad("Round:step=0.05")).report.quantization is None
    assert run(example, "int8:all_layers=true", verify=False).report.quantization is None


def test_a_check_proves_a_quantized_candidate(example: Example, tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    run(example, "int8:all_layers=true", output=output)
    report = api.check(output, example[0], example[1], latency_seconds=0)
    assert report.quantization is not None
    assert report.quantization.kernels is not None
    assert report.quantization.kernels.integer == 2
    assert api.check(example[0], example[0], example[1], latency_seconds=0).quantization is None


def test_memory_is_that_of_the_footprint(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    small = run(example, "int8:all_layers=true").report.quantization
    assert small is not None
    assert small.memory is None
    monkeypatch.setattr(footprint, "SMALL", 0)
    report = run(example, "int8:all_layers=true").report
    assert report.quantization is not None
    assert report.footprint is not None
    assert report.quantization.memory == report.footprint.memory


def test_targets_that_never_saturate_are_not_looked_at(example: Example) -> None:
    report = run(example, "int8:all_layers=true", target="arm64").report
    assert report.quantization is not None
    assert report.quantization.saturation is None


def test_a_part_that_fails_is_told_and_fails_no_run(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise PassError("the run failed", "none")

    monkeypatch.setattr(proof, "layer_figures", broken)
    report = run(example, "int8:all_layers=true").report
    assert report.quantization is not None
    assert report.quantization.notes == ("layers: the run failed",)
    assert report.quantization.kernels is not None
    assert "not proven: layers: the run failed" in report.to_text()
