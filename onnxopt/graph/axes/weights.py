"""What rules of operators with weights share: constants as weights and biases, and the channels that they make."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, Floats, Ints, proportional_rows
from onnxopt.graph.axes.maps import Array, AxisMaps, is_constant
from onnxopt.model import Constant, Node, Variable


def has_weights(tensor: Any) -> bool:
    """A constant of floats: sums of integers take no factors."""
    return is_constant(tensor) and (tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16")


def bias_known(node: Node, index: int) -> bool:
    """Whether an optional bias is absent or constant."""
    return index >= len(node.inputs) or node.inputs[index].is_empty() or is_constant(node.inputs[index])


def bias_of(node: Node, index: int, count: int) -> Floats:
    """The bias as [count] float64, zeros when absent; a [1, count] or scalar operand is broadcast."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return np.zeros(count)
    values = np.asarray(node.inputs[index].values, np.float64)
    return np.broadcast_to(values.reshape(-1) if values.size == count else values.reshape(1), (count,)).copy()


def add_to_bias(node: Node, index: int, count: int, amounts: Floats) -> None:
    """Add to the bias, giving the node one (of its own) when it has none."""
    present: Any = node.inputs[index] if index < len(node.inputs) else None
    dtype = node.inputs[1].dtype
    values = (bias_of(node, index, count) + amounts).astype(dtype)
    if present is not None and not present.is_empty() and tuple(present.shape) == (1, count):
        values = values.reshape(1, count)
    base = present.name if present is not None and present.name else f"{node.inputs[1].name}_bias"
    bias = Constant(base, values)
    while len(node.inputs) <= index:
        node.inputs.append(Variable.empty())
    node.inputs[index] = bias


def tie_groups(maps: AxisMaps, channels: Ints, groups: int) -> None:
    """Channels at the same place of each of several equal groups go together."""
    grid = channels.reshape(groups, -1)
    for other in grid[1:]:
        maps.channels.tie(grid[0], other)


def forget(axis: Axis, maps: AxisMaps) -> Axis:
    """The same channels, nothing known of their values (a zero slice stays zero in every product)."""
    return axis.known(np.where(axis.zero, ONES, maps.signals.new(len(axis))), np.where(axis.zero, 0, 1))


def unfused(node: Node, maps: AxisMaps, axis: Axis) -> Axis:
    """The output of a node that may apply an activation of its own: equal channels stay equal, no more is known."""
    return maps.arbitrary(axis) if node.domain == "com.microsoft" else axis


def produce(
    node: Node,
    maps: AxisMaps,
    weights: Array,
    read: Axis | None,
    bias: Floats,
    sums_constants: bool,
    stored: Constant | None = None,
) -> Axis:
    """Fresh channels of a dense operator, from weights [groups, rows, inner, taps] and bias [groups * rows].

    A row without weights on anything that varies is constant; rows that are multiples of each other are proportional.
    `sums_constants`: a constant input adds a constant (no padding). `stored`: the constant that holds the weights,
    input 1 unless given.
    """
    constant_weights = node.inputs[1] if stored is None else stored
    groups, per_group, inner, _ = weights.shape
    rows = np.asarray(weights, np.float64).reshape(groups * per_group, -1)
    keyed = np.repeat(np.arange(groups), per_group)
    live = np.ones((groups, inner), np.bool_)
    added = np.zeros((groups, inner))
    if read is not None:
        live = ~read.zero.reshape(groups, inner)
        if sums_constants:
            steady = read.constant.reshape(groups, inner)
            added = np.where(steady, read.scale.reshape(groups, inner), 0)
            live &= ~steady
    taps = np.asarray(weights, np.float64)
    varying = (taps * live[:, None, :, None]).reshape(rows.shape)
    value = bias + np.einsum("grik,gi->gr", taps, added).reshape(-1)
    classes, scale = proportional_rows(np.concatenate([rows, bias[:, None]], axis=1), epsilon(constant_weights))
    signal = maps.signals.classes(classes, keyed)
    constant = (varying == 0).all(axis=1)
    # products of matrices take any width equally well
    blocked = node.op not in ("MatMul", "Gemm", "FusedGemm", "FusedMatMul")
    return maps.produce(node, np.where(constant, ONES, signal), np.where(constant, value, scale), blocked)


def epsilon(weights: Constant) -> float:
    """Relative rounding of the type weights are stored in."""
    return float(ml_dtypes.finfo(weights.dtype).eps)
