"""Fixed-point numbers, real = code * 2^-n: formats whose scale is a power of two, so that scaling is a shift.

Qm.n has a sign, m bits before the binary point and n behind it: codes of 1 + m + n bits from -2^(m+n) to 2^(m+n) - 1,
in steps of 2^-n. UQm.n has no sign: m + n bits, from 0. One of m and n is negative where the point lies outside of the
code: Q-3.10 has 8 bits and holds values below 1/8. (Texas Instruments, "TMS320C64x DSP Library", appendix A; Oberstar,
"Fixed-Point Representation and Fractional Math", 2007.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.affine import SMALLEST_SCALE, CodeArray, FloatArray, QParams, quantize_weight
from onnxopt.numerics.histogram import Histogram
from onnxopt.numerics.powers import next_power_of_two
from onnxopt.numerics.saturation import Layout, max_pair_sum, pair_limit

# How often a scale of weights may be halved: with few bits, most values are far below the largest.
_HALVINGS = 4


def q_format(scale: float, bits: int, signed: bool = True) -> str:
    """The name, such as Q1.6 or UQ0.8, of codes of `bits` bits in steps of `scale`, a power of two."""
    fraction = 1 - int(np.frexp(scale)[1])
    return f"Q{bits - 1 - fraction}.{fraction}" if signed else f"UQ{bits - fraction}.{fraction}"


def q_formats(scales: FloatArray, bits: int) -> str:
    """The names of the finest and the coarsest format among signed ones: "Q1.6", or "Q-1.8 to Q1.6"."""
    finest, coarsest = (q_format(float(scale), bits) for scale in (scales.min(), scales.max()))
    return finest if finest == coarsest else f"{finest} to {coarsest}"


def activation_qparams(
    minimum: float,
    maximum: float,
    dtype: npt.DTypeLike,
    bits: int = 8,
    symmetric: bool = False,
    histogram: Histogram | None = None,
) -> QParams:
    """Fixed-point format for values in [minimum, maximum], widened to hold 0.

    Values that are never negative get codes without a sign, which start at the lowest of `dtype`; others get two's
    complement, zero in the middle of `dtype`: code 128 of uint8 and 0 of int8. symmetric: always the latter. The scale
    is the smallest with which the range needs no more than `bits` bits; with 8 bits, half of it where the histogram
    says that the finer step gains more, in squares, than clipping loses. Raises ValueError when a bound is not finite.
    """
    if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"[{minimum}, {maximum}] is no range of finite numbers")
    start = 0 if np.dtype(dtype) == np.uint8 else -128
    low, high = min(0.0, float(minimum)), max(0.0, float(maximum))
    signed = symmetric or low < 0.0
    zero_point = start + 128 if signed else start
    if high == low:
        return QParams(np.array(1, np.float32), np.array(zero_point, dtype))
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    needed = max(high / highest, low / lowest if signed else 0.0, float(SMALLEST_SCALE))
    scale = float(next_power_of_two(np.float64(needed)))
    if bits == 8 and histogram is not None and histogram.count and scale > SMALLEST_SCALE:
        whole, half = (squared_error(histogram, each, lowest, highest) for each in (scale, scale / 2))
        scale = scale / 2 if half < whole else scale
    return QParams(np.array(scale, np.float32), np.array(zero_point, dtype))


def squared_error(histogram: Histogram, scale: float, lowest: int, highest: int) -> float:
    """Sum of squared errors of counted values, each at the middle of its bin, as codes lowest..highest of one scale."""
    filled = np.flatnonzero(histogram.counts)
    values = histogram.centres()[filled]
    codes = np.clip(np.rint(values / scale), lowest, highest)
    return float(histogram.counts[filled] @ np.square(codes * scale - values))


def weight_scales(
    weight: FloatArray, layout: Layout, scales: FloatArray, least: FloatArray, limit: int, bounded: bool, joint: bool
) -> FloatArray:
    """Powers of two [N] about `scales` [N], those with the smallest squared error: first rounded up, then halved.

    limit: magnitude of the largest code; what exceeds it is clipped. A scale is not halved below `least` [N], nor,
    bounded, where a pair of codes could saturate. joint: all channels take one scale, the largest of `scales`.
    """
    largest = next_power_of_two(np.maximum(scales, SMALLEST_SCALE))
    if joint:
        largest = np.full_like(largest, largest.max(initial=0.0))
    chosen, smallest = largest, _channel_error(weight, layout, largest, limit)[0]
    for halvings in range(1, _HALVINGS + 1):
        tried = (largest / 2**halvings).astype(np.float32)
        error, codes = _channel_error(weight, layout, tried, limit)
        allowed = tried >= np.maximum(least, SMALLEST_SCALE)
        if bounded:
            allowed &= max_pair_sum(codes, layout) <= pair_limit(255)
        better = allowed & (error < smallest)
        if joint:
            better = np.full_like(better, bool(allowed.all()) and error.sum() < smallest.sum())
        chosen, smallest = np.where(better, tried, chosen), np.where(better, error, smallest)
    return np.asarray(chosen, np.float32)


def _channel_error(
    weight: FloatArray, layout: Layout, scales: FloatArray, limit: int
) -> tuple[npt.NDArray[np.float64], CodeArray]:
    """(sum of squared errors of each channel [N], the codes)."""
    codes = quantize_weight(weight, scales, layout.axis, limit)
    channels = np.moveaxis(weight, layout.axis, 0).reshape(len(scales), -1).astype(np.float64)
    coded = np.moveaxis(codes, layout.axis, 0).reshape(len(scales), -1)
    return np.square(coded * scales[:, None].astype(np.float64) - channels).sum(axis=1), codes
