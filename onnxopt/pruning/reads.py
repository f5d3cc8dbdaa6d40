"""What layers read: the channels behind their inputs, their weights on them, and where a constant can be added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.graph.axes import AxisMaps, Reader
from onnxopt.graph.axes.axis import Floats, Ints
from onnxopt.graph.axes.weights import add_to_bias
from onnxopt.graph.edit import is_output, label
from onnxopt.model import Constant, Model, Node, Variable

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where the values of channels can be seen: an axis of a tensor, counted from the end.

    direction: of a recurrent output [steps, directions, batch, units] the one that is meant.
    """

    tensor: Variable
    axis: int
    direction: int | None = None


@dataclass(frozen=True, eq=False)
class Read:
    """A layer that sums over channels with constant weights. A grouped one is several reads, one a group.

    roots [K]: the set of each position. source: where to see them, None where that is not known. positions: which of
    the source's channels they are.
    """

    reader: Reader
    group: int
    roots: Ints
    positions: slice
    source: Source | None

    @property
    def node(self) -> Node:
        """The layer."""
        return self.reader.node

    @cached_property
    def energy(self) -> Floats:
        """W^T W [K, K] over all outputs and taps, without weights that go with their channel."""
        weights = self.weights()
        lines = weights.transpose(1, 0, 2).reshape(weights.shape[1], -1)
        return np.asarray(lines @ lines.T)

    def weights(self) -> Floats:
        """[rows, K, taps] float64."""
        values = np.asarray(self.reader.node.inputs[self.reader.index].values)
        weights = np.array(self.reader.spread(values), np.float64)
        if self.reader.own is not None:
            weights = np.where(self.reader.own, 0.0, weights)
        return np.asarray(weights[self.group])


def reads_of(maps: AxisMaps) -> list[Read]:
    """Every layer that reads tracked channels, in graph order."""
    return [read for reader in maps.readers for read in _split(reader, maps)]


def _split(reader: Reader, maps: AxisMaps) -> Iterator[Read]:
    roots = maps.channels.roots(reader.read.channels)
    size = len(roots) // reader.groups
    for group in range(reader.groups):
        part = slice(group * size, (group + 1) * size)
        source = _source(reader, group)
        yield Read(reader, group, roots[part], part if reader.data is not None else slice(0, size), source)


def _source(reader: Reader, group: int) -> Source | None:
    node = reader.node
    if reader.data is None:
        units = node.outputs[0]
        return None if units.is_empty() else Source(units, -1, group if reader.groups > 1 else None)
    tensor = node.inputs[reader.data]
    if not isinstance(tensor, Variable) or tensor.shape is None:
        return None
    axis = _read_axis(node, reader.data, len(tensor.shape))
    return None if axis is None else Source(tensor, axis)


def _read_axis(node: Node, index: int, rank: int) -> int | None:
    """The axis that a layer sums over, counted from the end."""
    if node.op in ("Conv", "ConvTranspose", "FusedConv"):
        return 1 - rank
    if node.op in ("Gemm", "FusedGemm"):
        return -2 if node.attrs.get("transA" if index == 0 else "", 0) else -1
    if node.op in ("MatMul", "FusedMatMul"):
        return -1 if index == 0 else -2
    if node.op in ("LSTM", "GRU", "RNN", "Attention"):
        return -1
    return None


@dataclass(frozen=True)
class Slot:
    """Where a constant can be added to what a layer puts out: `add(amounts)` with one number an output channel."""

    node: Node
    add: Callable[[Floats], None]


def slot_of(reader: Reader, model: Model) -> Slot | None:
    """The bias of a layer, or of a MatMul the constant of the Add that alone follows it; None where there is none."""
    node = reader.node
    if node.op in ("LSTM", "GRU", "RNN"):
        half = 1 if reader.data is None else 0
        return Slot(node, lambda amounts: _add_to_gates(node, half, amounts)) if _is_open(node, 3) else None
    if node.op in ("Conv", "ConvTranspose") and _is_open(node, 2):
        return Slot(node, lambda amounts: add_to_bias(node, 2, len(amounts), amounts))
    if node.op == "Gemm":
        return Slot(node, reader.fold) if reader.fold is not None else None
    if node.op != "MatMul" or reader.data != 0:
        return None
    follower = _add_behind(node, model)
    if follower is None:
        return None
    add, index = follower
    return Slot(add, lambda amounts: _add_to_operand(add, index, amounts))


def _is_open(node: Node, index: int) -> bool:
    given = node.inputs[index] if index < len(node.inputs) else None
    return given is None or given.is_empty() or isinstance(given, Constant)


def _add_behind(node: Node, model: Model) -> tuple[Node, int] | None:
    out = node.outputs[0]
    if len(out.outputs) != 1 or out.outputs[0].op != "Add" or is_output(out, model):
        return None
    add = out.outputs[0]
    index = 0 if add.inputs[0] is not out else 1
    other = add.inputs[index]
    width = node.inputs[1].shape[-1]
    fits = isinstance(other, Constant) and other.shape[-1:] == (width,) and other.data.size == width
    return (add, index) if fits else None


def _add_to_operand(add: Node, index: int, amounts: Floats) -> None:
    old = add.inputs[index]
    values = np.asarray(old.values, np.float64) + amounts.reshape(old.shape)
    add.inputs[index] = Constant(old.name, values.astype(old.dtype))


def _add_to_gates(node: Node, half: int, amounts: Floats) -> None:
    """B [directions, 2 rows]: first what goes with the input, then what goes with the state."""
    weights = node.inputs[1]
    directions, rows = weights.shape[:2]
    present = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
    bias = np.zeros((directions, 2 * rows)) if present is None else np.array(present.values, np.float64)
    bias[:, half * rows : (half + 1) * rows] += amounts.reshape(directions, rows)
    while len(node.inputs) <= 3:
        node.inputs.append(Variable.empty())
    name = f"{weights.name}_bias" if present is None else present.name
    node.inputs[3] = Constant(name, bias.astype(weights.dtype))


def described(read: Read) -> str:
    """How reports call a layer."""
    return label(read.node)
