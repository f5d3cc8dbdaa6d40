"""Powers of two."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", bound=np.floating)


def next_power_of_two(values: npt.NDArray[Float] | Float) -> npt.NDArray[Float]:
    """The smallest power of two that is not below each positive value; type and shape of `values`."""
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.ones_like(values), exponent - (mantissa == 0.5)))
