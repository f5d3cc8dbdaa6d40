"""Rules of Reshape and Flatten: one axis becomes several, several become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis
from onnxopt.graph.axes.maps import AxisMaps, Keep, is_constant, register
from onnxopt.graph.edit import label
from onnxopt.model import Constant, Node

# positions of one segment beyond which following them is not worth the memory
_LARGEST = 1 << 22


@dataclass(frozen=True)
class Segment:
    """Input axes and output axes that cover the same positions in the same order."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@register("Flatten")
def flatten(node: Node, maps: AxisMaps) -> None:
    """[a, b, c, d] -> [a, b c d]."""
    data = node.inputs[0]
    if not maps.of(data):
        return
    rank = maps.rank(data)
    if rank is None:
        maps.freeze_node(node, "rank of the input of Flatten is unknown")
        return
    at = int(node.attrs.get("axis", 1))
    at = at + rank if at < 0 else at
    _follow(node, maps, [Segment(tuple(range(at)), (0,)), Segment(tuple(range(at, rank)), (1,))])


@register("Reshape")
def reshape(node: Node, maps: AxisMaps) -> None:
    """Axes are matched by their lengths from both ends; the target shape follows the cut."""
    data, target = node.inputs
    maps.freeze(target, label(node), "it is used as a shape")
    if not maps.of(data):
        return
    entries = _entries(node)
    out_shape = node.outputs[0].shape
    if entries is None or data.shape is None or out_shape is None or len(entries) != len(out_shape):
        maps.freeze_node(node, "target of Reshape is not known before the run")
        return
    before = list(data.shape)
    after = [_target_length(entry, at, node, out_shape[at]) for at, entry in enumerate(entries)]
    segments = _align(before, after)
    if segments is None:
        maps.freeze_node(node, "its axes and the target's can't be matched")
        return
    for axis, entry in enumerate(entries):
        copies = entry.value == 0 and not node.attrs.get("allowzero", 0) and axis in maps.of(data)
        if copies and Segment((axis,), (axis,)) not in segments:
            maps.freeze_axis(maps.of(data)[axis], label(node), "its length is copied to another axis")
    result = _follow(node, maps, segments)
    for axis, found in result.items():
        maps.on_cut(lambda keep, axis=axis, found=found: _retarget(entries, axis, found, keep))  # type: ignore[misc]


@dataclass
class _Entry:
    """One dim of a target shape: where it stands in which constant input of which node; value None when computed."""

    value: int | None
    node: Node | None = None
    index: int = 0
    place: int = 0


def _entries(node: Node) -> list[_Entry] | None:
    """The dims of a target shape that is a constant or a Concat of constants and computed dims."""
    target = node.inputs[1]
    if is_constant(target):
        return [_Entry(int(v), node, 1, place) for place, v in enumerate(target.values.reshape(-1))]
    if len(target.inputs) != 1 or target.inputs[0].op != "Concat" or len(target.outputs) != 1:
        return None
    entries: list[_Entry] = []
    concat = target.inputs[0]
    for index, part in enumerate(concat.inputs):
        if is_constant(part):
            entries += [_Entry(int(v), concat, index, place) for place, v in enumerate(part.values.reshape(-1))]
        elif part.shape is not None and list(part.shape) == [1]:
            entries.append(_Entry(None))
        else:
            return None
    return entries


def _target_length(entry: _Entry, at: int, node: Node, inferred: Any) -> Any:
    if entry.value is not None and entry.value > 0:
        return entry.value
    if entry.value == 0 and not node.attrs.get("allowzero", 0):
        shape = node.inputs[0].shape
        return shape[at] if at < len(shape) else inferred
    return inferred


def _align(before: list[Any], after: list[Any]) -> list[Segment] | None:
    """Split both shapes into segments of equal size, from both ends; None when what remains can't be matched."""
    left: list[Segment] = []
    low_b = low_a = 0
    high_b, high_a = len(before), len(after)
    while low_b < high_b and low_a < high_a and _same(before[low_b], after[low_a]):
        left.append(Segment((low_b,), (low_a,)))
        low_b, low_a = low_b + 1, low_a + 1
    right: list[Segment] = []
    while low_b < high_b and low_a < high_a:
        found = _last_segment(before[low_b:high_b], after[low_a:high_a])
        if found is None:
            break
        count_b, count_a = found
        right.append(Segment(tuple(range(high_b - count_b, high_b)), tuple(range(high_a - count_a, high_a))))
        high_b, high_a = high_b - count_b, high_a - count_a
    rest_b, rest_a = before[low_b:high_b], after[low_a:high_a]
    middle = [Segment(tuple(range(low_b, high_b)), tuple(range(low_a, high_a)))] if rest_b or rest_a else []
    if middle and not _determined(rest_b, rest_a):
        return None
    return [*left, *middle, *reversed(right)]


def _determined(before: list[Any], after: list[Any]) -> bool:
    """Whether the positions of these axes correspond although not all lengths are known.

    Either one axis (besides ones) stands on each side, which then have equal length, or all is known but one target.
    """
    long_b, long_a = [dim for dim in before if dim != 1], [dim for dim in after if dim != 1]
    if len(long_b) <= 1 and len(long_a) <= 1:
        return True
    return all(isinstance(dim, int) for dim in before) and sum(not isinstance(dim, int) for dim in after) <= 1


def _same(one: Any, other: Any) -> bool:
    return one is not None and one == other


