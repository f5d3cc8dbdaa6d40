"""What a model costs once channels are gone: multiply-accumulates, parameters, or time by the target's table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.axes.axis import Ints
from onnxopt.graph.macs import LAYERS, layer_macs
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.pruning.moments import Measure
from onnxopt.target import Target

UNITS = ("macs", "parameters", "latency")
Shape = tuple[int, ...]
# operators whose kernels take channels in blocks
_BLOCKED = frozenset({"Conv", "ConvTranspose"})


@dataclass(frozen=True)
class Seen:
    """What runs show of layers whose shapes inference can't tell.

    elements: id of a tensor -> how many it has in a run, on average; idle: layers in branches that no feed takes.
    """

    elements: Mapping[int, float] = field(default_factory=dict)
    idle: frozenset[Node] = frozenset()


def seen_sizes(model: Model, shapes: Mapping[str, Sequence[int]], measure: Measure) -> Seen:
    """Look at the layers of inner bodies, and at those of unknown shape. shapes: those of the inputs in one run."""
    facts = known(model, shapes)
    asked: dict[Node, list[Variable]] = {}
    for body in model.bodies():
        for node in body.nodes if body.function is None else ():
            tensors = [t for t in (*node.inputs[:2], node.outputs[0]) if isinstance(t, Variable) and not t.is_empty()]
            unknown = any(not _is_known(facts.get(id(tensor))) for tensor in tensors)
            if node.op in LAYERS and (body.parent is not None or unknown):
                asked[node] = tensors
    if not asked:
        return Seen()
    wanted = list(dict.fromkeys(tensor for tensors in asked.values() for tensor in tensors))
    statistics = measure(model, Requests(ranges=tuple(wanted)))
    ranges = {tensor: statistics.range(tensor) for tensor in wanted}
    elements = {id(tensor): found.count / statistics.samples for tensor, found in ranges.items() if found is not None}
    idle = {node for node, tensors in asked.items() if any(_never(statistics, tensor) for tensor in tensors)}
    return Seen(elements, frozenset(idle))


def _never(statistics: Statistics, tensor: Variable) -> bool:
    return statistics.range(tensor) is None and statistics.reason(tensor) is None


def _is_known(fact: Fact | None) -> bool:
    return fact is not None and fact.shape is not None and all(isinstance(dim, int) for dim in fact.shape)


def _variables(model: Model) -> Iterator[Variable]:
    for body in model.bodies():
        yield from (tensor for tensor in body.inputs if isinstance(tensor, Variable))
        yield from (tensor for node in body.nodes for tensor in node.outputs)


def _shape_of(tensor: Variable, facts: Mapping[int, Fact]) -> Sequence[int | str | None] | None:
    """What follows from the inputs' shapes, or else what the model says."""
    fact = facts.get(id(tensor))
    return fact.shape if fact is not None and fact.shape is not None else tensor.shape


def _filled(dims: Sequence[int | str | None], elements: float | None) -> Shape:
    """A shape in numbers: unknown dims are 1 but for one, which makes up the elements that were seen."""
    found = [dim if isinstance(dim, int) else 1 for dim in dims]
    unknown = [at for at, dim in enumerate(dims) if not isinstance(dim, int)]
    if unknown and elements is not None:
        found[unknown[0]] = max(1, round(elements / max(1, math.prod(found))))
    return tuple(found)


