"""Rules of Reshape and Flatten: one axis becomes several, several become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis, Ints
from onnxopt.graph.axes.maps import AxisMaps, is_constant, numbers, register
from onnxopt.graph.axes.targets import Entry, entries, follow, tie_measured
from onnxopt.graph.edit import label
from onnxopt.model import Node

# positions of one segment beyond which following them is not worth the memory
_LARGEST = 1 << 22


@dataclass(frozen=True)
class Segment:
    """Input axes and output axes that cover the same positions in the same order.

    matched: False where it is not known how they correspond.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    matched: bool = True


@dataclass(frozen=True)
class _Target:
    """The output axes of a segment and their lengths; `first`: only the first is known to be that long."""

    axes: tuple[int, ...]
    lengths: list[int]
    first: bool = False


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
    if maps.of(data):
        _reshape(node, maps, data)
    tie_measured(node, maps, 1)


def _reshape(node: Node, maps: AxisMaps, data: Any) -> None:
    wanted = entries(node, 1)
    out_shape = node.outputs[0].shape
    if wanted is None or data.shape is None or out_shape is None or len(wanted) != len(out_shape):
        maps.freeze_node(node, "target of Reshape is not known before the run")
        return
    # lengths that are not known have names of their own, so that those measured at the data are found again
    before = [f"?{at}" if length is None else length for at, length in enumerate(data.shape)]
    after = [_target_length(entry, at, node, out_shape[at], before) for at, entry in enumerate(wanted)]
    segments = _align(before, after)
    for axis, entry in enumerate(wanted):
        copies = entry.value == 0 and not node.attrs.get("allowzero", 0) and axis in maps.of(data)
        if copies and Segment((axis,), (axis,)) not in segments:
            maps.freeze_axis(maps.of(data)[axis], label(node), "its length is copied to another axis")
    result = _follow(node, maps, segments)
    for axis, found in result.items():
        follow(maps, node, wanted[axis], found.channels)


def _target_length(entry: Entry, at: int, node: Node, inferred: Any, before: list[Any] | None = None) -> Any:
    shape = list(node.inputs[0].shape) if before is None else before
    if entry.value is not None and entry.value > 0:
        return entry.value
    if entry.value == 0 and not node.attrs.get("allowzero", 0):
        return shape[at] if at < len(shape) else inferred
    if entry.source is not None and entry.source[0] is node.inputs[0]:
        return shape[entry.source[1]]
    return inferred


def _align(before: list[Any], after: list[Any]) -> list[Segment]:
    """Split both shapes into segments of equal size, from both ends; what remains may be left unmatched."""
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
    inner = Segment(tuple(range(low_b, high_b)), tuple(range(low_a, high_a)), _determined(rest_b, rest_a))
    return [*left, *([inner] if rest_b or rest_a else []), *reversed(right)]


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


def _follow(node: Node, maps: AxisMaps, segments: list[Segment]) -> dict[int, Axis]:
    """Track every segment through; returns the output's axes."""
    data = node.inputs[0]
    result: dict[int, Axis] = {}
    for segment in segments:
        tracked = [number for number in segment.before if number in maps.of(data)]
        if not tracked:
            continue
        axis = maps.of(data)[tracked[0]]
        if len(segment.before) == 1 and len(segment.after) == 1 and segment.matched:
            result[segment.after[0]] = maps.linear(axis, True)
            continue
        lengths = [len(maps.of(data)[number]) if number in tracked else data.shape[number] for number in segment.before]
        known = all(isinstance(length, int) for length in lengths) and segment.matched
        out_lengths = _out_lengths(node, segment, int(np.prod(lengths, dtype=np.int64))) if known else None
        pair = None
        if out_lengths is None and tracked == [segment.before[0]] and segment.after:
            pair = _leading(node, segment, len(axis))
            lengths, out_lengths = pair or (lengths, None)
        reason = _obstacle(node, segment, len(tracked), lengths, out_lengths)
        if reason is not None or out_lengths is None:
            for number in tracked:
                maps.freeze_axis(maps.of(data)[number], label(node), str(reason))
            continue
        target = _Target(segment.after, out_lengths, pair is not None)
        place, found = _through(maps, node, axis, segment.before.index(tracked[0]), lengths, target)
        result[segment.after[place]] = found
    maps.set(node.outputs[0], result)
    return result


def _obstacle(
    node: Node, segment: Segment, tracked: int, lengths: list[Any], out_lengths: list[int] | None
) -> str | None:
    """Why a segment can't be followed."""
    known = all(isinstance(length, int) for length in lengths)
    if tracked > 1:
        return f"{node.op} joins two axes that can both be cut"
    if not segment.after:
        return f"{node.op} drops it"
    if out_lengths is None and not segment.matched:
        return "its axes and the target's can't be matched"
    if out_lengths is None:
        return f"{node.op} {'splits it into' if known else 'joins it with an axis of'} unknown length"
    if np.prod(lengths, dtype=np.int64) > _LARGEST:
        return f"{node.op} makes more positions than are followed"
    return None


