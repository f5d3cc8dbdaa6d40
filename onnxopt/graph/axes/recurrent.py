"""Rules of LSTM, GRU and RNN: hidden units are channels, each a row of every gate.

With H units, gate q of unit k is row q H + k of W, R and of both halves of B. A unit goes from all gates and directions
at once; the directions could keep different units, but not different numbers of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxopt.graph.axes.axis import Axis, Floats, Ints, Mask
from onnxopt.graph.axes.maps import Array, AxisMaps, Keep, Reader, is_constant, register
from onnxopt.graph.axes.weights import bias_known, has_weights
from onnxopt.graph.edit import label
from onnxopt.model import Constant, Node, Variable


@dataclass(frozen=True)
class _Cell:
    """Gates in the order of the rows, which of them makes the candidate state, and activations per direction.

    `through`: the places among a direction's activations that a candidate of zero passes on its way to the output.
    """

    gates: int
    candidate: int
    activations: int
    through: tuple[int, ...]


# LSTM: i o f c; GRU: z r h. A unit whose candidate and initial state are zero stays at zero, whatever its other gates.
_CELLS = {"LSTM": _Cell(4, 3, 3, (1, 2)), "GRU": _Cell(3, 2, 2, (1,)), "RNN": _Cell(1, 0, 1, (0,))}
# functions that are zero at zero whatever their alpha and beta
_ZERO_AT_ZERO = frozenset({"tanh", "relu", "leakyrelu", "softsign", "elu", "scaledtanh"})
_BIAS, _PEEPHOLES = 3, 7
_STATES = (5, 6)


@register("LSTM", "GRU", "RNN")
def recurrent(node: Node, maps: AxisMaps) -> None:
    """W [D, g H, I] reads the input's last axis, R [D, g H, H] the units; both make Y [.., H], Y_h and Y_c [.., H]."""
    data, weights = node.inputs[0], node.inputs[1]
    for number, axis in maps.of(data).items():
        if number != 2 or not has_weights(weights):
            maps.freeze_axis(axis, label(node), f"{node.op} needs all of it")
    reason = _obstacle(node, maps)
    if has_weights(weights):
        _read_input(node, maps)
    if reason is not None:
        for tensor in node.inputs[1:]:
            maps.freeze(tensor, label(node), reason)
        maps.freeze_axis(_unknown(node, maps), label(node), reason)
        return
    _make_units(node, maps)


def _read_input(node: Node, maps: AxisMaps) -> None:
    read = maps.of(node.inputs[0]).get(2)
    if read is None:
        return
    spread: Callable[[Array], Array] = lambda w: w.reshape(1, -1, w.shape[2], 1)  # noqa: E731
    fold = partial(add_to_gates, node, 0) if bias_known(node, _BIAS) else None
    maps.readers.append(Reader(node, 1, read, 1, spread, lambda new, old: new.reshape(old.shape), fold))
    maps.parameter(node, 1, 2, read.channels)


def add_to_gates(node: Node, half: int, amounts: Floats) -> None:
    """Add to half of B [directions, 2 rows], making it where there is none; amounts: [directions * rows].

    half: 0 for what goes with the input (W), 1 for what goes with the state (R).
    """
    weights = node.inputs[1]
    directions, rows = weights.shape[:2]
    present = _given(node, _BIAS)
    bias = np.zeros((directions, 2 * rows)) if present is None else np.array(present.values, np.float64)
    bias[:, half * rows : (half + 1) * rows] += amounts.reshape(directions, rows)
    while len(node.inputs) <= _BIAS:
        node.inputs.append(Variable.empty())
    base = f"{weights.name}_bias" if present is None else present.name
    node.inputs[_BIAS] = Constant(base, bias.astype(weights.dtype))


def _obstacle(node: Node, maps: AxisMaps) -> str | None:
    """Why no unit can go, None where units can."""
    constants = [
        node.inputs[1],
        node.inputs[2],
        *(t for i in (_BIAS, _PEEPHOLES) if (t := _given(node, i)) is not None),
    ]
    if not all(has_weights(tensor) for tensor in constants):
        return f"weights of {node.op} are not constant floats"
    for index in _STATES:
        state = _given(node, index)
        if state is not None and not is_constant(state) and 2 not in maps.of(state):
            return f"an initial state of {node.op} can't be cut"
    return None


def _unknown(node: Node, maps: AxisMaps) -> Axis:
    """Units that nothing is known of but their number, so that reports count them."""
    recurrence = node.inputs[2]
    count = recurrence.shape[2] if has_weights(recurrence) else int(node.attrs.get("hidden_size", 0))
    return maps.produce(node, maps.signals.new(count), np.ones(count))


