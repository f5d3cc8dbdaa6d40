"""Static 8-bit quantization for onnxruntime's integer kernels, and int8 storage for the weights they do not serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import CALIBRATORS, Requests
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import static
from onnxopt.quantization.selection import Selection

WEIGHTS = ("auto", "s8", "u8")


@dataclass(frozen=True)
class Int8(Pass):
    """Run layers on 8-bit integers; store as int8 what stays float."""

    name: ClassVar[str] = "int8"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "fuse_hard_swish", "convert_opset")
    storage: bool = option(True, "store weights that no integer kernel serves as int8")
    islands: bool = option(True, "keep integers between layers where every operator on the way can take them")
    gates: bool = option(True, "count x * Sigmoid(x) among these operators")
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    feedback: bool = option(False, "round weights so that, on the inputs seen, errors make good for each other")
    smooth: bool = option(True, "move outliers of the inputs of MatMul and Gemm into their weights")
    calibrator: tuple[str, ...] = option(
        ("minmax",), f"how ranges are chosen, of several the one that does best: {', '.join(CALIBRATORS)}"
    )
    min_sqnr: float = option(3.0, "dB of typical values over rounding noise that a layer needs")
    all_layers: bool = option(False, "quantize layers too whose conversions cost more than their integer kernel saves")
    sequential_bias: bool = option(False, "choose biases layer by layer, measuring each time; kept where it helps")
    fallback: bool = option(True, "leave layers float, worst first, until the budgets on quality hold")
    aim: float = option(0.0, "dB that outputs must reach; layers are left float until they do", minimum=0.0)
    only: tuple[str, ...] = option((), "names or patterns of the layers that may be quantized; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")
    weights: str = option(
        "auto", "s8, u8 (slower, never saturates), or auto: u8 where s8 would lose much accuracy on x86 without VNNI"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = next((name for name in self.calibrator if name not in CALIBRATORS), None)
        if unknown is not None:
            raise UsageError(f"pass 'int8': unknown calibrator {unknown!r}", did_you_mean(unknown, CALIBRATORS))
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"pass 'int8': unknown type of weights {self.weights!r}", f"use one of: {', '.join(WEIGHTS)}"
            )
        if not self.calibrator:
            raise UsageError("pass 'int8': no calibrator is named", f"use one of: {', '.join(CALIBRATORS)}")

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
            storage=self.storage,
            islands=self.islands,
            gates=self.gates,
            correct_bias=self.correct_bias,
            calibrators=self.calibrator,
            min_sqnr=self.min_sqnr,
            all_layers=self.all_layers,
            feedback=self.feedback,
            weights=self.weights,
            selection=Selection(self.only, self.exclude),
            fallback=self.fallback,
            smooth=self.smooth,
            aim=self.aim,
            sequential_bias=self.sequential_bias,
        )
