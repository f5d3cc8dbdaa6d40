"""Saturation of U8S8 products on x86 CPUs without VNNI, and weight scales that rule it out.

`vpmaddubsw` multiplies unsigned activation codes x with signed weight codes q and adds *adjacent* products into 16 bits
with saturation; the kernels (onnxruntime, `mlas/lib/x86_64/QgemmU8S8KernelAvx2.S`) then add those pair sums in 32 bits:

    y = sum_k clip(x[2k] q[2k] + x[2k+1] q[2k+1], -32768, 32767)

The order of k is the rows of a MatMul or Gemm weight and (kernel position, input channel in its group) of a Conv
weight, because the kernel works on NHWC patches. The activation's zero-point does not enter: raw codes are multiplied.
The depthwise kernel multiplies in 32 bits and never saturates. With codes 0..m, nothing saturates for any input when

    m * max_k max(q[2k],0) + max(q[2k+1],0) <= 32767      and the same for -q with 32768.

For m = 255 a pair of the same sign may sum to 128: 127 and 1 are fine, 127 and 2 are not.
"""

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.affine import FloatArray, quantize_weight, weight_scales

INT16_MAXIMUM = 32767


class Layout(Enum):
    """Where a weight keeps its output channels and the inputs k that the kernel adds up."""

    CONV = "conv"  # [N, C / group, kernel...]
    ROWS = "rows"  # [K, N]: MatMul, Gemm
    COLUMNS = "columns"  # [N, K]: Gemm with transB = 1

    @property
    def axis(self) -> int:
        """The output-channel axis."""
        return 1 if self is Layout.ROWS else 0


def kernel_order(weight: npt.NDArray[np.generic], layout: Layout) -> npt.NDArray[np.generic]:
    """`weight` as [N, K] with K in the order in which the integer kernels add it up."""
    if layout is Layout.ROWS:
        return np.ascontiguousarray(weight.T)
    if layout is Layout.CONV:
        weight = np.moveaxis(weight, 1, -1)
    return np.ascontiguousarray(weight).reshape(weight.shape[0], -1)


def gram_order(weight: npt.NDArray[np.generic], layout: Layout) -> npt.NDArray[np.intp]:
    """Where each k of the kernels' order stands among the inputs in the order of the weight's own axes, [K]."""
    if layout is not Layout.CONV:
        return np.arange(weight.shape[0 if layout is Layout.ROWS else 1])
    return np.moveaxis(np.arange(weight[0].size).reshape(weight.shape[1:]), 0, -1).reshape(-1)


def from_kernel_order(ordered: npt.NDArray[np.generic], shape: tuple[int, ...], layout: Layout) -> npt.NDArray[Any]:
    """A weight of `shape` from its matrix [N, K] in the kernels' order: undoes `kernel_order`."""
    if layout is Layout.ROWS:
        return np.ascontiguousarray(ordered.T)
    if layout is Layout.COLUMNS:
        return np.ascontiguousarray(ordered)
    return np.ascontiguousarray(np.moveaxis(ordered.reshape(shape[0], *shape[2:], shape[1]), -1, 1))


def max_pair_sum(weight: npt.NDArray[np.generic], layout: Layout) -> npt.NDArray[np.float64]:
    """Largest |sum| of two adjacent weights of the same sign, per output channel: [N], float64.

    `weight` may hold int8 codes or real weights; an odd last k pairs with zero.
    """
    ordered = kernel_order(weight, layout).astype(np.float64)
    if ordered.shape[1] == 0:
        return np.zeros(ordered.shape[0])
    if ordered.shape[1] % 2:
        ordered = np.pad(ordered, ((0, 0), (0, 1)))
    first, second = ordered[:, 0::2], ordered[:, 1::2]
    upward = np.maximum(first, 0) + np.maximum(second, 0)
    downward = np.maximum(-first, 0) + np.maximum(-second, 0)
    return np.asarray(np.maximum(upward, downward).max(axis=1))


