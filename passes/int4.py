"""Weights as 4-bit integers with a scale for every few inputs, rounded so that errors make good for each other.

    w[n, k] = scale[n, k // B] * code[n, k],   -8 <= code <= 7          (`onnxopt.numerics.blocks`: scales, GPTQ)

What is too narrow for blocks becomes int8 with one scale for each output. Tables behind Gather keep packed rows.

    x ── MatMul(w) ── y    becomes    x ── MatMul(Mul(Cast(int4 w), scale)) ── y       to save the file
                           or         x ── MatMul(DequantizeLinear(int4 w)) ── y       to save memory too: MatMulNBits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import weight_store
from onnxopt.quantization.selection import Selection
from onnxopt.quantization.weight_store import SAVE, Storing


@dataclass(frozen=True)
class Int4(Pass):
    """Store weights as 4-bit integers in blocks; compute in float."""

    name: ClassVar[str] = "int4"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    block: int = option(32, "inputs that share a scale, a power of two", minimum=16, maximum=1024)
    save: str = option("auto", "what to save: file, memory (and the file), or as the target wants", choices=SAVE)
    feedback: bool = option(True, "round with second moments of inputs, so that errors make good for each other")
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be stored; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block & (self.block - 1):
            raise UsageError(f"pass 'int4', option 'block': {self.block} is no power of two", "use 16, 32, 64, ...")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def needs(self, model: Model) -> Requests:
        """Second moments of what the weights multiply; channel means of inputs of layers with a bias."""
        return weight_store.requests(model, self._storing(False, False), self._selection)

    def run(self, model: Model, context: Context) -> PassResult:
        """Store what pays."""
        self._selection.check(model, self.name)
        memory = weight_store.saves_memory(self.save, context.target)
        storing = self._storing(memory, memory and not context.target.integer_kernels)
        return weight_store.store(model, context, storing, self._selection)

    def _storing(self, memory: bool, plain_scales: bool) -> Storing:
        return Storing(
            bits=4,
            block=self.block,
            memory=memory,
            feedback=self.feedback,
            correct_bias=self.correct_bias,
            plain_scales=plain_scales,
        )

    @property
    def _selection(self) -> Selection:
        return Selection(self.only, self.exclude)
