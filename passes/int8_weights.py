"""Weights as int8 with one scale for each output; everything is computed in float.

w = scale * code,  scale = max |w| / 127 over the inputs of one output      (`onnxopt.numerics.weights`)

x ── MatMul(w) ── y    becomes    x ── MatMul(Mul(Cast(int8 w), scale)) ── y       to save the file
                       or         x ── MatMul(DequantizeLinear(int8 w)) ── y       to save memory too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.passbase import option
from onnxopt.quantization.passes import WeightPass
from onnxopt.quantization.weight_store import SAVE, Storing, saves_memory
from onnxopt.target import Target


@dataclass(frozen=True)
class Int8Weights(WeightPass):
    """Store weights as int8; compute in float, at full speed."""

    name: ClassVar[str] = "int8_weights"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    save: str = option("auto", "what to save: file, memory (and the file), or as the target wants", choices=SAVE)

    def storing(self, target: Target | None) -> Storing:
        """A scale for each output."""
        memory = target is not None and saves_memory(self.save, target)
        return Storing(memory=memory, correct_bias=self.correct_bias)
