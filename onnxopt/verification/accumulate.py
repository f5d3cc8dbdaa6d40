"""One output of two models, measured feed by feed without keeping it.

Sums run in float64 over blocks of a million elements. The variance is merged block by block (Chan, Golub and LeVeque,
1979), so a large mean costs no digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from onnxopt.runtime.ports import Array, dtype_name, is_float, shape_text

_BLOCK = 1 << 20
_WORST = 5
# An element is close when it is off by at most this share of the largest element of its tensor.
CLOSE = 0.1
# Positions of one output whose variance over feeds is followed.
_POSITIONS = 1 << 22
_SAME_AS_TEXT = "OUST"


@dataclass(frozen=True)
class Difference:
    """One element that differs. index: positions in lists, keys of maps, then the index in the tensor."""

    source: str
    index: tuple[int | str, ...]
    reference: Any
    candidate: Any
    size: float


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of the numbers seen."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Array) -> None:
        """Merge the numbers of a float64 array."""
        if not values.size:
            return
        mean = float(values.mean())
        squares = float(np.square(values - mean).sum())
        total = self.count + values.size
        delta = mean - self.mean
        self.squares += squares + delta * delta * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total


@dataclass
class Accumulator:
    """The running figures of one output; see OutputComparison for what they mean."""

    name: str
    kind: str | None = None
    dtype: str = ""
    candidate_dtype: str = ""
    elements: int = 0
    differing: int = 0
    discrete_elements: int = 0
    discrete_equal: int = 0
    rows: int = 0
    rows_agreeing: int = 0
    close: int = 0
    float_elements: int = 0
    max_abs: float = 0.0
    max_reference: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    reference_squares: float = 0.0
    candidate_squares: float = 0.0
    nonfinite_reference: int = 0
    nonfinite_candidate: int = 0
    nonfinite_mismatches: int = 0
    shape_mismatches: int = 0
    dtype_mismatch: bool = False
    epsilon: float = 0.0
    moments: Moments = field(default_factory=Moments)
    positions: Positions | None = None
    feeds: int = 0
    worst: list[Difference] = field(default_factory=list)

    def add(self, reference: Any, candidate: Any, source: str) -> None:
        """Take in the output of one feed."""
        self.feeds += 1
        for path, ours, theirs in _leaves(reference, candidate, ()):
            self._add_leaf(path, ours, theirs, source)

    def _add_leaf(self, path: tuple[int | str, ...], ours: Array | None, theirs: Array | None, source: str) -> None:
        if ours is None or theirs is None:
            self._add_mismatch(path, ours, theirs, source)
            return
        self._note_types(ours, theirs)
        if ours.shape != theirs.shape:
            self._add_mismatch(path, ours, theirs, source)
            return
        self.elements += ours.size
        if is_float(ours.dtype) and theirs.dtype.kind not in _SAME_AS_TEXT:
            self._add_floats(path, ours, theirs, source)
        else:
            self._add_discrete(path, ours, theirs, source)

    def _note_types(self, ours: Array, theirs: Array) -> None:
        kind = "float" if is_float(ours.dtype) else "discrete"
        self.kind = kind if self.kind in (None, kind) else "mixed"
        self.dtype = self.dtype or dtype_name(ours.dtype)
        self.candidate_dtype = self.candidate_dtype or dtype_name(theirs.dtype)
        if dtype_name(ours.dtype) != dtype_name(theirs.dtype):
            self.dtype_mismatch = True
            self.candidate_dtype = dtype_name(theirs.dtype)

    def _add_mismatch(self, path: tuple[int | str, ...], ours: Array | None, theirs: Array | None, source: str) -> None:
        """A value without counterpart, or of another shape: all of its elements disagree."""
        size = max((array.size for array in (ours, theirs) if array is not None), default=1)
        self.shape_mismatches += 1
        self.elements += size
        self.differing += max(size, 1)
        if ours is not None and is_float(ours.dtype):
            self.float_elements += size
            self.rows += _rows(ours)
        else:
            self.discrete_elements += size
        texts = ["nothing" if array is None else f"shape {shape_text(array.shape)}" for array in (ours, theirs)]
        self._keep(Difference(source, path, texts[0], texts[1], math.inf))

    def _add_discrete(self, path: tuple[int | str, ...], ours: Array, theirs: Array, source: str) -> None:
        self.discrete_elements += ours.size
        if (ours.dtype.kind in _SAME_AS_TEXT) != (theirs.dtype.kind in _SAME_AS_TEXT):
            self.differing += ours.size
            return
        unequal = np.asarray(ours != theirs)
        count = int(unequal.sum())
        self.differing += count
        self.discrete_equal += ours.size - count
        if ours.dtype.kind in _SAME_AS_TEXT:
            sizes = unequal.astype(np.float64)
        else:
            sizes = np.where(unequal, np.maximum(np.abs(_wide(theirs) - _wide(ours)), 1.0), 0.0)
            self.max_abs = max(self.max_abs, float(sizes.max(initial=0.0)))
        self._keep_worst(path, ours, theirs, sizes.reshape(-1), 0, source)

    def _add_floats(self, path: tuple[int | str, ...], ours: Array, theirs: Array, source: str) -> None:
        self.float_elements += ours.size
        self.epsilon = max(self.epsilon, float(ml_dtypes.finfo(ours.dtype).eps))
        flat, other = ours.reshape(-1), theirs.reshape(-1)
        largest = max((_largest(flat[start : start + _BLOCK]) for start in range(0, flat.size, _BLOCK)), default=0.0)
        self.max_reference = max(self.max_reference, largest)
        for start in range(0, flat.size, _BLOCK):
            block, counter = flat[start : start + _BLOCK], other[start : start + _BLOCK]
            sizes = self._add_block(block, counter, largest)
            self._keep_worst(path, ours, theirs, sizes, start, source)
        self._add_rows(ours, theirs)
        if not path:
            self._add_positions(ours)

    def _add_block(self, ours: Array, theirs: Array, largest: float) -> Array:
        """Take in a block. Returns the size of each difference, infinite where only one side is finite."""
        y, x = _wide(ours), _wide(theirs)
        finite_y, finite_x = np.isfinite(y), np.isfinite(x)
        both = finite_y & finite_x
        with np.errstate(invalid="ignore", over="ignore"):
            same = (np.isnan(y) & np.isnan(x)) | (y == x)
            sizes = np.where(both, np.abs(x - y), np.where(same, 0.0, np.inf))
            self.differing += int((_unequal_bits(ours, theirs, y, x)).sum())
            self.nonfinite_reference += int((~finite_y).sum())
            self.nonfinite_candidate += int((~finite_x).sum())
            self.nonfinite_mismatches += int((~both & ~same).sum())
            self.max_abs = max(self.max_abs, float(sizes.max(initial=0.0)))
            self.close += int((sizes <= CLOSE * largest).sum())
            y, x = y[both], x[both]
            self.noise += float(np.square(x - y).sum())
            self.dot += float(y @ x)
            self.reference_squares += float(y @ y)
            self.candidate_squares += float(x @ x)
            self.moments.add(y)
        return sizes

    def _add_rows(self, ours: Array, theirs: Array) -> None:
        """Whether the largest entries along the last axis agree, for outputs that may be class scores."""
        if not _rows(ours):
            return
        y, x = (array if array.dtype.itemsize > 2 else array.astype(np.float32) for array in (ours, theirs))
        agree = (y.argmax(-1) == x.argmax(-1)) & ~np.isnan(x).any(-1)
        self.rows += agree.size
        self.rows_agreeing += int(agree.sum())

    def _add_positions(self, ours: Array) -> None:
        if self.feeds == 1 and 0 < ours.size <= _POSITIONS:
            self.positions = Positions(ours.shape)
        if self.positions is not None and not self.positions.add(ours):
            self.positions = None

    def _keep_worst(
        self, path: tuple[int | str, ...], ours: Array, theirs: Array, sizes: Array, start: int, source: str
    ) -> None:
        count = min(_WORST, sizes.size)
        least = self.worst[-1].size if len(self.worst) == _WORST else 0.0
        if float(sizes.max(initial=0.0)) <= least:
            return
        for position in np.argpartition(-sizes, count - 1)[:count].tolist():
            if sizes[position] > least:
                index = tuple(int(part) for part in np.unravel_index(start + position, ours.shape))
                values = _scalar(ours[index]), _scalar(theirs[index])
                self._keep(Difference(source, (*path, *index), *values, float(sizes[position])))

    def _keep(self, difference: Difference) -> None:
        self.worst.append(difference)
        self.worst.sort(key=lambda item: -item.size)
        del self.worst[_WORST:]


class Positions:
    """Mean and squared deviations over feeds of every position of an output whose shape stays the same (Welford)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self._mean: Array = np.zeros(shape)
        self._squares: Array = np.zeros(shape)

    def add(self, values: Array) -> bool:
        """Take in one feed; False when it has another shape or is not finite, and nothing can be said any more."""
        wide = _wide(values)
        if wide.shape != self._mean.shape or not np.isfinite(wide).all():
            return False
        self.count += 1
        with np.errstate(over="ignore", invalid="ignore"):
            delta = wide - self._mean
            self._mean += delta / self.count
            self._squares += delta * (wide - self._mean)
        return True

    @property
    def signal(self) -> float:
        """Sum over feeds and positions of the squared deviation, made unbiased: n/(n-1) times the sum seen."""
        return float(self._squares.sum()) * self.count / (self.count - 1) if self.count > 1 else 0.0


