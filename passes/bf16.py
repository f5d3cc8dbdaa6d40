"""Weights stored as bfloat16: the range of float32 with 8 bits of precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.errors import UsageError
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import half, halving


@dataclass(frozen=True)
class Bf16(Pass):
    """Store weights as bfloat16: half the file at full speed."""

    name: ClassVar[str] = "bf16"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    compute: str = option(
        "auto", "float, which auto stands for: half the file at full speed", choices=("auto", "half", "float")
    )
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute == "half":
            raise UsageError(
                "pass 'bf16': compute=half can't be proven, onnxruntime's CPU provider has no kernels for bfloat16",
                "use bf16:compute=float, which stores weights as bfloat16, or fp16:compute=half",
            )

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def run(self, model: Model, context: Context) -> PassResult:
        """Store the weights; what is computed stays float32."""
        selection = Selection(exclude=self.exclude)
        selection.check(model, self.name)
        return halving.convert(model, context, halving.Settings(half.BF16, "float", selection))
