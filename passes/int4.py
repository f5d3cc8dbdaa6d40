"""Weights as 4-bit integers with a scale for every few inputs, rounded so that errors make good for each other.

    w[n, k] = scale[n, k // B] * code[n, k],   -8 <= code <= 7          (`onnxopt.numerics.blocks`: scales, GPTQ)

What is too narrow for blocks becomes int8 with one scale for each output. Tables behind Gather keep packed rows.

    x ── MatMul(w) ── y    becomes    x ── MatMul(Mul(Cast(int4 w), scale)) ── y       to save the file
                           or         x ── MatMul(DequantizeLinear(int4 w)) ── y       to save memory too: MatMulNBits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.errors import UsageError
from onnxopt.passbase import option
from onnxopt.quantization.passes import WeightPass
from onnxopt.quantization.weight_store import SAVE, Storing, saves_memory
from onnxopt.target import Target


@dataclass(frozen=True)
class Int4(WeightPass):
    """Store weights as 4-bit integers in blocks; compute in float."""

    name: ClassVar[str] = "int4"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    block: int = option(32, "inputs that share a scale, a power of two", minimum=16, maximum=1024)
    save: str = option("auto", "what to save: file, memory (and the file), or as the target wants", choices=SAVE)
    feedback: bool = option(True, "round with second moments of inputs, so that errors make good for each other")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block & (self.block - 1):
            raise UsageError(f"pass 'int4', option 'block': {self.block} is no power of two", "use 16, 32, 64, ...")

    def storing(self, target: Target | None) -> Storing:
        """Blocks; scales are positive where a runtime that is not onnxruntime reads the codes."""
        memory = target is not None and saves_memory(self.save, target)
        return Storing(
            bits=4,
            block=self.block,
            memory=memory,
            feedback=self.feedback,
            correct_bias=self.correct_bias,
            plain_scales=memory and target is not None and not target.integer_kernels,
        )
