"""What layers read: the channels behind their inputs, their weights on them, and where a constant can be added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from onnxopt.calibration.channels import Source
from onnxopt.graph.axes import AxisMaps, Reader
from onnxopt.graph.axes.axis import Floats, Ints
from onnxopt.graph.axes.recurrent import add_to_gates
from onnxopt.graph.axes.weights import add_to_bias, bias_known
from onnxopt.graph.biases import bias_slot
from onnxopt.graph.edit import is_output
from onnxopt.model import Constant, Model, Node, Variable


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
        return energy(self.weights())

    def weights(self) -> Floats:
        """[rows, K, taps] float64."""
        values = np.asarray(self.reader.node.inputs[self.reader.index].values)
        weights = np.array(self.reader.spread(values), np.float64)
        if self.reader.own is not None:
            weights = np.where(self.reader.own, 0.0, weights)
        return np.asarray(weights[self.group])


def energy(weights: Floats) -> Floats:
    """W^T W [K, K] of weights [rows, K, taps], over all rows and taps."""
    lines = weights.transpose(1, 0, 2).reshape(weights.shape[1], -1)
    return np.asarray(lines @ lines.T)


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
        return Slot(node, partial(add_to_gates, node, half)) if bias_known(node, 3) else None
    if node.op in ("Conv", "ConvTranspose") and bias_known(node, 2):
        return Slot(node, lambda amounts: add_to_bias(node, 2, len(amounts), amounts))
    if node.op == "Gemm":
        return Slot(node, reader.fold) if reader.fold is not None else None
    return _slot_behind(node, model) if node.op == "MatMul" and reader.data == 0 else None


def _slot_behind(node: Node, model: Model) -> Slot | None:
    output = node.outputs[0]
    slot = bias_slot(node, {id(output)} if is_output(output, model) else set())
    width = node.inputs[1].shape[-1]
    if slot is None or slot.given is None or slot.given.shape[-1:] != (width,) or slot.given.data.size != width:
        return None
    add, at = slot.node, slot.at

    def plus(amounts: Floats) -> None:
        now = replace(slot, given=add.inputs[at])
        add.inputs[at] = Constant(add.inputs[at].name, now.plus(amounts, node.inputs[1].dtype))

    return Slot(add, plus)
