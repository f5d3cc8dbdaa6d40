"""Rules of convolutions and of normalisation by stored statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, proportional_rows
from onnxopt.graph.axes.maps import Array, AxisMaps, Reader, is_constant, register
from onnxopt.graph.axes.weights import (
    add_to_bias,
    bias_known,
    bias_of,
    epsilon,
    has_weights,
    produce,
    tie_groups,
    unfused,
)
from onnxopt.graph.edit import label
from onnxopt.model import Node


@register("FusedConv", domain="com.microsoft")
@register("Conv")
def conv(node: Node, maps: AxisMaps) -> None:
    """W [M, C/g, *k]: reads input axis 1 in g groups, makes output axis 1."""
    weights = node.inputs[1]
    if not has_weights(weights) or not bias_known(node, 2):
        maps.freeze_node(node, f"weights of {node.op} are not constant floats")
        return
    if len(node.inputs) > 3:
        maps.freeze_node(node, f"{node.op} adds another tensor")
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
        fold = None if padded else partial(add_to_bias, node, 2, out)
        maps.readers.append(Reader(node, 1, read, groups, spread, lambda new, old: new.reshape(old.shape), fold))
        maps.parameter(node, 1, 1, read.channels[:inner])
    produced = produce(node, maps, spread(weights.values), read, bias_of(node, 2, out), not padded)
    if groups > 1:
        tie_groups(maps, produced.channels, groups)
    _outputs_of_dense(node, maps, produced, 0, 2)
    maps.set(node.outputs[0], {1: unfused(node, maps, produced)})


@register("ConvTranspose")
def conv_transpose(node: Node, maps: AxisMaps) -> None:
    """W [C, M/g, *k]: as Conv with the first two axes exchanged; a constant input leaves a pattern, no constant."""
    weights = node.inputs[1]
    if not has_weights(weights) or not bias_known(node, 2):
        maps.freeze_node(node, f"weights of {node.op} are not constant floats")
        return
    groups = int(node.attrs.get("group", 1))
    inner, per_group = weights.shape[0] // groups, weights.shape[1]
    read, out = maps.of(node.inputs[0]).get(1), per_group * groups
    if inner == 1 and groups > 1:
        _depthwise_transpose(node, maps, read, groups, per_group)
        return
    read = _grouped_read(node, maps, read, groups)
    spread: Callable[[Array], Array] = lambda w: (  # noqa: E731
        w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).swapaxes(1, 2)
    )
    if read is not None:
        gather: Callable[[Array, Array], Array] = lambda new, old: new.swapaxes(1, 2).reshape(old.shape)  # noqa: E731
        maps.readers.append(Reader(node, 1, read, groups, spread, gather, None))
        maps.parameter(node, 1, 0, read.channels)
    produced = produce(node, maps, spread(weights.values), read, bias_of(node, 2, out), False)
    if groups > 1:
        tie_groups(maps, produced.channels, groups)
    maps.parameter(node, 1, 1, produced.channels[:per_group])
    maps.parameter(node, 2, -1, produced.channels)
    maps.set(node.outputs[0], {1: produced})


def _depthwise_transpose(node: Node, maps: AxisMaps, read: Axis | None, groups: int, multiplier: int) -> None:
    """One input channel a group: the outputs go with their input, and `group` with their number."""
    if read is None or len(read) != groups:
        maps.freeze(node.inputs[0], label(node), "the input of the depthwise ConvTranspose can't be cut")
        return
    repeated = read.take(np.repeat(np.arange(groups), multiplier))
    weights = np.asarray(node.inputs[1].values, np.float64).reshape(groups * multiplier, -1)
    bias = bias_of(node, 2, groups * multiplier)
    dead = (repeated.zero | (weights == 0).all(axis=1)) & (bias == 0)
    maps.parameter(node, 1, 0, read.channels)
    maps.parameter(node, 2, -1, repeated.channels)
    maps.on_cut(lambda keep: node.attrs.update(group=int(keep(read.channels).sum())), read.channels)
    maps.set(node.outputs[0], {1: repeated.known(maps.signals.new(len(repeated)), np.where(dead, 0.0, 1.0))})


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


def _depthwise(node: Node, maps: AxisMaps, read: Axis | None, groups: int, multiplier: int) -> None:
    """One input channel a group: the outputs go with their input, and `group` with their number."""
    if read is None or len(read) != groups:
        # cutting outputs alone would leave groups that no longer match the input: the output is not tracked
        maps.freeze(node.inputs[0], label(node), "the input of the depthwise Conv can't be cut")
        return
    repeated = read.take(np.repeat(np.arange(groups), multiplier))
    weights = np.asarray(node.inputs[1].values, np.float64).reshape(groups * multiplier, -1)
    bias = bias_of(node, 2, groups * multiplier)
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    rows = np.concatenate([weights * repeated.scale[:, None], bias[:, None]], axis=1)
    rows[repeated.zero, :-1] = 0
    classes, scale = proportional_rows(rows, epsilon(node.inputs[1]))
    signal = maps.signals.classes(repeated.signal, classes)
    silent = (rows[:, :-1] == 0).all(axis=1)
    constant = silent | (repeated.constant & (not padded))
    value = bias + np.where(silent, 0, rows[:, :-1].sum(axis=1))
    result = repeated.known(np.where(constant, ONES, signal), np.where(constant, value, scale))
    _outputs_of_dense(node, maps, result, 0, 2)
    maps.on_cut(lambda keep: node.attrs.update(group=int(keep(read.channels).sum())), read.channels)
    maps.set(node.outputs[0], {1: unfused(node, maps, result)})


def _grouped_read(node: Node, maps: AxisMaps, read: Axis | None, groups: int) -> Axis | None:
    """All groups keep the same number of inputs: channels at the same place of each group go together."""
    if read is None or groups == 1:
        return read
    if len(read) % groups:
        maps.freeze_axis(read, label(node), "its channels don't divide into the groups")
        return None
    tie_groups(maps, read.channels, groups)
    return read


def _outputs_of_dense(node: Node, maps: AxisMaps, axis: Axis, weight_axis: int, bias_index: int) -> None:
    maps.parameter(node, 1, weight_axis, axis.channels)
    maps.parameter(node, bias_index, -1, axis.channels)
