"""One streaming run over feeds, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.instrument import Instrument, Probe
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Range, Statistics
from onnxopt.errors import FeedError
from onnxopt.feeds import Sample
from onnxopt.model import Model, Variable
from onnxopt.runtime import Session


def collect(
    model: Model,
    requests: Requests,
    feeds: Iterable[Sample],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure what `requests` asks for, over all feeds, with in-graph reductions on a clone of `model`.

    Each feed runs once and is dropped; minima and maxima do not depend on the order of feeds. The clone runs optimized,
    with only the wanted tensors exposed. A tensor that holds NaN or infinity is skipped with the sample named: masks of
    -inf are nothing wrong. Raises FeedError, naming input and sample, where that comes from the sample itself (the
    tensor is an input of the model, or an input holds NaN), and when there are no feeds; what the runtime raises for
    feeds that do not fit passes through.
    """
    statistics = Statistics()
    if not requests:
        return statistics
    clone = model.clone()
    wanted = _in_clone(requests.ranges, clone.tensors, statistics)
    means = {
        copy: (original, axis)
        for original, axis in requests.channel_means
        if (copy := clone.tensors.get(id(original))) is not None
    }
    probe = Instrument(clone.model, wanted, means).probe
    for tensor, reason in probe.closed:
        statistics.record_skip(tensor, reason)
    session = Session(clone.model, threads=threads, name="the model under calibration")
    outputs = _names(probe)
    if not outputs:
        return statistics
    totals = _Totals(probe, model)
    total = len(feeds) if isinstance(feeds, Sized) else 0
    for index, sample in enumerate(feeds):
        totals.add(session.run(sample.inputs, outputs), sample)
        statistics.samples += 1
        if progress is not None:
            progress(index + 1, total)
    if statistics.samples == 0:
        raise FeedError("there are no feeds to calibrate with", "give at least one sample")
    totals.store(statistics)
    return statistics


def _in_clone(
    tensors: Iterable[Variable], mapping: dict[int, Variable], statistics: Statistics
) -> dict[Variable, Variable]:
    """Tensor of the clone -> tensor asked about. What has no counterpart is recorded as skipped."""
    found: dict[Variable, Variable] = {}
    for original in tensors:
        copy = mapping.get(id(original))
        if copy is None:
            statistics.record_skip(original, "is not produced in the model")
        else:
            found[copy] = original
    return found


def _names(probe: Probe) -> list[str]:
    names = [name for four in probe.scalars for name in four]
    names += [name for four, _ in probe.vectors for name in four]
    return names + [name for name, _ in probe.means]


class _Totals:
    """Running minima, maxima, sums and counts of everything measured.

    broken: per tensor with NaN or infinities what is said of it, with the first such sample.
    """

    def __init__(self, probe: Probe, model: Model) -> None:
        self.probe = probe
        self.inputs = set(model.graph.inputs)
        self.broken: dict[Variable, str] = {}
        self.tensors = list(probe.measured) + [tensor for _, tensors in probe.vectors for tensor in tensors]
        size = len(self.tensors)
        self.minimum, self.maximum = np.full(size, np.inf), np.full(size, -np.inf)
        self.absolutes, self.count = np.zeros(size), np.zeros(size, np.int64)
        self.means: dict[Variable, tuple[npt.NDArray[np.float64], int]] = {}

    def add(self, outputs: dict[str, Any], sample: Sample) -> None:
        """Merge the figures of one sample. Raises FeedError when it is to blame for NaN or infinities."""
        low, high, absolutes = (self._figure(outputs, i) for i in range(3))
        count = self._figure(outputs, 3).astype(np.int64)
        seen = count > 0
        # NaN shows in the magnitudes only; their sum may overflow where all values are finite, as with attention masks
        bad = seen & (np.isnan(absolutes) | ~np.isfinite(low) | ~np.isfinite(high))
        if bad.any():
            nan = np.isnan(low) | np.isnan(high) | np.isnan(absolutes)
            found = {self.tensors[i]: "NaN" if nan[i] else "infinities" for i in np.flatnonzero(bad)}
            self._blame(found, sample)
            for tensor, what in found.items():
                self.broken.setdefault(tensor, f"holds {what} ({sample.source})")
            seen &= ~bad
        self.minimum = np.minimum(self.minimum, np.where(seen, low, np.inf))
        self.maximum = np.maximum(self.maximum, np.where(seen, high, -np.inf))
        self.absolutes += np.where(seen, absolutes, 0.0)
        self.count += count
        for name, tensor in self.probe.means:
            self._add_mean(tensor, outputs[name])

    def _figure(self, outputs: dict[str, Any], i: int) -> npt.NDArray[np.float64]:
        scalars = np.array([outputs[four[i]] for four in self.probe.scalars], np.float64)
        vectors = [np.asarray(outputs[four[i]]) for four, _ in self.probe.vectors]
        return np.concatenate([scalars, *vectors]).astype(np.float64)

    def _blame(self, found: dict[Variable, str], sample: Sample) -> None:
        """Raise FeedError where NaN or infinities come from an input. found: tensor -> what it holds."""
        blamed = [(tensor.name, what) for tensor, what in found.items() if tensor in self.inputs]
        for name, value in sample.inputs.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
                blamed.append((name, "NaN"))
        if blamed:
            raise FeedError(
                f"input {blamed[0][0]!r} holds {blamed[0][1]} for sample {sample.source}",
                "check the preprocessing of this sample, or leave it out",
            )

    def _add_mean(self, tensor: Variable, mean: npt.NDArray[np.float32]) -> None:
        if np.isnan(mean).all():
            return  # no elements in this sample
        total, samples = self.means.get(tensor, (np.zeros(mean.shape), 0))
        with np.errstate(invalid="ignore"):  # infinities of both signs; `store` leaves such a tensor out
            self.means[tensor] = (total + mean, samples + 1)

    def store(self, statistics: Statistics) -> None:
        """Write the final figures."""
        for i, tensor in enumerate(self.tensors):
            count = int(self.count[i])
            if tensor in self.broken:
                statistics.record_skip(tensor, self.broken[tensor])
            elif count:
                mean_absolute = float(self.absolutes[i]) / count
                low, high = float(self.minimum[i]), float(self.maximum[i])
                statistics.record_range(tensor, Range(low, high, count, mean_absolute))
        for tensor, (sum_of_means, samples) in self.means.items():
            if tensor not in self.broken and np.isfinite(sum_of_means).all():
                statistics.record_mean(tensor, sum_of_means / samples)
