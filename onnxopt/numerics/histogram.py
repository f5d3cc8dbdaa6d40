"""Histograms whose range is a power of two, so that they merge exactly.

With exponent e, bin i of BINS = 8192 counts the values

    i = floor(x * BINS / 2^(e+1)) + BINS / 2,        -2^e <= x < 2^e,

and zero is the lower edge of bin BINS / 2. A value outside doubles the range: as floor(floor(y) / 2) = floor(y / 2),
adding up neighbouring bins in pairs about the middle gives the counts that the wider range would have had from the
start. Counts therefore depend on the values only, never on their order, on batches or on merges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 8192
HALF = BINS // 2
MIN_EXPONENT = -100  # keeps HALF / 2^e finite in float32
MAX_EXPONENT = 128  # above every finite float32

# Up to here HALF / 2^e >= 1: a float32 times it cannot underflow and is exact, subnormals included.
_SINGLE_EXPONENT = 12
_PENDING = 32768  # values gathered before they are counted: four times this many bytes a tensor

Counts = npt.NDArray[np.int64]


def exponent_of(magnitude: float) -> int:
    """Smallest e >= MIN_EXPONENT with `magnitude` < 2^e; `magnitude` is max |x|: finite, 0 if there are no values."""
    return max(MIN_EXPONENT, int(np.frexp(magnitude)[1])) if magnitude else MIN_EXPONENT


def widened_counts(counts: Counts, steps: int) -> Counts:
    """`counts` [BINS] as they would be with a range 2^steps times as wide; a new array. steps >= 0."""
    steps = min(steps, HALF.bit_length() - 1)  # by then the two bins about zero hold everything
    merged = counts.reshape(-1, 2**steps).sum(axis=1)
    wide = np.zeros(BINS, np.int64)
    start = HALF - merged.size // 2
    wide[start : start + merged.size] = merged
    return wide


@dataclass(frozen=True)
class Histogram:
    """Counts (int64, [BINS]) of values in [-2^exponent, 2^exponent), in bins of equal width."""

    exponent: int
    counts: Counts

    @property
    def width(self) -> float:
        """Width of one bin, in the unit of the values."""
        return float(2.0 ** (self.exponent + 1) / BINS)

    @property
    def count(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def centres(self) -> npt.NDArray[np.float64]:
        """The middle of every bin: [BINS] float64, rising, symmetric about 0."""
        return (np.arange(BINS, dtype=np.float64) - (HALF - 0.5)) * self.width

    def widened(self, exponent: int) -> Histogram:
        """The histogram of the same values with a larger exponent. Raises ValueError when it is smaller."""
        if exponent < self.exponent:
            raise ValueError(f"exponent {exponent} is below {self.exponent}: bins cannot be split")
        return Histogram(exponent, widened_counts(self.counts, exponent - self.exponent))

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of the values of both."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(exponent, self.widened(exponent).counts + other.widened(exponent).counts)

    def mean_absolute(self) -> float:
        """Mean |x|, every value taken at the middle of its bin: off by less than `width` / 2. 0 without values."""
        return float(self.counts @ np.abs(self.centres())) / max(1, self.count)

    def quantile(self, q: float) -> float:
        """The value below which a share `q` of the values lies, taken as spread evenly inside each bin.

        0 gives the lower edge of the lowest bin that holds something, 1 the upper edge of the highest. Raises
        ValueError when `q` is outside [0, 1] or there are no values.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"quantile {q} is outside [0, 1]")
        below = self.counts.cumsum()
        if below[-1] == 0:
            raise ValueError("no values, no quantile")
        wanted = q * float(below[-1])
        # the second term skips the empty bins in front when nothing at all is wanted below
        index = max(int(np.searchsorted(below, wanted)), int(np.searchsorted(below, 0, "right")))
        inside = (wanted - float(below[index] - self.counts[index])) / float(self.counts[index])
        return (index - HALF + inside) * self.width

    def occupied(self) -> tuple[float, float]:
        """Lower edge of the lowest and upper edge of the highest bin that holds something; (0, 0) without values."""
        filled = np.flatnonzero(self.counts)
        if not filled.size:
            return 0.0, 0.0
        return (int(filled[0]) - HALF) * self.width, (int(filled[-1]) + 1 - HALF) * self.width


