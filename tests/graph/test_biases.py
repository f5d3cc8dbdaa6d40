"""Where a constant for each output channel can be added without a new node."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.graph.biases import BiasSlot, bias_slot
from onnxopt.model import Constant, Model
from onnxopt.quantization.layers import shared_tensors
from onnxopt.runtime import Session
from tests.passes.quantizing import Array, nodes, normal, parse, weight


def slot_of(model: Model, op: str) -> BiasSlot | None:
    return bias_slot(nodes(model, op)[0], shared_tensors(model))


ROWS = "g (float[n, 6] x) => (float[n, 4] y)"
IMAGES = "g (float[n, 3, 5, 5] x) => (float[n, 4, 3, 3] y)"
# text, the bias that there is, operator
SLOTS: dict[str, tuple[str, Array | None, str]] = {
    "gemm": (f"{ROWS} {{ y = Gemm(x, w, b) }}", normal(4), "Gemm"),
    "gemm_row": (f"{ROWS} {{ y = Gemm(x, w, b) }}", normal(1, 4), "Gemm"),
    "gemm_number": (f"{ROWS} {{ y = Gemm(x, w, b) }}", np.array(0.3, np.float32), "Gemm"),
    "gemm_scaled": (f"{ROWS} {{ y = Gemm<alpha = 0.5, beta = 4.0>(x, w, b) }}", normal(4), "Gemm"),
    "gemm_none": (f"{ROWS} {{ y = Gemm<alpha = 3.0>(x, w) }}", None, "Gemm"),
    "matmul_add": (f"{ROWS} {{ a = MatMul(x, w) y = Add(a, b) }}", normal(4), "MatMul"),
    "matmul_add_left": (f"{ROWS} {{ a = MatMul(x, w) y = Add(b, a) }}", normal(1, 1), "MatMul"),
    "conv": (f"{IMAGES} {{ y = Conv(x, w, b) }}", normal(4), "Conv"),
    "conv_none": (f"{IMAGES} {{ y = Conv(x, w) }}", None, "Conv"),
}


@pytest.mark.parametrize("kind", SLOTS)
def test_what_is_added_arrives_as_units_of_the_product(kind: str) -> None:
    text, bias, op = SLOTS[kind]
    given = {"w": weight(4, 3, 3, 3) if op == "Conv" else weight(6, 4)}
    model = parse(text, given if bias is None else {**given, "b": np.asarray(bias)})
    feed = {"x": normal(2, 3, 5, 5) if op == "Conv" else normal(2, 6)}
    before = Session(model).run(feed)["y"]
    slot = slot_of(model, op)
    assert slot is not None
    node = nodes(model, op)[0]
    alpha = float(node.attrs.get("alpha", 1.0))
    amounts = np.arange(1.0, 5.0)
    added = slot.plus(amounts, np.dtype(np.float32))
    assert added.dtype == np.float32
    if slot.given is None:
        node.inputs = [*node.inputs[:2], Constant("added", added)]
    else:
        slot.given.values = added
    model.normalize()
    wanted = alpha * amounts.reshape((4, 1, 1) if op == "Conv" else 4)
    np.testing.assert_allclose(Session(model).run(feed)["y"] - before, np.broadcast_to(wanted, before.shape), atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        f"{ROWS} {{ y = MatMul(x, w) }}",
        f"{ROWS} {{ a = MatMul(x, w) y = Mul(a, b) }}",
        f"{ROWS} {{ a = MatMul(x, w) y = Add(a, a) }}",
        "g (float[n, 6] x) => (float[n, 4] y, float[n, 4] z) { a = MatMul(x, w) y = Add(a, b) z = Relu(a) }",
        "g (float[n, 6] x) => (float[n, 4] y, float[n, 4] a) { a = MatMul(x, w) y = Add(a, b) }",
        "g (float[n, 6] x, float[n, 4] c) => (float[n, 4] y) { a = MatMul(x, w) y = Add(a, c) }",
        "g (float[n, 6] x, float[4] c) => (float[n, 4] y) { y = Gemm(x, w, c) }",
        f"{ROWS} {{ y = Gemm<beta = 0.0>(x, w, b) }}",
        "g (float[6, n] x) => (float[4, n] y) { a = MatMul(x, b) y = Relu(a) }",
    ],
)
def test_there_is_none_where_others_would_see_it_or_it_is_computed(text: str) -> None:
    model = parse(text, {"w": weight(6, 4), "b": normal(4)})
    assert slot_of(model, "Gemm" if "Gemm" in text else "MatMul") is None
