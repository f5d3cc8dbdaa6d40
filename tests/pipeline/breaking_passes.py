"""Passes for tests: some that do their work, and one for each way to break a model. Loaded by path, as a user's are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from onnxopt import Change, Context, Effect, Pass, PassResult, Skip, option, rewrite
from onnxopt.calibration import Requests
from onnxopt.graph import remove_node, replace_uses
from onnxopt.model import Constant, Graph, Model, Node, Variable


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Remove Identity nodes whose output is no graph output."""

    name: ClassVar[str] = "drop_identity"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        changes, skipped = [], []
        for body in model.bodies():
            for node in [node for node in body.nodes if node.op == "Identity"]:
                if any(node.outputs[0] is output for output in body.outputs):
                    skipped.append(Skip(node.name, "its output is an output of the graph"))
                    continue
                replace_uses(node.outputs[0], node.inputs[0], model)
                remove_node(node, body)
                changes.append(Change("removed", node.name))
        return PassResult(changes, skipped)


@dataclass(frozen=True)
class Round(Pass):
    """Round float weights to multiples of a step."""

    name: ClassVar[str] = "round_weights"
    prepare: ClassVar[tuple[str, ...]] = ()
    step: float = option(0.01, "size of the steps", minimum=1e-6, maximum=100.0)

    @property
    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: Model, context: Context) -> PassResult:
        changes = []
        for constant in model.constants():
            if constant.dtype == np.float32:
                constant.values = (np.round(constant.values / self.step) * self.step).astype(np.float32)
                changes.append(Change("rounded", constant.name))
        return PassResult(changes)


@dataclass(frozen=True)
class Shuffle(Pass):
    """Sum in another order: a Transpose trick that costs the last bits."""

    name: ClassVar[str] = "shuffle"

    @property
    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        w1, w2 = _weights(model)
        order = np.random.default_rng(context.seed).permutation(w1.shape[1])
        w1.values, w2.values = w1.values[:, order].copy(), w2.values[order].copy()
        return PassResult([Change("permuted", "hidden units")])


@dataclass(frozen=True)
class SeeStatistics(Pass):
    """Change nothing; note what was measured of the hidden layer."""

    name: ClassVar[str] = "see_statistics"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def needs(self, model: Model) -> Requests | None:
        return Requests(ranges=(_hidden(model),))

    def run(self, model: Model, context: Context) -> PassResult:
        if context.statistics is None:
            return PassResult(notes=["no statistics"])
        found = context.statistics.range(_hidden(model))
        return PassResult(notes=[f"{found.count} values" if found is not None else "not measured"])


@dataclass(frozen=True)
class WrongValues(Pass):
    """Claim to be exact, and change a weight."""

    name: ClassVar[str] = "wrong_values"
    factor: float = option(1.001, "what one weight is multiplied by")

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        w1, _ = _weights(model)
        w1.values = w1.values * np.float32(self.factor)
        return PassResult([Change("scaled", w1.name)])


@dataclass(frozen=True)
class WrongRounding(WrongValues):
    """Claim to only round, and change a weight by a thousandth."""

    name: ClassVar[str] = "wrong_rounding"

    @property
    def effect(self) -> Effect:
        return Effect.ROUNDING


@dataclass(frozen=True)
class Ruin(WrongValues):
    """Claim to be lossy, and lose everything."""

    name: ClassVar[str] = "ruin"
    factor: float = option(-5.0, "what one weight is multiplied by")

    @property
    def effect(self) -> Effect:
        return Effect.LOSSY


@dataclass(frozen=True)
class Unloadable(Pass):
    """Leave an operator that no runtime knows."""

    name: ClassVar[str] = "unloadable"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        relu = next(node for node in model.graph.nodes if node.op == "Relu")
        relu.op, relu.domain = "Unheard", "nowhere"
        model.import_opset("nowhere", 1)
        return PassResult([Change("spoilt", relu.name)])


@dataclass(frozen=True)
class Invalid(Pass):
    """Leave an operator that its operator set does not have."""

    name: ClassVar[str] = "invalid"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        next(node for node in model.graph.nodes if node.op == "Relu").op = "Reluu"
        return PassResult([Change("spoilt", "relu")])


@dataclass(frozen=True)
class Rename(Pass):
    """Rename an output."""

    name: ClassVar[str] = "rename"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        model.graph.outputs[0].name = "logits_1"
        return PassResult([Change("renamed", "logits")])


@dataclass(frozen=True)
class Raise(Pass):
    """Change the model halfway, then raise."""

    name: ClassVar[str] = "raise"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        w1, _ = _weights(model)
        w1.values = w1.values * np.float32(2)
        raise RuntimeError("halfway\nthrough")


@dataclass(frozen=True)
class Leave(Pass):
    """Try to end the process as if all were well."""

    name: ClassVar[str] = "leave"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        raise SystemExit(0)


@dataclass(frozen=True)
class ReturnNothing(Pass):
    """Forget the result."""

    name: ClassVar[str] = "return_nothing"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class QuantizeInput(Pass):
    """Put a QuantizeLinear and a DequantizeLinear behind the first MatMul."""

    name: ClassVar[str] = "quantize_hidden"

    @property
    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: Model, context: Context) -> PassResult:
        hidden = _hidden(model)
        scale, zero = Constant("s", np.array(0.1, np.float32)), Constant("z", np.array(128, np.uint8))
        quantized, back = Variable("q", np.dtype(np.uint8)), Variable("dq", np.dtype(np.float32))
        replace_uses(hidden, back, model)
        new = [
            Node("QuantizeLinear", "quantize", inputs=[hidden, scale, zero], outputs=[quantized]),
            Node("DequantizeLinear", "dequantize", inputs=[quantized, scale, zero], outputs=[back]),
        ]
        model.graph.nodes[1:1] = new
        return PassResult([Change("quantized", hidden.name)])


@dataclass(frozen=True)
class Wait(Pass):
    """Tell that it runs, and wait to be interrupted."""

    name: ClassVar[str] = "wait"

    @property
    def effect(self) -> Effect:
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        Path("running").touch()
        time.sleep(60)
        return PassResult()


@rewrite(name="prepared", effect="rounding", prepare=("dedup",))
def prepared(graph: Graph) -> None:
    """Do nothing, after dedup."""


def _hidden(model: Model) -> Variable:
    found = model.graph.nodes[0].outputs[0]
    assert isinstance(found, Variable)
    return found


def _weights(model: Model) -> tuple[Constant, Constant]:
    one, other = (node.inputs[1] for node in model.graph.nodes if node.op == "MatMul")
    assert isinstance(one, Constant)
    assert isinstance(other, Constant)
    return one, other