class Sizes:
    """The cost of every layer in one unit, recomputed for layers whose channels go.

    shapes: those of the model's inputs in one run. What neither inference nor `seen` tells counts as 1. Layers that
    never run count in parameters only.
    """

    def __init__(
        self,
        model: Model,
        maps: AxisMaps,
        shapes: Mapping[str, Sequence[int]],
        unit: str,
        target: Target,
        seen: Seen | None = None,
    ) -> None:
        self.unit, self._target, self._block = unit, target, 1
        seen = seen if seen is not None else Seen()
        facts = known(model, shapes)
        self._elements = seen.elements
        self._shapes = {
            id(tensor): _filled(shape, seen.elements.get(id(tensor)))
            for tensor in _variables(model)
            if (shape := _shape_of(tensor, facts)) is not None
        }
        self._cut: dict[tuple[int, int], list[tuple[int, Ints]]] = defaultdict(list)
        for parameter in maps.parameters:
            entry = (parameter.axis, maps.channels.roots(parameter.channels))
            self._cut[id(parameter.node), parameter.index].append(entry)
        self._axes = {
            key: {at: maps.channels.roots(axis.channels) for at, axis in axes.items()}
            for key, axes in maps.axes.items()
        }
        nodes = [node for body in model.bodies() for node in body.nodes]
        layers = [node for node in nodes if node.op in LAYERS and node not in seen.idle]
        self._nodes = nodes if unit == "parameters" else layers
        self._counted = _first_uses(self._nodes)
        self._touched: dict[int, list[Node]] = defaultdict(list)
        for node in self._nodes:
            for root in self._roots(node):
                self._touched[root].append(node)
        nothing = np.zeros(0, np.int64)
        self.current = {node: self._cost(node, nothing) for node in self._nodes}
        self.total = sum(self.current.values())

    def after(self, gone: Iterable[int], lately: Iterable[int]) -> dict[Node, float]:
        """What the layers that the sets `lately` touch cost when all of `gone` are removed."""
        removed = np.array(sorted(gone), np.int64)
        touched = {node: None for root in lately for node in self._touched.get(root, ())}
        return {node: self._cost(node, removed) for node in touched}

    def _roots(self, node: Node) -> set[int]:
        found: set[int] = set()
        for index, tensor in enumerate(node.inputs):
            for _, roots in self._cut.get((id(node), index), ()):
                found.update(roots.tolist())
            if self.unit != "parameters":
                for roots in self._axes.get(id(tensor), {}).values():
                    found.update(roots.tolist())
        if self.unit != "parameters":
            for tensor in node.outputs:
                for roots in self._axes.get(id(tensor), {}).values():
                    found.update(roots.tolist())
        return found

    def _cost(self, node: Node, gone: Ints) -> float:
        if self.unit == "parameters":
            return float(sum(math.prod(self._constant(node, index, gone)) for index in self._counted[node]))
        self._block = self._target.channels if self.unit == "latency" and node.op in _BLOCKED else 1
        macs = layer_macs(node, lambda tensor: self._shape(node, tensor, gone)) or 0
        return float(macs) if self.unit == "macs" else self._nanoseconds(node, macs)

    def _nanoseconds(self, node: Node, macs: int) -> float:
        costs = self._target.costs
        return macs * (costs.float_depthwise_mac if _depthwise(node) else costs.float_mac)

    def _shape(self, node: Node, tensor: Constant | Variable, gone: Ints) -> Shape | None:
        if isinstance(tensor, Constant):
            index = next(at for at, other in enumerate(node.inputs) if other is tensor)
            return self._constant(node, index, gone)
        shape = self._shapes.get(id(tensor))
        if shape is None:
            return self._lines(node, tensor, gone)
        dims = list(shape)
        for at, roots in self._axes.get(id(tensor), {}).items():
            dims[at] = self._width(roots, gone)
        return tuple(dims)

    def _lines(self, node: Node, tensor: Variable, gone: Ints) -> Shape | None:
        """Of an input of unknown rank as many lines as were seen, as wide as the weights that read them."""
        seen = self._elements.get(id(tensor))
        if seen is None or tensor is not node.inputs[0] or not isinstance(node.inputs[1], Constant):
            return None
        at = {"LSTM": 2, "GRU": 2, "RNN": 2, "MatMul": 0}.get(node.op)
        if at is None:
            return None
        lines = max(1, round(seen / node.inputs[1].shape[at]))
        width = self._constant(node, 1, gone)[at]
        return (lines, width) if node.op == "MatMul" else (lines, 1, width)

    def _constant(self, node: Node, index: int, gone: Ints) -> Shape:
        dims = list(node.inputs[index].shape)
        for at, roots in self._cut.get((id(node), index), ()):
            if dims and dims[at] == len(roots):
                dims[at] = self._width(roots, gone)
        return tuple(dims)

    def _width(self, roots: Ints, gone: Ints) -> int:
        """How many channels stay; in time, as many as the kernel's blocks hold."""
        left = len(roots) - int(np.isin(roots, gone).sum())
        return min(len(roots), -(-left // self._block) * self._block)


def _first_uses(nodes: Sequence[Node]) -> dict[Node, list[int]]:
    """Which float constants each node is charged for: those that no node before it reads."""
    seen: set[int] = set()
    found: dict[Node, list[int]] = {}
    for node in nodes:
        found[node] = []
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, Constant) and id(tensor) not in seen and tensor.dtype.kind in "fV":
                seen.add(id(tensor))
                found[node].append(index)
    return found


def _depthwise(node: Node) -> bool:
    return node.op == "Conv" and int(node.attrs.get("group", 1)) > 1 and tuple(node.inputs[1].shape[1:2]) == (1,)
