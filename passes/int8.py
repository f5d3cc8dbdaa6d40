"""Static 8-bit quantization for onnxruntime's integer kernels, and int8 storage for the weights they do not serve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnxopt.errors import UsageError
from onnxopt.passbase import option
from onnxopt.quantization import static
from onnxopt.quantization.passes import StaticPass

WEIGHTS = ("auto", "s8", "u8")


@dataclass(frozen=True)
class Int8(StaticPass):
    """Run layers on 8-bit integers; store as int8 what stays float."""

    name: ClassVar[str] = "int8"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "fuse_hard_swish", "convert_opset")
    islands: bool = option(True, "keep integers between layers where every operator on the way can take them")
    gates: bool = option(True, "count x * Sigmoid(x) among these operators")
    smooth: bool = option(True, "move outliers of the inputs of MatMul and Gemm into their weights")
    sequential_bias: bool = option(False, "choose biases layer by layer, measuring each time; kept where it helps")
    weights: str = option(
        "auto", "s8, u8 (slower, never saturates), or auto: u8 where s8 would lose much accuracy on x86 without VNNI"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"pass 'int8': unknown type of weights {self.weights!r}", f"use one of: {', '.join(WEIGHTS)}"
            )

    @property
    def settings(self) -> static.Settings:
        """What the engine is told."""
        return replace(
            super().settings,
            islands=self.islands,
            gates=self.gates,
            smooth=self.smooth,
            sequential_bias=self.sequential_bias,
            weights=self.weights,
        )
