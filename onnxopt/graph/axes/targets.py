"""Target shapes: vectors of lengths that are constants, or put together from constants and lengths at run time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import Axis, Ints
from onnxopt.graph.axes.maps import AxisMaps, Keep, is_constant, numbers
from onnxopt.graph.edit import insert_before, label
from onnxopt.graph.names import Names
from onnxopt.model import Constant, Node, Variable

# nodes that pass a vector of lengths on as it is
_PASSING = ("Identity", "Cast", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Entry:
    """One length of a target: its value and its place in a constant, or None when it is computed.

    `path` leads from the node that uses the target to that constant, by the inputs taken. `source` is the tensor and
    its axis that a computed length was measured at, where that is certain.
    """

    value: int | None
    path: tuple[int, ...] = ()
    place: int = 0
    source: tuple[Any, int] | None = None


def entries(node: Node, index: int) -> list[Entry] | None:
    """The lengths in input `index` of a node, which is a constant or a Concat of constants and computed lengths."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return _entries(node.inputs[index], (index,))


def _entries(target: Any, path: tuple[int, ...]) -> list[Entry] | None:
    if is_constant(target):
        return [Entry(int(value), path, place) for place, value in enumerate(target.values.reshape(-1))]
    maker = target.inputs[0] if len(target.inputs) == 1 else None
    if maker is not None and maker.kind[0] == "":
        found = _made(maker, path)
        if found is not None:
            return found
    if target.shape is not None and all(isinstance(length, int) for length in target.shape) and len(target.shape) < 2:
        return [Entry(None)] * (target.shape[0] if target.shape else 1)
    return None


def _made(maker: Node, path: tuple[int, ...]) -> list[Entry] | None:
    """The lengths in the output of a node."""
    if maker.op == "Shape":
        data = maker.inputs[0]
        if data.shape is None:
            return None
        return [Entry(None, source=(data, axis)) for axis in measured_axes(maker, len(data.shape))]
    if maker.op == "Concat":
        parts = [_entries(part, (*path, at)) for at, part in enumerate(maker.inputs)]
        return None if any(part is None for part in parts) else [entry for part in parts for entry in part or []]
    if maker.op not in (*_PASSING, "Gather", "Slice"):
        return None
    found = _entries(maker.inputs[0], (*path, 0))
    return None if found is None else picked(maker, found)


def measured_axes(node: Node, rank: int) -> range:
    """The axes whose lengths a Shape node gives."""
    begin, end, _ = slice(node.attrs.get("start"), node.attrs.get("end")).indices(rank)
    return range(begin, end)


def picked(node: Node, vector: list[Any]) -> list[Any] | None:
    """What a node that only picks among the elements of its first input makes of them; None where it does more."""
    if node.kind[0] != "":
        return None
    if node.op in _PASSING:
        return vector
    if node.op == "Gather":
        indices = numbers(node.inputs, 1)
        return None if indices is None else [vector[at] for at in indices if -len(vector) <= at < len(vector)]
    if node.op == "Slice" and len(node.inputs) > 2:
        begin, end, step = (numbers(node.inputs, at) for at in (1, 2, 4))
        if begin is None or end is None or (step is None and len(node.inputs) > 4):
            return None
        return vector[begin[0] : end[0] : step[0] if step else 1]
    return None


def tie_measured(node: Node, maps: AxisMaps, index: int) -> None:
    """Axes whose lengths, measured at run time, are the node's target are cut like the output's axes, or not at all."""
    wanted = entries(node, index)
    if wanted is None:
        for axis in _upstream(node.inputs[index], maps):
            maps.freeze_axis(axis, label(node), f"its length is used by {node.op}")
        return
    made = maps.of(node.outputs[0])
    for at, entry in enumerate(wanted):
        if entry.source is None:
            continue
        tensor, place = entry.source
        pair = [axes[number] for axes, number in ((maps.of(tensor), place), (made, at)) if number in axes]
        if len(pair) == 2 and len(pair[0]) == len(pair[1]):
            maps.channels.tie(pair[0].channels, pair[1].channels)
            continue
        for found in pair:
            maps.freeze_axis(found, label(node), f"{node.op} takes the length of a tensor that is cut otherwise")


def _upstream(target: Any, maps: AxisMaps) -> Iterator[Axis]:
    """All tracked axes that are measured anywhere behind a target."""
    pending, seen = [target], set()
    while pending:
        tensor = pending.pop()
        if is_constant(tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for maker in tensor.inputs:
            if maker.op == "Shape":
                yield from maps.of(maker.inputs[0]).values()
            else:
                pending += maker.inputs


def follow(maps: AxisMaps, node: Node, entry: Entry, channels: Ints) -> None:
    """Keep this length of the node's target at the number of these channels that stay.

    A negative number and a computed length follow by themselves.
    """
    if entry.value is None or entry.value < 0:
        return
    maps.on_cut(lambda keep: _rewrite(maps, node, entry, channels, keep), channels)


def _rewrite(maps: AxisMaps, node: Node, entry: Entry, channels: Ints, keep: Keep) -> None:
    *path, last = entry.path
    user = node
    for index in path:
        _own(maps, user, index)
        user = user.inputs[index].inputs[0]
    old = user.inputs[last]
    values = np.array(old.values)
    values.reshape(-1)[entry.place] = int(keep(channels).sum())
    user.inputs[last] = Constant(old.name, values)


def _own(maps: AxisMaps, node: Node, index: int) -> None:
    """Give the node a copy of what makes this input where others read it too: their target may stay as it is."""
    shared = node.inputs[index]
    body = next(body for body in maps.model.bodies() if any(other is node for other in body.nodes))
    given_out = any(shared is tensor for other in maps.model.bodies() for tensor in other.outputs)
    if len(shared.outputs) == 1 and not given_out:
        return
    maker = shared.inputs[0]
    names = Names(maps.model)
    twin = Variable(names.new(shared.name), shared.dtype, shared.shape)
    name = names.new(maker.name) if maker.name else ""
    copy = Node(maker.op, name, dict(maker.attrs), list(maker.inputs), [twin], domain=maker.domain)
    insert_before(node, [copy], body)
    node.inputs[index] = twin