def _last_segment(before: list[Any], after: list[Any]) -> tuple[int, int] | None:
    """The fewest trailing axes of both shapes with equal products of known lengths."""
    size_b = size_a = 1
    count_b = count_a = 0
    while True:
        if count_b and count_a and size_b == size_a:
            return count_b, count_a
        take_before = count_b == 0 or (count_a > 0 and size_b < size_a)
        dims, count = (before, count_b) if take_before else (after, count_a)
        if count >= len(dims) or not isinstance(dims[-1 - count], int):
            return None
        if take_before:
            size_b, count_b = size_b * dims[-1 - count], count_b + 1
        else:
            size_a, count_a = size_a * dims[-1 - count], count_a + 1


def _retarget(entries: list[_Entry], axis: int, found: Axis, keep: Keep) -> None:
    """Write the new length of output axis `axis` into the target; -1 and computed dims follow by themselves."""
    entry = entries[axis]
    if entry.value is None or entry.value < 0 or entry.node is None:
        return
    old = entry.node.inputs[entry.index]
    values = np.array(old.values)
    values.reshape(-1)[entry.place] = int(keep(found.channels).sum())
    entry.node.inputs[entry.index] = Constant(old.name, values)


def _follow(node: Node, maps: AxisMaps, segments: list[Segment]) -> dict[int, Axis]:
    """Track every segment through; returns the output's axes."""
    data = node.inputs[0]
    result: dict[int, Axis] = {}
    for segment in segments:
        tracked = [number for number in segment.before if number in maps.of(data)]
        if not tracked:
            continue
        lengths = [len(maps.of(data)[number]) if number in tracked else data.shape[number] for number in segment.before]
        known = all(isinstance(length, int) for length in lengths)
        reason = None
        if len(tracked) > 1:
            reason = f"{node.op} joins two axes that can both be cut"
        elif not segment.after:
            reason = f"{node.op} drops it"
        elif len(segment.before) > 1 and not known:
            reason = f"{node.op} joins it with an axis of unknown length"
        elif known and np.prod(lengths, dtype=np.int64) > _LARGEST:
            reason = f"{node.op} makes more positions than are followed"
        if reason is not None:
            for number in tracked:
                maps.freeze_axis(maps.of(data)[number], label(node), reason)
            continue
        axis = maps.of(data)[tracked[0]]
        if len(segment.before) == 1 and len(segment.after) == 1:
            result[segment.after[0]] = maps.linear(axis, True)
            continue
        out_lengths = _out_lengths(node, segment, int(np.prod(lengths, dtype=np.int64)))
        if out_lengths is None:
            maps.freeze_axis(axis, label(node), f"{node.op} splits it into lengths that are not known")
            continue
        place, found = _through(maps, axis, segment.before.index(tracked[0]), lengths, out_lengths)
        result[segment.after[place]] = found
    maps.set(node.outputs[0], result)
    return result


def _out_lengths(node: Node, segment: Segment, size: int) -> list[int] | None:
    if len(segment.after) == 1:
        return [size]
    entries = _entries(node) or []
    shape = node.outputs[0].shape
    lengths = [_target_length(entries[axis], axis, node, shape[axis]) for axis in segment.after]
    unknown = [place for place, length in enumerate(lengths) if not isinstance(length, int)]
    if len(unknown) == 1:
        rest = int(np.prod([length for length in lengths if isinstance(length, int)], dtype=np.int64))
        lengths[unknown[0]] = size // rest if rest else 0
    elif unknown:
        return None
    return lengths if int(np.prod(lengths, dtype=np.int64)) == size else None


def _through(maps: AxisMaps, axis: Axis, place: int, before: list[int], after: list[int]) -> tuple[int, Axis]:
    """(which output axis of the segment can be cut, its state).

    Each flat position knows its channel and its coordinates on the other input axes. The output axis chosen is the one
    whose slices hold the fewest different channels; the channels of one slice are tied: they can only go together.
    """
    grid = np.indices(before).reshape(len(before), -1)
    position = grid[place]
    others = np.ravel_multi_index(
        tuple(np.delete(grid, place, axis=0)) if len(before) > 1 else (np.zeros_like(position),),
        tuple(np.delete(np.array(before), place)) if len(before) > 1 else (1,),
    )
    roots = maps.channels.roots(axis.channels)[position].reshape(after)
    best, slices = 0, np.zeros((0, 0), np.int64)
    fewest: int | None = None
    for candidate in range(len(after)):
        if after[candidate] == 1 and int(np.prod(after)) > 1:
            continue
        rows = np.moveaxis(roots, candidate, 0).reshape(after[candidate], -1)
        different = max((len(np.unique(row)) for row in rows), default=0)
        if fewest is None or different < fewest:
            fewest, best, slices = different, candidate, rows
    first = slices[:, 0]
    for column in range(1, slices.shape[1]):
        maps.channels.tie(first, slices[:, column])
    flat = [np.moveaxis(values.reshape(after), best, 0).reshape(after[best], -1) for values in (position, others)]
    signal, scale = axis.signal[flat[0]], axis.scale[flat[0]]
    inner = np.where(signal == ONES, 0, flat[1])
    lead = scale[np.arange(len(scale)), np.argmax(np.abs(scale), axis=1)]
    relative = (scale / np.where(lead == 0, 1, lead)[:, None]).astype(np.float32)
    same = ((signal == ONES) & (scale == scale[:, :1])).all(axis=1)
    classes = maps.signals.classes(signal, inner, relative)
    return best, Axis(first, np.where(same, ONES, classes), lead).known(np.where(same, ONES, classes), lead)
