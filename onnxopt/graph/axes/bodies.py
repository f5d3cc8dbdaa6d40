"""Rules of operators that hold bodies: branches, loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import ONES, Axis
from onnxopt.graph.axes.maps import AxisMaps, is_constant, register
from onnxopt.graph.edit import label
from onnxopt.model import Graph, Node


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


@dataclass(frozen=True)
class _Passage:
    """How tensors go into a body and come out of it.

    states: (initial value's input, body input, body output, output); scans_in: (input, body input, axis of the steps);
    scans_out: (body output, output, axis of the steps).
    """

    states: list[tuple[int, int, int, int]]
    scans_in: list[tuple[int, int, int]]
    scans_out: list[tuple[int, int, int]]


@register("Loop")
def loop(node: Node, maps: AxisMaps) -> None:
    """M, condition, states; the body gets the step's number, the condition, states, and gives back one more group."""
    for tensor in node.inputs[:2]:
        maps.freeze(tensor, label(node), "it ends a Loop")
    count = len(node.inputs) - 2
    body = next(iter(node.graphs()))
    states = [(at + 2, at + 2, at + 1, at) for at in range(count)]
    scans_out = [(at + 1, at, 0) for at in range(count, len(body.outputs) - 1)]
    _carry(node, maps, body, _Passage(states, [], scans_out))
    maps.freeze(body.outputs[0], label(node), "it ends a Loop")


@register("Scan")
def scan(node: Node, maps: AxisMaps) -> None:
    """States and sequences; the body sees one step of each sequence."""
    if maps.model.opset < 9:
        maps.freeze_node(node, "Scan of this version is not followed")
        return
    body = next(iter(node.graphs()))
    sequences = int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - sequences
    axes_in = [int(axis) for axis in node.attrs.get("scan_input_axes", [0] * sequences)]
    axes_out = [int(axis) for axis in node.attrs.get("scan_output_axes", [0] * (len(node.outputs) - count))]
    passage = _Passage(
        [(at, at, at, at) for at in range(count)],
        [(count + at, count + at, axis) for at, axis in enumerate(axes_in)],
        [(count + at, count + at, axis) for at, axis in enumerate(axes_out)],
    )
    _carry(node, maps, body, passage)


def _carry(node: Node, maps: AxisMaps, body: Graph, passage: _Passage) -> None:
    """Walk the body with what enters it, then tie what is carried and pass on what leaves."""
    for given, inner, _, _ in passage.states:
        axes = _initial(node, maps, given)
        # what the state is after the first step is not known beforehand
        maps.set(body.inputs[inner], {axis: _unknown(maps, found) for axis, found in axes.items()})
    for given, inner, steps in passage.scans_in:
        maps.set(body.inputs[inner], _one_step(node, maps, node.inputs[given], steps))
    maps.visit(body)
    for _, inner, left, out in passage.states:
        maps.set(node.outputs[out], _tie_state(node, maps, body.inputs[inner], body.outputs[left]))
    for left, out, steps in passage.scans_out:
        maps.set(node.outputs[out], _stacked(node, maps, body.outputs[left], steps))


def _initial(node: Node, maps: AxisMaps, index: int) -> dict[int, Axis]:
    """The axes of an initial value; those of a constant are cut with the state."""
    tensor = node.inputs[index]
    if not is_constant(tensor):
        axes = maps.of(tensor)
        for axis in axes.values():
            maps.settle(axis)
        return axes
    if tensor.dtype.kind != "f":
        return {}
    return {axis: maps.constant_axis(node, index, axis) for axis, length in enumerate(tensor.shape) if length > 1}


def _unknown(maps: AxisMaps, axis: Axis) -> Axis:
    return axis.known(maps.signals.new(len(axis)), np.ones(len(axis)))


def _one_step(node: Node, maps: AxisMaps, tensor: Any, steps: int) -> dict[int, Axis]:
    """The axes of one step of a sequence: the axis of the steps is gone."""
    axes, rank = maps.of(tensor), maps.rank(tensor)
    if not axes:
        return {}
    if rank is None and steps < 0:
        maps.freeze(tensor, label(node), "rank of an input of Scan is unknown")
        return {}
    at = steps % rank if rank is not None else steps
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        if axis == at:
            maps.freeze_axis(found, label(node), f"{node.op} goes through it")
            continue
        maps.settle(found)
        result[axis - (axis > at)] = maps.linear(found, True)
    return result


def _tie_state(node: Node, maps: AxisMaps, before: Any, after: Any) -> dict[int, Axis]:
    """What is carried has the same channels before and after each step, or can't be cut."""
    result: dict[int, Axis] = {}
    pair = maps.of(before), maps.of(after)
    for axis in sorted({*pair[0], *pair[1]}):
        found = [axes[axis] for axes in pair if axis in axes]
        if len(found) == 2 and len(found[0]) == len(found[1]):
            maps.channels.tie(found[0].channels, found[1].channels)
            result[axis] = _unknown(maps, found[0])
            continue
        for one in found:
            maps.freeze_axis(one, label(node), f"it is carried by {node.op} with what can't be cut")
    return result


def _stacked(node: Node, maps: AxisMaps, tensor: Any, steps: int) -> dict[int, Axis]:
    """The axes of all steps' outputs together."""
    axes, rank = maps.of(tensor), maps.rank(tensor)
    if axes and steps < 0 and rank is None:
        maps.freeze(tensor, label(node), f"rank of an output of {node.op} is unknown")
        return {}
    at = steps if steps >= 0 else steps + (rank or 0) + 1
    return {axis + (axis >= at): maps.linear(found, True) for axis, found in axes.items()}
