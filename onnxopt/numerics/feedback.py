"""Error feedback: what changing one input of a weight does to the output is made good in the inputs that come later.

A weight W [R, K] is settled input after input. With H = E[x x^T] and U^T U = H^-1, U upper triangular, the change e of
input k moves each later input j by -e U_kj / U_kk: the least output error that they can leave (Hassibi and Stork 1993;
in this order, and in stretches of inputs, Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float64]

# Added to the diagonal of second moments, as a share of its mean, so that a factor exists (GPTQ: 1 %).
DAMPING = 0.01
# Inputs that are settled before their errors go on to all later ones: a matrix product instead of many small updates.
_LAZY = 128


class Sweep:
    """Weights of P parts, [P, R, K], of which one input after the other is settled, for second moments [P, K, K].

    Time P R K^2, memory P K^2. Inputs that were always zero pass nothing on.
    """

    def __init__(self, matrix: npt.NDArray[np.floating[Any]], second: Wide) -> None:
        # a row for each input: what an update touches lies together
        self._left = np.array(np.moveaxis(matrix, -1, 0), np.float64, order="C")
        self._upper = inverse_factor(second, np.einsum("...kk->...k", second) <= 0)
        self.freedom = np.square(np.einsum("...kk->...k", self._upper))
        self._start = self._settled = 0
        self._errors = np.zeros((min(_LAZY, len(self._left)), *self._left.shape[1:]))

    @property
    def inputs(self) -> int:
        """K."""
        return len(self._left)

    def column(self, k: int) -> Wide:
        """Input k as it is by now, [P, R]: the first that is not settled, or one that is."""
        return np.asarray(self._left[k])

    def ahead(self, stop: int) -> Wide:
        """Inputs not settled yet, up to `stop`, as they are by now, [n, P, R]."""
        k, behind = self._settled, self._behind
        found = self._left[k:stop].copy()
        if stop > behind > k:  # errors of this stretch that have not yet gone beyond it
            found[behind - k :] -= self._passed_on(behind, stop)
        return found

    def settle(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Let `values` [P, R] stand in the first input that is not settled."""
        k, behind = self._settled, self._behind
        pivot = self._upper[:, k, k, None]
        error = (self._left[k] - values) / pivot
        self._errors[k - self._start] = error
        self._left[k] = values
        self._left[k + 1 : behind] -= self._upper[:, k, k + 1 : behind].T[:, :, None] * error
        self._settled += 1
        if self._settled == behind:
            self._left[behind:] -= self._passed_on(behind, self.inputs)
            self._start = behind

    def result(self) -> Wide:
        """The weights, [P, R, K], as far as they are settled."""
        return np.ascontiguousarray(np.moveaxis(self._left, 0, -1))

    @property
    def _behind(self) -> int:
        """Where the present stretch ends."""
        return min(self._start + _LAZY, self.inputs)

    def _passed_on(self, start: int, stop: int) -> Wide:
        """What the errors of the present stretch take from later inputs, [n, P, R]."""
        factor = self._upper[:, self._start : self._settled, start:stop]
        errors = self._errors[: self._settled - self._start]
        return np.moveaxis(np.matmul(factor.transpose(0, 2, 1), np.moveaxis(errors, 0, 1)), 0, 1)


def inverse_factor(second: Wide, dead: npt.NDArray[np.bool_]) -> Wide:
    """Upper triangular U with U^T U the inverse of the damped second moments (a Cholesky factor).

    second: [..., K, K]. dead: [..., K], inputs that were always zero.
    """
    damped = np.array(second, np.float64)
    diagonal = np.einsum("...kk->...k", damped)
    mean = diagonal.mean(axis=-1, keepdims=True)
    mean = np.where(mean == 0, 1.0, mean)
    diagonal[...] = np.where(dead, mean, diagonal) + DAMPING * mean
    # inverse by the factor of the matrix turned end for end: J H J = L L^T gives H^-1 = (J L^-1 J)^T (J L^-1 J)
    lower = np.linalg.cholesky(damped[..., ::-1, ::-1])
    inverse = np.linalg.solve(lower, np.broadcast_to(np.eye(lower.shape[-1]), lower.shape))
    return np.ascontiguousarray(inverse[..., ::-1, ::-1])
