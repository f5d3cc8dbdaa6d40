"""Few-bit codes of a weight with one scale for every block of inputs, and how to choose scales and codes.

A weight is seen as a matrix [R, K]: R outputs, each a sum over K inputs. Every row is cut into blocks of B inputs, and

    w[r, k] = scale[r, k // B] * code[r, k],    lowest <= code <= highest

Round-to-nearest takes scale = max |w| / highest in each block. Two things do better at the same size. A smaller scale
clips a few large values and rounds all others more finely: `search_scales` tries a grid. And what rounding one input
does to the output can be made good in the inputs not yet rounded, as far as they move together: `feedback_round`
(GPTQ, Frantar et al. 2022, arXiv 2210.17323, algorithm 1, after Hassibi and Stork 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.affine import SMALLEST_SCALE, FloatArray
from onnxopt.numerics.feedback import Sweep

Wide = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.int8]

# Shares of max |w| that a scale search tries as the largest value represented.
_SHARES = np.linspace(1.06, 0.5, 29)
_SMALLEST_HALF = 2.0**-24  # subnormal
# Elements that a search looks at together, so that what it computes stays in the cache.
_TOGETHER = 1 << 18


@dataclass(frozen=True)
class Levels:
    """The integers that codes may be: `lowest` to `highest`, with 0 among them."""

    lowest: int
    highest: int

    @staticmethod
    def signed(bits: int) -> Levels:
        """Two's complement of 2 to 8 bits: -8..7 for 4."""
        return Levels(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)

    def round(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Nearest integers, half to even, within the levels; still of a floating type."""
        return np.asarray(np.clip(np.rint(values), self.lowest, self.highest))


@dataclass(frozen=True)
class Scaling:
    """What codes and scales may be. half: scales are float16 values. negative: a scale may turn the levels around, so
    that the one more below zero serves a large positive weight; not every runtime takes negative scales.
    """

    levels: Levels
    half: bool = False
    negative: bool = False

    def stored(self, scales: npt.NDArray[Any]) -> FloatArray:
        """Float32 scales as the file will hold them; 0 becomes 1."""
        return _as_stored(scales, self.half)


@dataclass(frozen=True)
class Blocks:
    """Codes [R, K] of int8 and float32 scales [R, ceil(K / size)], both in the matrix view of a weight."""

    codes: CodeArray
    scales: FloatArray
    size: int

    def values(self) -> FloatArray:
        """The weight that they stand for, [R, K] float32."""
        per_input = np.repeat(self.scales, self.size, axis=1)[:, : self.codes.shape[1]]
        return np.asarray(self.codes.astype(np.float32) * per_input)


def round_to_nearest(matrix: npt.NDArray[np.floating], size: int, levels: Levels) -> Blocks:
    """Codes of `matrix` [R, K] under the plain scales max |w| / highest of blocks of `size`."""
    cut = _cut(np.asarray(matrix, np.float64), size)
    scales = _as_stored(np.abs(cut).max(axis=2) / levels.highest)
    return Blocks(_codes(cut, scales, levels)[:, : matrix.shape[1]], scales, size)


def searched(matrix: npt.NDArray[np.floating], size: int, scaling: Scaling, importance: Wide | None = None) -> Blocks:
    """Codes of `matrix` [R, K] under searched scales. importance: weight of each input's error, [K]."""
    weight = None if importance is None else _cut(_near_one(importance)[None], size).astype(np.float32)
    codes, scales = [], []
    rows = max(1, _TOGETHER // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        cut = _cut(np.asarray(matrix[start : start + rows], np.float32), size)
        scales.append(search_scales(cut, scaling, weight))
        codes.append(_codes(cut, scales[-1], scaling.levels)[:, : matrix.shape[1]])
    return Blocks(np.concatenate(codes), np.concatenate(scales), size)


def _near_one(importance: Wide) -> Wide:
    """Times the power of two that brings the largest below 1: squares of large inputs are beyond float32."""
    return np.asarray(np.ldexp(importance, -int(np.frexp(importance.max(initial=0.0))[1])))


def search_scales(cut: npt.NDArray[Any], scaling: Scaling, importance: npt.NDArray[Any] | None = None) -> FloatArray:
    """Scales [R, n] that leave the least sum of importance * (w - scale * code)^2 in each block of `cut` [R, n, B].

    importance: broadcastable to `cut`.
    """
    levels = scaling.levels
    largest = np.abs(cut).max(axis=2)
    best, least = scaling.stored(largest / levels.highest), np.full(largest.shape, np.inf)
    reach = (levels.highest - levels.lowest) / 2
    for sign in (1.0, -1.0) if scaling.negative and levels.highest != -levels.lowest else (1.0,):
        for share in _SHARES:
            scales = scaling.stored(largest * (sign * share / reach))
            error = _squared_error(cut, scales, levels)
            if importance is not None:
                error *= importance
            total = error.sum(axis=2)
            better = total < least
            best, least = np.where(better, scales, best), np.where(better, total, least)
    return best


def _squared_error(cut: npt.NDArray[Any], scales: FloatArray, levels: Levels) -> npt.NDArray[Any]:
    """(w - scale * code)^2 of nearest codes, in the type and shape of `cut` [R, n, B]."""
    wide = scales.astype(cut.dtype)[:, :, None]
    error: npt.NDArray[Any] = cut / wide
    np.rint(error, out=error)
    np.clip(error, levels.lowest, levels.highest, out=error)
    error *= wide
    error -= cut
    error *= error
    return error


def feedback_round(
    matrix: npt.NDArray[np.floating],
    second: Wide,
    size: int,
    scaling: Scaling,
    *,
    scales: FloatArray | None = None,
    pair_limit: int | None = None,
) -> Blocks:
    """Codes of `matrix` [R, K] whose errors make good for each other under inputs of second moments E[x x^T] [K, K].

    Inputs are rounded one after the other; the error of each, divided by how freely it moves given the later ones, is
    taken out of these. scales: [R, ceil(K / size)]; by default they are searched when a block is reached, for the
    weights as they are by then. pair_limit: the largest same-sign sum that codes of inputs 2 j and 2 j + 1 may have
    (`saturation`). Inputs that were always zero round to nearest. Time R K^2, memory K^2 float64.
    """
    rows, width = matrix.shape
    levels = scaling.levels
    sweep = Sweep(matrix[None], second[None])
    spread = sweep.freedom[0]
    codes = np.zeros((rows, width), np.int8)
    chosen = np.ones((rows, -(-width // size)), np.float32) if scales is None else scales
    for k in range(width):
        if scales is None and k % size == 0:
            settled = sweep.ahead(min(k + size, width))[:, 0].T
            found = search_scales(settled[:, None], scaling, 1.0 / spread[None, None, k : k + size])
            chosen[:, k // size] = found[:, 0]
        scale = chosen[:, k // size].astype(np.float64)
        rounded = levels.round(sweep.column(k)[0] / scale)
        if pair_limit is not None and k % 2:
            before = codes[:, k - 1].astype(np.int64)
            rounded = np.clip(rounded, np.maximum(-before, 0) - pair_limit, pair_limit - np.maximum(before, 0))
        codes[:, k] = rounded
        sweep.settle((scale * rounded)[None])
    return Blocks(codes, chosen, size)


def refined(matrix: npt.NDArray[np.floating], second: Wide, found: Blocks, scaling: Scaling, rounds: int = 2) -> Blocks:
    """`found` with codes and scales chosen anew in turn, each as the others stand; the output error only falls.

    A code moves to the level nearest to where the error would be least, all others kept (coordinate descent); then the
    scales of each row are the least-squares solution for its codes, kept where rounding them would not pay.
    """
    exact, size = np.asarray(matrix, np.float64), found.size
    starts = np.arange(0, exact.shape[1], size)
    codes, scales = found.codes.astype(np.float64), found.scales
    weighted = exact @ second
    for _ in range(rounds):
        codes = _descended(exact, second, codes, scales, size, scaling.levels)
        rhs = np.add.reduceat(codes * weighted, starts, axis=1)
        products = np.empty((len(exact), len(starts), len(starts)))
        for block, start in enumerate(starts):
            mine = slice(start, start + size)
            products[:, block] = np.add.reduceat(codes * (codes[:, mine] @ second[mine]), starts, axis=1)
        ridge = 1e-9 * np.trace(products, axis1=1, axis2=2) + np.finfo(np.float64).tiny
        solved = np.linalg.solve(products + ridge[:, None, None] * np.eye(len(starts)), rhs[..., None])[..., 0]
        refitted = scaling.stored(np.where(np.sign(solved) == np.sign(scales), solved, scales))
        errors = [
            _row_errors(exact, codes * _spread(each, exact.shape[1], size), second) for each in (refitted, scales)
        ]
        scales = np.where((errors[0] < errors[1])[:, None], refitted, scales)
    return Blocks(codes.astype(np.int8), scales, size)


def _descended(exact: Wide, second: Wide, codes: Wide, scales: FloatArray, size: int, levels: Levels) -> Wide:
    """Codes after each was moved once to its best level, in order."""
    codes, step = codes.copy(), _spread(scales, exact.shape[1], size)
    pull = (exact - codes * step) @ second
    for k, power in enumerate(np.diagonal(second)):
        if power <= 0:
            continue
        moved = levels.round(codes[:, k] + pull[:, k] / power / step[:, k]) - codes[:, k]
        codes[:, k] += moved
        changed = np.flatnonzero(moved)
        pull[changed] -= np.outer(moved[changed] * step[changed, k], second[k])
    return codes


def _spread(scales: FloatArray, width: int, size: int) -> Wide:
    """Scales [R, n] for every input, [R, K] float64."""
    return np.repeat(scales.astype(np.float64), size, axis=1)[:, :width]


def _row_errors(exact: Wide, rounded: Wide, second: Wide) -> Wide:
    apart = exact - rounded
    return np.asarray(np.einsum("rk,rk->r", apart @ second, apart))


def shrunk(second: Wide, rows: int) -> Wide:
    """Second moments [K, K] that `rows` inputs gave, as if K more had come whose entries do not move together.

    Few inputs seem to move together more than they do; rounding that trusts them is worse than rounding to nearest on
    inputs it has not seen. (Shrinkage of a covariance towards its diagonal, as in Ledoit and Wolf 2004; the weight is
    chosen by trial on held-out inputs.)
    """
    width = len(second)
    share = width / (width + rows)
    return np.asarray((1.0 - share) * second + share * np.diag(np.diagonal(second)))


def output_error(matrix: npt.NDArray[np.floating], rounded: npt.NDArray[np.floating], second: Wide) -> float:
    """E|(W - W') x|^2 / E|W x|^2 for inputs of second moments `second` [K, K]; 0 where there is no output."""
    exact = np.asarray(matrix, np.float64)
    apart = exact - rounded
    power = float(np.einsum("rk,kj,rj->", exact, second, exact, optimize=True))
    return float(np.einsum("rk,kj,rj->", apart, second, apart, optimize=True)) / power if power > 0 else 0.0


def _cut(matrix: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """[R, K] as [R, ceil(K / size), size], with zeros at the end."""
    rows, width = matrix.shape
    blocks = -(-width // size)
    padded = np.pad(matrix, ((0, 0), (0, blocks * size - width)))
    return padded.reshape(rows, blocks, size)


def _codes(cut: npt.NDArray[Any], scales: FloatArray, levels: Levels) -> CodeArray:
    return np.asarray(levels.round(cut / scales.astype(np.float64)[:, :, None]), np.int8).reshape(len(cut), -1)


def _as_stored(scales: npt.NDArray[Any], half: bool = False) -> FloatArray:
    """Float32 scales that are not too small, rounded to what float16 holds with `half`. A scale of zero becomes 1."""
    least = float(_SMALLEST_HALF if half else SMALLEST_SCALE)
    stored = np.where(scales != 0, np.copysign(np.maximum(np.abs(scales), least), scales), 1.0).astype(np.float32)
    return stored.astype(np.float16).astype(np.float32) if half else stored
