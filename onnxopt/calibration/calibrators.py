"""Calibrators: from measured statistics to the range [low, high] that the codes of each tensor should cover.

All follow one interface, see `Calibrator`, and are found by name in CALIBRATORS. A range that is narrower than the
measured one clips the rare large values and represents all others more finely. None is best for every tensor, so that
`choose` decides by the error measured at the outputs.

`entropy` and `mse` search formats value = step * (code - zero_point) on a grid of steps and of the zero-points that
keep the range inside the measured one, so that either tail may be cut without the other. With a given step both costs
are sums over codes counted from zero: prefix sums give all zero-points at once, at O(levels) a step, however many bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.histogram import HALF, Histogram

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Bounds = tuple[Vector, Vector]

_COARSE, _FINE = 32, 15  # steps tried over the whole range, and about the best of them, two neighbours to each side
_ACROSS = 17  # zero-points tried with a coarse step, from cutting one tail only to cutting the other only
_NARROWEST = (
    1 / 64
)  # no range below this part of the values seen; for 256 codes the width of a bin ends the search first


@dataclass(frozen=True)
class Measured:
    """What is known of T tensors.

    minimum, maximum: float64 [T], the extremes of all elements. counts (int64 [T, BINS]) and exponents (int64 [T]):
    histograms of all or some of the elements, see `onnxopt.numerics.histogram`. mean_minimum, mean_maximum: float64
    [T], the means of the extremes of each sample, or None. Raises ValueError when an extreme is not finite or a minimum
    is above its maximum.
    """

    minimum: Vector
    maximum: Vector
    counts: npt.NDArray[np.int64]
    exponents: npt.NDArray[np.int64]
    mean_minimum: Vector | None = None
    mean_maximum: Vector | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.minimum) & np.isfinite(self.maximum) & (self.minimum <= self.maximum)).all():
            raise ValueError("a tensor has extremes that are not finite, or a minimum above its maximum")

    def __len__(self) -> int:
        return len(self.minimum)

    def histogram(self, index: int) -> Histogram:
        """The histogram of one tensor."""
        return Histogram(int(self.exponents[index]), self.counts[index])

    def widest(self) -> Bounds:
        """The extremes, widened to hold 0."""
        return np.minimum(self.minimum, 0.0), np.maximum(self.maximum, 0.0)

    def varied(self) -> npt.NDArray[np.intp]:
        """Indices of the tensors that have a histogram and more than one value."""
        return np.flatnonzero((self.minimum < self.maximum) & self.counts.any(axis=1))


class Calibrator(Protocol):
    """Ranges low <= 0 <= high, float64 [T] each, inside the extremes widened to hold 0; for `levels` >= 2 codes.

    Only a tensor that is always 0 gets an empty range. One without counts or with a single value gets its extremes.
    symmetric: low = -high, high at most max |x|; the zero-point is the middle code, 256 codes being -128..127.
    """

    def __call__(self, measured: Measured, *, symmetric: bool = False, levels: int = 256) -> Bounds:
        """The ranges of all tensors."""


def minmax(measured: Measured, *, symmetric: bool = False, levels: int = 256) -> Bounds:
    """The extremes of all elements: nothing is clipped."""
    return _finished(measured, *measured.widest(), symmetric)


def moving_average(measured: Measured, *, symmetric: bool = False, levels: int = 256) -> Bounds:
    """The mean of the extremes of each sample, onnxruntime's `CalibMovingAverage`; ValueError when not measured."""
    if measured.mean_minimum is None or measured.mean_maximum is None:
        raise ValueError("moving_average needs the means of the extremes of each sample, which were not measured")
    return _finished(measured, measured.mean_minimum, measured.mean_maximum, symmetric)


