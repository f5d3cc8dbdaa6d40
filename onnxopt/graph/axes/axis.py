"""What is known of one axis of a tensor: which channels its positions belong to, and how their values relate.

Positions that must be removed together carry the same *channel* (after `Channels.tie`, channels of one root). The
values at position p, over all other axes, are `scale[p]` times a *signal*; two positions with the same signal are
proportional, with the same scale equal. Signal 0 is the all-ones tensor, so a position with signal 0 is constant and
its value is its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

ONES = 0


@dataclass(frozen=True)
class Axis:
    """One tracked axis of length n: `channels`, `signal` and `scale`, each of shape [n]."""

    channels: Ints
    signal: Ints
    scale: Floats

    def __len__(self) -> int:
        return len(self.channels)

    @property
    def constant(self) -> Mask:
        """Positions whose value is one number, whatever the input."""
        return np.equal(self.signal, ONES)

    @property
    def zero(self) -> Mask:
        """Positions that are always zero."""
        return np.equal(self.scale, 0)

    def take(self, index: Ints | Mask | slice) -> Axis:
        """The axis after its positions were selected by `index`."""
        return Axis(self.channels[index], self.signal[index], self.scale[index])

    def known(self, signal: Ints, scale: Floats) -> Axis:
        """The same channels with other values; a scale of 0 is the constant 0."""
        scale = np.asarray(scale, np.float64)
        return Axis(self.channels, np.where(scale == 0, ONES, signal), scale)


def concatenate(parts: Sequence[Axis]) -> Axis:
    """Axes one after the other."""
    return Axis(
        np.concatenate([part.channels for part in parts]),
        np.concatenate([part.signal for part in parts]),
        np.concatenate([part.scale for part in parts]),
    )


class Channels:
    """Disjoint sets of channels that can only go together (Tarjan 1975, with path halving)."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self, count: int) -> Ints:
        """`count` fresh channels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def tie(self, one: Ints, other: Ints) -> None:
        """From now on channel one[i] can only go together with other[i]."""
        if one is other or np.array_equal(one, other):
            return
        for a, b in np.unique(np.stack([one, other], axis=1), axis=0).tolist():
            self._parent[max(self._root(a), self._root(b))] = min(self._root(a), self._root(b))

    def roots(self, channels: Ints) -> Ints:
        """The representative of each channel's set."""
        unique, inverse = np.unique(channels, return_inverse=True)
        return np.array([self._root(channel) for channel in unique.tolist()], np.int64)[inverse.reshape(channels.shape)]

    def _root(self, channel: int) -> int:
        parent = self._parent
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel


class Signals:
    """Names for signals: equal keys get equal names."""

    def __init__(self) -> None:
        self._next = ONES + 1

    def new(self, count: int) -> Ints:
        """`count` signals unlike any other."""
        self._next += count
        return np.arange(self._next - count, self._next, dtype=np.int64)

    def classes(self, *columns: NDArray[np.generic]) -> Ints:
        """One new signal per distinct row of the columns (each [n] or [n, k]); rows that are equal share it."""
        parts = [np.asarray(column, np.float64).reshape(len(column), -1) for column in columns]
        table = np.concatenate(parts, axis=1)
        _, inverse = np.unique(table, axis=0, return_inverse=True)
        names = self.new(int(inverse.max()) + 1) if len(inverse) else self.new(0)
        return names[inverse.reshape(-1)]


def proportional_rows(rows: Floats, epsilon: float) -> tuple[Ints, Floats]:
    """(class [n], scale [n]) of the rows of a matrix [n, k]: rows of one class are multiples of each other.

    Row i is scale[i] times its class's direction, element by element within twice `epsilon`, the relative rounding of
    the type the rows are stored in. The scale is the row's entry of largest magnitude; zero rows get scale 0. Near
    rows are found by sorting one random projection, so the cost is O(n k + n log n).
    """
    count = len(rows)
    peak = np.argmax(np.abs(rows), axis=1) if rows.shape[1] else np.zeros(count, np.int64)
    scale = rows[np.arange(count), peak] if rows.shape[1] else np.zeros(count)
    directions = rows / np.where(scale == 0, 1, scale)[:, None]
    weights = np.random.default_rng(0).uniform(0.5, 1.5, rows.shape[1])
    projection = directions @ weights
    slack = 1e-5 * np.abs(directions) @ weights + 1e-12
    classes = np.arange(count, dtype=np.int64)
    order = np.argsort(projection, kind="stable")
    leaders: list[int] = []
    for at in order.tolist():
        leaders = [leader for leader in leaders if projection[at] - projection[leader] <= slack[at]]
        for leader in leaders:
            if np.all(np.abs(directions[at] - directions[leader]) <= 2 * epsilon * np.abs(directions[leader])):
                classes[at] = leader
                break
        else:
            leaders.append(at)
    return classes, np.asarray(scale, np.float64)
