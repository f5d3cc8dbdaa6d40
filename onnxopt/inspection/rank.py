"""How many columns a weight matrix needs: the rank at which a truncated decomposition leaves a small error.

The squares of the singular values of W are the eigenvalues of its Gram matrix, taken over the shorter side. By Eckart
and Young the best approximation of rank r leaves, as relative error, the root of the sum of the others over all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxopt.model import Model
from onnxopt.quantization.storage import find_weights

RELATIVE_ERROR = 1e-3
# multiply-accumulates spent on all matrices together, about a second, and on one
_BUDGET, _ONE = 12e9, 1e9
# an eigenvalue decomposition costs about so many times the cube of the side
_EIGEN = 10
# of what is dearer, a block of so many rows and columns is looked at: a rank well below that shows in it
BLOCK, _WELL_BELOW = 256, 0.75
_BLOCK_COST = (1 + _EIGEN) * float(BLOCK) ** 3
_SMALLEST_SIDE = 16
_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class LowRank:
    """matrices: that two factors would store in less. bytes: saved by that. whole, blocks: matrices looked at that way.

    candidates: matrices there are.
    """

    matrices: int
    bytes: int
    whole: int
    blocks: int
    candidates: int


def low_rank(model: Model) -> LowRank:
    """What factors of weights would save at RELATIVE_ERROR of each weight; the largest matrices are looked at first."""
    found: dict[int, tuple[NDArray[Any], int]] = {}
    for stored in find_weights(model):
        data = stored.weight.data
        if stored.node.op not in _LAYERS or data.dtype.name not in ("float16", "float32", "float64"):
            continue
        shape = _matrix(stored.node.op, data.shape, stored.node.attrs.get("group", 1))
        if shape is not None and min(shape) >= _SMALLEST_SIDE and data.uid not in found:
            found[data.uid] = data.array().reshape(shape), data.dtype.itemsize
    left, whole, blocks, matrices, saved = _BUDGET, 0, 0, 0, 0
    ordered = sorted(found.values(), key=lambda entry: (-entry[0].size, entry[0].shape))
    for at, (matrix, width) in enumerate(ordered):
        cost, part = _cost(matrix), matrix
        # what is left for each of those that follow is at least the cost of a block
        if cost > min(_ONE, left - _BLOCK_COST * (len(ordered) - at - 1)):
            part = _block(matrix)
            cost = _cost(part)
        if cost > left:
            continue
        left -= cost
        whole, blocks = whole + (part is matrix), blocks + (part is not matrix)
        rank = rank_at(part, RELATIVE_ERROR)
        if part is not matrix and rank > _WELL_BELOW * min(part.shape):
            continue
        gain = matrix.size - rank * sum(matrix.shape)
        if gain > 0:
            matrices += 1
            saved += gain * width
    return LowRank(matrices, saved, whole, blocks, len(found))


def _cost(matrix: NDArray[Any]) -> float:
    short = float(min(matrix.shape))
    return float(matrix.size) * short + _EIGEN * short**3


def _block(matrix: NDArray[Any]) -> NDArray[Any]:
    """Rows and columns drawn at random, the same for equal shapes: regular ones might follow a pattern."""
    drawn = np.random.default_rng(0)
    rows, columns = (np.sort(drawn.permutation(size)[:BLOCK]) for size in matrix.shape)
    return matrix[np.ix_(rows, columns)]


def rank_at(matrix: NDArray[Any], error: float) -> int:
    """The least rank whose best approximation leaves at most this relative error; the full rank for NaN."""
    wide = np.asarray(matrix, np.float64)
    if not np.isfinite(wide).all():
        return int(min(matrix.shape))
    gram: NDArray[np.float64] = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    energies = np.maximum(np.linalg.eigvalsh(gram), 0.0)  # ascending
    lost = np.cumsum(energies)
    if lost[-1] == 0:
        return 0
    return int(len(energies) - np.searchsorted(lost, error**2 * lost[-1], side="right"))


def _matrix(op: str, shape: tuple[int, ...], group: int) -> tuple[int, int] | None:
    if op == "Conv":
        return (shape[0], int(np.prod(shape[1:]))) if group == 1 and len(shape) > 2 else None
    return (shape[0], shape[1]) if len(shape) == 2 else None
