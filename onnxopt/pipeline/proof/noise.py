"""How close each quantized layer's tensor is to the tensor of the same name in the original."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.feeds import Sample
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.pipeline.proof.exposed import exposing, grouped, main_tensors, sizes
from onnxopt.quantization.coded import CodedLayer, Form, coded_layers
from onnxopt.report import LayerFigures
from onnxopt.runtime import Array

# tensors of both models that lie in memory at once
_MEMORY = 256 << 20
# Operators that a layer's result may pass through before it is what the original calls by the same name.
_FINISHING = frozenset(
    {"Add", "Sub", "Mul", "Cast", "Relu", "Clip", "QuantizeLinear", "DequantizeLinear", "Identity", "Reshape"}
)
_STEPS = 8


@dataclass(eq=False)
class _Power:
    """Sums over all feeds. noise: of (r - a)^2, infinite where a is not finite and r is."""

    signal: float = 0.0
    noise: float = 0.0
    elements: int = 0

    def add(self, reference: Array, candidate: Array) -> None:
        exact, found = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
        finite = np.isfinite(exact)
        if not finite.all():
            exact, found = exact[finite], found[finite]
        self.elements += exact.size
        self.signal += float(np.square(exact).sum())
        noise = float(np.square(exact - found).sum())
        self.noise += noise if math.isfinite(noise) else math.inf

    @property
    def decibels(self) -> float:
        """10 log10(signal / noise); inf where nothing differs, -inf where there is noise and no signal."""
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise < math.inf else -math.inf


def layer_figures(
    reference: Model, result: Model, feeds: Sequence[Sample], threads: int = 1, memory: int = _MEMORY
) -> tuple[tuple[LayerFigures, ...], int]:
    """(the quantized layers that could be measured, in order, how many could not be) over the feeds.

    Both models run unoptimized: no tensor is fused away, and no pair of codes saturates. A layer whose tensor has
    another shape in the original, as behind pruning, can't be measured. Raises PassError where a run fails.
    """
    shared = main_tensors(reference) & main_tensors(result)
    layers = [layer for layer in coded_layers(result) if layer.body is result.graph]
    others = sum(layer.body is not result.graph for layer in coded_layers(result))
    made = {layer: name for layer in layers if (name := _made(layer, shared)) is not None}
    read = {layer: name for layer in made if (name := _read(layer, shared)) is not None}
    names = list(dict.fromkeys([*made.values(), *read.values()]))
    powers = _powers(reference, result, names, feeds, threads, memory)
    figures = tuple(
        LayerFigures(
            layer.name,
            layer.node.op,
            name,
            powers[name].decibels,
            powers[read[layer]].decibels if layer in read and read[layer] in powers else None,
        )
        for layer, name in made.items()
        if name in powers
    )
    return figures, len(layers) + others - len(figures)


def _powers(
    reference: Model, result: Model, names: Sequence[str], feeds: Sequence[Sample], threads: int, memory: int
) -> dict[str, _Power]:
    if not names or not feeds:
        return {}
    powers = {name: _Power() for name in names}
    unlike: set[str] = set()
    for group in grouped(names, sizes(reference, names, feeds[0].inputs), memory // 2):
        sessions = exposing(reference, group, threads), exposing(result, group, threads)
        for sample in feeds:
            exact, found = (session.run(sample.inputs) for session in sessions)
            for name in group:
                one, other = exact[name], found[name]
                if _alike(one, other):
                    powers[name].add(one, other)
                else:
                    unlike.add(name)
    return {name: power for name, power in powers.items() if name not in unlike and power.elements}


def _alike(one: object, other: object) -> bool:
    """Whether both are floats of one shape."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return False
    return one.shape == other.shape and all(array.dtype.kind in "fV" for array in (one, other))


def _made(layer: CodedLayer, shared: set[str]) -> str | None:
    """The first tensor from the layer's output on that the original has as well."""
    tensor = layer.node.outputs[0]
    for _ in range(_STEPS):
        if tensor.name in shared:
            return str(tensor.name)
        readers: Iterable[Node] = (reader for reader in tensor.outputs if reader.op in _FINISHING)
        reader = next(iter(readers), None)
        if reader is None or not (_only_moving_input(reader, tensor) or _scales(reader, layer)):
            return None
        tensor = reader.outputs[0]
    return None


def _scales(node: Node, layer: CodedLayer) -> bool:
    """Whether the node is the Mul that turns the sums of an integer kernel into floats, its scale being computed."""
    return layer.form is Form.KERNEL and node.op == "Mul"


def _only_moving_input(node: Node, tensor: Variable) -> bool:
    """Whether all other inputs are stored: constants, or what DequantizeLinear makes of some."""
    for other in node.inputs:
        if other is tensor or other.is_empty() or isinstance(other, Constant):
            continue
        producer = other.inputs[0] if other.inputs else None
        if producer is None or producer.op != "DequantizeLinear" or not isinstance(producer.inputs[0], Constant):
            return False
    return True


def _read(layer: CodedLayer, shared: set[str]) -> str | None:
    """The tensor that the layer reads, before it became codes, where the original has it."""
    if layer.activation is None:
        tensor = layer.node.inputs[0]
        return str(tensor.name) if tensor.name in shared else None
    codes = layer.activation.tensor
    producer = codes.inputs[0] if isinstance(codes, Variable) and codes.inputs else None
    if producer is None or producer.op not in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return None
    name = producer.inputs[0].name
    return str(name) if name in shared else None
