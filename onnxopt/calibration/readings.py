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
)
from onnxopt.model import Variable
from onnxopt.numerics.histogram import HistogramSet

NAN, INFINITE = "NaN", "infinities"


class Run:
    """One run of the model on one sample or batch: what is known of it so far.

    shapes: of every tensor. suspects: tensors that held something that is not finite -> what, where that is known.
    inner: the same for those of inner bodies. overflown: (kind, subject) of sums that are not finite. alarm: an output
    of the model holds NaN.
    """

    def __init__(self, batch: int, shapes: Mapping[Tensor, Shape]) -> None:
        self.batch = batch
        self.shapes: dict[Tensor, Shape] = dict(shapes)
        self.suspects: dict[Tensor, str | None] = {}
        self.inner: dict[Variable, str] = {}
        self.overflown: dict[tuple[str, Subject], Tensor] = {}
        self.alarm = False
        self._sizes: dict[Tensor, int] = {}

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
        self.quiet: set[Variable] = set()  # outputs of the model that may hold NaN
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
        for tensor, reading, value in report.readings:
            if reading.figure == "shape":
                run.shapes[tensor] = tuple(int(dim) for dim in value)
            elif reading.figure == "whole" and reading.detail:
                run.shapes[tensor] = value.shape
        for tensor, reading, value in report.readings:
            if reading.figure != "shape" and not tensor.broken and run.size(tensor):
                self._take[reading.figure](tensor, reading, value, run)
        for variable, low, high, magnitudes, count in report.inner:
            self._inner(variable, (low, high, magnitudes, count), run)
        for variable, total in (report.guards or {}).items():
            run.alarm |= math.isnan(total) and variable not in self.quiet

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
        """Hand the histograms over."""
        for tensor, at in self._at.items():
            found = self._histograms[at]
            if not tensor.broken:
                tally = HistogramTally(found.exponent, found.counts)
                self.statistics.record("histograms", tensor.variable, tally)

    # one method a figure of Wanted

    def _low(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        low = float(value) + 0.0  # -0.0 is 0.0, whichever came first
        if not math.isfinite(low):
            run.suspects[tensor] = NAN if math.isnan(low) else run.suspects.get(tensor) or INFINITE
            return
        if tensor.range:
            tally = self._range(tensor)
            tally.minimum = min(tally.minimum, low)
        if tensor.extremes:
            self.statistics.tally("extremes", tensor.variable, ExtremesTally).minimum.add(np.float64(low))

    def _high(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        high = float(value.max() if value.ndim else value) + 0.0
        if not math.isfinite(high):
            run.suspects[tensor] = NAN if math.isnan(high) else run.suspects.get(tensor) or INFINITE
            return
        if tensor.range:
            tally = self._range(tensor)
            tally.maximum = max(tally.maximum, high)
        if tensor.extremes:
            self.statistics.tally("extremes", tensor.variable, ExtremesTally).maximum.add(np.float64(high))

    def _total(self, tensor: Tensor, _reading: Reading, value: Any, run: Run) -> None:
        if math.isnan(value):
            run.suspects[tensor] = NAN

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
        for axis in tensor.means:
            if mean_is_sum(axis, values.ndim):
                self._channel_mean(tensor, Reading("", "channel_mean", (axis,)), values, run)
        for node, patches in tensor.grams:
            rows = patches.rows(values, run.batch)
            make = partial(GramTally.empty, rows.shape[0], rows.shape[2])
            self.statistics.tally("grams", node, make).add(rows)

    def _bin(self, tensor: Tensor, values: Any, run: Run) -> None:
        try:
            self._histograms.add(self._at[tensor], values)
        except ValueError:  # not finite
            run.suspects.setdefault(tensor, None)

    def _channel_low(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        if self._sums_up("channel_ranges", (tensor.variable, *reading.detail), tensor, value, run):
            tally = self._channel_range(tensor, reading, run)
            tally.minimum = np.minimum(tally.minimum, value + 0.0)

    def _channel_high(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        if self._sums_up("channel_ranges", (tensor.variable, *reading.detail), tensor, value, run):
            tally = self._channel_range(tensor, reading, run)
            highest = value.reshape(-1, len(tally.maximum)).max(axis=0)
            tally.maximum = np.maximum(tally.maximum, highest + 0.0)

    def _channel_mean(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        axis = reading.detail[0]
        subject = (tensor.variable, axis)
        kind = "channel_moments" if axis in tensor.squares else "channel_means"
        if not self._sums_up(kind, subject, tensor, value, run):
            return
        channels = run.shapes[tensor][axis]
        parts = value.astype(np.float64).reshape(-1, channels)
        positions = math.prod(run.shapes[tensor]) // channels
        tally = self.statistics.tally(kind, subject, partial(_CHANNEL_SUMS[kind].empty, channels))
        tally.total.add(parts.sum(axis=0) * (positions / len(parts)))
        tally.positions += positions

    def _channel_squares(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        axis = reading.detail[0]
        subject = (tensor.variable, axis)
        if not self._sums_up("channel_moments", subject, tensor, value, run):
            return
        channels = run.shapes[tensor][axis]
        parts = value.astype(np.float64).reshape(-1, channels)
        tally = self.statistics.tally("channel_moments", subject, partial(ChannelMomentsTally.empty, channels))
        tally.squares.add(parts.sum(axis=0))

    def _channel_fired(self, tensor: Tensor, reading: Reading, value: Any, run: Run) -> None:
        channels = len(value)
        subject = (tensor.variable, *reading.detail)
        tally = self.statistics.tally("firings", subject, partial(FiringTally.empty, channels))
        tally.fired = tally.fired + np.rint(value).astype(np.int64)
        tally.positions += math.prod(run.shapes[tensor]) // channels

    def _inner(self, variable: Variable, figures: tuple[float, float, float, int], run: Run) -> None:
        low, high, magnitudes, count = figures
        if count == 0 or self.statistics.reason(variable) is not None:
            return
        if not (math.isfinite(low) and math.isfinite(high)) or math.isnan(magnitudes):
            nan = math.isnan(low) or math.isnan(high) or math.isnan(magnitudes)
            run.inner[variable] = NAN if nan else INFINITE
            return
        tally = self.statistics.tally("ranges", variable, RangeTally)
        tally.minimum, tally.maximum = min(tally.minimum, low + 0.0), max(tally.maximum, high + 0.0)
        tally.count += count
        tally.magnitudes.add(np.float64(magnitudes))

    def _range(self, tensor: Tensor) -> Any:
        return self.statistics.tally("ranges", tensor.variable, RangeTally)

    def _channel_range(self, tensor: Tensor, reading: Reading, run: Run) -> Any:
        axis = reading.detail[0]
        make = partial(ChannelRangeTally.empty, run.shapes[tensor][axis])
        return self.statistics.tally("channel_ranges", (tensor.variable, axis), make)

    def _sums_up(self, kind: str, subject: Subject, tensor: Tensor, value: Any, run: Run) -> bool:
        """Whether a figure is finite. Where it is not, the tensor is suspected; sums may also just have overflown."""
        if self.statistics.reason(subject, kind) is not None:
            return False
        if np.isfinite(value).all():
            return True
        run.suspects.setdefault(tensor, None)
        run.overflown[kind, subject] = tensor
        return False


# Tallies that hold sums over the positions of each channel.
_CHANNEL_SUMS: dict[str, Any] = {"channel_means": ChannelMeanTally, "channel_moments": ChannelMomentsTally}
