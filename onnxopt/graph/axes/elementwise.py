"""Rules of operators that treat every element alike, with broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis
from onnxopt.graph.axes.maps import Array, AxisMaps, is_constant, register
from onnxopt.graph.edit import label
from onnxopt.model import Node

# f(s x) = s f(x) for every s, for one data input and constants
_LINEAR = ("Identity", "Neg", "Dropout")
# f(s x) = s f(x) for s > 0 only
_POSITIVE = ("Relu", "LeakyRelu", "Abs")
_UNARY = (
    "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Softplus", "Softsign", "Gelu", "Mish",
    "Swish", "ThresholdedRelu", "Exp", "Log", "Sqrt", "Reciprocal", "Erf", "Floor", "Ceil", "Round", "Sign", "Sin",
    "Cos", "Tan", "Atan", "Cast", "Not", "IsNaN", "IsInf", "Clip", "Shrink", "Asin", "Acos", "Sinh", "Cosh", "Asinh",
    "Acosh", "Atanh", "BitwiseNot",
)  # fmt: skip
_BINARY = (
    "Sub", "Div", "Pow", "Max", "Min", "Mean", "Sum", "PRelu", "Mod", "Where", "Equal", "Greater", "Less",
    "GreaterOrEqual", "LessOrEqual", "And", "Or", "Xor",
)  # fmt: skip


@register("Gelu", "BiasGelu", "FastGelu", "QuickGelu", domain="com.microsoft")
@register(*_LINEAR, *_POSITIVE, *_UNARY, *_BINARY, "Add", "Mul")
def elementwise(node: Node, maps: AxisMaps) -> None:
    """Ties the inputs' channels position by position; a constant operand is cut along."""
    if not maps.tracks(node):
        return
    if node.op == "Dropout" and (len(node.inputs) > 2 or maps.second_output(node)):
        maps.freeze_node(node, "Dropout whose mask is read or that may be in training mode")
        return
    data = [(index, tensor) for index, tensor in enumerate(node.inputs) if not tensor.is_empty()]
    ranks = [maps.rank(tensor) for _, tensor in data]
    if ranks == [None]:
        found = maps.of(data[0][1])
        outputs = {at: _values(node, maps, data, axis, {0: axis}, {}) for at, axis in found.items()}
        maps.set(node.outputs[0], outputs if len(outputs) == 1 else {at: _nothing(found[at], maps) for at in found})
        return
    if any(rank is None for rank in ranks):
        maps.freeze_node(node, f"rank of an input of {node.op} is unknown")
        return
    rank = max(rank for rank in ranks if rank is not None)
    outputs = {}
    for axis in range(rank):
        merged = _merge(node, maps, data, rank, axis)
        if merged is not None:
            outputs[axis] = merged
    if len(outputs) > 1:
        # values are described along one axis only; with two tracked, nothing is claimed of either
        outputs = {axis: _nothing(found, maps) for axis, found in outputs.items()}
    maps.set(node.outputs[0], outputs)


def _nothing(axis: Axis, maps: AxisMaps) -> Axis:
    """The same channels, nothing known of their values unless the whole tensor is one number."""
    if axis.constant.all() and (axis.scale == axis.scale[0]).all():
        return axis
    return axis.known(maps.signals.new(len(axis)), np.ones(len(axis)))


def _merge(node: Node, maps: AxisMaps, data: list[tuple[int, Any]], rank: int, axis: int) -> Axis | None:
    """The output axis number `axis`: tie all inputs that have it, cut the constants, derive the values."""
    tracked: dict[int, Axis] = {}
    constants: dict[int, tuple[int, Any]] = {}
    solid: list[str] = []
    for index, tensor in data:
        own = axis - (rank - len(tensor.shape))
        if own < 0:
            continue
        if own in maps.of(tensor):
            tracked[index] = maps.of(tensor)[own]
        elif tensor.shape[own] != 1:
            if is_constant(tensor):
                constants[index] = (own, tensor)
            else:
                solid.append(tensor.name)
    if not tracked:
        return None
    first = next(iter(tracked.values()))
    lengths = {len(one) for one in tracked.values()} | {tensor.shape[own] for own, tensor in constants.values()}
    if solid or lengths != {len(first)}:
        reason = f"{node.op} joins it with a tensor that can't be cut" if solid else f"{node.op} broadcasts it"
        for one in tracked.values():
            maps.freeze_axis(one, label(node), reason)
        return None
    for one in tracked.values():
        maps.channels.tie(first.channels, one.channels)
    for index, (own, _) in constants.items():
        maps.parameter(node, index, own, first.channels)
    return _values(node, maps, data, first, tracked, constants)


