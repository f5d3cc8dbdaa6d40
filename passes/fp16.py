"""16-bit floating point: weights stored as float16, or a graph that computes in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx

from onnxopt.calibration import Requests
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.quantization import half, halving
from onnxopt.target import Target


@dataclass(frozen=True)
class Fp16(Pass):
    """Store weights as float16, and compute in it where the target does."""

    name: ClassVar[str] = "fp16"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")
    compute: str = option(
        "auto",
        "float: half the file at full speed; half: a mixed graph; auto: what the target computes in",
        choices=("auto", "half", "float"),
    )
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")
    keep_ops: tuple[str, ...] = option((), "operator types that compute in float32 in a mixed graph")
    min_sqnr: float = option(50.0, "dB at the outputs below which parts of a mixed graph return to float32")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def for_target(self, target: Target) -> Fp16:
        """With `compute=auto` decided."""
        return replace(self, compute="half" if self._settings.computes_half(target) else "float")

    def needs(self, model: Model) -> Requests | None:
        """Ranges of every tensor that may become float16."""
        return halving.requests(model, self._settings)

    def run(self, model: Model, context: Context) -> PassResult:
        """Write the form that `compute` asks for; inputs and outputs keep their types."""
        self._settings.selection.check(model, self.name)
        self._check_operators(model)
        return halving.convert(model, context, self._settings)

    def _check_operators(self, model: Model) -> None:
        """Raise UsageError for a type in keep_ops that neither ONNX nor the model knows."""
        known = {node.op for body in model.bodies() for node in body.nodes}
        known |= {schema.name for schema in onnx.defs.get_all_schemas()}
        unknown = next((op for op in self.keep_ops if op not in known), None)
        if unknown is not None:
            raise UsageError(
                f"pass 'fp16', option 'keep_ops': there is no operator {unknown!r}",
                did_you_mean(unknown, sorted(known)),
            )

    @property
    def _settings(self) -> halving.Settings:
        return halving.Settings(half.FP16, self.compute, Selection(exclude=self.exclude), self.keep_ops, self.min_sqnr)
