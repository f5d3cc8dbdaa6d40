"""What a model costs once channels are gone: multiply-accumulates, parameters, or time by the target's table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxopt.calibration.elements import Seen, run_shapes
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.axes.axis import Ints
from onnxopt.graph.macs import LAYERS, layer_macs
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.target import Target

UNITS = ("macs", "parameters", "latency")
Shape = tuple[int, ...]
# operators whose kernels take channels in blocks
_BLOCKED = frozenset({"Conv", "ConvTranspose"})


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
        self._elements = seen.elements
        self._shapes = run_shapes(model, shapes, seen)
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