def _values(
    node: Node,
    maps: AxisMaps,
    data: list[tuple[int, Any]],
    first: Axis,
    tracked: dict[int, Axis],
    constants: dict[int, tuple[int, Any]],
) -> Axis:
    """What is known of the result: constants computed, proportions kept where the operator allows."""
    count = len(first)
    operands: dict[int, Axis] = dict(tracked)
    for index, tensor in data:
        if index in tracked:
            continue
        operand = _operand(maps, tensor, constants[index][0] if index in constants else None, count)
        if operand is None:
            # a tensor without this axis that is no constant: one unknown signal for all positions
            operand = Axis(first.channels, np.full(count, maps.signals.new(1)[0]), np.ones(count))
        operands[index] = operand
    axes = [operands[index] for index, _ in data]
    result = _derive(node, maps, first, axes)
    constant = np.logical_and.reduce([axis.constant for axis in axes])
    if constant.any():
        values = maps.evaluate(node, _inputs(node, data, operands, constants, tracked))
        if values is not None and values.shape == (count,):
            finite = constant & np.isfinite(values)
            result = result.known(np.where(finite, ONES, result.signal), np.where(finite, values, result.scale))
    return result


def _operand(maps: AxisMaps, tensor: Any, own: int | None, count: int) -> Axis | None:
    """A constant operand as an axis of `count` positions; None for a variable."""
    if not is_constant(tensor) or tensor.dtype.kind not in "fiub":
        return None
    values = np.asarray(tensor.values, np.float64)
    slices = np.moveaxis(values, own, 0).reshape(count, -1) if own is not None else values.reshape(1, -1)
    slices = np.broadcast_to(slices, (count, slices.shape[1]))
    uniform = (slices == slices[:, :1]).all(axis=1) if slices.shape[1] else np.zeros(count, np.bool_)
    signal = np.where(uniform, ONES, maps.signals.classes(slices))
    scale = np.where(uniform, slices[:, 0] if slices.shape[1] else 0.0, 1.0)
    blank = Axis(np.zeros(count, np.int64), signal, scale)
    return blank.known(signal, scale)


def _derive(node: Node, maps: AxisMaps, first: Axis, axes: list[Axis]) -> Axis:
    signals, scales = [axis.signal for axis in axes], [axis.scale for axis in axes]
    if node.op in _LINEAR:
        return first.known(axes[0].signal, -axes[0].scale if node.op == "Neg" else axes[0].scale)
    if node.op in _POSITIVE and len(axes) == 1:
        signal = maps.signals.classes(signals[0], np.sign(scales[0]))
        return first.known(signal, np.abs(scales[0]))
    if node.op == "Mul" and len(axes) == 2:
        return first.known(_product(maps, *axes), scales[0] * scales[1])
    if node.op in ("Add", "Sum") and len(axes) == 2:
        return _sum(maps, first, *axes)
    return first.known(maps.signals.classes(*signals, *scales), np.ones(len(first)))


def _product(maps: AxisMaps, one: Axis, other: Axis) -> Array:
    """Signal of x*y: that of the other factor where one is constant."""
    low, high = np.minimum(one.signal, other.signal), np.maximum(one.signal, other.signal)
    return np.where(one.constant, other.signal, np.where(other.constant, one.signal, maps.signals.classes(low, high)))


def _sum(maps: AxisMaps, first: Axis, one: Axis, other: Axis) -> Axis:
    """a u + b v = a (u + b/a v); where one term is zero the other stays as it is."""
    safe = np.where(one.scale == 0, 1, one.scale)
    with np.errstate(over="ignore"):
        ratio = (other.scale / safe).astype(np.float32)
    signal = maps.signals.classes(one.signal, other.signal, ratio)
    signal = np.where(one.zero, other.signal, np.where(other.zero, one.signal, signal))
    return first.known(signal, np.where(one.zero, other.scale, one.scale))


def _inputs(
    node: Node,
    data: list[tuple[int, Any]],
    operands: dict[int, Axis],
    constants: dict[int, tuple[int, Any]],
    tracked: dict[int, Axis],
) -> list[Array | None]:
    """Operands for computing the node over constant positions: per-position values as [n], other constants as [] ."""
    inputs: list[Array | None] = [None] * len(node.inputs)
    for index, tensor in data:
        dtype = tensor.dtype if tensor.dtype is not None else np.dtype(np.float32)
        if index in tracked or index in constants:
            axis = operands[index]
            inputs[index] = np.where(axis.constant, axis.scale, 0).astype(dtype)
        elif is_constant(tensor) and tensor.data.size and operands[index].constant.all():
            inputs[index] = tensor.values.reshape(-1)[0]
        else:
            inputs[index] = np.zeros((), dtype)
    return inputs
