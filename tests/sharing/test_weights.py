"""Which constants may share values, and how reports name the reasons of the others."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxopt.graph.selection import Selection
from onnxopt.model import load
from onnxopt.sharing.codebooks import Form, group_count
from onnxopt.sharing.weights import Shareable, find_shareable, finite
from tests.passes.quantizing import normal, parse, weight


def found(text: str, **given: np.ndarray) -> tuple[list[Shareable], dict[str, str]]:
    layers, skipped = find_shareable(parse(text, given), Selection(), True)
    return layers, {skip.node: skip.reason for skip in skipped}


def test_readers_of_one_weight_are_found_together() -> None:
    text = "g (float[n, 32] x) => (float[n, 32] y) { a = MatMul(x, w) y = Gemm<transB = 1>(a, w) }"
    [only], reasons = found(text, w=weight(32, 32))
    assert [reader.node.op for reader in only.readers] == ["MatMul", "Gemm"]
    assert only.weight is None  # seen as two matrices
    assert not reasons


def test_quantized_readers_and_foreign_ones_refuse() -> None:
    w = helper.make_node("MatMul", ["x", "w"], ["a"])
    other = helper.make_node("FusedMatMul", ["a", "v"], ["y"], domain="com.microsoft")
    third = helper.make_node("MatMul", ["y", "v"], ["z"])
    graph = helper.make_graph(
        [w, other, third],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 80])],
        [helper.make_tensor_value_info("z", 1, ["n", 80])],
        [numpy_helper.from_array(weight(80, 80, seed=at), name) for at, name in enumerate("wv")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    for computed in (True, False):
        layers, skipped = find_shareable(model, Selection(), computed)
        assert len(layers) == (1 if computed else 2)
        assert [skip.reason for skip in skipped] == (
            ["com.microsoft.FusedMatMul reads it, whose kernel may need a constant"] if computed else []
        )


def test_a_layer_in_a_local_function_is_named() -> None:
    proto = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17, "d" : 1]>
    g (float[n, 64] x) => (float[n, 64] y) { y = d.f(x) }
    <domain: "d", opset_import: ["" : 17]>
    f (x) => (y) { y = MatMul(x, w) }
    """)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(64, 64)))
    proto.functions[0].node.insert(0, constant)
    layers, skipped = find_shareable(load(proto), Selection(), True)
    assert not layers
    assert [skip.reason for skip in skipped] == ["it is in a local function, which several callers share"]


def test_not_every_constant_is_finite() -> None:
    model = parse("g (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }", {"w": np.array([[np.nan]] * 4)})
    assert not finite(next(iter(model.constants())))


def test_codebooks_serve_equal_runs_of_outputs_and_take_few_bytes() -> None:
    [wide], _ = found("g (float[n, 512] x) => (float[n, 96] y) { y = MatMul(x, w) }", w=normal(512, 96))
    assert [group_count(wide, Form(16, group)) for group in (1, 5, 48, 96, 1000)] == [96, 16, 2, 1, 1]
    for bits in (4, 8):
        groups = group_count(wide, Form(1 << bits))
        assert groups > 1
        assert groups * 4 * 2**bits + 4 * 96 <= 0.05 * 512 * 96 * bits / 8
    [few], _ = found("g (float[n, 40000] x) => (float[n, 3] y) { y = MatMul(x, w) }", w=normal(40000, 3))
    assert group_count(few, Form(16)) == 3
    [narrow], _ = found("g (float[n, 9] x) => (float[n, 960] y) { y = MatMul(x, w) }", w=normal(9, 960))
    assert group_count(narrow, Form(16)) == 1
