"""fuse_matmul_add: products of two matrices and what is added to them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import load
from onnxopt.passes.fuse_matmul_add import FuseMatmulAdd
from tests.helpers import apply, assert_close, assert_valid, operators, proto, run

NUMBERS = """<float[3] row = {1, 2, 3}, float[1,3] line = {1, 2, 3}, float[2,1] column = {4, 5}, float one = {7},
  float[1,1,3] deep = {1, 2, 3}>"""
FUSED = {
    "a row": "p = MatMul(x, w) y = Add(p, row)",
    "a row before": "p = MatMul(x, w) y = Add(row, p)",
    "a line": "p = MatMul(x, w) y = Add(p, line)",
    "a column": "p = MatMul(x, w) y = Add(p, column)",
    "a number": "p = MatMul(x, w) y = Add(p, one)",
    "a matrix": "p = MatMul(x, w) y = Add(p, b)",
    "a Gemm without addend": "p = Gemm<alpha = 0.5, transB = 1>(x, v) y = Add(p, row)",
}
KEPT = {
    "one axis more": "p = MatMul(x, w) q = Add(p, deep) y = Squeeze(q)",
    "a Gemm with addend": "p = Gemm(x, w, row) y = Add(p, row)",
    "a product read twice": "p = MatMul(x, w) q = Add(p, row) y = Mul(p, q)",
    "what spreads the product": "p = MatMul(x, w) q = ReduceMax(p) y = Add(q, b)",
}


def text(body: str) -> str:
    return f"g (float[2,4] x, float[4,3] w, float[3,4] v, float[2,3] b) => (float[c,d] y) {NUMBERS} {{ {body} }}"


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 4), "w": (4, 3), "v": (3, 4), "b": (2, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("opset", [9, 13, 21])
@pytest.mark.parametrize("kind", list(FUSED))
def test_they_become_one_gemm(kind: str, opset: int) -> None:
    if opset < 11 and "Gemm" in FUSED[kind]:
        pytest.skip("a Gemm had to have an addend then")
    source = proto(text(FUSED[kind]), opset)
    target = load(source)
    assert apply(FuseMatmulAdd(), target).changes
    assert operators(target) == ["Gemm"]
    assert_valid(target)
    assert_close(run(source, feeds()), run(target, feeds()))
    assert not apply(FuseMatmulAdd(), target).changes


@pytest.mark.parametrize("kind", list(KEPT))
def test_others_stay(kind: str) -> None:
    target = load(proto(text(KEPT[kind])))
    before = target.digest()
    assert not apply(FuseMatmulAdd(), target).changes
    assert target.digest() == before


def test_a_batch_of_matrices_and_integers_stay() -> None:
    for types in ("float[5,2,4] x, float[4,3] w) => (float[5,2,3] y", "int32[2,4] x, int32[4,3] w) => (int32[2,3] y"):
        kind = types.split("[")[0]
        target = load(proto(f"g ({types}) <{kind}[3] row = {{1, 2, 3}}> {{ p = MatMul(x, w) y = Add(p, row) }}"))
        assert not apply(FuseMatmulAdd(), target).changes


def test_an_addend_of_open_length_stays() -> None:
    target = load(
        proto("g (float[N,4] x, float[4,3] w, float[M,3] b) => (float[c,d] y) { p = MatMul(x, w) y = Add(p, b) }")
    )
    result = apply(FuseMatmulAdd(), target)
    assert [skip.reason for skip in result.skipped] == ["what is added may not spread over the product"]
