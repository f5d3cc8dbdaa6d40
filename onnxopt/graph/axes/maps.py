"""Axis maps of a whole model, built by walking its nodes once with one rule per operator.

A rule reads the axes of the node's inputs and states those of its outputs; it says which parameters are cut with which
axis, which weights read it, and what else must be rewritten when channels go. Operators without a rule freeze every
channel they touch, with node and reason, and so does an axis that a rule forgot. `register` is open: a rule for another
operator needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto

from onnxopt.graph.axes.axis import ONES, Axis, Channels, Floats, Ints, Mask, Signals
from onnxopt.graph.edit import is_output, label
from onnxopt.model import Constant, Graph, Model, Node

Array = NDArray[Any]
Keep = Callable[[Ints], Mask]
Rule = Callable[[Node, "AxisMaps"], None]
# values of an element-wise node over constant channels: (node, one array or None per input) -> array [n] or None
Evaluate = Callable[[Node, list[Array | None]], Array | None]

# which axis is followed where one becomes several: that with the fewest ties, the first (whole heads, whole groups) or
# the last (dims within heads)
Split = Literal["fewest", "outer", "inner"]

_RULES: dict[tuple[str, str], Rule] = {}
# a constant of at most this many elements that several nodes share is cut for each of them separately
_UNTIED = 4096


def register(*operators: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Make a function the rule of these operators."""

    def add(rule: Rule) -> Rule:
        for operator in operators:
            _RULES[domain, operator] = rule
        return rule

    return add


def known_operators() -> list[tuple[str, str]]:
    """(domain, operator) of all rules."""
    return sorted(_RULES)


@dataclass(frozen=True)
class Parameter:
    """Input `index` of a node is a constant whose `axis` is cut with these channels."""

    node: Node
    index: int
    axis: int
    channels: Ints


@dataclass(frozen=True)
class Reader:
    """A node that sums over a tracked axis with constant weights, so that what a channel contributes can be moved.

    `spread(weights)` shows the weights as [groups, rows, n / groups, taps], `gather` undoes it. `fold(amounts)` adds to
    the node's bias, `amounts` being [groups * rows]; None where a constant input can't be expressed as a bias.
    `data` is the input whose axis is read, None where a recurrent node reads its own state. `own` marks weights that a
    channel has on nothing but itself, broadcast to what `spread` shows: they go with it.
    """

    node: Node
    index: int
    read: Axis
    groups: int
    spread: Callable[[Array], Array]
    gather: Callable[[Array, Array], Array]
    fold: Callable[[Floats], None] | None
    data: int | None = 0
    own: Mask | None = None


@dataclass(frozen=True)
class Product:
    """A node that sums products of two tensors over a tracked axis: a channel can go where either factor is zero.

    `factors`: (input, axis) of the tensors that are multiplied, where they are inputs of `node`.
    """

    channels: Ints
    needed: Mask
    node: Node | None = None
    factors: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Site:
    """A node that makes new channels: `channels` [n] of its output.

    blocked: the runtime's kernels take these channels in blocks, so that a width in between is slower than the next
    multiple.
    """

    node: Node
    channels: Ints
    blocked: bool = False


