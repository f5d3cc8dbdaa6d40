"""What one streaming run over feeds measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxopt.model import Variable


@dataclass(frozen=True)
class Range:
    """One tensor over all feeds: extreme values, mean magnitude, and how many elements were seen in all."""

    minimum: float
    maximum: float
    count: int
    mean_absolute: float


@dataclass
class Statistics:
    """Measured ranges and channel means, looked up by the tensors that were asked about.

    samples: how many feeds were run. skipped: (tensor name, why it has no figures); a tensor in a branch that no feed
    took is not skipped, it has no range.
    """

    samples: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _reasons: dict[Variable, str] = field(default_factory=dict)
    _ranges: dict[Variable, Range] = field(default_factory=dict)
    _means: dict[Variable, npt.NDArray[np.float64]] = field(default_factory=dict)

    def range(self, tensor: Variable) -> Range | None:
        """Range of `tensor`; None when it was not asked for, never computed, always empty, or skipped."""
        return self._ranges.get(tensor)

    def channel_mean(self, tensor: Variable) -> npt.NDArray[np.float64] | None:
        """Mean of `tensor` per channel, [C] float64; None when it was not asked for or never computed."""
        return self._means.get(tensor)

    def reason(self, tensor: Variable) -> str | None:
        """Why `tensor` was skipped, as what is said of it: "holds infinities (feeds[2])"; None when it was not."""
        return self._reasons.get(tensor)

    def record_skip(self, tensor: Variable, reason: str) -> None:
        """`tensor` has no figures, because it ..."""
        self.skipped.append((tensor.name, reason))
        self._reasons[tensor] = reason

    def record_range(self, tensor: Variable, found: Range) -> None:
        """Store the range of `tensor`."""
        self._ranges[tensor] = found

    def record_mean(self, tensor: Variable, mean: npt.NDArray[np.float64]) -> None:
        """Store the channel mean of `tensor`."""
        self._means[tensor] = mean
