"""Weights as 8-bit floats with one scale for each output; everything is computed in float32.

e4m3 has 3 bits of fraction and reaches 448, e5m2 2 bits and 57,344 (Micikevicius et al. 2022, arXiv 2209.05433). Beside
int8 it rounds large weights worse and small ones better. Operator set 19 has the types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.numerics.formats import FLOAT8
from onnxopt.passbase import option
from onnxopt.quantization.passes import WeightPass
from onnxopt.quantization.weight_store import Storing
from onnxopt.target import Target


@dataclass(frozen=True)
class Fp8(WeightPass):
    """Store weights as 8-bit floats; compute in float32."""

    name: ClassVar[str] = "fp8"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset:opset=19")
    form: str = option("e4m3", "bits of exponent and fraction", choices=tuple(FLOAT8))

    def storing(self, target: Target | None) -> Storing:
        """A scale for each output."""
        return Storing(form=FLOAT8[self.form], correct_bias=self.correct_bias)
