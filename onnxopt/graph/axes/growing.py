"""Rules of operators that repeat positions or exchange them with space: Expand, Tile, DepthToSpace, SpaceToDepth."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, Ints
from onnxopt.graph.axes.maps import AxisMaps, is_constant, numbers, register
from onnxopt.graph.axes.targets import Entry, entries, follow
from onnxopt.graph.edit import label
from onnxopt.model import Node

# lengths beyond which nothing is repeated channel by channel
_LONGEST = 1 << 16


@register("ConstantOfShape")
def constant_of_shape(node: Node, maps: AxisMaps) -> None:
    """One value everywhere: axes of constant length can be cut with what they are joined to."""
    maps.freeze(node.inputs[0], label(node), "it is used as a shape")
    wanted = entries(node, 0)
    value = node.attrs.get("value")
    if wanted is None or (value is not None and np.asarray(value).dtype.kind != "f"):
        return
    fill = 0.0 if value is None else float(np.asarray(value).reshape(-1)[0])
    maps.set(node.outputs[0], _filled(node, maps, wanted, fill))


def _filled(node: Node, maps: AxisMaps, wanted: list[Entry], fill: float | None) -> dict[int, Axis]:
    """Axes of fresh channels for every constant length above 1; fill None: the same values at all positions."""
    result: dict[int, Axis] = {}
    for axis, entry in enumerate(wanted):
        if entry.value is None or not 1 < entry.value <= _LONGEST:
            continue
        count = entry.value
        channels = maps.channels.new(count)
        signal = np.full(count, ONES if fill is not None else maps.signals.new(1)[0])
        result[axis] = Axis(channels, signal, np.ones(count)).known(signal, np.full(count, 1 if fill is None else fill))
        follow(maps, node, entry, channels)
    return result


@register("Expand")
def expand(node: Node, maps: AxisMaps) -> None:
    """Axes that keep their length pass; those that come from one position hold equal ones."""
    data, target = node.inputs
    maps.freeze(target, label(node), "it is used as a shape")
    wanted, rank = entries(node, 1), maps.rank(data)
    floats = data.dtype is not None and np.dtype(data.dtype).kind == "f"
    if wanted is None or rank is None or not (floats or maps.of(data)):
        maps.freeze(data, label(node), "target of Expand is not known before the run")
        return
    extra = max(len(wanted) - rank, 0)
    wanted = [*[Entry(1)] * (rank + extra - len(wanted)), *wanted]
    own: dict[int, Axis] = dict(maps.of(data))
    if is_constant(data):
        own = {axis: maps.constant_axis(node, 0, axis) for axis, length in enumerate(data.shape) if length > 1}
    result: dict[int, Axis] = {}
    for axis, found in own.items():
        entry = wanted[axis + extra]
        if entry.value == 1 or entry.value == len(found):
            result[axis + extra] = maps.linear(found, True)
            if entry.value != 1:
                follow(maps, node, entry, found.channels)
        else:
            maps.freeze_axis(found, label(node), "its length is computed in the target of Expand")
    fill = float(np.asarray(data.values).reshape(-1)[0]) if is_constant(data) and data.data.size == 1 else None
    if is_constant(data):
        grown = [_repeated(entry, axis - extra, data) for axis, entry in enumerate(wanted)]
        result.update(_filled(node, maps, grown, fill))
    if len(result) > 1 and fill is None:
        result = {axis: maps.arbitrary(found, maps.signals.new(len(found))) for axis, found in result.items()}
    maps.set(node.outputs[0], result)


def _repeated(entry: Entry, own: int, data: Any) -> Entry:
    """The entry where the data has one position or no such axis, else one that asks for nothing."""
    return entry if own < 0 or data.shape[own] == 1 else Entry(1)


@register("Tile")
def tile(node: Node, maps: AxisMaps) -> None:
    """Positions one after the other, as often as asked; the repeats stay as they are."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    repeats = numbers(node.inputs, 1)
    if repeats is None or len(repeats) != maps.rank(node.inputs[0]):
        maps.freeze_node(node, "repeats of Tile are not constant")
        return
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        repeated = np.tile(np.arange(len(found)), repeats[axis]) if repeats[axis] * len(found) <= _LONGEST else None
        if repeated is None:
            maps.freeze_axis(found, label(node), "Tile makes more positions than are followed")
        else:
            result[axis] = maps.linear(found, True).take(repeated)
    maps.set(node.outputs[0], result)


@register("DepthToSpace")
def depth_to_space(node: Node, maps: AxisMaps) -> None:
    """Blocks of b b channels become one: DCR takes them apart C' channels from each other, CRD side by side."""
    read = _channel_axis(node, maps)
    if read is None:
        return
    block = int(node.attrs["blocksize"]) ** 2
    if len(read) % block:
        maps.freeze_axis(read, label(node), "its channels don't divide into blocks")
        return
    places: Ints = np.arange(len(read), dtype=np.int64).reshape(block, -1)
    if node.attrs.get("mode", "DCR") == "CRD":
        places = places.reshape(-1, block).T
    first = places[0]
    for other in places[1:]:
        maps.channels.tie(read.channels[first], read.channels[other])
    constant = (read.constant[places] & (read.scale[places] == read.scale[first])).all(axis=0)
    lead = maps.signals.classes(*(values[places].T for values in (read.signal, read.scale)))
    scale = np.where(constant, read.scale[first], 1.0)
    maps.set(node.outputs[0], {1: read.take(first).known(np.where(constant, ONES, lead), scale)})


@register("SpaceToDepth")
def space_to_depth(node: Node, maps: AxisMaps) -> None:
    """Each channel becomes b b, C channels apart from each other (DCR) or side by side (CRD), which go together."""
    read = _channel_axis(node, maps)
    if read is None:
        return
    block = int(node.attrs["blocksize"]) ** 2
    part, channel = np.indices((block, len(read)))
    if node.attrs.get("mode", "DCR") == "CRD":
        part, channel = part.T, channel.T
    maps.set(node.outputs[0], {1: maps.linear(read.take(channel.reshape(-1)), True, part.reshape(-1))})


def _channel_axis(node: Node, maps: AxisMaps) -> Axis | None:
    for axis, found in maps.of(node.inputs[0]).items():
        if axis > 1:
            maps.freeze_axis(found, label(node), f"{node.op} mixes it")
    if 0 in maps.of(node.inputs[0]):
        maps.freeze_axis(maps.of(node.inputs[0])[0], label(node), f"{node.op} is not followed along this axis")
    return maps.of(node.inputs[0]).get(1)
