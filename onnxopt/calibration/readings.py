"""From what a run reported to the tallies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from onnxopt.calibration.instrument import Reading, mean_is_sum
from onnxopt.calibration.plan import Plan, Shape, Tensor
from onnxopt.calibration.sessions import Report
from onnxopt.calibration.statistics import Statistics, Subject
from onnxopt.calibration.tallies import (
    ChannelMeanTally,
    ChannelMomentsTally,
    ChannelRangeTally,
    ExtremesTally,
    FiringTally,
    GramTally,
    HistogramTally,
    MomentsTally,
    RangeTally,
    unlike,
)
from onnxopt.model import Variable
from onnxopt.numerics.histogram import HistogramSet


class Run:
    """One run of the model on one sample or batch: what is known of it so far.

    shapes: of every tensor. taken: tensors whose figures were added. suspects: tensors that held something that is not
    finite, or seem to have. inner: the same for those of inner bodies; inner_taken: whether their figures were added.
    overflown: (kind, subject) of sums that are not finite.
    """

    def __init__(self, batch: int, shapes: Mapping[Tensor, Shape]) -> None:
        self.batch = batch
        self.shapes: dict[Tensor, Shape] = dict(shapes)
        self.taken: frozenset[Tensor] = frozenset()
        self.suspects: set[Tensor] = set()
        self.inner: set[Variable] = set()
        self.overflown: dict[tuple[str, Subject], Tensor] = {}
        self.inner_taken = False
        self._sizes: dict[Tensor, int] = {}

    def adopt(self, shapes: Mapping[Tensor, Shape]) -> None:
        """Take over shapes of just this run."""
        self.shapes.update(shapes)
        self._sizes.clear()

    def size(self, tensor: Tensor) -> int:
        """Elements of a tensor."""
        if tensor not in self._sizes:
            self._sizes[tensor] = math.prod(self.shapes[tensor])
        return self._sizes[tensor]


class Readings:
    """Adds the reports of runs to the tallies of `statistics`."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        self.plan = plan
        self.statistics = statistics
        self._at = {tensor: at for at, tensor in enumerate(t for t in plan.tensors if t.histogram)}
        self._histograms = HistogramSet(len(self._at))
        self._take: dict[str, Callable[[Tensor, Reading, Any, Run], None]] = {
            "low": self._low,
            "high": self._high,
            "total": self._total,
            "moments": self._moments,
            "moment_squares": self._moment_squares,
            "grid": self._grid,
            "whole": self._whole,
            "channel_low": self._channel_low,
            "channel_high": self._channel_high,
            "channel_mean": self._channel_mean,
            "channel_squares": self._channel_squares,
            "channel_fired": self._channel_fired,
        }

    def take(self, report: Report, run: Run) -> None:
        """Add what one session reported, but for tensors that it shows to hold something not finite."""
        run.adopt(report.shapes)
        for tensor, reading, value in report.readings:
            if reading.figure != "shape" and not tensor.broken and tensor not in run.taken and run.size(tensor):
                self._take[reading.figure](tensor, reading, value, run)
        run.taken = run.taken | report.tensors if run.taken else report.tensors
        if run.inner_taken:
            return
        for variable, low, high, magnitudes, count in report.inner:
            self._inner(variable, (low, high, magnitudes, count), run)
        run.inner_taken = bool(report.inner)

    def count(self, run: Run) -> None:
        """Add what every run adds to: elements, positions."""
        for tensor in self.plan.alive():
            size = run.size(tensor)
            if size == 0 or tensor in run.suspects:
                continue
            if tensor.range:
                self._range(tensor).count += size
            if tensor.moments and self.statistics.reason(tensor.variable, "moments") is None:
                self.statistics.tally("moments", tensor.variable, MomentsTally).count += size
            if tensor.extremes:
                self.statistics.tally("extremes", tensor.variable, ExtremesTally).runs += 1

    def finish(self) -> None:
        """Hand the histograms over, and take in rows that wait."""
        for _, _, tally in self.statistics.tallies():
            if isinstance(tally, GramTally):
                tally.settle()
        for tensor, at in self._at.items():
            found = self._histograms[at]
            if not tensor.broken:
                tally = HistogramTally(found.exponent, found.counts)
                self.statistics.record("histograms", tensor.variable, tally)

    # one method a figure of Wanted

    def _low(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        self._extreme("minimum", min, tensor, float(value), run)

    def _high(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        self._extreme("maximum", max, tensor, float(value.max() if value.ndim else value), run)

    def _extreme(
        self, side: str, pick: Callable[[float, float], float], tensor: Tensor, value: float, run: Run
    ) -> None:
        if not math.isfinite(value):
            run.suspects.add(tensor)
            return
        value += 0.0  # -0.0 is 0.0, whichever came first
        if tensor.range:
            tally = self._range(tensor)
            setattr(tally, side, pick(getattr(tally, side), value))
        if tensor.extremes:
            tally = self.statistics.tally("extremes", tensor.variable, ExtremesTally)
            getattr(tally, side).add(np.float64(value))

    def _total(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        # infinite may also be what is too large to be summed
        if np.isnan(value).any() or (not tensor.bounded and np.isinf(value).any()):
            run.suspects.add(tensor)

    def _moments(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        total = np.float64(value.sum(dtype=np.float64))
        if self._sums_up("moments", tensor.variable, tensor, total, run):
            self.statistics.tally("moments", tensor.variable, MomentsTally).total.add(total)

    def _moment_squares(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        total = np.float64(value.sum(dtype=np.float64))
        if self._sums_up("moments", tensor.variable, tensor, total, run):
            self.statistics.tally("moments", tensor.variable, MomentsTally).squares.add(total)

    def _grid(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        self._bin(tensor, value, run)

    def _whole(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        values = value.reshape(run.shapes[tensor])
        self._low(tensor, reading, np.minimum.reduce(value, axis=None), run)
        self._high(tensor, reading, np.maximum.reduce(value, axis=None), run)
        if tensor in run.suspects:
            return
        if tensor.histogram:
            self._bin(tensor, tensor.grid(values.shape, run.batch, self.plan.elements).pick(values), run)
        for axis in tensor.averaged:
            if mean_is_sum(axis, values.ndim):
                self._channel_mean(tensor, Reading("", "channel_mean", (axis,)), values, run)
        for kind, subject, cutter in tensor.grams:
            rows = cutter.rows(values, run.batch)
            make = partial(GramTally.empty, rows.shape[0], rows.shape[2])
            tally = self._like(kind, subject, make, rows.shape[2])
            if tally is not None:
                tally.add(rows)

    def _bin(self, tensor: Tensor, values: Any, run: Run) -> None:
        try:
            self._histograms.add(self._at[tensor], values)
        except ValueError:  # not finite
            run.suspects.add(tensor)

    def _channel_low(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        tally = self._channelled("channel_ranges", tensor, reading, value, run)
        if tally is not None:
            tally.minimum = np.minimum(tally.minimum, value + 0.0)

    def _channel_high(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        tally = self._channelled("channel_ranges", tensor, reading, value, run)
        if tally is not None:
            highest = value.reshape(-1, tally.channels).max(axis=0)
            tally.maximum = np.maximum(tally.maximum, highest + 0.0)

    def _channel_mean(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        for kind, axes in (("channel_means", tensor.means), ("channel_moments", tensor.squares)):
            if reading.detail[0] not in axes:
                continue
            tally = self._channelled(kind, tensor, reading, value, run)
            if tally is not None:
                parts = value.astype(np.float64).reshape(-1, tally.channels)
                positions = run.size(tensor) // tally.channels
                tally.total.add(parts.sum(axis=0) * (positions / len(parts)))
                tally.positions += positions

    def _channel_squares(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        tally = self._channelled("channel_moments", tensor, reading, value, run)
        if tally is not None:
            tally.squares.add(value.astype(np.float64).reshape(-1, tally.channels).sum(axis=0))

    def _channel_fired(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        tally = self._channelled("firings", tensor, reading, value, run)
        if tally is not None:
            tally.fired = tally.fired + np.rint(value).astype(np.int64)
            tally.positions += run.size(tensor) // tally.channels

    def _inner(self, variable: Variable, figures: tuple[float, float, float, int], run: Run) -> None:
        low, high, magnitudes, count = figures
        if count == 0 or self.statistics.reason(variable) is not None:
            return
        if not (math.isfinite(low) and math.isfinite(high)) or math.isnan(magnitudes):
            run.inner.add(variable)
            return
        tally = self.statistics.tally("ranges", variable, RangeTally)
        tally.minimum, tally.maximum = min(tally.minimum, low + 0.0), max(tally.maximum, high + 0.0)
        tally.count += count
        # a sum that overflows in float32 is replaced by what it is at most
        most = max(-low, high) * count
        tally.magnitudes.add(np.float64(magnitudes if math.isfinite(magnitudes) else most))

    def _range(self, tensor: Tensor) -> Any:
        return self.statistics.tally("ranges", tensor.variable, RangeTally)

    def _channelled(self, kind: str, tensor: Tensor, reading: Reading, value: Any, run: Run) -> Any | None:
        """The tally of a figure of each channel; None where it can't be added."""
        subject = (tensor.variable, *reading.detail)
        if not self._sums_up(kind, subject, tensor, value, run):
            return None
        channels = run.shapes[tensor][reading.detail[0]]
        return self._like(kind, subject, partial(_BY_CHANNEL[kind].empty, channels), channels)

    def _like(self, kind: str, subject: Subject, make: Any, channels: int) -> Any | None:
        """The tally of a subject, which all samples must give the same number of channels; else it is skipped."""
        if self.statistics.reason(subject, kind) is not None:
            return None
        tally = self.statistics.tally(kind, subject, make)
        if tally.channels == channels:
            return tally
        self.statistics.record_skip(subject, unlike(tally.channels, channels), kind)
        return None

    def _sums_up(self, kind: str, subject: Subject, tensor: Tensor, value: Any, run: Run) -> bool:
        """Whether a figure is finite. Where it is not, the tensor is suspected; sums may also just have overflown."""
        if self.statistics.reason(subject, kind) is not None:
            return False
        if np.isfinite(value).all():
            return True
        run.suspects.add(tensor)
        run.overflown[kind, subject] = tensor
        return False


# Tallies that hold a figure of each channel.
_BY_CHANNEL: dict[str, Any] = {
    "channel_ranges": ChannelRangeTally,
    "channel_means": ChannelMeanTally,
    "channel_moments": ChannelMomentsTally,
    "firings": FiringTally,
}
