"""What a pass wants to know about the tensors of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnxopt.model import Node, Variable

# A tensor of the main graph and its channel axis, counted from the end where negative.
Channels: TypeAlias = tuple[Variable, int]


@dataclass(frozen=True)
class Requests:
    """Statistics wanted, over all feeds. All but ranges are measured in the main graph only.

    ranges: floating-point tensors of any body: minimum, maximum, number of elements.
    extremes: tensors whose minimum and maximum in each run are averaged over the runs.
    moments: tensors whose mean and mean square over all elements are wanted.
    histograms: tensors whose values are counted in bins (`sampling` says which of them).
    channel_ranges, channel_means, channel_moments: (tensor, axis): minimum and maximum, mean, or mean and mean square,
    over all other axes.
    firings: (tensor, axis, threshold): at how many positions each channel is above the threshold.
    grams: Conv, Gemm and MatMul nodes: second moments of all pairs of inputs that their weight multiplies (`gram`).
    channel_grams: (tensor, axis): second moments of all pairs of channels at the same position.
    """

    ranges: tuple[Variable, ...] = ()
    extremes: tuple[Variable, ...] = ()
    moments: tuple[Variable, ...] = ()
    histograms: tuple[Variable, ...] = ()
    channel_ranges: tuple[Channels, ...] = ()
    channel_means: tuple[Channels, ...] = ()
    channel_moments: tuple[Channels, ...] = ()
    firings: tuple[tuple[Variable, int, float], ...] = ()
    grams: tuple[Node, ...] = ()
    channel_grams: tuple[Channels, ...] = ()

    def __or__(self, other: Requests) -> Requests:
        """Both requests, each thing once."""
        joined = {
            item.name: tuple(dict.fromkeys(getattr(self, item.name) + getattr(other, item.name)))
            for item in dataclasses.fields(self)
        }
        return Requests(**joined)

    def __bool__(self) -> bool:
        return any(self.by_kind().values())

    def by_kind(self) -> dict[str, tuple[Any, ...]]:
        """Name of the field -> what is asked for there."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
