"""Rules of operators with weights: convolution, matrix products, normalisation by stored statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, Floats, Ints, proportional_rows
from onnxopt.graph.axes.maps import Array, AxisMaps, Product, Reader, is_constant, register
from onnxopt.graph.edit import label
from onnxopt.model import Constant, Node, Variable


@register("Conv")
def conv(node: Node, maps: AxisMaps) -> None:
    """W [M, C/g, *k]: reads input axis 1 in g groups, makes output axis 1."""
    weights = node.inputs[1]
    if not _has_weights(weights) or not _bias_known(node, 2):
        maps.freeze_node(node, f"weights of {node.op} are not constant floats")
        return
    groups = int(node.attrs.get("group", 1))
    out, inner = weights.shape[0], weights.shape[1]
    read = maps.of(node.inputs[0]).get(1)
    if inner == 1 and groups > 1:
        _depthwise(node, maps, read, groups, out // groups)
        return
    read = _grouped_read(node, maps, read, groups)
    spread: Callable[[Array], Array] = lambda w: w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)  # noqa: E731
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if read is not None:
        fold = None if padded else partial(_add_to_bias, node, 2, out)
        maps.readers.append(Reader(node, 1, read, groups, spread, lambda new, old: new.reshape(old.shape), fold))
        maps.parameter(node, 1, 1, read.channels[:inner])
    produced = _produce(node, maps, spread(weights.values), read, _bias(node, 2, out), not padded)
    if groups > 1:
        _tie_groups(maps, produced.channels, groups)
    _outputs_of_dense(node, maps, produced, 0, 2)
    maps.set(node.outputs[0], {1: produced})


@register("ConvTranspose")
def conv_transpose(node: Node, maps: AxisMaps) -> None:
    """W [C, M/g, *k]: as Conv with the first two axes exchanged; a constant input leaves a pattern, no constant."""
    weights = node.inputs[1]
    if not _has_weights(weights) or not _bias_known(node, 2):
        maps.freeze_node(node, f"weights of {node.op} are not constant floats")
        return
    groups = int(node.attrs.get("group", 1))
    if groups > 1:
        maps.freeze_node(node, "grouped ConvTranspose is not followed")
        return
    read, out = maps.of(node.inputs[0]).get(1), weights.shape[1]
    spread: Callable[[Array], Array] = lambda w: w.reshape(w.shape[0], w.shape[1], -1).swapaxes(0, 1)[None]  # noqa: E731
    if read is not None:
        gather: Callable[[Array, Array], Array] = lambda new, old: new[0].swapaxes(0, 1).reshape(old.shape)  # noqa: E731
        maps.readers.append(Reader(node, 1, read, 1, spread, gather, None))
        maps.parameter(node, 1, 0, read.channels)
    produced = _produce(node, maps, spread(weights.values), read, _bias(node, 2, out), False)
    _outputs_of_dense(node, maps, produced, 1, 2)
    maps.set(node.outputs[0], {1: produced})


@register("Gemm")
def gemm(node: Node, maps: AxisMaps) -> None:
    """alpha A B + beta C with constant B [K, N] (or [N, K]): reads A's axis 1, makes output axis 1."""
    weights = node.inputs[1]
    c_shape = _shape(node, 2)
    if not _has_weights(weights) or not _bias_known(node, 2) or node.attrs.get("transA", 0) or len(c_shape) > 2:
        maps.freeze_node(node, "Gemm without constant weights and bias is not followed")
        return
    transposed = bool(node.attrs.get("transB", 0))
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    out = weights.shape[0 if transposed else 1]
    read = maps.of(node.inputs[0]).get(1)
    rows_per_row = len(c_shape) == 2 and c_shape[0] != 1
    spread: Callable[[Array], Array] = lambda w: (w if transposed else w.T)[None, :, :, None]  # noqa: E731
    if read is not None:
        gather: Callable[[Array, Array], Array] = lambda new, _old: (  # noqa: E731
            new[0, :, :, 0] if transposed else new[0, :, :, 0].T
        )
        scale = alpha / beta if beta else None
        usable = scale is not None and not rows_per_row
        fold = (lambda amounts: _add_to_bias(node, 2, out, amounts * scale)) if usable else None
        maps.readers.append(Reader(node, 1, read, 1, spread, gather, fold))
        maps.parameter(node, 1, 1 if transposed else 0, read.channels)
    if rows_per_row:
        signal, scales = maps.signals.new(out), np.ones(out)
        produced = maps.produce(node, signal, scales)
    else:
        bias = _bias(node, 2, out) * beta
        produced = _produce(node, maps, spread(weights.values) * np.float64(alpha), read, bias, True)
    maps.parameter(node, 2, -1, produced.channels)
    maps.parameter(node, 1, 0 if transposed else 1, produced.channels)
    maps.set(node.outputs[0], {1: produced})


