"""Weights as matrices of outputs and inputs, and back."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.graph.selection import Selection
from onnxopt.numerics.sparsity import Groups
from onnxopt.sparsity.weights import Prunable, find_prunable
from tests.passes.quantizing import Array, parse, weight


def the_one(text: str, values: Array) -> Prunable:
    weights, skipped = find_prunable(parse(text, {"w": values}), Selection(), depthwise=True)
    assert not skipped
    return weights[0]


FORMS: dict[str, tuple[str, Array, int, int]] = {  # text, values, parts, inputs behind which groups begin anew
    "matmul": ("g (float[n, 24] x) => (float[n, 16] y) { y = MatMul(x, w) }", weight(24, 16), 1, 24),
    "matmul_left": ("g (float[24, n] x) => (float[16, n] y) { y = MatMul(w, x) }", weight(16, 24), 1, 24),
    "batched": ("g (float[2, n, 24] x) => (float[2, n, 16] y) { y = MatMul(x, w) }", weight(2, 24, 16), 1, 24),
    "gemm": ("g (float[n, 24] x) => (float[n, 16] y) { y = Gemm<transB = 1>(x, w) }", weight(16, 24), 1, 24),
    "conv": ("g (float[n, 6, 9, 9] x) => (float[n, 8, a, b] y) { y = Conv(x, w) }", weight(8, 6, 3, 3), 1, 6),
    "grouped": (
        "g (float[n, 12, 9, 9] x) => (float[n, 8, a, b] y) { y = Conv<group = 2>(x, w) }",
        weight(8, 6, 3, 3),
        2,
        6,
    ),
    "transposed": (
        "g (float[n, 8, 9, 9] x) => (float[n, 10, a, b] y) { y = ConvTranspose<group = 2>(x, w) }",
        weight(8, 5, 3, 3),
        1,
        4,
    ),
    "recurrent": (
        "g (float[n, 2, 24] x) => (float[n, 1, 2, 16] y) { y = RNN<hidden_size = 16>(x, w, r) }",
        weight(1, 16, 24),
        1,
        24,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_turns_back_into_its_weight(form: str) -> None:
    text, values, parts, stretch = FORMS[form]
    if form == "recurrent":
        text = text.replace("{ y", "{ r = ConstantOfShape(s) y").replace("x) =>", "x, int64[3] s) =>")
    found = the_one(text, values)
    assert (found.parts, found.stretch) == (parts, stretch)
    matrix = found.matrix()
    assert matrix.shape[1] % stretch == 0
    np.testing.assert_array_equal(found.stored(matrix), values)
    assert found.stored(matrix).dtype == np.float32


def test_the_inputs_of_a_convolution_are_in_the_order_of_groups() -> None:
    text, values, _, stretch = FORMS["conv"]
    found = the_one(text, values)
    first = next(iter(Groups(2, 4, stretch).within(54)))
    np.testing.assert_array_equal(found.matrix()[:, slice(*first)], values[:, :4, 0, 0])
    np.testing.assert_array_equal(found.matrix()[3], values[3].transpose(1, 2, 0).reshape(-1))
    np.testing.assert_array_equal(np.sort(found.order), np.arange(54))


def test_empty_channels_are_counted() -> None:
    text, values, _, _ = FORMS["conv"]
    emptied = values.copy()
    emptied[:2] = 0
    emptied[:, 4] = 0
    found = the_one(text, emptied)
    assert found.empty_channels(found.matrix()) == (2, 1)
    assert found.empty_channels(the_one(text, values).matrix()) == (0, 0)