def pair_limit(largest_code: int) -> int:
    """Largest same-sign pair sum of int8 codes that cannot saturate with activation codes 0..largest_code."""
    return INT16_MAXIMUM // max(1, largest_code)


def saturates(codes: npt.NDArray[np.int8], layout: Layout, largest_code: int = 255) -> bool:
    """Whether some input of codes 0..largest_code makes a pair sum of these int8 weights saturate."""
    return bool((max_pair_sum(codes, layout) > pair_limit(largest_code)).any())


def pair_bound_scales(
    weight: npt.NDArray[np.floating], layout: Layout, maximum: npt.NDArray[np.float64], largest_code: int = 255
) -> FloatArray:
    """Symmetric scales [N] under which no pair of the rounded int8 codes can saturate.

    Raises each channel's scale maximum / 127 only as far as its worst pair needs: pair sum / scale <= limit - 1, where
    the 1 leaves room for rounding two codes up by at most half a step each (sums of codes are integers, so the rounding
    of the scale itself to float32 does not matter). A channel whose codes of plain scale already keep to the limit is
    left as it is.
    """
    limit = pair_limit(largest_code)
    plain = weight_scales(maximum)
    needed = max_pair_sum(weight, layout) / (limit - 1)
    raised = (max_pair_sum(quantize_weight(weight, plain, layout.axis), layout) > limit) & (maximum > 0)
    return np.where(raised, np.maximum(plain, needed), plain).astype(np.float32)


def saturating_product(codes: npt.NDArray[np.uint8], ordered: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """What the AVX2 kernel accumulates: activation codes [M, K] times weight codes [N, K] in kernel order -> [M, N].

    Bit-exact model of the sum in the module's docstring; `codes @ ordered.T` is the same without saturation.
    """
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
        ordered = np.pad(ordered, ((0, 0), (0, 1)))
    left, right = codes.astype(np.int64), ordered.astype(np.int64)
    total = np.zeros((codes.shape[0], ordered.shape[0]), np.int64)
    for k in range(0, codes.shape[1], 2):
        pair = np.multiply.outer(left[:, k], right[:, k]) + np.multiply.outer(left[:, k + 1], right[:, k + 1])
        total += np.clip(pair, -INT16_MAXIMUM - 1, INT16_MAXIMUM)
    return total


def saturation_loss(codes: npt.NDArray[np.uint8], ordered: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """What saturation takes from each sum: `saturating_product(codes, ordered)` minus the exact product, [M, N].

    Computes only the pairs whose weights can saturate at the largest code that occurs, so that a layer in which few can
    costs little.
    """
    loss = np.zeros((codes.shape[0], ordered.shape[0]), np.int64)
    if codes.size == 0 or ordered.size == 0:
        return loss
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
        ordered = np.pad(ordered, ((0, 0), (0, 1)))
    risky = pairs_at_risk(ordered, int(codes.max()))
    left, right = codes.astype(np.int32), ordered.astype(np.int32)
    for pair in np.flatnonzero(risky.any(axis=0)):
        rows = np.flatnonzero(risky[:, pair])
        sums = left[:, 2 * pair, None] * right[rows, 2 * pair] + left[:, 2 * pair + 1, None] * right[rows, 2 * pair + 1]
        loss[:, rows] += np.clip(sums, -INT16_MAXIMUM - 1, INT16_MAXIMUM) - sums
    return loss


def pairs_at_risk(ordered: npt.NDArray[np.int8], largest_code: int = 255) -> npt.NDArray[np.bool_]:
    """Which pairs of int8 codes [N, K] in kernel order can saturate with activation codes 0..largest_code: [N, pairs].

    An odd last k is in no pair: alone it never saturates.
    """
    even = ordered[:, : ordered.shape[1] // 2 * 2].astype(np.int32)
    first, second = even[:, 0::2], even[:, 1::2]
    upward = np.maximum(first, 0) + np.maximum(second, 0)
    downward = np.maximum(-first, 0) + np.maximum(-second, 0)
    return np.asarray(np.maximum(upward, downward) > pair_limit(largest_code))
