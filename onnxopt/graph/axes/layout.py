"""Rules of operators that move positions about without computing: joining, cutting, permuting."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, Ints, concatenate
from onnxopt.graph.axes.maps import AxisMaps, Keep, is_constant, numbers, register
from onnxopt.graph.axes.targets import measured_axes, picked
from onnxopt.graph.edit import is_output, label
from onnxopt.model import Constant, Node, Variable


@register("Concat")
def concat(node: Node, maps: AxisMaps) -> None:
    """One axis after the other; an input that can't be cut contributes positions that stay."""
    if not maps.tracks(node):
        return
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, "rank of the inputs of Concat is unknown")
        return
    along = int(node.attrs["axis"]) % rank
    result: dict[int, Axis] = {}
    for axis in range(rank):
        if axis != along:
            across = _across(node, maps, axis)
            if across is not None:
                result[axis] = across
    if any(along in maps.of(tensor) for tensor in node.inputs):
        parts = [_part(node, maps, index, along) for index in range(len(node.inputs))]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            result[along] = concatenate(known)
        else:
            for part in known:
                maps.freeze_axis(part, label(node), "Concat joins it with a tensor of unknown length")
    maps.set(node.outputs[0], result)


def _part(node: Node, maps: AxisMaps, index: int, along: int) -> Axis | None:
    tensor = node.inputs[index]
    if along in maps.of(tensor):
        return maps.of(tensor)[along]
    if is_constant(tensor):
        return maps.constant_axis(node, index, along)
    length = None if tensor.shape is None else tensor.shape[along]
    if not isinstance(length, int):
        return None
    solid = Axis(maps.channels.new(length), maps.signals.new(length), np.ones(length))
    maps.freeze_axis(solid, label(node), "Concat joins it with a tensor that can't be cut")
    return solid


def _across(node: Node, maps: AxisMaps, axis: int) -> Axis | None:
    """An axis that all inputs share: they are tied, and equal only where all are."""
    found = [maps.of(tensor).get(axis) for tensor in node.inputs]
    tracked = [one for one in found if one is not None]
    if not tracked:
        return None
    first = tracked[0]
    for index, (tensor, one) in enumerate(zip(node.inputs, found, strict=True)):
        if one is not None and len(one) == len(first):
            maps.channels.tie(first.channels, one.channels)
        elif is_constant(tensor) and tensor.shape[axis] == len(first):
            maps.parameter(node, index, axis, first.channels)
        else:
            for each in tracked:
                maps.freeze_axis(each, label(node), "Concat joins it with a tensor that can't be cut")
            return None
    return first.known(maps.signals.new(len(first)), np.ones(len(first)))


@register("Split")
def split(node: Node, maps: AxisMaps) -> None:
    """Pieces of one axis; the sizes are written out after a cut."""
    data = node.inputs[0]
    if not maps.of(data):
        return
    rank = maps.rank(data)
    if rank is None:
        maps.freeze_node(node, "rank of the input of Split is unknown")
        return
    along = int(node.attrs.get("axis", 0)) % rank
    others = {axis: found for axis, found in maps.of(data).items() if axis != along}
    if along not in maps.of(data):
        for tensor in node.outputs:
            maps.set(tensor, {axis: maps.linear(found, True) for axis, found in others.items()})
        return
    read = maps.of(data)[along]
    sizes = _split_sizes(node, len(read))
    if sizes is None or sum(sizes) != len(read):
        maps.freeze_node(node, "sizes of Split are not constant")
        return
    bounds = np.cumsum([0, *sizes])
    pieces = [read.take(slice(a, b)) for a, b in itertools.pairwise(bounds)]
    for tensor, piece in zip(node.outputs, pieces, strict=True):
        maps.set(tensor, {**{axis: maps.linear(found, True) for axis, found in others.items()}, along: piece})

    def rewrite(keep: Keep) -> None:
        _set_numbers(node, maps, "split", 1, [int(keep(piece.channels).sum()) for piece in pieces], 13)
        node.attrs.pop("num_outputs", None)

    maps.on_cut(rewrite, read.channels)


