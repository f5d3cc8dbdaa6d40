"""Int8 weights of a layer: scales that respect saturation and bias range, and the mean error they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numerics import affine, fixed_point
from onnxopt.numerics.affine import CodeArray, FloatArray
from onnxopt.numerics.blocks import Levels, Scaling, Wide, feedback_round, output_error
from onnxopt.numerics.formats import INT8, Format, scales_for
from onnxopt.numerics.saturation import (
    Layout,
    from_kernel_order,
    gram_order,
    kernel_order,
    max_pair_sum,
    pair_bound_scales,
    pair_limit,
)


@dataclass(frozen=True)
class LayerWeight:
    """Symmetric int8 codes (the weight's shape) and float32 scales [channels].

    growth: mean factor by which scales exceed max |w| / 127. largest_pair: largest same-sign sum of two codes that the
    kernel adds in 16 bits; up to 128 no input saturates. unsigned: the codes are to be stored as uint8 around 128, for
    kernels that add in 32 bits. per_tensor: all scales are equal and to be stored as one. bits: the codes have, in
    bytes of their own.
    """

    codes: CodeArray
    scales: FloatArray
    growth: float
    largest_pair: int
    unsigned: bool = False
    per_tensor: bool = False
    bits: int = 8

    @property
    def limit(self) -> int:
        """Magnitude of the largest code: 2^(bits - 1) - 1."""
        return _limit(self.bits)

    @property
    def stored_codes(self) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
        """The codes as the file has them."""
        return affine.unsigned(self.codes) if self.unsigned else self.codes

    @property
    def stored_scales(self) -> FloatArray:
        """The scales as the file has them: [channels], or 0-d."""
        return self.scales.reshape(-1)[0].reshape(()) if self.per_tensor else self.scales

    @property
    def stored_zero(self) -> npt.NDArray[np.generic]:
        """The zero-points as the file has them: shape of the scales, type of the codes."""
        zero = affine.UNSIGNED_ZERO if self.unsigned else 0
        return np.full(self.stored_scales.shape, zero, self.stored_codes.dtype)

    def values(self, axis: int) -> FloatArray:
        """The float32 weight that codes and scales stand for; axis: where its output channels are."""
        return affine.dequantize_weight(self.codes, self.scales, axis)


def trouble(weight: FloatArray) -> str | None:
    """What keeps a weight from 8 bits, as what is said of it; None when nothing does.

    Too small is a weight as a whole: a channel of next to nothing beside larger ones may round to zero.
    """
    if not np.isfinite(weight).all():
        return "holds NaN or infinity"
    largest = max(float(weight.max(initial=0.0)), -float(weight.min(initial=0.0)))
    if affine.underflows(largest, affine.WEIGHT_LIMIT):
        return f"is too small for 8 bits, {largest:.1g} at most"
    return None


def quantize_layer_weight(
    weight: FloatArray,
    layout: Layout,
    bounded: bool,
    biases: Sequence[tuple[FloatArray, npt.NDArray[np.float32]]] = (),
    per_tensor: bool = False,
    bits: int = 8,
    power_of_two: bool = False,
) -> LayerWeight:
    """Symmetric codes of `weight`, a scale per channel or one for all; of `bits` bits, as int8.

    bounded: raise scales until no pair of codes can saturate for activation codes 0..255 (`saturation`). biases: every
    (bias [channels], input scale) that must fit int32 in the product scale. power_of_two: all scales are; each is the
    one of smallest squared error, what that clips included.
    """
    limit, bounded = _limit(bits), bounded and bits == 8  # a pair of fewer bits can't saturate
    maximum = affine.channel_maximum(weight, layout.axis)
    if per_tensor:
        maximum = np.full_like(maximum, maximum.max(initial=0.0))
    plain = affine.weight_scales(maximum, limit)
    scales = pair_bound_scales(weight, layout, maximum) if bounded else plain
    least = np.zeros_like(scales)
    for bias, input_scale in biases:
        least = affine.scales_for_bias(least, bias, input_scale)
    scales = np.maximum(scales, least)
    if power_of_two:
        scales = fixed_point.weight_scales(weight, layout, scales, least, limit, bounded, per_tensor)
    elif per_tensor:
        scales = np.full_like(scales, scales.max(initial=0.0))
    codes = affine.quantize_weight(weight, scales, layout.axis, limit)
    largest = int(max_pair_sum(codes, layout).max(initial=0))
    return LayerWeight(codes, scales, float((scales / plain).mean()), largest, per_tensor=per_tensor, bits=bits)


def _limit(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def lost_decibels(weight: FloatArray, bounded: LayerWeight, free: LayerWeight, layout: Layout) -> float:
    """By how much the SQNR of `bounded` is below that of `free`, in dB; 0 where neither has an error."""
    values = [affine.dequantize_weight(each.codes, each.scales, layout.axis) for each in (free, bounded)]
    above, below = (affine.sqnr_db(weight, each) for each in values)
    return above - below if np.isfinite(below) and np.isfinite(above) else 0.0 if above == below else float("inf")


def fed_back(
    weight: FloatArray, layout: Layout, nearest: LayerWeight, seconds: Sequence[Wide], bounded: bool
) -> LayerWeight:
    """The codes of `nearest` chosen anew, at the same scales, so that errors make good for each other.

    seconds: E[x x^T] of each group, inputs in the order of the weight's own axes (`blocks.feedback_round`). bounded: as
    in `quantize_layer_weight`. A group whose error would not fall keeps its codes.
    """
    order = gram_order(weight, layout)
    limit = pair_limit(255) if bounded and nearest.bits == 8 else None
    ordered = np.asarray(kernel_order(weight, layout), np.float64)
    before = np.asarray(kernel_order(nearest.codes, layout), np.int8)
    scaling, codes = Scaling(Levels(-nearest.limit, nearest.limit)), np.array(before)
    each = len(ordered) // len(seconds)
    for group, second in enumerate(seconds):
        rows = slice(group * each, (group + 1) * each)
        turned = np.asarray(second[np.ix_(order, order)])
        scales = nearest.scales[rows, None]
        found = feedback_round(ordered[rows], turned, len(order), scaling, scales=scales, pair_limit=limit)
        errors = [output_error(ordered[rows], scales * taken, turned) for taken in (found.codes, before[rows])]
        if errors[0] < errors[1]:
            codes[rows] = found.codes
    chosen = from_kernel_order(codes, tuple(weight.shape), layout)
    return replace(nearest, codes=chosen, largest_pair=int(max_pair_sum(chosen, layout).max(initial=0)))


def quantize_kept(
    values: FloatArray, kept: tuple[int, ...], form: Format = INT8, power_of_two: bool = False
) -> tuple[npt.NDArray[Any], FloatArray]:
    """(symmetric codes, scales) of a tensor; scales have its shape with every axis outside `kept` set to 1."""
    others = tuple(axis for axis in range(values.ndim) if axis not in kept)
    scales = scales_for(np.abs(values).max(axis=others, keepdims=True, initial=0.0), form, power_of_two)
    return form.codes(values / scales), scales


def mean_output_error(
    weight: FloatArray, rounded: FloatArray, layout: Layout, group: int, mean: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """E[(W' - W) x] per output channel, [N]: what subtracting from the bias takes out of the mean error.

    weight, rounded: W and W', of one shape. mean: E[x] per input channel. group: groups of a Conv. Positions in the
    zero padding are counted like the others. (Nagel et al. 2019, arXiv 1906.04721, section 4.2.)
    """
    difference = rounded.astype(np.float64) - weight
    if layout is Layout.ROWS:
        return np.asarray(mean @ difference)
    if layout is Layout.COLUMNS:
        return np.asarray(difference @ mean)
    summed = difference.reshape(*difference.shape[:2], -1).sum(axis=-1)
    per_group = summed.reshape(group, summed.shape[0] // group, summed.shape[1])
    return np.asarray(np.einsum("goc,gc->go", per_group, mean.reshape(group, -1)).reshape(-1))
