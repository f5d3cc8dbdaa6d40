"""Rules of operators that work within each channel: pooling, resizing, per-channel and per-token reductions."""

from __future__ import annotations

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis
from onnxopt.graph.axes.maps import AxisMaps, is_constant, numbers, register
from onnxopt.graph.edit import label
from onnxopt.model import Node


@register("MaxPool", "GlobalMaxPool")
def max_pool(node: Node, maps: AxisMaps) -> None:
    """Keeps constants (padding is minus infinity) and positive factors."""
    axes = maps.of(node.inputs[0])
    if axes and maps.second_output(node):
        maps.freeze_node(node, f"the indices of {node.op} count over all channels")
        return
    maps.set(node.outputs[0], {axis: maps.positive(found) for axis, found in _only(axes, maps, node).items()})


@register("AveragePool", "GlobalAveragePool", "LpPool", "GlobalLpPool")
def average_pool(node: Node, maps: AxisMaps) -> None:
    """Linear; a constant stays one unless zeros of the padding are averaged in."""
    axes = _only(maps.of(node.inputs[0]), maps, node)
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if "Lp" in node.op:
        maps.set(node.outputs[0], {axis: maps.arbitrary(found) for axis, found in axes.items()})
        return
    keeps = not (padded and node.attrs.get("count_include_pad", 0)) and not node.attrs.get("ceil_mode", 0)
    maps.set(node.outputs[0], {axis: maps.linear(found, keeps) for axis, found in axes.items()})


def _only(axes: dict[int, Axis], maps: AxisMaps, node: Node) -> dict[int, Axis]:
    """Batch and channel axes pass; a tracked spatial axis is mixed by the window."""
    for axis, found in axes.items():
        if axis > 1:
            maps.freeze_axis(found, label(node), f"{node.op} mixes it")
    return {axis: found for axis, found in axes.items() if axis <= 1}


@register("Resize", "Upsample")
def resize(node: Node, maps: AxisMaps) -> None:
    """Interpolates along axes with a scale other than 1; target sizes of cut axes follow."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    scales = _scales(node, maps)
    data = node.inputs[0]
    if scales is None or len(scales) != len(data.shape or []) or "axes" in node.attrs:
        maps.freeze_node(node, f"scales of {node.op} are not known before the run")
        return
    result: dict[int, Axis] = {}
    plain = node.attrs.get("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    for axis, found in axes.items():
        if scales[axis] != 1:
            maps.freeze_axis(found, label(node), f"{node.op} interpolates along it")
        else:
            # outside the region that mode fills in a value of its own, which a zero channel takes too
            result[axis] = maps.linear(found, True) if plain else maps.arbitrary(found)
    maps.set(node.outputs[0], result)


def _scales(node: Node, maps: AxisMaps) -> list[float] | None:
    """Constant scales per axis. Target sizes are not followed: they would have to be rewritten with the cut."""
    if "scales" in node.attrs:
        return [float(value) for value in node.attrs["scales"]]
    index = 1 if node.op == "Upsample" or maps.model.opset < 11 else 2
    if index >= len(node.inputs) or not is_constant(node.inputs[index]) or not node.inputs[index].data.size:
        return None
    return [float(value) for value in node.inputs[index].values.reshape(-1)]


@register("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd")
def reduce(node: Node, maps: AxisMaps) -> None:
    """Over other axes each channel is reduced by itself; over the tracked axis the channels are mixed."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    given = node.attrs.get("axes") if "axes" in node.attrs else numbers(node.inputs, 1)
    if rank is None or (given is None and len(node.inputs) > 1 and not node.inputs[1].is_empty()):
        maps.freeze_node(node, f"axes of {node.op} are not known before the run")
        return
    everything = not node.attrs.get("noop_with_empty_axes", 0)
    reduced = {int(axis) % rank for axis in given} if given else set(range(rank)) if everything else set()
    keepdims = bool(node.attrs.get("keepdims", 1))
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        if axis in reduced:
            maps.freeze_axis(found, label(node), f"{node.op} mixes it")
            continue
        place = axis if keepdims else axis - sum(other < axis for other in reduced)
        result[place] = maps.linear(found, True) if node.op == "ReduceMean" else maps.arbitrary(found)
        if node.op == "ReduceSum":
            result[place] = maps.linear(found, False)
    maps.set(node.outputs[0], result)


@register("Softmax", "LogSoftmax")
def softmax(node: Node, maps: AxisMaps) -> None:
    """Normalises along one axis (before opset 13: over all axes from there on), which therefore stays."""
    axes = maps.of(node.inputs[0])
    rank = maps.rank(node.inputs[0])
    if not axes:
        return
    modern = maps.model.opset >= 13
    if rank is None:
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown")
        return
    at = int(node.attrs.get("axis", -1 if modern else 1)) % rank
    mixed = {at} if modern else set(range(at, rank))
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        if axis in mixed:
            maps.freeze_axis(found, label(node), f"{node.op} normalises over it")
        else:
            result[axis] = maps.arbitrary(found)
    maps.set(node.outputs[0], result)


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


@register("If")
def if_(node: Node, maps: AxisMaps) -> None:
    """Both branches are walked; an output can be cut where both branches' can, together."""
    maps.freeze(node.inputs[0], label(node), "it is a condition")
    bodies = list(node.graphs())
    for body in bodies:
        maps.visit(body)
    for place, output in enumerate(node.outputs):
        branches = [maps.of(body.outputs[place]) for body in bodies]
        common = set.intersection(*(set(axes) for axes in branches)) if branches else set()
        result: dict[int, Axis] = {}
        for axis in common:
            first = branches[0][axis]
            if any(len(axes[axis]) != len(first) for axes in branches):
                continue
            for axes in branches[1:]:
                maps.channels.tie(first.channels, axes[axis].channels)
            same = np.logical_and.reduce([axes[axis].constant & (axes[axis].scale == first.scale) for axes in branches])
            signal = np.where(same, ONES, maps.signals.new(len(first)))
            result[axis] = first.known(signal, np.where(same, first.scale, 1.0))
        for axes in branches:
            for number, found in axes.items():
                if number not in result:
                    maps.freeze_axis(found, label(node), "it leaves only one branch of If")
        maps.set(output, result)


@register("Loop", "Scan")
def loop(node: Node, maps: AxisMaps) -> None:
    """What enters, is carried or leaves stays; what is read from outside within the body is followed."""
    maps.freeze_node(node, f"it is carried by {node.op}")
