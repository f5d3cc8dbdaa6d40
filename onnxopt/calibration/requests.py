"""What a pass wants to know about the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from onnxopt.model import Variable

T = TypeVar("T")


@dataclass(frozen=True)
class Requests:
    """Statistics wanted, over all feeds.

    ranges: floating-point tensors of any body whose minimum, maximum, mean magnitude and element count are wanted.
    channel_means: (tensor, axis) of the main graph whose mean over all other axes is wanted, one value per channel;
    axis is 1 (of three or more) or -1.
    """

    ranges: tuple[Variable, ...] = ()
    channel_means: tuple[tuple[Variable, int], ...] = ()

    def __or__(self, other: Requests) -> Requests:
        """Both requests, each tensor once."""
        return Requests(
            _unique(self.ranges + other.ranges, self.ranges + other.ranges),
            _unique(
                self.channel_means + other.channel_means,
                [tensor for tensor, _ in self.channel_means + other.channel_means],
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.ranges or self.channel_means)


def _unique(items: tuple[T, ...], keys: Iterable[object]) -> tuple[T, ...]:
    first: dict[int, T] = {}
    for item, key in zip(items, keys, strict=True):
        first.setdefault(id(key), item)
    return tuple(first.values())
