"""Which weights of a layer may be zero, and how those that stay make good for those that go.

A weight is a matrix W [R, K]: R outputs, each a sum over K inputs. Zeroing some of it costs, for inputs of second
moments H = E[x x^T] (or of that covariance, where a bias takes the mean part of the error),

    E|(W - W') x|^2 = tr((W - W') H (W - W')^T)

    magnitude       the smallest |w| go (Han et al. 2015, arXiv 1506.02626)
    Wanda           the smallest |w| sqrt(H_kk) go (Sun et al. 2023, arXiv 2306.11695)
    SparseGPT       in one sweep over the inputs the smallest w^2 / U_kk^2 go, U^T U = H^-1, and what each loses is made
                    good by later inputs (Frantar and Alistarh 2023, arXiv 2301.00774)
    least squares   for a given choice, in each row the weights S that stay make good for the others, D: w'_S = w_S + d,
                    H_SS d = H_SD w_D (Hassibi and Stork 1993)

A choice is a mask [R, K], true where a weight stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.feedback import DAMPING, Wide, inverse_factor

Mask: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]

# Inputs whose weights SparseGPT chooses together, and whose errors go on to all later ones together (its Bs and B).
_TOGETHER = 128
# Bytes of the systems of equations that are solved together.
_SOLVED = 64 << 20
# Inputs up to which each row's equations are solved; beyond, steps towards their solution. On layers of 384 inputs ten
# steps come to the same error in four digits, in a third of the time.
_EXACT, _STEPS = 256, 12
# Elements of rows that take these steps together, so that they stay in the cache.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Share:
    """The share of weights that go, 0 to 1, rounded down to whole weights: of each row, or of the whole matrix."""

    share: float
    by_row: bool = False

    def count(self, size: int) -> int:
        """How many of `size` weights go."""
        return int(self.share * size * (1 + 1e-12) + 1e-9)  # .29 of 100 are 29


@dataclass(frozen=True)
class Groups:
    """N:M sparsity: at most `kept` of `of` consecutive inputs stay.

    stretch: inputs after which groups begin anew, a divisor of K; 0 for K. A group that it ends early keeps `kept` of
    what it has, as if zeros followed.
    """

    kept: int
    of: int
    stretch: int = 0

    def within(self, width: int) -> Iterator[tuple[int, int]]:
        """(first input, input behind the last) of every group of `width` inputs."""
        stretch = self.stretch or width
        for begin in range(0, width, stretch):
            for start in range(begin, begin + stretch, self.of):
                yield start, min(start + self.of, begin + stretch)


def kept_by(scores: Floats, wanted: Share | Groups) -> Mask:
    """The mask that keeps the largest scores [R, K]; of equal ones earlier inputs go by share, and stay in groups."""
    if isinstance(wanted, Groups):
        return _kept_in_groups(scores, wanted)
    axis = 1 if wanted.by_row else None
    return _without_smallest(scores, wanted.count(scores.shape[1] if wanted.by_row else scores.size), axis)


def _without_smallest(scores: Floats, gone: int, axis: int | None) -> Mask:
    """The mask without the `gone` smallest scores of all (axis None), or of each row (1)."""
    kept = np.ones(scores.shape, np.bool_)
    if gone <= 0:
        return kept
    if axis == 1:
        np.put_along_axis(kept, np.argsort(scores, axis=1, kind="stable")[:, :gone], False, axis=1)
        return kept
    limit = np.partition(scores, gone - 1, axis=None)[gone - 1]
    np.greater_equal(scores, limit, out=kept)
    equal = np.flatnonzero(scores == limit)
    kept.reshape(-1)[equal[: gone - (scores.size - int(kept.sum()))]] = False
    return kept


def _kept_in_groups(scores: Floats, groups: Groups) -> Mask:
    rows, width = scores.shape
    stretch = groups.stretch or width
    missing = -stretch % groups.of
    padded = np.pad(
        scores.reshape(rows, -1, stretch).astype(np.float64), ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf
    )
    cut = padded.reshape(rows, -1, groups.of)
    order = np.argsort(-cut, axis=2, kind="stable")[:, :, : groups.kept]
    kept = np.zeros(cut.shape, np.bool_)
    np.put_along_axis(kept, order, True, axis=2)
    return kept.reshape(rows, -1, stretch + missing)[:, :, :stretch].reshape(rows, width)


def wanda_scores(matrix: Floats, power: Wide) -> Wide:
    """|w| sqrt(E x^2), [R, K]; power: E x^2 of each input, [K]."""
    return np.asarray(np.abs(matrix) * np.sqrt(np.maximum(power, 0.0)))


def lamp_scores(scores: Floats) -> Wide:
    """Scores s >= 0 made comparable between matrices: s^2 over the sum of the squares of it and all larger ones.

    What is lost relative to what is left (LAMP: Lee et al. 2021, arXiv 2010.07611, equation 4, there with s = |w|). The
    largest of each matrix scores 1, so that no matrix is emptied before all others.
    """
    squares = np.square(np.asarray(scores, np.float64)).reshape(-1)
    order = np.argsort(squares, kind="stable")
    above = np.cumsum(squares[order][::-1])[::-1]
    found = np.zeros(squares.shape)
    found[order] = squares[order] / np.where(above > 0, above, 1.0)
    return found.reshape(scores.shape)


def sparse_gpt(matrix: Floats, second: Wide, wanted: Share | Groups | Mask) -> Wide:
    """`matrix` [R, K] with weights zeroed and the others changed to make good for them; time R K^2, memory K^2.

    second: H, [K, K]. wanted: what goes, or the mask of what stays. A share is taken of every 128 inputs. Weights of
    inputs that were always zero go first.
    """
    rows, width = matrix.shape
    dead = np.diagonal(second) <= 0
    upper = inverse_factor(second, dead)
    worth = np.where(dead, 0.0, 1.0 / np.square(np.diagonal(upper)))
    left = np.array(matrix, np.float64)
    for start, stop in _stretches(width, wanted):
        # a row for each input: what the loop touches lies together
        block, factor = np.ascontiguousarray(left[:, start:stop].T), upper[start:stop, start:stop]
        errors, kept = np.zeros_like(block), np.ones(block.shape, np.bool_)
        groups: dict[int, int] = {}
        if isinstance(wanted, Share):
            size, axis = (1, 1) if wanted.by_row else (rows, None)
            scores = np.square(block).T * worth[start:stop]
            kept = _without_smallest(scores, wanted.count(size * stop) - wanted.count(size * start), axis).T
        elif isinstance(wanted, Groups):
            groups = {first - start: end - start for first, end in wanted.within(width) if start <= first < stop}
        else:
            kept = wanted[:, start:stop].T
        for k in range(stop - start):
            if k in groups and isinstance(wanted, Groups):
                group = slice(k, groups[k])
                scores = np.square(block[group]).T * worth[start:stop][group]
                kept[group] = _kept_in_groups(scores, Groups(wanted.kept, wanted.of)).T
            gone = ~kept[k]
            errors[k, gone] = block[k, gone] / factor[k, k]
            block[k, gone] = 0.0
            block[k + 1 :] -= np.outer(factor[k, k + 1 :], errors[k])
        left[:, start:stop] = block.T
        left[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return left


def _stretches(width: int, wanted: Share | Groups | Mask) -> Iterator[tuple[int, int]]:
    """Inputs that are swept before their errors go on: `_TOGETHER`, or a little more where a group ends later."""
    ends = (
        [end for _, end in wanted.within(width)] if isinstance(wanted, Groups) else range(_TOGETHER, width, _TOGETHER)
    )
    start = 0
    for end in ends:
        if end - start >= _TOGETHER and end < width:
            yield start, end
            start = end
    yield start, width


def least_squares(matrix: Floats, kept: Mask, second: Wide, damping: float = DAMPING) -> Wide:
    """`matrix` [R, K] with what is not kept at zero, and the least output error with that.

    second: H, [K, K]. damping: as a share of the mean of its diagonal, what a change of a weight costs by itself, so
    that inputs that hardly vary do not make weights large. Time R times the cube of the weights that stay in a row.
    """
    exact = np.asarray(matrix, np.float64)
    found = np.where(kept, exact, 0.0)
    lost = (exact - found) @ second
    ridge = damping * float(np.diagonal(second).mean())
    if ridge <= 0:
        return found
    counts = kept.sum(axis=1)
    order = np.argsort(counts, kind="stable")
    start = int((counts == 0).sum())
    while start < len(order):
        most = int(counts[order[start]])
        rows = order[start : start + max(1, _SOLVED // (8 * most * most))]
        most = int(counts[rows].max())
        # the kept inputs of each row, then others whose unknowns are held at zero
        inputs = np.argsort(~kept[rows], axis=1, kind="stable")[:, :most]
        real = np.arange(most) < counts[rows][:, None]
        systems = second[inputs[:, :, None], inputs[:, None, :]]
        systems *= real[:, :, None] & real[:, None, :]
        np.einsum("rkk->rk", systems)[...] += np.where(real, ridge, 1.0)
        wanted = np.where(real, np.take_along_axis(lost[rows], inputs, axis=1), 0.0)
        solved = np.linalg.solve(systems, wanted[..., None])[..., 0]
        found[rows[:, None], inputs] += solved
        start += len(rows)
    return found


def descended(matrix: Floats, start: Wide, kept: Mask, second: Wide, damping: float = DAMPING) -> Wide:
    """`start`, zero where not kept, after a few steps towards `least_squares`, for matrices too wide to solve.

    Conjugate gradients (Hestenes and Stiefel 1952) on many rows at once, preconditioned by the diagonal. Time R K^2.
    """
    found = np.array(start)
    ridge = damping * float(np.diagonal(second).mean())
    if ridge <= 0:
        return found
    damped = second + ridge * np.eye(len(second))
    rows = max(1, _AT_ONCE // len(second))
    for first in range(0, len(found), rows):
        mine = slice(first, first + rows)
        found[mine] += _steps(np.asarray(matrix[mine] - found[mine], np.float64), kept[mine], damped)
    return found


def _steps(apart: Wide, kept: Mask, damped: Wide) -> Wide:
    """What to add to the weights kept, that are `apart` from the exact ones."""
    scale = 1.0 / np.diagonal(damped)
    residual = (apart @ damped) * kept
    added, direction, power = np.zeros_like(apart), np.zeros_like(apart), np.ones((len(apart), 1))
    for _ in range(_STEPS):
        towards = residual * scale
        before, power = power, np.einsum("rk,rk->r", residual, towards)[:, None]
        direction *= _ratio(power, before)
        direction += towards
        pulled = direction @ damped
        pulled *= kept
        length = _ratio(power, np.einsum("rk,rk->r", direction, pulled)[:, None])
        added += length * direction
        pulled *= length
        residual -= pulled
    return added


def _ratio(above: Wide, below: Wide) -> Wide:
    """Their ratio; 0 where nothing is left to go."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def refitted(matrix: Floats, start: Wide, kept: Mask, second: Wide) -> Wide:
    """The weights that stay, with the least output error: by `least_squares`, or from `start` by `descended`."""
    if matrix.shape[1] <= _EXACT:
        return least_squares(matrix, kept, second)
    return descended(matrix, start, kept, second)