@register("MatMul")
def matmul(node: Node, maps: AxisMaps) -> None:
    """x [..., K] times constant [K, N]; two variables tie the axis they are summed over."""
    left, right = node.inputs
    if _has_weights(right) and len(right.shape) == 2 and maps.rank(left) is not None:
        _matmul_weights(node, maps)
    elif is_constant(left) or is_constant(right):
        maps.freeze_node(node, "MatMul with these constant operands is not followed")
    else:
        _matmul_variables(node, maps)


def _matmul_weights(node: Node, maps: AxisMaps) -> None:
    data, weights = node.inputs
    last = len(data.shape) - 1
    read = maps.of(data).get(last)
    if last == 0:
        maps.freeze_node(node, "MatMul of a vector is not followed")
        return
    spread: Callable[[Array], Array] = lambda w: w.T[None, :, :, None]  # noqa: E731
    if read is not None:
        maps.readers.append(Reader(node, 1, read, 1, spread, lambda new, _old: new[0, :, :, 0].T, None))
        maps.parameter(node, 1, 0, read.channels)
    produced = _produce(node, maps, spread(weights.values), read, np.zeros(weights.shape[1]), True)
    maps.parameter(node, 1, 1, produced.channels)
    others = {axis: _forget(found, maps) for axis, found in maps.of(data).items() if axis != last}
    maps.set(node.outputs[0], {**others, last: produced})


def _matmul_variables(node: Node, maps: AxisMaps) -> None:
    left, right = node.inputs
    if not maps.tracks(node):
        return
    ranks = maps.rank(left), maps.rank(right)
    if ranks[0] is None or ranks[0] != ranks[1] or ranks[0] < 2:
        maps.freeze_node(node, "MatMul of tensors of different or unknown rank is not followed")
        return
    rank = ranks[0]
    summed, other = maps.of(left).get(rank - 1), maps.of(right).get(rank - 2)
    if summed is not None and other is not None:
        maps.channels.tie(summed.channels, other.channels)
        maps.products.append(Product(summed.channels, ~(summed.zero | other.zero)))
    for axis, missing in ((summed, other), (other, summed)):
        if axis is not None and missing is None:
            maps.freeze_axis(axis, label(node), "MatMul sums over it together with an axis that can't be cut")
    result: dict[int, Axis] = {}
    for batch in range(rank - 2):
        pair = maps.of(left).get(batch), maps.of(right).get(batch)
        if pair[0] is not None and pair[1] is not None and len(pair[0]) == len(pair[1]):
            maps.channels.tie(pair[0].channels, pair[1].channels)
            result[batch] = _forget(pair[0], maps)
        else:
            for found in pair:
                if found is not None:
                    maps.freeze_axis(found, label(node), "MatMul pairs it with an axis that can't be cut")
    if rank - 2 in maps.of(left):
        result[rank - 2] = _forget(maps.of(left)[rank - 2], maps)
    if rank - 1 in maps.of(right):
        result[rank - 1] = _forget(maps.of(right)[rank - 1], maps)
    maps.set(node.outputs[0], result)


@register("BatchNormalization")
def batch_normalization(node: Node, maps: AxisMaps) -> None:
    """y = g x + h per channel of axis 1, g = scale / sqrt(var + eps), h = B - mean g."""
    axis = maps.of(node.inputs[0]).get(1)
    if axis is None:
        return
    stored = node.inputs[1:5]
    per_channel = all(is_constant(tensor) and tensor.shape == (len(axis),) for tensor in stored)
    inference = not node.attrs.get("training_mode", 0) and sum(not t.is_empty() for t in node.outputs) == 1
    if not inference or not per_channel or len(maps.of(node.inputs[0])) > 1:
        maps.freeze_node(node, "BatchNormalization in training mode or without constant parameters")
        return
    scale, shift, mean, variance = (np.asarray(tensor.values, np.float64) for tensor in stored)
    for index in range(1, 5):
        maps.parameter(node, index, 0, axis.channels)
    gain = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    offset = shift - mean * gain
    signal = np.where(offset == 0, axis.signal, maps.signals.classes(axis.signal, axis.scale, gain, offset))
    result = axis.known(signal, np.where(offset == 0, axis.scale * gain, 1.0))
    constant = axis.constant | (gain == 0)
    values = axis.scale * axis.constant * gain + offset
    result = result.known(np.where(constant, ONES, result.signal), np.where(constant, values, result.scale))
    maps.set(node.outputs[0], {1: result})


@register("LSTM", "GRU", "RNN")
def recurrent(node: Node, maps: AxisMaps) -> None:
    """W [D, g H, I] reads axis 2 of the input; the hidden units stay."""
    read = maps.of(node.inputs[0]).get(2)
    weights = node.inputs[1]
    for index, tensor in enumerate(node.inputs):
        for number, axis in maps.of(tensor).items():
            if index != 0 or number != 2 or not _has_weights(weights):
                maps.freeze_axis(axis, label(node), f"{node.op} needs all of it")
    if read is None or not _has_weights(weights):
        return
    spread: Callable[[Array], Array] = lambda w: w.reshape(1, -1, w.shape[2], 1)  # noqa: E731
    maps.readers.append(Reader(node, 1, read, 1, spread, lambda new, old: new.reshape(old.shape), None))
    maps.parameter(node, 1, 2, read.channels)


