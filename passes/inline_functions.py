"""Put the nodes of local functions in the place of their calls.

    Before                                        After
    y = local.Scale(x, w)                         t = Mul(x, w)
    Scale(a, b) { c = Mul(a, b)  d = Relu(c) }    y = Relu(t)

Other passes leave functions alone: one function stands for several calls, and its shapes are those of none. A function
that was written for another version of an operator set than the model imports stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx import ModelProto, inliner

from onnxopt.model import Model, Snapshot
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the nodes of local functions in the place of their calls."""

    name: ClassVar[str] = "inline_functions"

    @property
    def effect(self) -> Effect:
        """The same nodes run."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Inline all functions, those that functions call too."""
        if not model.functions:
            return PassResult()
        before = model.snapshot()
        proto = ModelProto.FromString(before.skeleton)
        named = {(function.domain, function.name): function.name for function in proto.functions}
        inlined = inliner.inline_local_functions(proto)
        left = {(function.domain, function.name) for function in inlined.functions}
        model.restore(Snapshot(inlined.SerializeToString(), before.tensors))
        return PassResult(
            [Change("inlined", name) for key, name in named.items() if key not in left],
            [Skip(name, "it is of another operator set version than the model") for _, name in sorted(left)],
        )
