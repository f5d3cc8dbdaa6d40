"""Layers, islands, formats and sensitive outputs, on graphs that are not changed."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import Model, Variable
from onnxopt.numerics.affine import activation_qparams
from onnxopt.quantization.codes import implied, shared_params, within
from onnxopt.quantization.islands import drop_unprofitable, plan, saving
from onnxopt.quantization.layers import Layer, find_layers
from onnxopt.quantization.precision import before_logarithms
from onnxopt.quantization.storage import NODE_BYTES, find_stored, places, saved_bytes
from onnxopt.target import CostFacts
from tests.passes.quantizing import Array, nodes, normal, parse, weight

COSTS = CostFacts(
    float_mac=2.0, integer_mac=1.0, float_depthwise_mac=1.0, integer_depthwise_mac=1.0, convert=10.0, node=0.0
)


def layers(model: Model) -> list[Layer]:
    return [found for found in find_layers(model) if isinstance(found, Layer)]


def known(_: Variable) -> bool:
    return True


def conv_chain(middle: str = "b = Conv(a, w)") -> Model:
    text = f"g (float[1, 8, 4, 4] x) => (float y) {{ a = Conv(x, w) {middle} c = Conv(b, w) y = Neg(c) }}"
    return parse(text, {"w": weight(8, 8, 1, 1)})


def elements(tensor: Variable) -> float:
    return 128.0


def test_a_lone_layer_pays_for_both_borders() -> None:
    model = parse("g (float[1, 8, 4, 4] x) => (float y) { a = Conv(x, w) y = Neg(a) }", {"w": weight(8, 8, 1, 1)})
    [layer] = layers(model)
    island = plan(model.graph, [layer], set(), known)
    assert saving(layer, island, elements, COSTS) == 128 * 8 * 1.0 - 2 * 128 * 10.0


def test_a_layer_between_integer_layers_pays_for_none() -> None:
    model = conv_chain()
    found = layers(model)
    island = plan(model.graph, found, set(), known)
    assert saving(found[1], island, elements, COSTS) == 128 * 8 * 1.0 + 2 * 128 * 10.0
    assert {tensor.name for tensor in island.codes} == {"x", "a", "b", "c"}
    assert {tensor.name for tensor in island.produced} == {"a", "b", "c"}


def test_islands_need_integers_on_both_sides() -> None:
    model = conv_chain("p = MaxPool<kernel_shape = [1, 1]>(a) b = Add(p, p)")
    both = plan(model.graph, layers(model), set(), known)
    assert {node.op for node in both.nodes} == {"MaxPool", "Add"}
    assert not plan(model.graph, layers(model)[:1], set(), known).nodes
    # the second layer alone: nothing in front of it is made of codes
    assert not plan(model.graph, layers(model)[1:], set(), known).nodes
    unmeasured = plan(model.graph, layers(model), set(), lambda tensor: tensor.name != "p")
    assert {node.op for node in unmeasured.nodes} == set()
    assert not plan(model.graph, layers(model), set(), known, grow=False).nodes


def test_layers_that_lose_together_go_together() -> None:
    model = conv_chain()
    found = layers(model)
    cheap = CostFacts(2.0, 1.0, 1.0, 1.0, convert=1.0, node=0.0)
    assert drop_unprofitable(model.graph, found, set(), known, elements, cheap) == (found, [])
    # together three layers save 3 * 1024 and convert 2 * 128 elements
    for convert, kept in ((11.9, 3), (12.1, 0)):
        costs = CostFacts(2.0, 1.0, 1.0, 1.0, convert=convert, node=0.0)
        assert len(drop_unprofitable(model.graph, found, set(), known, elements, costs)[0]) == kept


def test_moved_codes_share_a_format_and_others_do_not() -> None:
    model = conv_chain("p = MaxPool<kernel_shape = [1, 1]>(a) q = Transpose(p) b = Add(q, q)")
    ranges = {"x": (-1.0, 1.0), "a": (-1.0, 2.0), "p": (0.0, 2.0), "q": (0.0, 3.0), "b": (0.0, 6.0), "c": (0.0, 1.0)}
    island = plan(model.graph, layers(model), set(), known)
    found = shared_params(
        island, lambda tensor: ranges[tensor.name], lambda _, low, high: activation_qparams(low, high, np.uint8)
    )
    by_name = {tensor.name: params for tensor, params in found.items()}
    assert by_name["a"] is by_name["p"] is by_name["q"]
    assert by_name["a"].same_as(activation_qparams(-1.0, 3.0, np.uint8))
    assert by_name["b"].same_as(activation_qparams(0.0, 6.0, np.uint8))


@pytest.mark.parametrize(
    ("low", "high", "bounds", "inside"),
    [
        (0.0, 6.0, (0.0, 6.0), True),
        (0.0, 4.0, (0.0, 6.0), True),
        (0.0, 7.0, (0.0, 6.0), False),
        (-1.0, 1.0, (-1.0, 1.0), False),  # the zero-point is rounded: one end lies outside
        (-0.5, 0.5, (-1.0, 1.0), True),
        (-2.0, 0.0, (-3.0, 0.0), True),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_when_codes_imply_a_clip(
    low: float, high: float, bounds: tuple[float, float], inside: bool, dtype: type
) -> None:
    values: dict[str, Array] = {"low": np.array(bounds[0], np.float32), "high": np.array(bounds[1], np.float32)}
    model = parse("g (float[2] x) => (float[2] y) { y = Clip(x, low, high) }", values)
    [clip] = nodes(model, "Clip")
    assert within(activation_qparams(low, high, dtype), clip) is inside
    assert implied(clip) is (0.0 in bounds)


def test_logarithms_reach_back_to_the_nearest_layers_only() -> None:
    text = """g (float[2, 8] x) => (float[2, 8] y, float[2, 8] z) {
      a = MatMul(x, w)  b = MatMul(a, w)  c = MatMul(a, w)
      p = Mul(b, c)  s = Sqrt(p)  y = Log(s)
      d = MatMul(a, w)  e = Softmax(d)  z = Log(e) }"""
    model = parse(text, {"w": weight(8, 8)})
    assert {node.outputs[0].name for node in before_logarithms(model)} == {"b", "c"}


def test_what_may_be_stored_and_along_which_axes() -> None:
    text = """g (float[2, 8] x, int64[3] ids) => (float y, float z) {
      a = MatMul(x, w)  b = Gemm<transB = 1>(a, v)  y = MatMul(u, b)
      g = Gather(t, ids)  k = Gather<axis = 1>(t, ids)  z = Add(g, x) }"""
    square = {name: normal(8, 8) for name in "wvut"}
    found = {stored.weight.name: stored.kept for stored in find_stored(parse(text, square))}
    assert found == {"w": (1,), "v": (0,), "u": (0,), "t": (0,)}


def test_readers_along_one_axis_share_codes_and_others_need_their_own() -> None:
    text = """g (float[2, 8] x, int64[3] ids) => (float y, float z) {
      a = Gemm<transB = 1>(x, t)  b = Gemm<transB = 1>(a, t)  y = MatMul(b, t)
      f = Gather(t, ids)  g = Gather(t, ids)  n = Neg(t)  z = Concat<axis = 0>(f, g, n) }"""
    model = parse(text, {"t": normal(8, 8)})
    found = {reader.node.outputs[0].name: reader for reader in find_stored(model)}
    codes = 64 + 4 * 8
    assert saved_bytes([found["a"]]) == saved_bytes([found["a"], found["b"]]) == 256 - codes - NODE_BYTES
    assert saved_bytes([found["a"], found["y"]]) == 256 - 2 * (codes + NODE_BYTES)
    assert saved_bytes([found["f"], found["g"]]) == 256 - codes - 2 * NODE_BYTES
    read = {(node.outputs[0].name, at) for node, at in places(found["a"].weight)}
    assert read == {("a", 1), ("b", 1), ("y", 1), ("f", 0), ("g", 0), ("n", 0)}
