"""Multiply-accumulates: by hand, against a loop over the definition, and where shapes are not known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.graph.macs import LAYERS, Shape, layer_macs, static_shape
from onnxopt.graph.shapes import infer
from onnxopt.model import Model
from tests.helpers import model


def counted(text: str, imports: str = "") -> int | None:
    """Of the only node, with the shapes that inference tells."""
    found = model(text, imports=imports) if imports else model(text)
    infer(found)
    (node,) = found.graph.nodes
    return layer_macs(node, static_shape)


@pytest.mark.parametrize(
    ("inputs", "output", "node", "macs"),
    [
        ("float[2, 6, 9, 9] x, float[8, 6, 3, 3] w", "[2, 8, 7, 7]", "Conv(x, w)", 2 * 8 * 49 * 6 * 9),
        ("float[2, 6, 9, 9] x, float[6, 1, 3, 3] w", "[2, 6, 7, 7]", "Conv<group = 6>(x, w)", 2 * 6 * 49 * 9),
        (
            "float[2, 6, 9] x, float[8, 3, 3] w, float[8] b",
            "[2, 8, 4]",
            "Conv<group = 2, strides = [2]>(x, w, b)",
            2 * 8 * 4 * 9,
        ),
        ("float[1, 6, 5, 5] x, float[6, 4, 2, 2] w", "[1, 4, 6, 6]", "ConvTranspose(x, w)", 6 * 25 * 4 * 4),
        ("float[1, 6, 5, 5] x, float[6, 2, 2, 2] w", "[1, 4, 6, 6]", "ConvTranspose<group = 2>(x, w)", 6 * 25 * 2 * 4),
        ("float[3, 5] x, float[5, 7] w, float[7] b", "[3, 7]", "Gemm(x, w, b)", 105),
        ("float[5, 3] x, float[7, 5] w", "[3, 7]", "Gemm<transA = 1, transB = 1>(x, w)", 105),
        ("float[3, 5] x, float[5, 7] w", "[3, 7]", "MatMul(x, w)", 105),
        ("float[2, 1, 3, 5] x, float[4, 5, 7] w", "[2, 4, 3, 7]", "MatMul(x, w)", 8 * 105),
        ("float[5] x, float[4, 5, 7] w", "[4, 7]", "MatMul(x, w)", 4 * 35),
        ("float[4, 3, 5] x, float[5] w", "[4, 3]", "MatMul(x, w)", 60),
        ("float[5] x, float[5] w", "", "MatMul(x, w)", 5),
        ("float[0, 5] x, float[5, 7] w", "[0, 7]", "MatMul(x, w)", 0),
        ("float[2, 3, 5] x, float[2, 5, 7] w", "[2, 3, 7]", 'Einsum<equation = "bij, bjk -> bik">(x, w)', 210),
        ("float[2, 3, 5] x, float[5, 7] w", "[2, 3, 7]", 'Einsum<equation = "...ij,...jk">(x, w)', 210),
        ("float[2, 3, 5] x", "[2]", 'Einsum<equation = "bij -> b">(x)', 0),
        ("float[2, 3, 4] x", "[2, 3, 4]", "Relu(x)", 0),
    ],
)
def test_by_hand(inputs: str, output: str, node: str, macs: int) -> None:
    assert counted(f"g ({inputs}) => (float{output} y) {{ y = {node} }}") == macs


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent(op: str, gates: int, directions: int) -> None:
    w, r = f"float[{directions}, {gates * 6}, 5] w", f"float[{directions}, {gates * 6}, 6] r"
    direction = "bidirectional" if directions == 2 else "forward"
    text = f"g (float[7, 3, 5] x, {w}, {r}) => (float[7, {directions}, 3, 6] y)"
    found = counted(f'{text} {{ y = {op}<hidden_size = 6, direction = "{direction}">(x, w, r) }}')
    assert found == directions * 7 * 3 * gates * 6 * (5 + 6)


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@given(SHAPES, SHAPES)
def test_matmul_against_the_definition(left: Shape, right: Shape) -> None:
    text = f"g (float[{', '.join(map(str, left))}] x, float[{', '.join(map(str, right))}] w) => (float y)"
    (node,) = model(f"{text} {{ y = MatMul(x, w) }}").graph.nodes
    shapes = {"x": left, "w": right}
    try:
        out = np.matmul(np.ones(left), np.ones(right))
    except ValueError:
        return
    # a product of ones tells how many there were in each sum
    assert layer_macs(node, lambda tensor: shapes.get(tensor.name)) == out.sum()


@given(st.lists(st.sampled_from(["ij", "jk", "ki", "i", "ii"]), min_size=2, max_size=3), st.data())
def test_einsum_against_the_definition(terms: list[str], data: st.DataObject) -> None:
    sizes = {label: data.draw(st.integers(1, 3), label) for label in "ijk"}
    names = [f"x{at}" for at in range(len(terms))]
    shapes = {name: tuple(sizes[label] for label in term) for name, term in zip(names, terms, strict=True)}
    inputs = ", ".join(f"float[{', '.join(map(str, shapes[name]))}] {name}" for name in names)
    equation = f"{','.join(terms)} ->"
    (node,) = model(
        f'g ({inputs}) => (float y) {{ y = Einsum<equation = "{equation}">({", ".join(names)}) }}'
    ).graph.nodes
    used = sorted(set("".join(terms)))
    choices = len(list(itertools.product(*(range(sizes[label]) for label in used))))
    assert layer_macs(node, lambda tensor: shapes.get(tensor.name)) == choices * (len(terms) - 1)


def test_what_is_not_known_is_none() -> None:
    assert counted("g (float[n, 5] x, float[5, 7] w) => (float[n, 7] y) { y = MatMul(x, w) }") is None
    assert counted("g (float[n, 6, 9, 9] x, float[8, 6, 3, 3] w) => (float[n, 8, 7, 7] y) { y = Conv(x, w) }") is None
    assert counted("g (float[5, 7] w, float x) => (float y) { y = MatMul(x, w) }") is None


def test_a_custom_operator_of_the_same_name_counts_nothing() -> None:
    text = "g (float[3, 5] x, float[5, 7] w) => (float[3, 7] y) { y = custom.MatMul(x, w) }"
    assert counted(text, imports='"custom" : 1') == 0


def test_the_shape_of_a_run_takes_the_place_of_an_open_one() -> None:
    found: Model = model("g (float[n, 5] x, float[5, 7] w) => (float[n, 7] y) { y = MatMul(x, w) }")
    (node,) = found.graph.nodes
    shapes = {"x": (4, 5), "w": (5, 7), "y": (4, 7)}
    assert layer_macs(node, lambda tensor: shapes.get(tensor.name)) == 140
    assert node.op in LAYERS