def _rows(array: Array) -> int:
    """How many rows of class scores an array may be: those of rank 2 and 3 with at least two entries a row."""
    return array.size // array.shape[-1] if array.ndim in (2, 3) and array.shape[-1] >= 2 else 0


def _leaves(
    ours: Any, theirs: Any, path: tuple[int | str, ...]
) -> Iterator[tuple[tuple[int | str, ...], Array | None, Array | None]]:
    """Pairs of arrays of two values of one structure; what has no counterpart is paired with None."""
    if ours is None and theirs is None:
        return
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        for index in range(max(len(ours), len(theirs))):
            pair = [side[index] if index < len(side) else None for side in (ours, theirs)]
            yield from _pair(pair[0], pair[1], (*path, index))
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from _pair(ours.get(key), theirs.get(key), (*path, str(key)))
    else:
        yield path, _array(ours), _array(theirs)


def _pair(
    ours: Any, theirs: Any, path: tuple[int | str, ...]
) -> Iterator[tuple[tuple[int | str, ...], Array | None, Array | None]]:
    if ours is None and theirs is None:
        yield path, None, None
    else:
        yield from _leaves(ours, theirs, path)


def _array(value: Any) -> Array | None:
    """An array, or None for a missing value and for a list or map that faces something else.

    Maps hold Python floats that were float32 (onnxruntime's ZipMap).
    """
    if value is None or isinstance(value, (list, tuple, Mapping)):
        return None
    return np.asarray(np.float32(value)) if isinstance(value, float) else np.asarray(value)


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _largest(block: Array) -> float:
    wide = np.abs(_wide(block))
    return float(wide[np.isfinite(wide)].max(initial=0.0))


def _unequal_bits(ours: Array, theirs: Array, y: Array, x: Array) -> Array:
    """Where the bits differ; any NaN equals any other. Of different types: where the numbers differ."""
    nan = np.isnan(y) & np.isnan(x)
    if ours.dtype != theirs.dtype:
        return np.asarray((y != x) & ~nan)
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    return np.asarray((ours.copy().view(bits) != theirs.copy().view(bits)) & ~nan)


def _scalar(value: Any) -> Any:
    item = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return item if isinstance(item, (int, float, str, bool)) else str(item) if isinstance(item, bytes) else float(item)
