"""Number formats of stored weights: what type codes have, how large they get, which versions of ONNX know them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxopt.numerics.affine import SMALLEST_SCALE, FloatArray
from onnxopt.numerics.powers import next_power_of_two

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Format:
    """Codes of one type; real = scale * code.

    largest: the magnitude that scales put the largest weight at. opset, ir_version: where Cast and DequantizeLinear
    first take the type (onnx, docs/Changelog.md and docs/IR.md).
    """

    name: str
    dtype: np.dtype[np.generic]
    largest: float
    bits: int
    opset: int
    ir_version: int

    def codes(self, values: npt.NDArray[np.floating]) -> Array:
        """Nearest codes of scaled values, those beyond `largest` at it; same shape."""
        clipped = np.clip(values, -self.largest, self.largest)
        rounded = np.rint(clipped) if self.dtype == np.int8 else clipped.astype(np.float32)
        return np.asarray(rounded.astype(self.dtype))


INT8 = Format("int8", np.dtype(np.int8), 127.0, 8, 13, 4)
# few bits in bytes of their own
INTEGER = {bits: Format(f"int{bits}", np.dtype(np.int8), 2.0 ** (bits - 1) - 1, bits, 13, 4) for bits in range(2, 8)}
INTEGER[8] = INT8
FLOAT8_E4M3 = Format("float8 (e4m3)", np.dtype(ml_dtypes.float8_e4m3fn), 448.0, 8, 19, 9)
FLOAT8_E5M2 = Format("float8 (e5m2)", np.dtype(ml_dtypes.float8_e5m2), 57344.0, 8, 19, 9)
FLOAT8 = {"e4m3": FLOAT8_E4M3, "e5m2": FLOAT8_E5M2}


def scales_for(maximum: npt.NDArray[np.floating], form: Format, power_of_two: bool = False) -> FloatArray:
    """Float32 scales that put each maximum at the format's largest code; a maximum of zero gets 1.

    power_of_two: the next power of two that is large enough, so that scaling is a shift (fixed point).
    """
    wide = np.asarray(maximum, np.float64)
    scales = np.where(wide > 0, np.maximum(wide / form.largest, float(SMALLEST_SCALE)), 1.0)
    if power_of_two:
        scales = next_power_of_two(scales)
    return scales.astype(np.float32)