def _make_units(node: Node, maps: AxisMaps) -> None:
    cell = _CELLS[node.op]
    directions, _, count = node.inputs[2].shape
    signal, scale = _values(node, maps, cell, directions, count)
    units = maps.produce(node, signal, scale)
    channels = units.channels
    rows = {1: cell.gates, 2: cell.gates, _BIAS: 2 * cell.gates, _PEEPHOLES: 3}
    for index, repeats in rows.items():  # a bias that is not there may be made before the cut
        maps.parameter(node, index, 1, np.tile(channels, repeats))
    maps.parameter(node, 2, 2, channels)
    for index in _STATES:
        state = _given(node, index)
        if is_constant(state):
            maps.parameter(node, index, 2, channels)
        elif state is not None and maps.of(state)[2].zero.all():
            # units of other nodes may start from the same zeros, with which these have nothing in common
            maps.on_cut(partial(_start_from_zero, node, index), channels)
            for axis in maps.of(state).values():
                maps.settle(axis)
        elif state is not None:
            maps.channels.tie(channels, maps.of(state)[2].channels)
            for number, axis in maps.of(state).items():
                if number != 2:
                    maps.freeze_axis(axis, label(node), f"{node.op} needs all of it")
    _read_units(node, maps, units, directions)
    maps.on_cut(lambda keep: node.attrs.update(hidden_size=int(keep(channels).sum())), channels)
    for place, tensor in enumerate(node.outputs):
        # Y [S, D, N, H] (or [N, S, D, H]), Y_h and Y_c [D, N, H] (or [N, D, H])
        own = units if place == 0 else maps.linear(units, True, np.full(count, place))
        maps.set(tensor, {3 if place == 0 else 2: own})


def _start_from_zero(node: Node, index: int, _keep: Keep) -> None:
    """Leave out an initial state that is zero: without one, cells start from zero."""
    node.inputs[index] = Variable.empty()


def _read_units(node: Node, maps: AxisMaps, units: Axis, directions: int) -> None:
    """Each direction reads its own units through R: groups of one Reader."""
    count = len(units)
    gates = _CELLS[node.op].gates
    read = units.take(np.tile(np.arange(count), directions))
    spread: Callable[[Array], Array] = lambda r: r[..., None]  # noqa: E731
    own = np.tile(np.eye(count, dtype=np.bool_), (gates, 1))[None, :, :, None]
    gather: Callable[[Array, Array], Array] = lambda new, old: new.reshape(old.shape)  # noqa: E731
    maps.readers.append(Reader(node, 2, read, directions, spread, gather, None, None, own))


def _values(node: Node, maps: AxisMaps, cell: _Cell, directions: int, count: int) -> tuple[Ints, Floats]:
    """(signal [H], scale [H]): units with the same weights in every gate are equal, dead ones zero."""
    by_unit: list[Array] = []
    candidates: list[Array] = []
    for index in (1, 2, _BIAS, _PEEPHOLES):
        tensor = _given(node, index)
        if tensor is None:
            continue
        gates = np.asarray(tensor.values, np.float64).reshape(directions, -1, count, *tensor.shape[2:])
        by_unit.append(_by_unit(gates))
        if index != _PEEPHOLES:  # B holds the gates twice
            candidates.append(_by_unit(gates[:, cell.candidate :: cell.gates]))
    states = [state for index in _STATES if (state := _given(node, index)) is not None]
    still = np.ones(count, np.bool_)
    for state in states:
        if is_constant(state):
            values = np.moveaxis(np.asarray(state.values, np.float64), 2, 0).reshape(count, -1)
            by_unit.append(values)
            still &= (values == 0).all(axis=1)
        else:
            axis = maps.of(state)[2]
            by_unit += [axis.signal.reshape(count, 1), axis.scale.reshape(count, 1)]
            still &= axis.zero
    dead: Mask = still & (np.concatenate(candidates, axis=1) == 0).all(axis=1) & _keeps_zero(node, cell, directions)
    return maps.signals.classes(*by_unit), np.where(dead, 0.0, 1.0)


def _by_unit(gates: Array) -> Array:
    """From [D, g, H, ...] to [H, everything else]."""
    return np.moveaxis(gates, 2, 0).reshape(gates.shape[2], -1)


def _keeps_zero(node: Node, cell: _Cell, directions: int) -> bool:
    """Whether a candidate of zero leaves the unit at zero, with the activations of this node."""
    named = [str(name).lower() for name in node.attrs.get("activations", [])]
    if not named:
        return True
    places = [direction * cell.activations + at for direction in range(directions) for at in cell.through]
    return all(place < len(named) and named[place] in _ZERO_AT_ZERO for place in places)


def _given(node: Node, index: int) -> Constant | Variable | None:
    """An optional input, None where it is absent."""
    tensor: Constant | Variable | None = node.inputs[index] if index < len(node.inputs) else None
    return None if tensor is None or tensor.is_empty() else tensor