class HistogramSet:
    """Histograms of many tensors, filled together; every range grows as its values ask for.

    Values wait in a buffer of 128 KiB a tensor and are counted together, which spares small tensors the cost of the
    calls. About 3.5 ns a value for parts of 8,000 values, 11 ns for parts of 500; `np.bincount` is most of it.
    """

    def __init__(self, size: int) -> None:
        self._exponents = [MIN_EXPONENT] * size
        self._limits = [2.0**MIN_EXPONENT] * size
        self._counts = np.zeros((size, BINS), np.int64)
        self._waiting = np.empty((size, _PENDING), np.float32)
        self._filled = [0] * size
        self._single = np.empty(_PENDING, np.float32)
        self._double = np.empty(_PENDING, np.float64)
        self._bins = np.empty(_PENDING, np.int32)

    def __len__(self) -> int:
        return len(self._exponents)

    def __getitem__(self, index: int) -> Histogram:
        """A copy of the histogram of one tensor."""
        self._count(index)
        return Histogram(self._exponents[index], self._counts[index].copy())

    @property
    def exponents(self) -> npt.NDArray[np.int64]:
        """Exponent of every tensor, [T]; MIN_EXPONENT where no value but 0 came."""
        return np.array(self._exponents, np.int64)

    @property
    def counts(self) -> Counts:
        """Counts of all values added so far, [T, BINS]: a view, not to be written; later values change it."""
        self.flush()
        return self._counts

    def add(self, index: int, values: npt.NDArray[np.float32]) -> None:
        """Count `values`, any shape, for tensor `index`. Raises ValueError, and counts none, if one is not finite."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        # the extremes of an array with NaN are NaN, for which no comparison holds
        low, high = float(np.minimum.reduce(flat)), float(np.maximum.reduce(flat))
        limit = self._limits[index]
        if not (high < limit and -low < limit):
            self._widen(index, _magnitude(low, high))
        for start in range(0, flat.size, _PENDING):
            self._keep(index, flat[start : start + _PENDING])

    def merge(self, other: HistogramSet) -> None:
        """Count the values of `other` too. Raises ValueError when it is of another size."""
        if len(other) != len(self):
            raise ValueError(f"{len(other)} histograms cannot be merged into {len(self)}")
        for index, counts in enumerate(other.counts):
            self._set_exponent(index, max(self._exponents[index], other._exponents[index]))
            self._counts[index] += widened_counts(counts, self._exponents[index] - other._exponents[index])

    def flush(self) -> None:
        """Count what waits."""
        for index in range(len(self)):
            self._count(index)

    def _keep(self, index: int, values: npt.NDArray[np.float32]) -> None:
        if self._filled[index] + values.size > _PENDING:
            self._count(index)
        start = self._filled[index]
        self._filled[index] = start + values.size
        self._waiting[index, start : start + values.size] = values

    def _count(self, index: int) -> None:
        size = self._filled[index]
        if not size:
            return
        exponent = self._exponents[index]
        work = (self._single if exponent <= _SINGLE_EXPONENT else self._double)[:size]
        bins = self._bins[:size]
        np.multiply(self._waiting[index, :size], HALF * 2.0**-exponent, out=work, dtype=work.dtype)
        np.floor(work, out=work)
        np.add(work, HALF, out=work)  # after the floor: before it, the sum would be rounded
        np.copyto(bins, work, casting="unsafe")
        self._counts[index] += np.bincount(bins, minlength=BINS)
        self._filled[index] = 0

    def _widen(self, index: int, magnitude: float) -> None:
        self._set_exponent(index, max(self._exponents[index], exponent_of(magnitude)))

    def _set_exponent(self, index: int, exponent: int) -> None:
        steps = exponent - self._exponents[index]
        if steps:
            self._counts[index] = widened_counts(self._counts[index], steps)
        self._exponents[index] = exponent
        self._limits[index] = 2.0**exponent


def _magnitude(low: float, high: float) -> float:
    """max |x| of values with these extremes; raises ValueError when it is NaN or infinite."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"values from {low} to {high} cannot be counted")
    return max(-low, high)
