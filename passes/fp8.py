"""Weights as 8-bit floats with one scale for each output; everything is computed in float32.

e4m3 has 3 bits of fraction and reaches 448, e5m2 2 bits and 57,344 (Micikevicius et al. 2022, arXiv 2209.05433). Beside
int8 it rounds large weights worse and small ones better. Operator set 19 has the types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.model import Model
from onnxopt.numerics.formats import FLOAT8
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import weight_store
from onnxopt.quantization.selection import Selection
from onnxopt.quantization.weight_store import Storing


@dataclass(frozen=True)
class Fp8(Pass):
    """Store weights as 8-bit floats; compute in float32."""

    name: ClassVar[str] = "fp8"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset:opset=19")
    form: str = option("e4m3", "bits of exponent and fraction", choices=tuple(FLOAT8))
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be stored; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def needs(self, model: Model) -> Requests:
        """Channel means of the inputs of layers whose bias can take an error."""
        return weight_store.requests(model, self._storing, self._selection)

    def run(self, model: Model, context: Context) -> PassResult:
        """Store what pays."""
        self._selection.check(model, self.name)
        return weight_store.store(model, context, self._storing, self._selection)

    @property
    def _storing(self) -> Storing:
        return Storing(form=FLOAT8[self.form], correct_bias=self.correct_bias)

    @property
    def _selection(self) -> Selection:
        return Selection(self.only, self.exclude)
