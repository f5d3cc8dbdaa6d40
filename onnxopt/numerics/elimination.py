"""Which inputs of a linear layer can be told from the others, and how: least squares over second moments.

A layer reads x [K] with weights W [rows, K]. When the inputs D go and S stay, x_D is replaced by its best linear
prediction from what stays,

    x_D ~ A x_S + c          A = C_DS C_SS^-1          c = m_D - A m_S

with means m and covariance C (or E[x x^T], and c = 0, where nothing can take c in). Whatever reads x, a matrix or a
convolution, then takes W_S + W_D A for its weights on S, and adds W_D c to its bias. What stays wrong in its outputs is
tr(W_D (C_DD - A C_SD) W_D^T). (Optimal brain surgery with whole inputs for weights: Frantar and Alistarh, "Optimal
Brain Compression", 2022, section 3; predictions from kept channels: Chee et al., "Model Preserving Compression for
Neural Networks", 2022.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

RIDGE = 3e-3  # of the mean variance


def damped(second: npt.NDArray[np.floating], rows: int, ridge: float = RIDGE) -> Floats:
    """Second moments [K, K] of `rows` inputs, trusted as far as they were seen, and safe to invert.

    Entries off the diagonal are shrunk as if K inputs had come on top that do not move together (Ledoit and Wolf 2004
    shrink so, with another weight); `ridge` of the mean diagonal is added.
    """
    size = len(second)
    share = rows / (rows + size)
    diagonal = np.diagonal(second).astype(np.float64)
    found = np.asarray(second, np.float64) * share
    found[np.arange(size), np.arange(size)] = diagonal + ridge * diagonal.mean() + 1e-30 if size else 0.0
    return found


class Elimination:
    """What one layer asks of its inputs, kept up to date while they go: the others are refitted each time.

    inverse: of the second moments of the inputs that are left; energy: W^T W of their refitted weights. Both shrink as
    inputs go (`alive` says which are left).
    """

    def __init__(self, second: Floats, energy: Floats) -> None:
        """second [K, K]: damped; energy [K, K]: W^T W."""
        self._inverse = np.linalg.inv(second)
        self._energy = np.array(energy, np.float64)
        self._alive = np.arange(len(second))
        self._place = np.arange(len(second))

    def costs(self, blocks: Indices) -> Floats:
        """[n]: squared error at the outputs that removing all inputs of a row of blocks [n, b] adds, for each row."""
        at = self._place[blocks]
        if at.shape[1] == 1:
            variance = self._inverse[at[:, 0], at[:, 0]]
            return np.asarray(self._energy[at[:, 0], at[:, 0]] / np.maximum(variance, 1e-200))
        inner = self._inverse[at[:, :, None], at[:, None, :]]
        energy = self._energy[at[:, :, None], at[:, None, :]]
        return np.asarray(np.einsum("nij,nij->n", energy, np.linalg.pinv(inner, hermitian=True)))

    def remove(self, gone: Indices) -> float:
        """Take these inputs out together; returns the squared error that it adds."""
        at = self._place[gone]
        left = np.ones(len(self._alive), np.bool_)
        left[at] = False
        inner = np.linalg.pinv(self._inverse[np.ix_(at, at)], hermitian=True)
        energy = self._energy[np.ix_(at, at)]
        columns, crossed = self._inverse[np.ix_(left, at)], self._energy[np.ix_(left, at)]
        moves = columns @ inner  # [left, gone]
        self._inverse = self._inverse[np.ix_(left, left)] - moves @ columns.T
        shared = moves @ (0.5 * energy @ moves.T - crossed.T)
        self._energy = self._energy[np.ix_(left, left)] + shared + shared.T
        self._alive = self._alive[left]
        self._place[gone] = -1
        self._place[self._alive] = np.arange(len(self._alive))
        return float(np.sum(energy * inner))


class Dropping:
    """As `Elimination` where inputs are taken for their means and nothing is refitted: far less work.

    With A = C o W^T W (Hadamard product) removing the set D costs 1_D^T A 1_D.
    """

    def __init__(self, covariance: Floats, energy: Floats) -> None:
        """covariance [K, K]; energy [K, K]: W^T W."""
        self._products = covariance * energy
        self._crossed = np.zeros(len(covariance))

    def costs(self, blocks: Indices) -> Floats:
        """[n]: see `Elimination.costs`; may be negative where errors cancel."""
        own = self._products[blocks[:, :, None], blocks[:, None, :]].sum(axis=(1, 2))
        return np.asarray(own + 2 * self._crossed[blocks].sum(axis=1))

    def remove(self, gone: Indices) -> float:
        """Take these inputs out together; returns the squared error that it adds."""
        cost = float(self._products[np.ix_(gone, gone)].sum() + 2 * self._crossed[gone].sum())
        self._crossed += self._products[:, gone].sum(axis=1)
        return cost


def prediction(second: Floats, keep: Mask) -> Floats:
    """A [gone, kept]: the best linear prediction of the inputs that go from those that stay. second: damped."""
    stay, gone = np.flatnonzero(keep), np.flatnonzero(~keep)
    if not len(stay):
        return np.zeros((len(gone), 0))
    solved = np.linalg.solve(second[np.ix_(stay, stay)], second[np.ix_(stay, gone)])
    return np.asarray(solved.T)