def _depthwise(node: Node, maps: AxisMaps, read: Axis | None, groups: int, multiplier: int) -> None:
    """One input channel a group: the outputs go with their input, and `group` with their number."""
    if read is None or len(read) != groups:
        # cutting outputs alone would leave groups that no longer match the input: the output is not tracked
        maps.freeze(node.inputs[0], label(node), "the input of the depthwise Conv can't be cut")
        return
    repeated = read.take(np.repeat(np.arange(groups), multiplier))
    weights = np.asarray(node.inputs[1].values, np.float64).reshape(groups * multiplier, -1)
    bias = _bias(node, 2, groups * multiplier)
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    rows = np.concatenate([weights * repeated.scale[:, None], bias[:, None]], axis=1)
    rows[repeated.zero, :-1] = 0
    classes, scale = proportional_rows(rows, _epsilon(node))
    signal = maps.signals.classes(repeated.signal, classes)
    silent = (rows[:, :-1] == 0).all(axis=1)
    constant = silent | (repeated.constant & (not padded))
    value = bias + np.where(silent, 0, rows[:, :-1].sum(axis=1))
    result = repeated.known(np.where(constant, ONES, signal), np.where(constant, value, scale))
    _outputs_of_dense(node, maps, result, 0, 2)
    maps.on_cut(lambda keep: node.attrs.update(group=int(keep(read.channels).sum())))
    maps.set(node.outputs[0], {1: result})


def _grouped_read(node: Node, maps: AxisMaps, read: Axis | None, groups: int) -> Axis | None:
    """All groups keep the same number of inputs: channels at the same place of each group go together."""
    if read is None or groups == 1:
        return read
    if len(read) % groups:
        maps.freeze_axis(read, label(node), "its channels don't divide into the groups")
        return None
    _tie_groups(maps, read.channels, groups)
    return read


def _tie_groups(maps: AxisMaps, channels: Ints, groups: int) -> None:
    grid = channels.reshape(groups, -1)
    for other in grid[1:]:
        maps.channels.tie(grid[0], other)


def _produce(node: Node, maps: AxisMaps, weights: Array, read: Axis | None, bias: Floats, sums_constants: bool) -> Axis:
    """Fresh channels of a dense operator, from weights [groups, rows, inner, taps] and bias [groups * rows].

    A row without weights on anything that varies is constant; rows that are multiples of each other are proportional.
    `sums_constants`: a constant input adds a constant (no padding).
    """
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
    classes, scale = proportional_rows(np.concatenate([rows, bias[:, None]], axis=1), _epsilon(node))
    signal = maps.signals.classes(classes, keyed)
    constant = (varying == 0).all(axis=1)
    # weights of rank 2 are matrices: their products take any width equally well
    blocked = node.inputs[1].data.shape[2:] != ()
    return maps.produce(node, np.where(constant, ONES, signal), np.where(constant, value, scale), blocked)


def _epsilon(node: Node) -> float:
    """Relative rounding of the type the node's weights are stored in."""
    return float(ml_dtypes.finfo(node.inputs[1].dtype).eps)


def _forget(axis: Axis, maps: AxisMaps) -> Axis:
    """The same channels, nothing known of their values (a zero slice stays zero in every product)."""
    return axis.known(np.where(axis.zero, ONES, maps.signals.new(len(axis))), np.where(axis.zero, 0, 1))


def _outputs_of_dense(node: Node, maps: AxisMaps, axis: Axis, weight_axis: int, bias_index: int) -> None:
    maps.parameter(node, 1, weight_axis, axis.channels)
    maps.parameter(node, bias_index, -1, axis.channels)


def _shape(node: Node, index: int) -> tuple[int, ...]:
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return ()
    return tuple(node.inputs[index].shape)


def _has_weights(tensor: Any) -> bool:
    """A constant of floats: sums of integers take no factors."""
    return is_constant(tensor) and (tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16")


def _bias_known(node: Node, index: int) -> bool:
    return index >= len(node.inputs) or node.inputs[index].is_empty() or is_constant(node.inputs[index])


def _bias(node: Node, index: int, count: int) -> Floats:
    """The bias as [count] float64, zeros when absent; a [1, count] or scalar operand is broadcast."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return np.zeros(count)
    values = np.asarray(node.inputs[index].values, np.float64)
    return np.broadcast_to(values.reshape(-1) if values.size == count else values.reshape(1), (count,)).copy()


def _add_to_bias(node: Node, index: int, count: int, amounts: Floats) -> None:
    """Add to the bias, giving the node one (of its own) when it has none."""
    present: Any = node.inputs[index] if index < len(node.inputs) else None
    dtype = node.inputs[1].dtype
    values = (_bias(node, index, count) + amounts).astype(dtype)
    if present is not None and not present.is_empty() and tuple(present.shape) == (1, count):
        values = values.reshape(1, count)
    base = present.name if present is not None and present.name else f"{node.inputs[1].name}_bias"
    bias = Constant(base, values)
    while len(node.inputs) <= index:
        node.inputs.append(Variable.empty())
    node.inputs[index] = bias
