"""Zeros and distinct values of weights, looked at whole or by samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxopt.model import Constant, Model, TensorData

# bytes of weights that are read whole; beyond them each tensor is sampled
_WHOLE = 512 << 20
# a sample: so many stretches of so many elements, evenly spread
_STRETCHES, _STRETCH = 64, 4096
# elements that tell whether counting distinct values is worth while
_PROBE = 4096
MOST_DISTINCT = 256
# a table of values pays for itself from so many elements on
_PALETTE_FROM = 1024
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass(frozen=True)
class Values:
    """What the values of one weight look like. elements: looked at. distinct: None above MOST_DISTINCT."""

    data: TensorData
    elements: int
    zeros: int
    distinct: int | None

    @property
    def whole(self) -> bool:
        """Whether every element was looked at."""
        return self.elements == self.data.size

    @property
    def palette_bits(self) -> int | None:
        """Bits an element that a table of its values needs; None where that saves nothing or is not certain."""
        if not self.whole or self.distinct is None or self.data.size < _PALETTE_FROM:
            return None
        bits = max(1, math.ceil(math.log2(max(self.distinct, 1))))
        return bits if self.palette_bytes(bits) < self.data.nbytes else None

    def palette_bytes(self, bits: int) -> int:
        """Bytes of the codes and the table."""
        return (self.data.size * bits + 7) // 8 + (self.distinct or 0) * self.data.dtype.itemsize


def distinct_contents(model: Model) -> dict[int, tuple[Constant, TensorData]]:
    """uid -> one constant that holds the content, in the order of the model."""
    found: dict[int, tuple[Constant, TensorData]] = {}
    for constant in model.constants():
        found.setdefault(constant.data.uid, (constant, constant.data))
    return found


def look_at(model: Model) -> dict[int, Values]:
    """uid -> what was seen, for float weights of at least one axis."""
    floats = [
        data for _, data in distinct_contents(model).values() if data.dtype.name in _FLOATS and data.shape and data.size
    ]
    whole = sum(data.nbytes for data in floats) <= _WHOLE
    return {data.uid: _values(data, whole) for data in floats}


def _values(data: TensorData, whole: bool) -> Values:
    flat = data.array().reshape(-1)
    if not whole and flat.size > _STRETCHES * _STRETCH:
        flat = np.concatenate(list(_sampled(flat)))
    return Values(data, flat.size, flat.size - int(np.count_nonzero(flat)), _distinct(flat))


def _sampled(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    last = flat.size - _STRETCH
    for number in range(_STRETCHES):
        start = last * number // (_STRETCHES - 1)
        yield flat[start : start + _STRETCH]


def _distinct(flat: NDArray[Any]) -> int | None:
    """Bit patterns that occur; None above MOST_DISTINCT, which a few elements mostly tell."""
    bits = flat.view(f"u{flat.dtype.itemsize}")
    if len(np.unique(bits[:: max(1, bits.size // _PROBE)])) > MOST_DISTINCT:
        return None
    known: NDArray[Any] = bits[:0]
    for start in range(0, bits.size, 1 << 20):
        known = np.union1d(known, bits[start : start + (1 << 20)])
        if len(known) > MOST_DISTINCT:
            return None
    return len(known)