@dataclass
class AxisMaps:
    """Everything the rules state of one model."""

    model: Model
    evaluate: Evaluate
    split: Split = "fewest"
    channels: Channels = field(default_factory=Channels)
    signals: Signals = field(default_factory=Signals)
    axes: dict[int, dict[int, Axis]] = field(default_factory=dict)
    tensors: dict[int, Any] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    frozen: list[tuple[Ints, str, str]] = field(default_factory=list)
    rewrites: list[Callable[[Keep], None]] = field(default_factory=list)
    _settled: list[Ints] = field(default_factory=list)
    _shared: dict[tuple[int, int], Ints] = field(default_factory=dict)

    @classmethod
    def build(cls, model: Model, evaluate: Evaluate, split: Split = "fewest") -> AxisMaps:
        """Walk all bodies of a model (shapes inferred, nodes in topological order) and apply the rules.

        split: which axis is followed where one becomes several: "outer" looks at whole heads, "inner" at the dims
        within heads, "fewest" at what ties the fewest channels.
        """
        maps = cls(model, evaluate, split)
        for root in (model.graph, *model.functions):
            maps.visit(root)
            for tensor in root.outputs:
                maps.freeze(
                    tensor,
                    tensor.name,
                    "it is an output of the model" if root is model.graph else "it leaves a function",
                )
        return maps

    def visit(self, body: Graph) -> None:
        """Apply the rules to the nodes of a body in order."""
        for node in body.nodes:
            rule = _RULES.get(node.kind)
            if rule is None:
                self.freeze_node(node, self._unruled(node))
                continue
            if any(isinstance(value, AttributeProto) for value in node.attrs.values()):
                self.freeze_node(node, f"an attribute of {node.op} is set by the function's caller")
                continue
            marks = len(self.readers), len(self.products), len(self.frozen), len(self._settled)
            rule(node, self)
            self._freeze_forgotten(node, marks)

    def _unruled(self, node: Node) -> str:
        if any(node.kind == (function.domain, function.name) for function in self.model.functions):
            return f"calls of the local function {node.op} are not followed"
        return f"no axis rule for {node.op}"

    def _freeze_forgotten(self, node: Node, marks: tuple[int, int, int, int]) -> None:
        """Freeze every input axis that the node's rule neither passed on nor read, froze or settled."""
        axes = [axis for tensor in node.inputs for axis in self.of(tensor).values()]
        if not axes:
            return
        readers, products, frozen, settled = marks
        accounted = [reader.read.channels for reader in self.readers[readers:]]
        accounted += [product.channels for product in self.products[products:]]
        accounted += [channels for channels, _, _ in self.frozen[frozen:]] + self._settled[settled:]
        accounted += [axis.channels for tensor in node.outputs for axis in self.of(tensor).values()]
        known = self.channels.roots(np.concatenate([np.zeros(0, np.int64), *accounted]))
        for axis in axes:
            if not np.isin(self.channels.roots(axis.channels), known).all():
                self.freeze_axis(axis, label(node), f"{node.op} is not followed along this axis")

    # what rules read

    def of(self, tensor: Any) -> dict[int, Axis]:
        """The tracked axes of a tensor by axis number; empty when nothing of it can be cut."""
        return self.axes.get(id(tensor), {})

    def rank(self, tensor: Any) -> int | None:
        """Number of axes, None when unknown."""
        return None if tensor.shape is None else len(tensor.shape)

    def second_output(self, node: Node) -> bool:
        """Whether anything but the first output is read."""
        return any(tensor.outputs or is_output(tensor, self.model) for tensor in node.outputs[1:])

    def tracks(self, node: Node) -> bool:
        """Whether any input has a tracked axis."""
        return any(self.of(tensor) for tensor in node.inputs)

    # what rules state

    def set(self, tensor: Any, axes: dict[int, Axis]) -> None:
        """State the tracked axes of an output; an axis of length 0 has nothing to cut."""
        axes = {number: axis for number, axis in axes.items() if len(axis)}
        if axes and not tensor.is_empty():
            self.axes[id(tensor)] = axes
            self.tensors[id(tensor)] = tensor

    def produce(self, node: Node, signal: Ints, scale: Floats, blocked: bool = False) -> Axis:
        """A new axis of fresh channels made by `node`. blocked: see Site."""
        channels = self.channels.new(len(signal))
        self.sites.append(Site(node, channels, blocked))
        return Axis(channels, np.zeros(0, np.int64), np.zeros(0)).known(signal, scale)

    def parameter(self, node: Node, index: int, axis: int, channels: Ints) -> None:
        """Constant input `index` is cut along `axis` together with these channels; an absent or scalar one is not."""
        constant = node.inputs[index] if index < len(node.inputs) else None
        if isinstance(constant, Constant) and constant.data.size > _UNTIED and len(constant.outputs) > 1:
            known = self._shared.setdefault((id(constant), axis), channels)
            self.channels.tie(known, channels)
        self.parameters.append(Parameter(node, index, axis, channels))

    def freeze(self, tensor: Any, where: str, reason: str) -> None:
        """No channel of this tensor may go."""
        for axis in self.of(tensor).values():
            self.freeze_axis(axis, where, reason)

    def freeze_axis(self, axis: Axis, where: str, reason: str) -> None:
        """No channel of this axis may go."""
        self.frozen.append((axis.channels, where, reason))

    def settle(self, axis: Axis) -> None:
        """The node at hand needs nothing of this axis that does not follow a cut by itself."""
        self._settled.append(axis.channels)

    def freeze_node(self, node: Node, reason: str) -> None:
        """No channel that reaches this node may go; its outputs start afresh. Bodies within are still walked."""
        for tensor in node.inputs:
            self.freeze(tensor, label(node), reason)
        for body in node.graphs():
            self.visit(body)
            for tensor in body.outputs:
                self.freeze(tensor, label(node), reason)

    def on_cut(self, rewrite: Callable[[Keep], None], channels: Ints | None = None) -> None:
        """Call `rewrite(keep)` when some of `channels` (by default any) are removed.

        `keep(channels)` is the mask of those that stay.
        """

        def guarded(keep: Keep) -> None:
            if channels is None or not keep(channels).all():
                rewrite(keep)

        self.rewrites.append(guarded)

    # helpers over what is known

    def constant_axis(self, node: Node, index: int, axis: int) -> Axis:
        """The axis of a constant that is data, not weight: its slices are cut with the result."""
        values = np.moveaxis(np.asarray(node.inputs[index].values, np.float64), axis, 0)
        flat = values.reshape(len(values), -1)
        uniform = (flat == flat[:, :1]).all(axis=1) if flat.shape[1] else np.ones(len(flat), np.bool_)
        signal = np.where(uniform, ONES, self.signals.classes(flat))
        scale = np.where(uniform, flat[:, 0] if flat.shape[1] else 0.0, 1.0)
        fresh = Axis(self.channels.new(len(flat)), signal, scale).known(signal, scale)
        self.parameter(node, index, axis, fresh.channels)
        return fresh

    def linear(self, axis: Axis, keeps_constants: bool, key: Ints | None = None) -> Axis:
        """The axis after an operator that is linear along all other axes, the same for every position.

        `keeps_constants`: a constant stays that constant; otherwise it becomes a signal of its own.
        """
        signal = self.signals.classes(axis.signal, key if key is not None else np.zeros(len(axis)))
        return axis.known(np.where(axis.constant & keeps_constants, ONES, signal), axis.scale)

    def positive(self, axis: Axis) -> Axis:
        """The axis after an operator with f(s x) = s f(x) for s > 0 only, that keeps constants (maximum pooling)."""
        signal = self.signals.classes(axis.signal, np.sign(axis.scale))
        return axis.known(
            np.where(axis.constant, ONES, signal), np.where(axis.constant, axis.scale, np.abs(axis.scale))
        )

    def arbitrary(self, axis: Axis, *keys: Array) -> Axis:
        """The axis after any function of the position's values and of `keys`: equal stays equal, no more is known."""
        return axis.known(self.signals.classes(axis.signal, axis.scale, *keys), np.ones(len(axis)))


def is_constant(tensor: Any) -> bool:
    """Whether a tensor is a Constant of the model."""
    return isinstance(tensor, Constant)


def numbers(tensors: Iterable[Any], index: int) -> list[int] | None:
    """The integers of optional constant input `index`; None when it is absent or not constant."""
    found = list(tensors)
    if index >= len(found) or found[index].is_empty() or not is_constant(found[index]):
        return None
    return [int(value) for value in found[index].values.reshape(-1)]
