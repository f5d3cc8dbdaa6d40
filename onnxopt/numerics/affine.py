"""Affine 8-bit formats: real = scale * (code - zero_point).

Activations take one asymmetric scale per tensor, weights one symmetric scale per output channel, biases int32 codes in
the scale of the products they are added to (onnxruntime, `tools/quantization/base_quantizer.py`). All functions are
pure; scales are float32 because the file stores them so and the codes must be computed with the stored value.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int8]

# The smallest scale that keeps 1 / scale and scale * 255 finite and normal in float32.
SMALLEST_SCALE = np.float32(2.0**-100)
WEIGHT_LIMIT = 127  # symmetric: -128 is not used, so that -w has the same code as w with the sign turned
UNSIGNED_ZERO = 128  # zero-point of a symmetric weight that is stored unsigned
_BIAS_CODES = 2.0**32 - 2  # int32 codes a symmetric bias may take


@dataclass(frozen=True)
class QParams:
    """Scale (float32, positive) and zero-point of one tensor; both 0-d, because a shape of [1] blocks kernel fusion."""

    scale: FloatArray
    zero_point: Array

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The integer type of the codes."""
        return self.zero_point.dtype

    @property
    def codes(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return _codes(self.dtype)

    def code(self, value: float) -> int:
        """The code that represents `value`, after clipping to the type."""
        return int(np.clip(np.rint(np.float32(value) / self.scale) + int(self.zero_point), *self.codes))

    def value(self, code: int) -> float:
        """The float32 value of a code, as DequantizeLinear computes it."""
        return float(np.float32(code - int(self.zero_point)) * self.scale)

    def same_as(self, other: "QParams") -> bool:
        """Whether both have bit-equal scale and zero-point: what the runtime asks of pass-through operators."""
        return (
            self.dtype == other.dtype
            and self.scale.tobytes() == other.scale.tobytes()
            and int(self.zero_point) == int(other.zero_point)
        )


def _codes(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    return (0, 255) if dtype == np.uint8 else (-128, 127)


def activation_qparams(minimum: float, maximum: float, dtype: npt.DTypeLike, symmetric: bool = False) -> QParams:
    """Format for values in [minimum, maximum], with zero exactly representable; asymmetric by default.

    The range is widened to hold 0 (padding inserts zeros). A range that is only {0} gets scale 1. The represented range
    ends at or inside the requested one on the far side of zero, up to one float32 rounding: a following Clip is then
    implied by the codes. symmetric: int8 with zero-point 0, and 127 codes for the larger of the two sides. Raises
    ValueError when a bound is NaN or infinite, minimum > maximum, or an unsigned format is to be symmetric.
    """
    if not (np.isfinite(minimum) and np.isfinite(maximum)):
        raise ValueError(f"range [{minimum}, {maximum}] is not finite")
    if minimum > maximum:
        raise ValueError(f"range [{minimum}, {maximum}] is empty")
    lowest, highest = _codes(np.dtype(dtype))
    low, high = min(0.0, float(minimum)), max(0.0, float(maximum))
    if symmetric and lowest >= 0:
        raise ValueError(f"a symmetric format needs a signed type, not {np.dtype(dtype)}")
    if high == low:
        return QParams(np.array(1, np.float32), np.array(max(0, lowest), dtype))
    if symmetric:
        scale = max(np.float32(max(high, -low) / highest), SMALLEST_SCALE)
        return QParams(np.array(scale, np.float32), np.array(0, dtype))
    scale = max(np.float32((high - low) / (highest - lowest)), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(lowest - low / float(scale)), lowest, highest))
    if zero_point == lowest:
        scale = _round_inside(scale, high, highest - lowest)
    elif zero_point == highest:
        scale = _round_inside(scale, -low, highest - lowest)
    return QParams(np.array(scale, np.float32), np.array(zero_point, dtype))


def _round_inside(scale: np.float32, bound: float, steps: int) -> np.float32:
    """Lower a one-sided scale until scale * steps, taken in float32 as the runtime does, is not above `bound`."""
    scale = min(scale, np.float32(bound / steps))
    while np.float32(steps) * scale > np.float32(bound) and scale > SMALLEST_SCALE:
        scale = np.nextafter(scale, np.float32(0.0))
    return max(scale, SMALLEST_SCALE)


def underflows(extent: float, steps: int) -> bool:
    """Whether `steps` codes over `extent` > 0 need a scale below SMALLEST_SCALE: rounding would lose all values."""
    return bool(0.0 < extent / steps < SMALLEST_SCALE)


def typical_sqnr_db(minimum: float, maximum: float, mean_absolute: float) -> float:
    """Decibels between the mean |x| and the rounding noise step / sqrt(12) of 255 steps over [minimum, maximum].

    Unlike the SQNR, which outliers raise with their own power, this falls when a few outliers stretch the range far
    beyond all other values. inf for a tensor that is always zero.
    """
    step = (max(maximum, 0.0) - min(minimum, 0.0)) / 255
    if step == 0.0:
        return float("inf")
    return float(20.0 * np.log10(max(mean_absolute, 1e-150) * 12.0**0.5 / step))


def quantize(values: npt.NDArray[np.floating], params: QParams) -> Array:
    """Codes of `values`, any shape: round half to even, then saturate, as QuantizeLinear does."""
    codes = np.rint(np.asarray(values, np.float32) / params.scale) + np.float32(int(params.zero_point))
    return np.asarray(np.clip(codes, *params.codes).astype(params.dtype))


def dequantize(codes: Array, params: QParams) -> FloatArray:
    """Float32 values of integer `codes`, any shape."""
    return (codes.astype(np.int32) - np.int32(params.zero_point)).astype(np.float32) * params.scale


def channel_maximum(weight: npt.NDArray[np.floating], axis: int) -> npt.NDArray[np.float64]:
    """max |w| per index of `axis`: shape [weight.shape[axis]], float64."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return np.asarray(np.abs(weight).max(axis=others, initial=0.0), np.float64)


def weight_scales(maximum: npt.NDArray[np.float64], limit: int = WEIGHT_LIMIT) -> FloatArray:
    """Symmetric scales, one a channel, that put max |w| at code `limit`; a channel of zeros gets 1."""
    scales = np.where(maximum > 0, maximum / limit, 1.0)
    return np.maximum(scales, SMALLEST_SCALE).astype(np.float32)


def quantize_weight(
    weight: npt.NDArray[np.floating], scales: FloatArray, axis: int, limit: int = WEIGHT_LIMIT
) -> CodeArray:
    """Symmetric int8 codes in [-limit, limit], one scale per index of `axis`; shape of `weight`."""
    codes = np.rint(np.asarray(weight, np.float32) / along(scales, axis, weight.ndim))
    return np.asarray(np.clip(codes, -limit, limit), np.int8)


def unsigned(codes: CodeArray) -> npt.NDArray[np.uint8]:
    """Symmetric int8 codes as uint8 codes of zero-point UNSIGNED_ZERO: the same values."""
    return (codes.astype(np.int16) + UNSIGNED_ZERO).astype(np.uint8)


def dequantize_weight(codes: CodeArray, scales: FloatArray, axis: int) -> FloatArray:
    """Float32 weights of symmetric int8 `codes`."""
    return codes.astype(np.float32) * along(scales, axis, codes.ndim)


def along(vector: FloatArray, axis: int, rank: int) -> FloatArray:
    """`vector` reshaped so that it broadcasts along `axis` of a tensor of `rank` dimensions."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def scales_for_bias(
    scales: FloatArray, bias: npt.NDArray[np.floating], input_scale: npt.NDArray[np.float32]
) -> FloatArray:
    """`scales` [C], enlarged where the int32 bias codes bias / (input_scale * scale) would overflow.

    The rule of onnxruntime's `_adjust_weight_scale_for_int32_bias`: input_scale * scale is at least
    1.0001 * 2 * |bias| / (2^32 - 2).
    """
    needed = 1.0001 * 2.0 * np.abs(bias.astype(np.float64)) / _BIAS_CODES / float(input_scale)
    enlarged = np.maximum(scales.astype(np.float64), needed).astype(np.float32)
    return np.maximum(enlarged, scales)


def quantize_bias(
    bias: npt.NDArray[np.floating], input_scale: npt.NDArray[np.float32], scales: FloatArray
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Int32 codes of `bias` [C] and their float32 scales input_scale * scales [C]; zero-point 0."""
    product = (np.float32(input_scale) * scales).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / np.maximum(product.astype(np.float64), 1e-300))
    return np.clip(codes, -(2**31) + 1, 2**31 - 1).astype(np.int32), product


def sqnr_db(reference: npt.NDArray[np.floating], approximation: npt.NDArray[np.floating]) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(sum r^2 / sum (r - a)^2), in dB; inf if equal, nan if no signal."""
    exact = np.asarray(reference, np.float64)
    noise = float(np.square(exact - np.asarray(approximation, np.float64)).sum())
    signal = float(np.square(exact).sum())
    if noise == 0.0:
        return float("inf")
    return float("nan") if signal == 0.0 else 10.0 * float(np.log10(signal / noise))
