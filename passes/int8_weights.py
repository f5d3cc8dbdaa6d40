"""Weights as int8 with one scale for each output; everything is computed in float.

w = scale * code,  scale = max |w| / 127 over the inputs of one output      (`onnxopt.numerics.weights`)

x ── MatMul(w) ── y    becomes    x ── MatMul(Mul(Cast(int8 w), scale)) ── y       to save the file
                       or         x ── MatMul(DequantizeLinear(int8 w)) ── y       to save memory too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import weight_store
from onnxopt.quantization.selection import Selection
from onnxopt.quantization.weight_store import SAVE, Storing


@dataclass(frozen=True)
class Int8Weights(Pass):
    """Store weights as int8; compute in float, at full speed."""

    name: ClassVar[str] = "int8_weights"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    save: str = option("auto", "what to save: file, memory (and the file), or as the target wants", choices=SAVE)
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be stored; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def needs(self, model: Model) -> Requests:
        """Channel means of the inputs of layers whose bias can take an error."""
        return weight_store.requests(model, Storing(correct_bias=self.correct_bias), self._selection)

    def run(self, model: Model, context: Context) -> PassResult:
        """Store what pays."""
        self._selection.check(model, self.name)
        memory = weight_store.saves_memory(self.save, context.target)
        storing = Storing(memory=memory, correct_bias=self.correct_bias)
        return weight_store.store(model, context, storing, self._selection)

    @property
    def _selection(self) -> Selection:
        return Selection(self.only, self.exclude)