def _split_sizes(node: Node, length: int) -> list[int] | None:
    if "split" in node.attrs:
        return [int(size) for size in node.attrs["split"]]
    if len(node.inputs) > 1 and not node.inputs[1].is_empty():
        return numbers(node.inputs, 1)
    count = len(node.outputs)
    chunk = -(-length // count)
    return [chunk] * (count - 1) + [length - chunk * (count - 1)]


def _set_numbers(node: Node, maps: AxisMaps, name: str, index: int, values: list[int], since: int) -> None:
    """Write integers where this opset keeps them: in an attribute before version `since`, else in an input."""
    if maps.model.opset < since:
        node.attrs[name] = values
        return
    while len(node.inputs) <= index:
        node.inputs.append(Variable.empty())
    old = node.inputs[index]
    base = old.name if old.name else f"{label(node)}_{name}"
    dtype = old.dtype if is_constant(old) else np.dtype(np.int64)
    node.inputs[index] = Constant(base, np.array(values, dtype))


@register("Slice")
def slice_(node: Node, maps: AxisMaps) -> None:
    """A range of an axis; start and end follow the cut."""
    data = node.inputs[0]
    if not maps.of(data):
        return
    modern = len(node.inputs) > 1
    starts = numbers(node.inputs, 1) if modern else [int(v) for v in node.attrs["starts"]]
    ends = numbers(node.inputs, 2) if modern else [int(v) for v in node.attrs["ends"]]
    rank = maps.rank(data)
    if starts is None or ends is None or rank is None:
        maps.freeze_node(node, "range of Slice is not constant")
        return
    axes = (numbers(node.inputs, 3) if modern else node.attrs.get("axes")) or list(range(len(starts)))
    steps = (numbers(node.inputs, 4) if modern else None) or [1] * len(starts)
    axes = [int(axis) % rank for axis in axes]
    result = {axis: maps.linear(found, True) if axes else found for axis, found in maps.of(data).items()}
    for place, axis in enumerate(axes):
        read = maps.of(data).get(axis)
        if read is None:
            continue
        if steps[place] != 1:
            result.pop(axis)
            if len(axes) > 1 or not modern:
                maps.freeze_axis(read, label(node), "Slice with a step and other axes is not followed")
                continue
            maps.settle(read)
            picked = np.arange(len(read))[slice(starts[place], ends[place], steps[place])]
            result[axis] = read.take(picked)
            _follow_steps(node, maps, read, axis, picked)
            continue
        maps.settle(read)
        begin, stop, _ = slice(starts[place], ends[place]).indices(len(read))
        result[axis] = (read if len(axes) == 1 else result[axis]).take(slice(begin, max(begin, stop)))
        _follow_range(node, maps, read, place, begin, max(begin, stop), modern)
    maps.set(node.outputs[0], result)


def _follow_range(node: Node, maps: AxisMaps, read: Axis, place: int, begin: int, stop: int, modern: bool) -> None:
    def rewrite(keep: Keep) -> None:
        kept = keep(read.channels)
        bounds = {"starts": int(kept[:begin].sum()), "ends": int(kept[:stop].sum())}
        for index, (name, value) in enumerate(bounds.items(), start=1):
            old = numbers(node.inputs, index) if modern else [int(v) for v in node.attrs[name]]
            assert old is not None
            values = [value if at == place else each for at, each in enumerate(old)]
            _set_numbers(node, maps, name, index, values, 10)

    maps.on_cut(rewrite, read.channels)


def _follow_steps(node: Node, maps: AxisMaps, read: Axis, axis: int, picked: Ints) -> None:
    """What stays of every second position is no range any more: a Gather picks it."""

    def rewrite(keep: Keep) -> None:
        indices = Constant(f"{label(node)}_indices", picked)
        node.op, node.inputs = "Gather", [node.inputs[0], indices]
        node.attrs.clear()
        node.attrs["axis"] = axis
        _renumber(node, read, picked, keep)

    maps.on_cut(rewrite, read.channels)


@register("Transpose")
def transpose(node: Node, maps: AxisMaps) -> None:
    """The same axes in another order."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    perm = node.attrs.get("perm")
    if perm is None and rank is None:
        maps.freeze_node(node, "rank of the input of Transpose is unknown")
        return
    order = [int(axis) for axis in perm] if perm is not None else list(range(rank or 0))[::-1]
    maps.set(node.outputs[0], {order.index(axis): maps.linear(found, True) for axis, found in axes.items()})


@register("Squeeze", "Unsqueeze")
def squeeze(node: Node, maps: AxisMaps) -> None:
    """Axes of length 1 go or come; the others are renumbered."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    given = node.attrs.get("axes") if "axes" in node.attrs else numbers(node.inputs, 1)
    if rank is None or (given is None and len(node.inputs) > 1):
        maps.freeze_node(node, f"axes of {node.op} are unknown")
        return
    if node.op == "Unsqueeze":
        inserted = {int(axis) % (rank + len(given or [])) for axis in given or []}
        places = [axis for axis in range(rank + len(inserted)) if axis not in inserted]
        maps.set(node.outputs[0], {places[axis]: maps.linear(found, True) for axis, found in axes.items()})
        return
    shape = node.inputs[0].shape
    if given is None and any(not isinstance(dim, int) for dim in shape):
        maps.freeze_node(node, "Squeeze without axes of a shape that is not known")
        return
    gone = {int(axis) % rank for axis in given} if given is not None else {a for a, d in enumerate(shape) if d == 1}
    if any(axis in gone for axis in axes):
        maps.freeze_node(node, "Squeeze removes it")
        return
    places = [axis for axis in range(rank) if axis not in gone]
    maps.set(node.outputs[0], {places.index(axis): maps.linear(found, True) for axis, found in axes.items()})
    if given is None:
        # written out, or an axis cut to length 1 would be squeezed too
        maps.on_cut(lambda _keep: _set_numbers(node, maps, "axes", 1, sorted(gone), 13))


@register("Gather")
def gather(node: Node, maps: AxisMaps) -> None:
    """Constant indices pick positions and are renumbered; a constant table looked up by row keeps its columns free."""
    data, indices = node.inputs
    along = int(node.attrs.get("axis", 0))
    if is_constant(data) and not is_constant(indices) and len(data.shape) == 2 and along % 2 == 0:
        rank = maps.rank(indices)
        maps.freeze(indices, label(node), "Gather looks up by it")
        if rank is not None:
            columns = np.asarray(data.values, np.float64).T if data.dtype.kind == "f" else None
            if columns is not None:
                maps.set(node.outputs[0], {rank: _columns(node, maps, columns)})
        return
    maps.freeze(indices, label(node), "Gather looks up by it")
    axes = maps.of(data)
    if not axes:
        return
    rank, picked = maps.rank(data), numbers(node.inputs, 1)
    if rank is None or indices.shape is None:
        maps.freeze(data, label(node), "rank of an input of Gather is unknown")
        return
    along %= rank
    extra = len(indices.shape) - 1
    result = {(a if a < along else a + extra): maps.linear(found, True) for a, found in axes.items() if a != along}
    read = axes.get(along)
    if read is not None and picked is None:
        maps.freeze_axis(read, label(node), "indices of Gather are not constant")
    elif read is not None and extra > 0:
        maps.freeze_axis(read, label(node), "Gather with indices of this rank is not followed")
    elif read is not None and extra == 0:
        assert picked is not None
        index = np.array(picked, np.int64) % len(read)
        maps.settle(read)
        result[along] = read.take(index)
        maps.on_cut(lambda keep: _renumber(node, read, index, keep), read.channels)
    elif read is not None:
        maps.freeze_axis(read, label(node), "Gather picks one of it")
    maps.set(node.outputs[0], result)


def _columns(node: Node, maps: AxisMaps, columns: np.ndarray) -> Axis:
    uniform = (columns == columns[:, :1]).all(axis=1)
    signal = np.where(uniform, ONES, maps.signals.classes(columns))
    produced = maps.produce(node, signal, np.where(uniform, columns[:, 0], 1.0))
    maps.parameter(node, 0, 1, produced.channels)
    return produced


def _renumber(node: Node, read: Axis, index: np.ndarray, keep: Keep) -> None:
    kept = keep(read.channels)
    places = np.cumsum(kept) - 1
    old = node.inputs[1]
    node.inputs[1] = Constant(old.name, places[index[kept[index]]].astype(old.dtype))


@register("Shape", "Size")
def shape_of(node: Node, maps: AxisMaps) -> None:
    """Harmless where only lengths of other axes are read; else the arithmetic on it may mean anything."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    if node.op == "Size" or rank is None:
        maps.freeze_node(node, f"its length is used through {node.op}")
        return
    lengths = [axes.get(axis) for axis in measured_axes(node, rank)]
    _trace_lengths(node, maps, node.outputs[0], lengths)
    for read in axes.values():
        maps.settle(read)


def _trace_lengths(origin: Node, maps: AxisMaps, vector: Any, lengths: list[Axis | None]) -> None:
    """Freeze the axes whose lengths, entries of `vector`, are used for more than as they are in target shapes."""
    used = [axis for axis in lengths if axis is not None]
    if not used:
        return
    if is_output(vector, maps.model):
        for axis in used:
            maps.freeze_axis(axis, label(origin), "its length is an output")
    for consumer in vector.outputs:
        if _is_target(consumer, vector):
            continue
        if consumer.op == "Concat" and _only_targets(consumer.outputs[0], maps):
            continue
        rest = picked(consumer, lengths) if consumer.inputs[0] is vector else None
        if rest is not None:
            _trace_lengths(origin, maps, consumer.outputs[0], rest)
            continue
        for axis in used:
            maps.freeze_axis(axis, label(origin), f"its length is used by {consumer.op}")


def _is_target(node: Node, vector: Any) -> bool:
    """Whether the vector is the target of a Reshape, whose rule ties what comes out with what was measured."""
    return node.op == "Reshape" and node.inputs[1] is vector and node.inputs[0] is not vector


def _only_targets(vector: Any, maps: AxisMaps) -> bool:
    """Whether all readers use the vector as a target, directly or through nodes that pass it on."""
    return not is_output(vector, maps.model) and all(
        _is_target(consumer, vector)
        or (consumer.op in ("Cast", "Identity") and _only_targets(consumer.outputs[0], maps))
        for consumer in vector.outputs
    )


@register("Pad")
def pad(node: Node, maps: AxisMaps) -> None:
    """Pads other axes; a constant stays constant where it is padded with itself."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    pads = [int(v) for v in node.attrs["pads"]] if "pads" in node.attrs else numbers(node.inputs, 1)
    named = list(range(rank)) if rank is not None else []
    if rank is not None and len(node.inputs) > 3 and not node.inputs[3].is_empty():
        named = [axis % rank for axis in numbers(node.inputs, 3) or []]
    if pads is None or rank is None or not named or len(pads) != 2 * len(named):
        maps.freeze_node(node, "amounts of Pad are not constant")
        return
    padded = {axis for at, axis in enumerate(named) if pads[at] or pads[at + len(named)]}
    zero_filled = node.attrs.get("mode", "constant") == "constant"
    value = _fill_value(node)
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        if axis in padded:
            maps.freeze_axis(found, label(node), "Pad lengthens it")
        elif not zero_filled or not any(pads):
            result[axis] = maps.linear(found, True)
        elif value == 0:
            result[axis] = maps.linear(found, False)
        else:
            result[axis] = maps.arbitrary(found)
    maps.set(node.outputs[0], result)


def _fill_value(node: Node) -> float | None:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        fill = node.inputs[2]
        return float(fill.values.reshape(-1)[0]) if is_constant(fill) and fill.data.size else None
    return float(node.attrs.get("value", 0.0))
