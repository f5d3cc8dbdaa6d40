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

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import CALIBRATORS, Requests
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import static
from onnxopt.quantization.selection import Selection


@dataclass(frozen=True)
class Fixed(Pass):
    """Run layers on fixed-point numbers: 8-bit integers whose scales are powers of two."""

    name: ClassVar[str] = "fixed"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "fuse_hard_swish", "convert_opset")
    bits: int = option(8, "bits of a weight; each takes a byte", minimum=2, maximum=8)
    activation_bits: int = option(8, "bits that calibrated ranges need; codes take a byte", minimum=2, maximum=8)
    per_channel: bool = option(True, "a power of two for each output channel, not one for each weight")
    storage: bool = option(True, "store weights that no integer kernel serves as int8")
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    feedback: bool = option(False, "round weights so that, on the inputs seen, errors make good for each other")
    calibrator: tuple[str, ...] = option(
        ("minmax",), f"how ranges are chosen, of several the one that does best: {', '.join(CALIBRATORS)}"
    )
    min_sqnr: float = option(3.0, "dB of typical values over rounding noise that a layer needs")
    all_layers: bool = option(False, "quantize layers too whose conversions cost more than their integer kernel saves")
    fallback: bool = option(True, "leave layers float, worst first, until the budgets on quality hold")
    aim: float = option(0.0, "dB that outputs must reach; layers are left float until they do", minimum=0.0)
    only: tuple[str, ...] = option((), "names or patterns of the layers that may be quantized; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = next((name for name in self.calibrator if name not in CALIBRATORS), None)
        if unknown is not None:
            raise UsageError(f"pass 'fixed': unknown calibrator {unknown!r}", did_you_mean(unknown, CALIBRATORS))
        if not self.calibrator:
            raise UsageError("pass 'fixed': no calibrator is named", f"use one of: {', '.join(CALIBRATORS)}")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def needs(self, model: Model) -> Requests:
        """Ranges of every tensor that may carry codes; channel means of layer inputs in the main graph."""
        return static.requests(model, self._settings)

    def run(self, model: Model, context: Context) -> PassResult:
        """Quantize the layers that have statistics and pay; store the other weights."""
        self._settings.selection.check(model, self.name)
        return static.quantize(model, context, self._settings)

    @property
    def _settings(self) -> static.Settings:
        return static.Settings(
            power_of_two=True,
            bits=self.bits,
            activation_bits=self.activation_bits,
            per_channel=self.per_channel,
            storage=self.storage,
            correct_bias=self.correct_bias,
            feedback=self.feedback,
            calibrators=self.calibrator,
            min_sqnr=self.min_sqnr,
            all_layers=self.all_layers,
            fallback=self.fallback,
            aim=self.aim,
            selection=Selection(self.only, self.exclude),
        )
