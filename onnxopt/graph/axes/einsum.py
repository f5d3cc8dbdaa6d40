"""The rule of Einsum: every letter is an axis, tied among the operands that have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxopt.graph.axes.axis import Axis
from onnxopt.graph.axes.maps import Array, AxisMaps, Product, Reader, is_constant, register
from onnxopt.graph.axes.weights import forget, has_weights
from onnxopt.graph.edit import label
from onnxopt.model import Node


@dataclass(frozen=True)
class _Equation:
    """Letters of every operand and of the output."""

    operands: tuple[str, ...]
    output: str

    def places(self, letter: str) -> list[tuple[int, int]]:
        """(operand, axis) of a letter."""
        return [(at, operand.index(letter)) for at, operand in enumerate(self.operands) if letter in operand]


@register("Einsum")
def einsum(node: Node, maps: AxisMaps) -> None:
    """Sums over letters that the output lacks; constants hold weights, as in MatMul."""
    if not any(not is_constant(tensor) for tensor in node.inputs):
        return
    equation = _parse(str(node.attrs["equation"]), len(node.inputs))
    if equation is None or any(is_constant(tensor) and not has_weights(tensor) for tensor in node.inputs):
        maps.freeze_node(node, f"the equation {node.attrs['equation']} of Einsum is not followed")
        return
    result: dict[int, Axis] = {}
    for letter in dict.fromkeys("".join(equation.operands)):
        found = _letter(node, maps, equation, letter)
        if found is not None:
            result[equation.output.index(letter)] = found
    made = _made(node, maps, equation)
    if made is not None:
        result[made[0]] = made[1]
    maps.set(node.outputs[0], result)


def _parse(text: str, count: int) -> _Equation | None:
    """The equation when it names its output and no operand repeats a letter."""
    text = text.replace(" ", "")
    if "." in text or "->" not in text:
        return None
    left, output = text.split("->")
    operands = left.split(",")
    if len(operands) != count or any(len(set(part)) != len(part) for part in (*operands, output)):
        return None
    return _Equation(tuple(operands), output)


def _letter(node: Node, maps: AxisMaps, equation: _Equation, letter: str) -> Axis | None:
    """Tie the axes of one letter; returns the output's where it has it. Letters of constants alone are left out."""
    places = equation.places(letter)
    tracked = [axis for at, place in places if (axis := maps.of(node.inputs[at]).get(place)) is not None]
    constants = [(at, place) for at, place in places if is_constant(node.inputs[at])]
    if not tracked:
        return None
    first = tracked[0]
    lengths = {len(axis) for axis in tracked} | {node.inputs[at].shape[place] for at, place in constants}
    if len(tracked) + len(constants) != len(places) or lengths != {len(first)}:
        for axis in tracked:
            maps.freeze_axis(axis, label(node), "Einsum joins it with an axis that can't be cut")
        return None
    for axis in tracked[1:]:
        maps.channels.tie(first.channels, axis.channels)
    for at, place in constants:
        maps.parameter(node, at, place, first.channels)
    if letter in equation.output:
        return forget(first, maps)
    if len(places) == 1:
        maps.freeze_axis(first, label(node), "Einsum sums over it")
    elif len(tracked) > 1:
        needed = ~np.logical_or.reduce([axis.zero for axis in tracked])
        factors = tuple((at, place) for at, place in places if not is_constant(node.inputs[at]))
        maps.products.append(Product(first.channels, needed, node, factors))
    else:
        at, place = constants[0]
        data = next(other for other, _ in places if other != at)
        spread, gather = _rows(place)
        maps.readers.append(Reader(node, at, first, 1, spread, gather, None, data))
    return None


def _rows(place: int) -> tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]:
    """(spread, gather) of weights that are read along axis `place`; everything else counts as rows."""

    def spread(weights: Array) -> Array:
        return np.moveaxis(weights, place, -1).reshape(1, -1, weights.shape[place], 1)

    def gather(new: Array, old: Array) -> Array:
        moved = np.moveaxis(old, place, -1).shape
        return np.moveaxis(new.reshape(moved), -1, place)

    return spread, gather


def _made(node: Node, maps: AxisMaps, equation: _Equation) -> tuple[int, Axis] | None:
    """(output axis, its channels) of a letter that weights alone bring in.

    Of several, heads and dims within, one can be followed: the first when whole heads are looked at, else the last.
    """
    letters = [
        letter
        for letter in equation.output
        if (places := equation.places(letter)) and all(is_constant(node.inputs[at]) for at, _ in places)
    ]
    if not letters:
        return None
    letter = letters[0] if maps.split == "outer" else letters[-1]
    places = equation.places(letter)
    count = node.inputs[places[0][0]].shape[places[0][1]]
    slices = [
        np.moveaxis(np.asarray(node.inputs[at].values, np.float64), place, 0).reshape(count, -1) for at, place in places
    ]
    dead = np.logical_or.reduce([(rows == 0).all(axis=1) for rows in slices])
    produced = maps.produce(node, maps.signals.classes(*slices), np.where(dead, 0.0, 1.0))
    for at, place in places:
        maps.parameter(node, at, place, produced.channels)
    return equation.output.index(letter), produced
