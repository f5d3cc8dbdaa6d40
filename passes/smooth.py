"""SmoothQuant: outliers of activations go into weights, before both are rounded. `quantization.balance` says how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import balance


@dataclass(frozen=True)
class Smooth(Pass):
    """Move outliers of the inputs of MatMul and Gemm into their weights; before a quantizing pass."""

    name: ClassVar[str] = "smooth"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)
    alpha: float | None = option(
        None, "share of the range that moves, 0 to 1; default what leaves least noise", minimum=0.0, maximum=1.0
    )
    insert: bool = option(True, "put a Mul before MatMul and Gemm where no constant takes the scales in")

    @property
    def effect(self) -> Effect:
        """Products are scaled, by powers of two."""
        return Effect.ROUNDING

    def needs(self, model: Model) -> Requests:
        """Ranges and mean squares of the channels that MatMul and Gemm layers of the main graph read."""
        return balance.smooth_requests(model, self.insert)

    def run(self, model: Model, context: Context) -> PassResult:
        """Scale every tensor that layers read and that has figures."""
        return balance.smooth(model, context.statistics, balance.Smoothing(self.alpha, self.insert))
