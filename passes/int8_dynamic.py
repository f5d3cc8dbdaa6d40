"""8-bit integer layers whose input scales are found at run time, without data: `quantization.dynamic` says how.

Where there is data, `smooth` goes before it and moves outliers of inputs into weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import dynamic


@dataclass(frozen=True)
class Int8Dynamic(Pass):
    """Run MatMul, Gemm and LSTM on 8-bit integers, scales of inputs taken at run time: needs no data."""

    name: ClassVar[str] = "int8_dynamic"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "smooth", "convert_opset")
    only: tuple[str, ...] = option((), "names or patterns of the nodes that may be quantized; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay float")
    min_weights: int = option(4096, "smallest number of weights that a layer is quantized for", minimum=1)
    all_layers: bool = option(False, "quantize layers too whose inputs cost more to convert than integers save")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def run(self, model: Model, context: Context) -> PassResult:
        """Quantize the layers that pay."""
        selection = Selection(self.only, self.exclude)
        selection.check(model, self.name)
        settings = dynamic.Settings(selection, self.min_weights, self.all_layers)
        return dynamic.quantize(model, context.target, settings)
