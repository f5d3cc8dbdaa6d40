"""Which channels a model can lose without changing its outputs, and their physical removal.

A channel can go when every node that sums over it can do without it: it is zero there, the weights on it are zero, its
constant can be folded into the node's bias, or a proportional channel that stays takes over its weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxopt.graph.axes import ONES, AxisMaps, Reader
from onnxopt.graph.axes.axis import Ints, Mask
from onnxopt.graph.axes.maps import Array, is_constant
from onnxopt.graph.edit import label
from onnxopt.model import Constant, Model, Node

# why a channel can go, from the simplest reason to the one that asks most of those that stay
KINDS = ("unread", "dead", "constant", "proportional")

# (number of the reader, group within it, signal): positions of one class can stand in for each other
_Class = tuple[int, int, int]


@dataclass(frozen=True)
class SiteCut:
    """What one node that makes channels loses: how many it made, and how many go for each of KINDS."""

    node: Node
    before: int
    removed: dict[str, int]

    @property
    def total(self) -> int:
        """Channels that go."""
        return sum(self.removed.values())


@dataclass(frozen=True)
class Plan:
    """The channels to remove: set representatives -> kind, and the same seen from the nodes that make them."""

    removed: dict[int, str]
    sites: tuple[SiteCut, ...]


@dataclass
class _Demand:
    """What the readers ask of one set of channels.

    `members`: how many positions it has in each class. `needed`: classes of which another position must stay.
    """

    members: Counter[_Class] = field(default_factory=Counter)
    needed: set[_Class] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    size: float = 0.0


def plan_lossless(maps: AxisMaps, round_to: int) -> Plan:
    """The channels that can go together without changing outputs beyond rounding.

    Greedy, the smallest signals first, so that of proportional channels the largest stays. Every axis keeps at least
    one channel; one that kernels take in blocks keeps a multiple of `round_to`, or all it had.
    """
    demands, present = _demands(maps)
    held = held_channels(maps)
    sites = [Counter(maps.channels.roots(site.channels).tolist()) for site in maps.sites]
    axes = sites + _passing(maps)
    at: dict[int, list[int]] = {}
    for index, counter in enumerate(axes):
        for root in counter:
            at.setdefault(root, []).append(index)
    left = [counter.total() for counter in axes]
    made = {root for counter in sites for root in counter}
    candidates = sorted((root for root in made if root not in held), key=lambda root: (_size(demands, root), -root))
    pinned: set[_Class] = set()
    removed: dict[int, str] = {}
    for root in candidates:
        demand = demands.get(root, _Demand())
        exhausted = any(
            present[key] - count < 1 and (key in demand.needed or key in pinned)
            for key, count in demand.members.items()
        )
        if exhausted or any(left[index] - axes[index][root] < 1 for index in at[root]):
            continue
        present.subtract(demand.members)
        pinned |= demand.needed
        for index in at[root]:
            left[index] -= axes[index][root]
        removed[root] = max(demand.kinds, key=KINDS.index, default="unread")
    if round_to > 1:
        blocked = [index for index, site in enumerate(maps.sites) if site.blocked]
        _restore_multiples(removed, axes, blocked, at, left, round_to)
    return Plan(removed, _site_cuts(maps, sites, removed))


def _size(demands: dict[int, _Demand], root: int) -> float:
    return demands[root].size if root in demands else 0.0


def _demands(maps: AxisMaps) -> tuple[dict[int, _Demand], Counter[_Class]]:
    """What readers ask per set of channels, and how many positions each class has."""
    demands: dict[int, _Demand] = {}
    present: Counter[_Class] = Counter()
    for number, reader in enumerate(maps.readers):
        read = reader.read
        per_group = len(read) // reader.groups
        silent = _silent(reader)
        for position, root in enumerate(maps.channels.roots(read.channels).tolist()):
            demand = demands.setdefault(root, _Demand())
            if read.scale[position] == 0:
                demand.kinds.add("dead")
                continue
            key = (number, position // per_group, int(read.signal[position]))
            present[key] += 1
            demand.members[key] += 1
            if silent[position]:
                demand.kinds.add("unread")
                continue
            constant = read.signal[position] == ONES
            demand.kinds.add("constant" if constant else "proportional")
            demand.size = max(demand.size, abs(float(read.scale[position])))
            if not (constant and reader.fold is not None):
                demand.needed.add(key)
    return demands, present


def _silent(reader: Reader) -> Mask:
    """Positions of the read axis whose weights are all zero."""
    weights = reader.spread(np.asarray(reader.node.inputs[reader.index].values))
    if reader.own is not None:
        weights = np.where(reader.own, 0, weights)
    return np.asarray((weights == 0).all(axis=(1, 3))).reshape(-1)


def frozen_channels(maps: AxisMaps) -> set[int]:
    """Sets of channels that can't be cut from the graph, whatever they contribute."""
    held: set[int] = set()
    for channels, _, _ in maps.frozen:
        held.update(maps.channels.roots(channels).tolist())
    return held