def percentile(measured: Measured, *, symmetric: bool = False, levels: int = 256, percent: float = 99.99) -> Bounds:
    """The range that holds `percent` of the values; both tails lose the same share, (100 - percent) / 2 %.

    Symmetric: the percentile of |x|. This is onnxruntime's convention (`HistogramCollector.compute_percentile`), which
    takes the edge of a bin where this interpolates. Where only the bin of the zeros is left, as in a tensor of rare
    non-zeros, the range is that of the extremes. Raises ValueError when `percent` is outside (0, 100].
    """
    if not 0.0 < percent <= 100.0:
        raise ValueError(f"percentile {percent} is outside (0, 100]")
    low, high = measured.widest()
    for index in measured.varied():
        found = measured.histogram(int(index))
        if symmetric:
            high[index] = _beyond_zeros(_folded(found), percent / 100.0)
            low[index] = -high[index]
        else:
            tail = (100.0 - percent) / 200.0
            low[index], high[index] = _beyond_zeros(found, tail), _beyond_zeros(found, 1.0 - tail)
    return _finished(measured, low, high, symmetric)


def entropy(measured: Measured, *, symmetric: bool = False, levels: int = 256) -> Bounds:
    """The range whose codes lose least information: smallest Kullback-Leibler divergence KL(P || Q).

    Migacz, "8-bit inference with TensorRT" (GTC 2017). P: the histogram, with what lies outside folded into the
    outermost bins inside. Q: what lies inside, evenly spread over the non-empty bins of each code. Exact zeros are left
    out: every range represents them exactly, and as the fullest bin they would ask for the finest codes.
    """
    return _searched(measured, _Divergence, symmetric, levels)


def mse(measured: Measured, *, symmetric: bool = False, levels: int = 256) -> Bounds:
    """The range with the smallest expected squared error sum_x (Q(x) - x)^2, values spread evenly inside each bin."""
    return _searched(measured, _SquaredError, symmetric, levels)


CALIBRATORS: Mapping[str, Calibrator] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def choose(scores: Mapping[str, float]) -> str:
    """The name with the highest score (dB at the outputs). NaN loses; of equals the first. ValueError for no names."""
    if not scores:
        raise ValueError("there is nothing to choose from")
    return max(scores, key=lambda name: (False, 0.0) if np.isnan(scores[name]) else (True, scores[name]))


def _finished(measured: Measured, low: Vector, high: Vector, symmetric: bool) -> Bounds:
    """Ranges inside the extremes, never empty where those are not, and symmetric if asked for."""
    lowest, highest = measured.widest()
    low, high = np.clip(low, lowest, 0.0), np.clip(high, 0.0, highest)
    empty = low == high
    low, high = np.where(empty, lowest, low), np.where(empty, highest, high)
    if not symmetric:
        return low, high
    high = np.maximum(-low, high)
    return -high, high


def _folded(histogram: Histogram) -> Histogram:
    """The histogram of |x|."""
    counts = histogram.counts.copy()
    counts[HALF:] += counts[HALF - 1 :: -1]
    counts[:HALF] = 0
    return Histogram(histogram.exponent, counts)


def _beyond_zeros(histogram: Histogram, q: float) -> float:
    """The quantile, or 0 where it lies in the bin that holds the zeros and cannot be told from them."""
    found = histogram.quantile(q)
    return 0.0 if 0.0 <= found <= histogram.width else found


def _searched(measured: Measured, cost_of: Callable[[Vector], _Cost], symmetric: bool, levels: int) -> Bounds:
    """The cheapest range of every tensor, by one cost."""
    low, high = minmax(measured, symmetric=symmetric)
    for index in measured.varied():
        found = measured.histogram(int(index))
        space = _Space(low[index] / found.width, high[index] / found.width, levels - 1, symmetric)
        best = space.best(cost_of(_without_zeros(found.counts)), _seen(found, symmetric))
        low[index], high[index] = best[0] * found.width, best[1] * found.width
    return _finished(measured, low, high, symmetric)


def _without_zeros(counts: npt.NDArray[np.int64]) -> Vector:
    """`counts` as float64 without the exact zeros: their bin keeps no more than the fuller of its neighbours holds.

    Zero is represented exactly in any range; counted, a tensor's many zeros would seem spread over their bin.
    """
    kept = counts.astype(np.float64)
    kept[HALF] = min(kept[HALF], max(kept[HALF - 1], kept[HALF + 1]))
    return kept


def _seen(histogram: Histogram, symmetric: bool) -> float:
    """Width, in bins, of the range that holds all counts and 0."""
    low, high = histogram.occupied()
    low, high = min(low, 0.0), max(high, 0.0)
    return (2.0 * max(-low, high) if symmetric else high - low) / histogram.width


