"""Which elements of a large tensor are looked at one by one.

A histogram of every element would cost more than the inference that made them. So for each item of the batch a tensor
gives about ELEMENTS, on a grid over its positions that starts half a step in: borders, which see padding, count no more
than they should. Channels are never left out. The grid depends on the shape and the size of the batch alone, on nothing
that changes with the order, the batching or the sharding of samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ELEMENTS = 4096


@dataclass(frozen=True)
class Grid:
    """items: how many equal parts the first axis consists of, one an item of the batch. steps: one an axis within."""

    items: int
    steps: tuple[int, ...]

    @property
    def all(self) -> bool:
        """Whether every element is taken."""
        return all(step == 1 for step in self.steps)

    def pick(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The elements on the grid; their order and shape mean nothing."""
        if self.all:
            return array
        slices = tuple(slice(step // 2, None, step) for step in self.steps)
        if self.steps[0] == 1:
            return array[slices]
        parts = array.reshape(self.items, -1, *array.shape[1:])
        return parts[(slice(None), *slices)]


@functools.lru_cache(maxsize=1 << 10)
def grid(shape: tuple[int, ...], channels_first: bool, batch: int = 1, elements: int | None = ELEMENTS) -> Grid:
    """The grid for a tensor of this shape.

    channels_first: axis 1 holds channels and the axes behind it positions, as convolutions have them; else the last
    axis holds channels. The first axis holds positions too where it is longer than the batch. elements: for each item
    of the batch; None takes all.
    """
    steps = [1] * len(shape)
    items = batch if shape and batch > 0 and shape[0] % batch == 0 and shape[0] > 0 else 1
    sizes = (shape[0] // items, *shape[1:]) if shape else ()
    if elements is None or math.prod(sizes) <= elements:
        return Grid(items, tuple(steps))
    left = math.prod(sizes) / elements
    axes = sorted(_positions(sizes, channels_first), key=lambda axis: (sizes[axis], axis))
    for place, axis in enumerate(axes):
        steps[axis] = min(sizes[axis], math.ceil(left ** (1 / (len(axes) - place))))
        left = max(1.0, left / steps[axis])
    return Grid(items, tuple(steps))


def _positions(sizes: tuple[int, ...], channels_first: bool) -> list[int]:
    """The axes that hold positions; all that there are for a tensor without any."""
    rank = len(sizes)
    inner = range(2, rank) if channels_first else range(1, rank - 1)
    found = [axis for axis in (0, *inner) if axis < rank and sizes[axis] > 1]
    return found or [axis for axis in range(rank) if sizes[axis] > 1]


def batch_of(inputs: Mapping[str, Any]) -> int:
    """The length of the first axis that all inputs with axes share; 1 where they differ."""
    lengths = {value.shape[0] for value in inputs.values() if isinstance(value, np.ndarray) and value.ndim}
    return int(lengths.pop()) if len(lengths) == 1 else 1
