"""Cross-layer equalization: channels between two layers get equal ranges. `quantization.balance` says how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.quantization import balance


@dataclass(frozen=True)
class Equalize(Pass):
    """Give each channel between two layers equal ranges of weights; before a quantizing pass, needs no data."""

    name: ClassVar[str] = "equalize"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    @property
    def effect(self) -> Effect:
        """Products are scaled, by powers of two."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Equalize every pair of layers with nothing but Relu, PRelu and the like between."""
        return balance.equalize(model)