def _choose(maps: AxisMaps, node: Node, roots: Ints, shape: _Target) -> int:
    """The output axis that is followed: one that no tie is needed for, else what `maps.split` asks for.

    Axes along which nothing but copies of the same channels lie, and axes that are taken apart behind the Reshape (the
    3 of queries, keys and values made by one product), are chosen only when there is no other.
    """
    lengths = roots.shape
    candidates = [at for at, length in enumerate(lengths) if length > 1] or [0]
    if shape.first or len(candidates) == 1:
        return 0 if shape.first else candidates[0]
    rows = {at: np.moveaxis(roots, at, 0).reshape(lengths[at], -1) for at in candidates}
    ties = {at: max((len(np.unique(row)) for row in rows[at]), default=0) for at in candidates}
    apart = [at for at in candidates if not (rows[at] == rows[at][:1]).all()] or candidates
    whole = [at for at in apart if not _taken_apart(node.outputs[0], shape.axes[at])] or apart
    fewest = min(whole, key=lambda at: (ties[at], at))
    if maps.split == "fewest" or ties[fewest] == 1:
        return fewest
    return whole[0] if maps.split == "outer" else whole[-1]


def _taken_apart(tensor: Any, axis: int) -> bool:
    """Whether every reader picks single positions or pieces of this axis, directly or behind a Transpose."""
    return bool(tensor.outputs) and all(_picks(consumer, tensor, axis) for consumer in tensor.outputs)


def _picks(node: Node, tensor: Any, axis: int) -> bool:
    if tensor is not node.inputs[0]:
        return False
    rank = len(tensor.shape)
    if node.op == "Transpose":
        order = [int(at) for at in node.attrs.get("perm", range(rank)[::-1])]
        return _taken_apart(node.outputs[0], order.index(axis))
    if node.op == "Gather":
        return int(node.attrs.get("axis", 0)) % rank == axis and is_constant(node.inputs[1])
    if node.op == "Slice":
        sliced = node.attrs.get("axes") if len(node.inputs) == 1 else numbers(node.inputs, 3)
        return axis in {int(at) % rank for at in sliced or []}
    return node.op == "Split" and int(node.attrs.get("axis", 0)) % rank == axis


def _leading(node: Node, segment: Segment, count: int) -> tuple[list[int], list[int]] | None:
    """Lengths to follow the first axis of a segment by, when what stands behind it is not known.

    [C, H, W] -> [G, rest] puts C / G channels into each group whatever H and W are, and [G, rest] -> [C, H, W] takes
    them apart again: the unknown lengths count as one.
    """
    wanted = entries(node, 1)
    if wanted is None:
        return None
    first = _target_length(wanted[segment.after[0]], segment.after[0], node, node.outputs[0].shape[segment.after[0]])
    behind, beyond = len(segment.before) - 1, len(segment.after) - 1
    if not isinstance(first, int) or not behind or not beyond:
        return None
    if first and count % first == 0:
        return [count, *[1] * behind], [first, count // first, *[1] * (beyond - 1)]
    if first % count == 0:
        return [count, first // count, *[1] * (behind - 1)], [first, *[1] * beyond]
    return None


def _out_lengths(node: Node, segment: Segment, size: int) -> list[int] | None:
    if len(segment.after) == 1:
        return [size]
    wanted = entries(node, 1) or []
    shape = node.outputs[0].shape
    lengths = [_target_length(wanted[axis], axis, node, shape[axis]) for axis in segment.after]
    unknown = [place for place, length in enumerate(lengths) if not isinstance(length, int)]
    if len(unknown) == 1:
        rest = int(np.prod([length for length in lengths if isinstance(length, int)], dtype=np.int64))
        lengths[unknown[0]] = size // rest if rest else 0
    elif unknown:
        return None
    return lengths if int(np.prod(lengths, dtype=np.int64)) == size else None


def _through(maps: AxisMaps, node: Node, axis: Axis, place: int, before: list[int], shape: _Target) -> tuple[int, Axis]:
    """(which output axis of the segment can be cut, its state).

    Each flat position knows its channel and its coordinates on the other input axes. The channels of one slice of the
    chosen output axis are tied: they can only go together.
    """
    after = shape.lengths
    grid = np.indices(before).reshape(len(before), -1)
    position = grid[place]
    others = np.ravel_multi_index(
        tuple(np.delete(grid, place, axis=0)) if len(before) > 1 else (np.zeros_like(position),),
        tuple(np.delete(np.array(before), place)) if len(before) > 1 else (1,),
    )
    roots = maps.channels.roots(axis.channels)[position].reshape(after)
    best = _choose(maps, node, roots, shape)
    slices = np.moveaxis(roots, best, 0).reshape(after[best], -1)
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