def held_channels(maps: AxisMaps) -> set[int]:
    """Sets of channels that lossless pruning leaves: frozen ones, and those that a product of two tensors needs."""
    held = frozen_channels(maps)
    for product in maps.products:
        held.update(maps.channels.roots(product.channels[product.needed]).tolist())
    return held


def _passing(maps: AxisMaps) -> list[Counter[int]]:
    """The axes of all tensors, each distinct one once: a piece of a Split may not vanish either."""
    found: dict[bytes, Counter[int]] = {}
    for axes in maps.axes.values():
        for axis in axes.values():
            key = axis.channels.tobytes()
            if key not in found:
                found[key] = Counter(maps.channels.roots(axis.channels).tolist())
    return list(found.values())


def _restore_multiples(
    removed: dict[int, str],
    axes: list[Counter[int]],
    blocked: list[int],
    at: dict[int, list[int]],
    left: list[int],
    round_to: int,
) -> None:
    """Take back removals, the last first, until each of the blocked axes has a multiple or all it had."""
    pending = list(blocked)
    while pending:
        index = pending.pop()
        while left[index] % round_to and left[index] < axes[index].total():
            root = next(root for root in reversed(removed) if root in axes[index])
            del removed[root]
            for other in at[root]:
                left[other] += axes[other][root]
                if other in blocked:
                    pending.append(other)


def _site_cuts(maps: AxisMaps, sites: list[Counter[int]], removed: dict[int, str]) -> tuple[SiteCut, ...]:
    cuts = []
    for site, counter in zip(maps.sites, sites, strict=True):
        kinds: Counter[str] = Counter()
        for root, count in counter.items():
            if root in removed:
                kinds[removed[root]] += count
        if kinds:
            cuts.append(SiteCut(site.node, counter.total(), dict(kinds)))
    return tuple(cuts)


def frozen_reasons(maps: AxisMaps) -> list[tuple[str, str]]:
    """(node, reason) for everything that keeps channels from being removed, each once, in graph order.

    Axes of data that no node of the model made channels of could not be cut anyway and are left out.
    """
    made = np.concatenate([np.zeros(0, np.int64), *(site.channels for site in maps.sites)])
    roots = np.unique(maps.channels.roots(made))
    return list(
        dict.fromkeys(
            (where, reason)
            for channels, where, reason in maps.frozen
            if np.isin(maps.channels.roots(channels), roots).any()
        )
    )


def remove(maps: AxisMaps, plan: Plan, compensate: bool = True) -> None:
    """Carry out a plan: move contributions, cut weights, rewrite attributes and shapes.

    The maps describe the old model afterwards and are spent. compensate: give the weights on removed channels to what
    stays, which asks for a lossless plan; without it any sets of channels that nothing holds can go, and what they
    contributed is lost.
    """
    gone = np.array(sorted(plan.removed), np.int64)

    def keep(channels: Ints) -> Mask:
        return ~np.isin(maps.channels.roots(channels), gone)

    replaced = _Replacements(maps.model)
    for reader in maps.readers if compensate else ():
        _compensate(reader, keep(reader.read.channels), replaced)
    for parameter in maps.parameters:
        kept = keep(parameter.channels)
        if parameter.index < len(parameter.node.inputs) and not kept.all():
            replaced.cut(parameter.node, parameter.index, parameter.axis, kept)
    replaced.commit()
    for rewrite in maps.rewrites:
        rewrite(keep)
    for identity, axes in maps.axes.items():
        tensor = maps.tensors[identity]
        if tensor.shape is not None and not is_constant(tensor):
            tensor.shape = [
                int(keep(axes[at].channels).sum()) if at in axes else dim for at, dim in enumerate(tensor.shape)
            ]


