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
from onnxopt.numerics.histogram import BINS, MAX_EXPONENT, MIN_EXPONENT, Histogram

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
T = TypeVar("T", bound="Tally")


# Fields that count.
_WHOLE = frozenset({"count", "counts", "runs", "exponent", "positions", "fired", "rows"})


# Rows of a Gram matrix that wait at most before they are multiplied.
_WAITING = 1024


def _no_sum() -> CompensatedSum:
    return CompensatedSum.zeros(())


class Tally:
    """Base of the tallies: fields are arrays, numbers or sums, combined as `combine` says, or added up.

    axes: field -> a letter for each of its axes; letters that are alike stand for sizes that are. Others are numbers.
    _sized: a field whose last axis is that of the channels.
    """

    combine: ClassVar[Mapping[str, Any]] = {}
    axes: ClassVar[Mapping[str, str]] = {}
    _sized: ClassVar[str | None] = None

    @property
    def channels(self) -> int:
        """How many channels, or inputs of a layer, it is of; 1 for a whole tensor. Only tallies of as many merge."""
        if self._sized is None:
            return 1
        value = getattr(self, self._sized)
        return int((value.high if isinstance(value, CompensatedSum) else value).shape[-1])

    def merge(self: T, other: T) -> None:
        """Take in what another run counted of the same tensor."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, CompensatedSum):
                mine.merge(theirs)
            else:
                setattr(self, item.name, self.combine.get(item.name, np.add)(mine, theirs))

    def copy(self: T) -> T:
        """The same figures in arrays of their own."""
        return type(self).from_arrays({name: array.copy() for name, array in self.arrays().items()})

    def check(self) -> None:
        """Raise ValueError where a field has not the type, size or range that counting gives it."""
        sizes = {"b": BINS}
        for name, array in self.arrays().items():
            field_name = name.removesuffix("_low")
            letters = self.axes.get(field_name, "")
            whole = field_name in _WHOLE
            if array.dtype != (np.int64 if whole else np.float64):
                raise ValueError(f"{name} is of type {array.dtype}")
            dims = zip(letters, array.shape, strict=True) if array.ndim == len(letters) else [("b", -1)]
            if any(sizes.setdefault(letter, dim) != dim for letter, dim in dims):
                raise ValueError(f"{name} has shape {array.shape}")
            if not np.isfinite(array).all() or (whole and field_name != "exponent" and (array < 0).any()):
                raise ValueError(f"{name} holds values that are no counts and no figures")

    @classmethod
    def names(cls) -> list[str]:
        """What `arrays` gives."""
        found = []
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            found += [item.name, f"{item.name}_low"] if item.type == "CompensatedSum" else [item.name]
        return found

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

    axes: ClassVar[Mapping[str, str]] = {"counts": "b"}
    exponent: Any = MIN_EXPONENT
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def check(self) -> None:
        """Raise ValueError for what no histogram has."""
        super().check()
        if not MIN_EXPONENT <= self.exponent <= MAX_EXPONENT:
            raise ValueError(f"exponent is {self.exponent}")

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
    axes: ClassVar[Mapping[str, str]] = {"minimum": "c", "maximum": "c"}
    _sized: ClassVar[str | None] = "minimum"
    minimum: Array
    maximum: Array

    @classmethod
    def empty(cls, channels: int) -> ChannelRangeTally:
        """Of no element."""
        return cls(np.full(channels, np.inf), np.full(channels, -np.inf))


@dataclass
class ChannelMeanTally(Tally):
    """Sum over the positions of each channel [C], and how many positions a channel has."""

    axes: ClassVar[Mapping[str, str]] = {"total": "c"}
    _sized: ClassVar[str | None] = "total"
    total: CompensatedSum
    positions: Any = 0

    @classmethod
    def empty(cls, channels: int) -> ChannelMeanTally:
        """Of no element."""
        return cls(CompensatedSum.zeros(channels))


@dataclass
class ChannelMomentsTally(Tally):
    """Sums of x and x * x over the positions of each channel [C]."""

    axes: ClassVar[Mapping[str, str]] = {"total": "c", "squares": "c"}
    _sized: ClassVar[str | None] = "total"
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

    axes: ClassVar[Mapping[str, str]] = {"fired": "c"}
    _sized: ClassVar[str | None] = "fired"
    fired: Array
    positions: Any = 0

    @classmethod
    def empty(cls, channels: int) -> FiringTally:
        """Of no element."""
        return cls(np.zeros(channels, np.int64))


@dataclass
class GramTally(Tally):
    """matrix: sum of x x^T [groups, K, K]; total: sum of x [groups, K]; rows: how many x a group has seen."""

    axes: ClassVar[Mapping[str, str]] = {"matrix": "gkk", "total": "gk"}
    _sized: ClassVar[str | None] = "total"
    matrix: CompensatedSum
    total: CompensatedSum
    rows: Any = 0

    def __post_init__(self) -> None:
        self._waiting: list[FloatArray] = []

    @classmethod
    def empty(cls, groups: int, inputs: int) -> GramTally:
        """Of no row."""
        return cls(CompensatedSum.zeros((groups, inputs, inputs)), CompensatedSum.zeros((groups, inputs)))

    def add(self, rows: FloatArray) -> None:
        """Add rows [groups, n, K]; of wide layers some wait until there are enough for one product. See `settle`."""
        self._waiting.append(rows)
        if sum(waiting.shape[1] for waiting in self._waiting) >= min(rows.shape[2] // 4, _WAITING):
            self.settle()

    def settle(self) -> None:
        """Take in the rows that wait."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting, axis=1) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
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
    "channel_grams": GramTally,
}


def merge_all(
    tallies: dict[Any, Tally], reasons: dict[Any, str], others: Mapping[Any, Tally], other_reasons: Mapping[Any, str]
) -> None:
    """Take in what another run counted of the same subjects, and what it skipped: what either skipped is skipped."""
    for at, tally in others.items():
        mine = tallies.get(at)
        if mine is None:
            tallies[at] = tally.copy()
        elif mine.channels != tally.channels:
            reasons.setdefault(at, unlike(mine.channels, tally.channels))
        else:
            tallies[at] = mine.copy()
            tallies[at].merge(tally)
    for at, reason in other_reasons.items():
        reasons.setdefault(at, reason)
    for at in reasons:
        tallies.pop(at, None)


def unlike(one: int, other: int) -> str:
    """Why something was skipped that has not the same number of channels everywhere."""
    return f"has {min(one, other)} channels in one sample and {max(one, other)} in another"
