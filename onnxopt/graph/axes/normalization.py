"""Rules of operators that normalise: along an axis whose statistics a cut would change, or channel by channel."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxopt.graph.axes.axis import Axis
from onnxopt.graph.axes.maps import AxisMaps, is_constant, register
from onnxopt.graph.edit import label
from onnxopt.model import Node


def only_over(node: Node, maps: AxisMaps, mixed: Iterable[int], why: str) -> None:
    """Freeze the axes of the first input that are mixed; along the others each position is treated alike."""
    result: dict[int, Axis] = {}
    gone = set(mixed)
    for axis, found in maps.of(node.inputs[0]).items():
        if axis in gone:
            maps.freeze_axis(found, label(node), f"{node.op} {why}")
        else:
            result[axis] = maps.arbitrary(found)
    maps.set(node.outputs[0], result)


@register("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node, maps: AxisMaps) -> None:
    """Normalises along one axis (before opset 13: over all axes from there on), which therefore stays."""
    rank = maps.rank(node.inputs[0])
    if not maps.of(node.inputs[0]):
        return
    modern = maps.model.opset >= 13
    if rank is None:
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown")
        return
    at = int(node.attrs.get("axis", -1 if modern else 1)) % rank
    only_over(node, maps, {at} if modern else range(at, rank), "normalises over it")


@register("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(node: Node, maps: AxisMaps) -> None:
    """Divides by statistics over all axes from one on: without some of their positions these would be others."""
    rank = maps.rank(node.inputs[0])
    if not maps.of(node.inputs[0]):
        return
    if rank is None or maps.second_output(node):
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown, or its statistics are read")
        return
    only_over(node, maps, range(int(node.attrs.get("axis", -1)) % rank, rank), "takes statistics over it")


@register("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(node: Node, maps: AxisMaps) -> None:
    """LayerNormalization of a sum, over the last axis."""
    for tensor in node.inputs:
        maps.freeze(tensor, label(node), f"{node.op} takes statistics over it")


@register("LpNormalization")
def lp_normalization(node: Node, maps: AxisMaps) -> None:
    """Divides by the norm along one axis."""
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown")
        return
    only_over(node, maps, {int(node.attrs.get("axis", -1)) % rank}, "takes statistics over it")


@register("LRN")
def local_response(node: Node, maps: AxisMaps) -> None:
    """Divides by what neighbouring channels hold."""
    only_over(node, maps, {1}, "takes statistics over neighbours along it")


@register("MeanVarianceNormalization")
def mean_variance(node: Node, maps: AxisMaps) -> None:
    """Statistics over the given axes."""
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown")
        return
    axes = {int(axis) % rank for axis in node.attrs.get("axes", [0, 2, 3])}
    only_over(node, maps, axes, "takes statistics over it")


@register("InstanceNormalization")
def instance_normalization(node: Node, maps: AxisMaps) -> None:
    """Normalises each channel by itself."""
    axes = maps.of(node.inputs[0])
    axis = axes.get(1)
    if axis is None or len(axes) > 1 or not all(is_constant(tensor) for tensor in node.inputs[1:3]):
        maps.freeze(node.inputs[0], label(node), "InstanceNormalization without constant parameters")
        return
    scale, shift = (np.asarray(tensor.values, np.float64) for tensor in node.inputs[1:3])
    for index in (1, 2):
        maps.parameter(node, index, 0, axis.channels)
    maps.set(node.outputs[0], {1: maps.arbitrary(axis, scale, shift)})


@register("GroupNormalization")
def group_normalization(node: Node, maps: AxisMaps) -> None:
    """Statistics per group: whole groups can go, the channels of one together."""
    axes = maps.of(node.inputs[0])
    axis, groups = axes.get(1), int(node.attrs["num_groups"])
    plain = all(is_constant(tensor) for tensor in node.inputs[1:3])
    if axis is None or len(axes) > 1 or not plain or len(axis) % groups:
        maps.freeze(node.inputs[0], label(node), "GroupNormalization takes statistics over it")
        return
    grid = axis.channels.reshape(groups, -1)
    for column in range(1, grid.shape[1]):
        maps.channels.tie(grid[:, 0], grid[:, column])
    for index in (1, 2):  # per group before opset 21, per channel since
        maps.parameter(node, index, 0, axis.channels if maps.model.opset >= 21 else grid[:, 0])
    maps.on_cut(lambda keep: node.attrs.update(num_groups=int(keep(grid[:, 0]).sum())), axis.channels)
    maps.set(node.outputs[0], {1: axis.known(maps.signals.new(len(axis)), np.ones(len(axis)))})
