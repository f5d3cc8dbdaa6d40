"""Sums of float64 values that do not depend on the order of the terms, as far as float64 can tell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class CompensatedSum:
    """Running sum of arrays of one shape, kept as an unevaluated pair high + low.

    What rounding cuts off a sum is itself a float64, found without error by six operations and summed apart (TwoSum:
    Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B). n terms in any order, or in parts that are
    merged, give the sum to about 2**-53 of itself + n**2 * 2**-106 of the sum of magnitudes.

    high, low: float64 arrays of the summed shape. Terms are finite.
    """

    def __init__(self, high: FloatArray, low: FloatArray | None = None) -> None:
        self.high = high
        self.low = np.zeros_like(high) if low is None else low

    @classmethod
    def zeros(cls, shape: int | tuple[int, ...]) -> CompensatedSum:
        """The empty sum."""
        return cls(np.zeros(shape))

    @property
    def value(self) -> FloatArray:
        """The sum, rounded once."""
        return np.asarray(self.high + self.low)

    def add(self, terms: npt.NDArray[np.floating]) -> None:
        """Add an array of the summed shape."""
        total = self.high + terms
        # The part of `terms` that entered the total, and what rounding left of both.
        entered = total - self.high
        self.low += (self.high - (total - entered)) + (terms - entered)
        self.high = total

    def merge(self, other: CompensatedSum) -> None:
        """Add another sum of the same shape."""
        self.add(other.high)
        self.low += other.low
        # Renormalized, so that the pair is nearly the same whatever the parts were.
        total = self.high + self.low
        self.low = self.low - (total - self.high)
        self.high = total