class _Cost(Protocol):
    """A cost of formats, by the histogram of one tensor; smaller is better."""

    def __call__(self, steps: Vector, zero_points: Indices, codes: int) -> Matrix:
        """Costs [S, Z] for steps [S], in bins, each with its zero-points [S, Z]; codes 0..`codes`."""


@dataclass(frozen=True)
class _Space:
    """The formats of one tensor, lengths in bins: value = step * (code - zero_point), codes 0..`codes`."""

    low: float
    high: float
    codes: int
    symmetric: bool

    def best(self, cost: _Cost, seen: float) -> tuple[float, float]:
        """Bounds of the cheapest format, the widest of equals; `seen`: the width of the range that holds all counts."""
        widest = (self.high - self.low) / self.codes
        start = min(widest, seen / self.codes)
        end = min(start, max(1.0, start * _NARROWEST))  # below one bin the histogram knows nothing
        coarse = np.geomspace(start, end, _COARSE)
        place = int(cost(coarse, self._zero_points(coarse, _ACROSS), self.codes).min(axis=1).argmin())
        between = np.geomspace(coarse[max(place - 2, 0)], coarse[min(place + 2, _COARSE - 1)], _FINE)
        fine = np.append(widest, between)
        zero_points = self._zero_points(fine, self.codes + 1)
        row, column = divmod(int(cost(fine, zero_points, self.codes).argmin()), zero_points.shape[1])
        return self._bounds(float(fine[row]), int(zero_points[row, column]))

    def _zero_points(self, steps: Vector, most: int) -> Indices:
        """The zero-points that `affine.activation_qparams` may give to each step, `most` of them or all: [S, Z].

        It rounds -low / step, and low lies between `self.low` and `self.high` - step * codes. Rows repeat some.
        """
        if self.symmetric:
            return np.full((steps.size, 1), round(self.codes / 2))
        last = np.clip(np.rint(-self.low / steps), 0, self.codes)
        first = np.minimum(np.clip(np.rint(self.codes - self.high / steps), 0, self.codes), last)
        choices = min(most, int((last - first).max()) + 1)
        return np.asarray(np.rint(np.linspace(first, last, choices, axis=1)), np.intp)

    def _bounds(self, step: float, zero_point: int) -> tuple[float, float]:
        """The range from which that step and zero-point come."""
        extent = step * self.codes
        if self.symmetric:
            return -extent / 2, extent / 2
        low = min(max(-zero_point * step, self.low), self.high - extent)
        return low, low + extent


class _SquaredError:
    """Sum of squared errors, less a constant.

    A value x > 0 is rounded to the code n = #{k >= 1: b_k < x} steps above zero, b_k = (k - 1/2) step, and
    (x - n step)^2 = x^2 - 2 step sum_{b_k < x} (x - b_k). So the sum over all values is the constant sum x^2 less
    2 step sum_k R(b_k), where R(b) = sum_x max(x - b, 0) is tabled once. That k ends at the last code is the clipping.
    """

    def __init__(self, counts: Vector) -> None:
        self.above, self.below = _overshoot(counts[HALF:]), _overshoot(counts[HALF - 1 :: -1])

    def __call__(self, steps: Vector, zero_points: Indices, codes: int) -> Matrix:
        """See `_Cost`."""
        above = self._sums(self.above, steps, codes - zero_points)
        below = self._sums(self.below, steps, zero_points)
        return np.asarray(-2.0 * steps[:, None] * (above + below))

    @staticmethod
    def _sums(table: tuple[Vector, Vector, Vector], steps: Vector, codes: Indices) -> Matrix:
        """sum_{k <= n} R(b_k) for all n of `codes` [S, Z]."""
        end = table[0].size - 1
        if end == 0:
            return np.zeros(codes.shape)
        bounds = np.minimum(np.multiply.outer(steps, np.arange(codes.max()) + 0.5), end)
        bins = bounds.astype(np.intp)
        rest = bins + 1.0 - bounds
        beyond, mass, density = (column.take(bins) for column in table)
        sums = np.zeros((steps.size, bins.shape[1] + 1))
        np.cumsum(beyond + rest * (mass + rest * density), axis=1, out=sums[:, 1:])
        return np.asarray(np.take_along_axis(sums, codes, axis=1))


