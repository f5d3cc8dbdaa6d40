"""Fixed-point numbers: 8-bit codes whose scales are powers of two, value = code * 2^-n, so that scaling is a shift.

    w = c_w 2^-f  per output channel, x = c_x 2^-g :   w x = c_w c_x 2^-(f + g),   y = shift of the sum by f + g - h

A tensor that is never negative has codes 0..255, others two's complement: Qm.n and UQm.n in `numerics.fixed_point`. A
power of two is rounded up, so that nothing is clipped, or down where that leaves less squared error.

    x ── Conv(w, b) ── Clip(0, 6) ── y
    x ── Q ── DQ ── Conv(DQ(int8 w), DQ(int32 b)) ── Q ── Clip(0, 192) ── DQ ── y      192 = 6 * 2^5 in UQ3.5

Products and sums of codes below 2^24 are exact in float32 as well, so that convolutions, Gemm, MatMul, Add and Concat
give the same bits on integer kernels and computed in float.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnxopt.passbase import option
from onnxopt.quantization import static
from onnxopt.quantization.passes import StaticPass


@dataclass(frozen=True)
class Fixed(StaticPass):
    """Run layers on fixed-point numbers: 8-bit integers whose scales are powers of two."""

    name: ClassVar[str] = "fixed"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "fuse_hard_swish", "convert_opset")
    bits: int = option(8, "bits of a weight; each takes a byte", minimum=2, maximum=8)
    activation_bits: int = option(8, "bits that calibrated ranges need; codes take a byte", minimum=2, maximum=8)
    per_channel: bool = option(True, "a power of two for each output channel, not one for each weight")

    @property
    def settings(self) -> static.Settings:
        """What the engine is told."""
        return replace(
            super().settings,
            power_of_two=True,
            bits=self.bits,
            activation_bits=self.activation_bits,
            per_channel=self.per_channel,
        )
