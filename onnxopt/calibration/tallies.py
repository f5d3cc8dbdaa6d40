"""What is kept of one tensor while feeds stream by. Every tally merges with another, and is a few arrays on disk.

Extremes, counts and histograms merge exactly; sums are compensated, so that order and parts don't show in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.compensated import CompensatedSum
from onnxopt.numerics.histogram import BINS, MIN_EXPONENT, Histogram

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
T = TypeVar("T", bound="Tally")


def _no_sum() -> CompensatedSum:
    return CompensatedSum.zeros(())


class Tally:
    """Base of the tallies: fields are arrays, numbers or sums, combined as `combine` says, or added up."""

    combine: ClassVar[Mapping[str, Any]] = {}

    def merge(self: T, other: T) -> None:
        """Take in what another run counted of the same tensor."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, CompensatedSum):
                mine.merge(theirs)
            else:
                setattr(self, item.name, self.combine.get(item.name, np.add)(mine, theirs))

    def arrays(self) -> dict[str, Array]:
        """Field -> array; a sum becomes two, NAME and NAME_low."""
        found: dict[str, Array] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, CompensatedSum):
                found[item.name], found[f"{item.name}_low"] = value.high, value.low
            else:
                found[item.name] = np.asarray(value)
        return found

    @classmethod
    def from_arrays(cls: type[T], arrays: Mapping[str, Array]) -> T:
        """Read what `arrays` gave."""
        values = {
            name: CompensatedSum(array, arrays[f"{name}_low"]) if f"{name}_low" in arrays else array
            for name, array in arrays.items()
            if not name.endswith("_low")
        }
        return cls(**values)


@dataclass
class RangeTally(Tally):
    """Extremes and number of elements; magnitudes: sum of |x|, for tensors of inner bodies only."""

    combine: ClassVar[Mapping[str, Any]] = {"minimum": np.minimum, "maximum": np.maximum}
    minimum: Any = np.inf
    maximum: Any = -np.inf
    count: Any = 0
    magnitudes: CompensatedSum = field(default_factory=_no_sum)


@dataclass
class ExtremesTally(Tally):
    """Sums of the minimum and maximum of each run."""

    minimum: CompensatedSum = field(default_factory=_no_sum)
    maximum: CompensatedSum = field(default_factory=_no_sum)
    runs: Any = 0


@dataclass
class MomentsTally(Tally):
    """Sums of x and x * x."""

    total: CompensatedSum = field(default_factory=_no_sum)
    squares: CompensatedSum = field(default_factory=_no_sum)
    count: Any = 0


@dataclass
class HistogramTally(Tally):
    """counts: int64 [BINS] over [-2**exponent, 2**exponent)."""

    exponent: Any = MIN_EXPONENT
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def histogram(self) -> Histogram:
        """The counts with their bins."""
        return Histogram(int(self.exponent), self.counts)

    def merge(self, other: HistogramTally) -> None:
        """Widen to the larger range and add."""
        merged = self.histogram().merged(other.histogram())
        self.exponent, self.counts = merged.exponent, merged.counts


@dataclass
class ChannelRangeTally(Tally):
    """Extremes of each channel, float64 [C]."""

    combine: ClassVar[Mapping[str, Any]] = {"minimum": np.minimum, "maximum": np.maximum}
    minimum: Array
    maximum: Array

    @classmethod
    def empty(cls, channels: int) -> ChannelRangeTally:
        """Of no element."""
        return cls(np.full(channels, np.inf), np.full(channels, -np.inf))


@dataclass
class ChannelMeanTally(Tally):
    """Sum over the positions of each channel [C], and how many positions a channel has."""

    total: CompensatedSum
    positions: Any = 0

    @classmethod
    def empty(cls, channels: int) -> ChannelMeanTally:
        """Of no element."""
        return cls(CompensatedSum.zeros(channels))


@dataclass
class ChannelMomentsTally(Tally):
    """Sums of x and x * x over the positions of each channel [C]."""

    total: CompensatedSum
    squares: CompensatedSum
    positions: Any = 0

    @classmethod
    def empty(cls, channels: int) -> ChannelMomentsTally:
        """Of no element."""
        return cls(CompensatedSum.zeros(channels), CompensatedSum.zeros(channels))


@dataclass
class FiringTally(Tally):
    """At how many of the positions each channel [C] was above the threshold."""

    fired: Array
    positions: Any = 0

    @classmethod
    def empty(cls, channels: int) -> FiringTally:
        """Of no element."""
        return cls(np.zeros(channels, np.int64))


@dataclass
class GramTally(Tally):
    """matrix: sum of x x^T [groups, K, K]; total: sum of x [groups, K]; rows: how many x a group has seen."""

    matrix: CompensatedSum
    total: CompensatedSum
    rows: Any = 0

    @classmethod
    def empty(cls, groups: int, inputs: int) -> GramTally:
        """Of no row."""
        return cls(CompensatedSum.zeros((groups, inputs, inputs)), CompensatedSum.zeros((groups, inputs)))

    def add(self, rows: FloatArray) -> None:
        """Add rows [groups, n, K]."""
        self.matrix.add(np.matmul(rows.transpose(0, 2, 1), rows))
        self.total.add(rows.sum(axis=1))
        self.rows = self.rows + rows.shape[1]


# Kind of statistic, as in Requests -> its tally.
KINDS: dict[str, type[Tally]] = {
    "ranges": RangeTally,
    "extremes": ExtremesTally,
    "moments": MomentsTally,
    "histograms": HistogramTally,
    "channel_ranges": ChannelRangeTally,
    "channel_means": ChannelMeanTally,
    "channel_moments": ChannelMomentsTally,
    "firings": FiringTally,
    "grams": GramTally,
}