def _overshoot(outward: Vector) -> tuple[Vector, Vector, Vector]:
    """R(b) = sum_x max(x - b, 0) for counts of bins from zero outward, as a table: values spread evenly inside bins.

    For b in bin i and d = i + 1 - b: R(b) = first[i] + d * (second[i] + d * third[i]). The last entry of each is 0 and
    stands for all b beyond the counts.
    """
    filled = np.flatnonzero(outward)
    counts = np.append(outward[: int(filled[-1]) + 1 if filled.size else 0], 0.0)
    mass = _after(counts)
    return _after(mass + counts / 2), mass, counts / 2


def _after(values: Vector) -> Vector:
    """The sum of all that follows each entry."""
    return np.asarray(values[::-1].cumsum()[::-1] - values)


class _Divergence:
    """KL(P || Q) in nats, times the number of values.

    With counts h, and per code the sum H over n non-empty bins, it is sum_bins h log h - sum_codes H log(H / n) without
    clipping. What is clipped, o on one side, adds itself to h of the outermost bin and to the weight of the outermost
    code. Q is not normalised, so that what it lacks counts too: a P folded wholly into two bins would fit perfectly. An
    outermost code without values is given one: else no range could end in the gap between the values and an outlier.
    """

    def __init__(self, counts: Vector) -> None:
        filled = np.flatnonzero(counts)
        self.first = int(filled[0]) if filled.size else HALF
        self.counts = counts[self.first : int(filled[-1]) + 1] if filled.size else np.zeros(1)
        self.x_log_x = _x_log_x(self.counts)
        self.mass, self.filled, self.information = (
            np.append(0.0, np.cumsum(each)) for each in (self.counts, self.counts > 0, self.x_log_x)
        )

    def __call__(self, steps: Vector, zero_points: Indices, codes: int) -> Matrix:
        """See `_Cost`."""
        deepest = int(zero_points.max())
        # the lower boundaries of the codes of all zero-points, counted from the code of zero, and one above the last
        k = np.arange(-deepest, codes - int(zero_points.min()) + 2)
        # not rint: boundaries one bin apart must stay apart where they fall on halves
        places = np.floor(np.multiply.outer(steps, k - 0.5) + 0.5) + (HALF - self.first)
        edges = np.clip(places, 0, self.counts.size).astype(np.intp)
        low = np.arange(steps.size)[:, None], deepest - zero_points
        high = low[0], low[1] + codes
        above = low[0], high[1] + 1
        mass = self.mass.take(edges)
        inside, bins = np.diff(mass, axis=1), np.diff(self.filled.take(edges), axis=1)
        terms = inside * _log_mean(inside, bins)
        spread = np.zeros(edges.shape)
        np.cumsum(terms, axis=1, out=spread[:, 1:])
        cost = self.information.take(edges[above]) - self.information.take(edges[low]) - (spread[above] - spread[low])
        cost += self._folding(mass[low], edges[low], inside[low], bins[low], terms[low])
        lost = self.mass[-1] - mass[above]
        return np.asarray(cost + self._folding(lost, edges[above] - 1, inside[high], bins[high], terms[high]))

    def _folding(self, lost: Matrix, outermost: Indices, inside: Matrix, bins: Matrix, terms: Matrix) -> Matrix:
        """What changes when `lost` values join the outermost bin of a code with `inside` values in `bins` filled bins.

        terms: inside * log(inside / bins), which is counted already.
        """
        held = self.counts.take(outermost, mode="clip")
        change = _x_log_x(held + lost) - self.x_log_x.take(outermost, mode="clip") + terms
        change -= (inside + lost) * _log_mean(inside, bins + (held == 0))
        return np.where(lost > 0, change, 0.0)


def _x_log_x(counts: Matrix) -> Matrix:
    """x log x of whole numbers, 0 for 0."""
    return np.asarray(counts * np.log(np.maximum(counts, 1.0)))


def _log_mean(total: Matrix, bins: Matrix) -> Matrix:
    """log(total / bins), 0 where there is nothing."""
    return np.asarray(np.log(np.maximum(total, 1.0) / np.maximum(bins, 1.0)))