def _compensate(reader: Reader, kept: Mask, replaced: _Replacements) -> None:
    """Give the weights of removed positions to those that stay: into the bias, or onto a proportional position."""
    read = reader.read
    per_group = len(read) // reader.groups
    lost = np.flatnonzero(~kept & (read.scale != 0) & ~_silent(reader))
    if not len(lost):
        return
    old = replaced.current(reader.node, reader.index)
    weights = np.array(reader.spread(old), np.float64)
    folded = np.zeros(weights.shape[:2])
    for position in lost.tolist():
        group, place = divmod(position, per_group)
        taken = weights[group, :, place]
        if read.signal[position] == ONES and reader.fold is not None:
            folded[group] += read.scale[position] * taken.sum(axis=1)
            continue
        start = group * per_group
        members = np.flatnonzero(
            kept[start : start + per_group] & (read.signal[start : start + per_group] == read.signal[position])
        )
        stays = members[np.argmax(np.abs(read.scale[start + members]))]
        weights[group, :, stays] += taken * (read.scale[position] / read.scale[start + stays])
    replaced.set(reader.node, reader.index, reader.gather(weights, old).astype(old.dtype))
    if folded.any() and reader.fold is not None:
        reader.fold(folded.reshape(-1))


class _Replacements:
    """New values per use of a constant: nodes that shared one may be given different ones."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._values: dict[tuple[int, int], tuple[Node, int, Array]] = {}

    def current(self, node: Node, index: int) -> Array:
        known = self._values.get((id(node), index))
        return known[2] if known is not None else np.asarray(node.inputs[index].values)

    def set(self, node: Node, index: int, values: Array) -> None:
        self._values[id(node), index] = (node, index, values)

    def cut(self, node: Node, index: int, axis: int, kept: Mask) -> None:
        if node.inputs[index].is_empty():
            return
        values = self.current(node, index)
        if values.ndim and values.shape[axis] == len(kept):
            self.set(node, index, np.compress(kept, values, axis=axis))

    def commit(self) -> None:
        """Wire the new values. A constant all of whose uses get the same is changed itself and keeps its place."""
        by_constant: dict[int, list[tuple[Node, int, Array]]] = {}
        for node, index, values in self._values.values():
            by_constant.setdefault(id(node.inputs[index]), []).append((node, index, values))
        outputs = {id(tensor) for body in self.model.bodies() for tensor in body.outputs}
        retired: set[int] = set()
        for uses in by_constant.values():
            constant: Constant = uses[0][0].inputs[uses[0][1]]
            first = uses[0][2]
            alike = all(values.shape == first.shape and values.tobytes() == first.tobytes() for _, _, values in uses)
            if alike and len(uses) == len(constant.outputs) and id(constant) not in outputs:
                constant.values = first
                continue
            made: dict[tuple[Any, ...], Constant] = {}
            for node, index, values in uses:
                key = (values.shape, values.tobytes())
                node.inputs[index] = made.setdefault(key, Constant(constant.name, values))
            if not constant.outputs and id(constant) not in outputs:
                retired.add(id(constant))
        for body in self.model.bodies():
            body.initializers = [constant for constant in body.initializers if id(constant) not in retired]


def describe(cut: SiteCut) -> str:
    """ "12 of 64 channels: 8 dead, 4 constant"."""
    parts = ", ".join(f"{count} {kind}" for kind, count in cut.removed.items())
    return f"{cut.total} of {cut.before} channels: {parts}"


def site_label(cut: SiteCut) -> str:
    """Name of the node a cut is about."""
    return label(cut.node)
