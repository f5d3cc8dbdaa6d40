"""What one streaming run over feeds measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.requests import Channels
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
    Tally,
    merge_all,
)
from onnxopt.model import Node, Variable
from onnxopt.numerics.compensated import CompensatedSum
from onnxopt.numerics.histogram import Histogram

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T", bound=Tally)
# what a statistic is of: a tensor, a tensor with a channel axis (and a threshold), or a node
Subject = Variable | Node | tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """One tensor over all feeds: its extreme values, and how many elements were seen in all."""

    minimum: float
    maximum: float
    count: int


@dataclass(frozen=True)
class Moments:
    """Mean and mean square, each a number or [C] for channels; count: elements, or positions of a channel."""

    mean: FloatArray
    mean_square: FloatArray
    count: int

    @property
    def variance(self) -> FloatArray:
        """Mean square minus square of the mean, not below zero."""
        return np.maximum(self.mean_square - np.square(self.mean), 0.0)


@dataclass(frozen=True)
class Gram:
    """second: E[x x^T], [groups, K, K] float64; mean: E[x], [groups, K]; rows: how many x they are taken over."""

    second: FloatArray
    mean: FloatArray
    rows: int

    @property
    def covariance(self) -> FloatArray:
        """E[x x^T] - E[x] E[x]^T, [groups, K, K]."""
        return np.asarray(self.second - self.mean[:, :, None] * self.mean[:, None, :])


class Statistics:
    """Measured figures, looked up by the tensors and nodes that were asked about.

    samples: how many feeds were run; runs: in how many runs of the model. Every lookup gives None for what was not
    asked for, never computed (a branch that no feed took), always empty, or skipped; `reason` tells a skip.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.runs = 0
        self._tallies: dict[tuple[str, Subject], Tally] = {}
        self._reasons: dict[tuple[str, Subject], str] = {}

    # looking up

    def range(self, tensor: Variable) -> Range | None:
        """Minimum, maximum and number of elements."""
        found = self._find(RangeTally, "ranges", tensor)
        if found is None or not found.count:
            return None
        return Range(float(found.minimum), float(found.maximum), int(found.count))

    def ranged(self) -> list[Variable]:
        """The tensors that have a range."""
        return [subject for kind, subject in self._tallies if kind == "ranges" and isinstance(subject, Variable)]

    def mean_extremes(self, tensor: Variable) -> tuple[float, float] | None:
        """Mean over the runs of each run's minimum and maximum."""
        found = self._find(ExtremesTally, "extremes", tensor)
        if found is None or not found.runs:
            return None
        return float(found.minimum.value / found.runs), float(found.maximum.value / found.runs)

    def moments(self, tensor: Variable) -> Moments | None:
        """Mean and mean square of all elements."""
        found = self._find(MomentsTally, "moments", tensor)
        if found is None or not found.count:
            return None
        return Moments(found.total.value / found.count, found.squares.value / found.count, int(found.count))

    def histogram(self, tensor: Variable) -> Histogram | None:
        """Counts of the values on the grid of `sampling`."""
        found = self._find(HistogramTally, "histograms", tensor)
        return None if found is None or not found.counts.any() else found.histogram()

    def mean_magnitude(self, tensor: Variable) -> float | None:
        """Mean |x|: from the histogram, to its resolution; of tensors in inner bodies from their own sums."""
        histogram = self.histogram(tensor)
        if histogram is not None:
            return histogram.mean_absolute()
        found = self._find(RangeTally, "ranges", tensor)
        if found is None or not found.count or not found.magnitudes.value:
            return None
        return float(found.magnitudes.value / found.count)

    def channel_range(self, tensor: Variable, axis: int) -> tuple[FloatArray, FloatArray] | None:
        """Minimum and maximum of each channel, [C] float64."""
        found = self._find(ChannelRangeTally, "channel_ranges", (tensor, axis))
        return None if found is None else (found.minimum, found.maximum)

    def channel_maximum(self, tensor: Variable, axis: int) -> FloatArray | None:
        """max |x| of each channel, [C] float64."""
        found = self.channel_range(tensor, axis)
        return None if found is None else np.maximum(np.abs(found[0]), np.abs(found[1]))

    def channel_mean(self, tensor: Variable, axis: int) -> FloatArray | None:
        """Mean of each channel, [C] float64."""
        found = self._find(ChannelMeanTally, "channel_means", (tensor, axis))
        if found is None or not found.positions:
            moments = self.channel_moments(tensor, axis)
            return None if moments is None else moments.mean
        return np.asarray(found.total.value / found.positions)

    def channel_moments(self, tensor: Variable, axis: int) -> Moments | None:
        """Mean and mean square of each channel, [C] float64."""
        found = self._find(ChannelMomentsTally, "channel_moments", (tensor, axis))
        if found is None or not found.positions:
            return None
        count = int(found.positions)
        return Moments(found.total.value / count, found.squares.value / count, count)

    def firing(self, tensor: Variable, axis: int, threshold: float) -> FloatArray | None:
        """Share of its positions at which each channel was above the threshold, [C]; 0 for one that never fires."""
        found = self._find(FiringTally, "firings", (tensor, axis, threshold))
        return None if found is None or not found.positions else np.asarray(found.fired / found.positions)

    def gram(self, node: Node) -> Gram | None:
        """Second moments of the inputs that the layer's weight multiplies."""
        return _gram(self._find(GramTally, "grams", node))

    def channel_gram(self, tensor: Variable, axis: int) -> Gram | None:
        """Second moments of all pairs of channels at the same position, one group."""
        return _gram(self._find(GramTally, "channel_grams", (tensor, axis)))

    def reason(self, subject: Subject, kind: str = "ranges") -> str | None:
        """Why `subject` was skipped, as what is said of it: "holds infinities (feeds[2])"; None when it was not."""
        return self._reasons.get((kind, subject))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, why it has no figures), each once."""
        told = [(_name(subject), reason) for (_, subject), reason in self._reasons.items()]
        return list(dict.fromkeys(told))

    # filling in

    def tally(self, kind: str, subject: Subject, make: Any) -> Any:
        """The tally of a subject, made by `make()` where there is none yet."""
        key = (kind, subject)
        if key not in self._tallies:
            self._tallies[key] = make()
        return self._tallies[key]

    def record(self, kind: str, subject: Subject, tally: Tally) -> None:
        """Take over a finished tally."""
        self._tallies[kind, subject] = tally

    def record_skip(self, subject: Subject, reason: str, kind: str = "ranges") -> None:
        """`subject` has no figures of that kind, because it ..."""
        self._reasons.setdefault((kind, subject), reason)
        self._tallies.pop((kind, subject), None)

    def tallies(self) -> Iterator[tuple[str, Subject, Tally]]:
        """(kind, subject, tally) of everything measured."""
        for (kind, subject), tally in self._tallies.items():
            yield kind, subject, tally

    def reasons(self) -> Iterator[tuple[str, Subject, str]]:
        """(kind, subject, reason) of everything skipped."""
        for (kind, subject), reason in self._reasons.items():
            yield kind, subject, reason

    def moved(self, tensors: Mapping[int, Variable]) -> Statistics:
        """The same figures for a clone of the model; tensors: `Clone.tensors`."""
        moved = Statistics()
        moved.samples, moved.runs = self.samples, self.runs

        def there(subject: Subject) -> Subject | None:
            if isinstance(subject, Node):
                outputs = [tensors[id(output)] for output in subject.outputs if id(output) in tensors]
                return outputs[0].inputs[0] if outputs and outputs[0].inputs else None
            inner, *detail = subject if isinstance(subject, tuple) else (subject,)
            found = tensors.get(id(inner))
            return None if found is None else (found, *detail) if detail else found

        moved._tallies = {(k, to): t for (k, s), t in self._tallies.items() if (to := there(s)) is not None}
        moved._reasons = {(k, to): t for (k, s), t in self._reasons.items() if (to := there(s)) is not None}
        return moved

    def copy(self) -> Statistics:
        """Figures that may be changed apart from these; what they are made of is shared."""
        made = Statistics()
        made.samples, made.runs = self.samples, self.runs
        made._tallies, made._reasons = dict(self._tallies), dict(self._reasons)
        return made

    def divide(self, channels: Channels, factors: FloatArray, result: Variable, readers: Iterable[Node]) -> None:
        """Take over what is known of a tensor as figures of `result`, its channels divided by positive factors [C].

        result: the tensor itself or another one. readers: MatMuls and Gemms that multiply `result`. Range and means
        follow from those of the channels, which must be known; what does not follow (histograms, extremes of runs) is
        forgotten.
        """
        tensor, axis = channels
        extremes, moments = self.channel_range(tensor, axis), self.channel_moments(tensor, axis)
        known = self.range(tensor)
        assert extremes is not None
        assert moments is not None
        low, high = (each / factors for each in extremes)
        count = known.count if known is not None else moments.count * len(factors)
        for kind in ("ranges", "extremes", "moments", "histograms"):
            self._tallies.pop((kind, result), None)
        self.record("ranges", result, RangeTally(low.min(), high.max(), count))
        means = ChannelMeanTally(CompensatedSum(moments.mean / factors * moments.count), moments.count)
        self.record("channel_means", (result, axis), means)
        for kind in ("channel_ranges", "channel_moments", "channel_grams"):
            self._tallies.pop((kind, (result, axis)), None)
        for node in readers:
            gram = self._find(GramTally, "grams", node)
            if gram is not None:
                matrix = CompensatedSum(gram.matrix.value / np.multiply.outer(factors, factors))
                self.record("grams", node, GramTally(matrix, CompensatedSum(gram.total.value / factors), gram.rows))

    def merge(self, other: Statistics) -> None:
        """Take in another run over other feeds of the same graph; what either skipped is skipped."""
        self.samples += other.samples
        self.runs += other.runs
        merge_all(self._tallies, self._reasons, other._tallies, other._reasons)

    def _find(self, _type: type[T], kind: str, subject: Subject) -> T | None:
        found = self._tallies.get((kind, subject))
        return found if isinstance(found, _type) else None


def _gram(tally: GramTally | None) -> Gram | None:
    if tally is None or not tally.rows:
        return None
    return Gram(tally.matrix.value / tally.rows, tally.total.value / tally.rows, int(tally.rows))


def _name(subject: Subject) -> str:
    inner = subject[0] if isinstance(subject, tuple) else subject
    if isinstance(inner, Node):
        return str(inner.name or (inner.outputs[0].name if inner.outputs else inner.op))
    return str(inner.name)
