"""In which order the sets of a group go, and what that costs the layers that read them.

The cost of removing sets is the squared error that it leaves in the outputs of each reader, the weights of the others
refitted, over the power of these outputs; summed over the readers. With `obs` the cheapest set goes next, and the rest
is looked at again (Hassibi and Stork 1993, with whole channels for weights). The other criteria give each set a fixed
score; its cost is reckoned the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.calibration.channels import Moments
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.axes.axis import Floats, Ints, Mask
from onnxopt.model import Node
from onnxopt.numerics.elimination import Dropping, Elimination, damped
from onnxopt.pruning.groups import Group
from onnxopt.pruning.reads import Read

CRITERIA = ("obs", "variance", "activation", "l1", "l2", "never_fires", "fisher")
# a step removes this share of a group's sets at once
_STEP = 1 / 96
# beyond so many inputs the others are not refitted while sets are put in order
_REFITTED = 2304


@dataclass(frozen=True)
class Order:
    """sets: those that go, first ones first; costs[i]: what removing sets[: i + 1] costs, never falling."""

    sets: tuple[int, ...]
    costs: Floats

    def cost(self, count: int) -> float:
        """Of the first `count` sets."""
        return float(self.costs[count - 1]) if count else 0.0


def removal_order(
    group: Group,
    moments: Mapping[Read, Moments],
    products: Sequence[tuple[Ints, Floats]],
    criterion: str,
    scores: Mapping[int, float] | None,
) -> Order:
    """The order for one group.

    moments: of each read of the group; where one is missing nothing is reckoned for it. products: for each product of
    two tensors the sets of its positions [K] and the share of its power that each holds [K]. scores: set -> the score
    of a fixed criterion, smallest first; None: that of `criterion` follows from weights and moments.
    """
    state = _State(group, moments, products)
    fixed = scores if scores is not None else _fixed(group, moments, criterion)
    left = list(group.sets)
    if fixed is not None:
        left.sort(key=lambda root: (fixed.get(root, 0.0), root))
    room = [counter.total() for counter in group.passing]
    step = max(1, int(len(left) * _STEP))
    order: list[int] = []
    costs: list[float] = []
    total = 0.0
    while left:
        if fixed is None:
            by_cost = state.costs(left)
            left = [left[at] for at in np.argsort(by_cost, kind="stable")]
        chosen: list[int] = []
        while left and len(chosen) < step:
            root = left.pop(0)
            if _leaves_some(root, group.passing, room):
                chosen.append(root)
        if not chosen:
            break
        total += max(0.0, state.remove(chosen))
        order += chosen
        # within a step costs rise evenly
        costs += np.linspace(costs[-1] if costs else 0.0, total, len(chosen) + 1)[1:].tolist()
    return Order(tuple(order), np.array(costs))


def _leaves_some(root: int, passing: Sequence[Counter[int]], room: list[int]) -> bool:
    """Take a set's positions away, unless that would empty an axis on the way."""
    if any(left <= counter[root] for counter, left in zip(passing, room, strict=True) if counter[root]):
        return False
    for at, counter in enumerate(passing):
        room[at] -= counter[root]
    return True


class _State:
    """The readers of one group while its sets go."""

    def __init__(self, group: Group, moments: Mapping[Read, Moments], products: Sequence[tuple[Ints, Floats]]) -> None:
        self._reads = [_Reading(read, moments[read], group.sets) for read in group.reads if read in moments]
        self._shares: dict[int, float] = {}
        for roots, shares in products:
            for root, share in zip(roots.tolist(), shares.tolist(), strict=True):
                self._shares[root] = self._shares.get(root, 0.0) + share

    def costs(self, sets: Sequence[int]) -> Floats:
        found = np.array([self._shares.get(root, 0.0) for root in sets])
        for reading in self._reads:
            found += reading.costs(sets)
        return found

    def remove(self, sets: Sequence[int]) -> float:
        total = sum(self._shares.get(root, 0.0) for root in sets)
        return total + sum(reading.remove(sets) for reading in self._reads)


class _Reading:
    """One reader: its elimination, its power, and where the sets stand in it."""

    def __init__(self, read: Read, moments: Moments, sets: Sequence[int]) -> None:
        energy = read.energy
        covariance = moments.covariance
        self._power = max(float(np.sum(energy * covariance)), 1e-30)
        self._elimination: Elimination | Dropping = (
            Elimination(damped(covariance, moments.rows), energy)
            if len(energy) <= _REFITTED
            else Dropping(covariance, energy)
        )
        wanted = set(sets)
        self._places: dict[int, list[int]] = {}
        for place, root in enumerate(read.roots.tolist()):
            if root in wanted:
                self._places.setdefault(root, []).append(place)
        self._sizes = {len(places) for places in self._places.values()}

    def costs(self, sets: Sequence[int]) -> Floats:
        found = np.zeros(len(sets))
        for size in self._sizes:
            at = [i for i, root in enumerate(sets) if len(self._places.get(root, ())) == size]
            if at:
                blocks = np.array([self._places[sets[i]] for i in at], np.int64)
                found[at] = self._elimination.costs(blocks) / self._power
        return found

    def remove(self, sets: Sequence[int]) -> float:
        gone = np.array([place for root in sets for place in self._places.get(root, ())], np.int64)
        return self._elimination.remove(gone) / self._power if len(gone) else 0.0


def _fixed(group: Group, moments: Mapping[Read, Moments], criterion: str) -> dict[int, float] | None:
    """Scores that follow from weights and moments of the readers; None for `obs`, whose scores change.

    variance: E(x - Ex)^2 |w|^2 (An et al., "Fluctuation-based adaptive structured pruning", 2024, eq. 5); activation:
    sqrt(E x^2) |w| (Sun et al., "A simple and effective pruning approach", 2024, for whole columns).
    """
    if criterion == "obs":
        return None
    found: dict[int, float] = {}
    for read in group.reads:
        if read not in moments:
            continue
        spread = np.maximum(np.diagonal(moments[read].centred).astype(np.float64), 0.0)
        second = spread + moments[read].mean ** 2
        weights = np.diagonal(read.energy)
        values = spread * weights if criterion == "variance" else np.sqrt(second * weights)
        values = values / max(float(values.mean()), 1e-30)
        for root, value in zip(read.roots.tolist(), values.tolist(), strict=True):
            found[root] = found.get(root, 0.0) + value
    return found


def magnitudes(group: Group, maps: AxisMaps, norm: int) -> dict[int, float]:
    """set -> L1 or L2 norm of the weights that make its channels, over the mean of each node (Li et al. 2017)."""
    found = dict.fromkeys(group.sets, 0.0)
    sites = {id(node) for node in group.nodes}
    made = np.unique(np.concatenate([maps.channels.roots(site.channels) for site in group.sites]))
    for parameter in maps.parameters:
        node, index = parameter.node, parameter.index
        if id(node) not in sites or index == 0 or index >= len(node.inputs) or node.inputs[index].is_empty():
            continue
        roots = maps.channels.roots(parameter.channels)
        values = np.asarray(node.inputs[index].values)
        if values.ndim < 2 or values.shape[parameter.axis] != len(roots) or not np.isin(roots, made).any():
            continue
        if _is_read(maps, node, index, parameter.channels):
            continue
        lines = np.abs(np.moveaxis(values, parameter.axis, 0).reshape(len(roots), -1).astype(np.float64))
        norms = lines.sum(axis=1) if norm == 1 else np.sqrt((lines**2).sum(axis=1))
        norms = norms / max(float(norms.mean()), 1e-30)
        for root, value in zip(roots.tolist(), norms.tolist(), strict=True):
            if root in found:
                found[root] += value
    return found


def _is_read(maps: AxisMaps, node: Node, index: int, channels: Ints) -> bool:
    """Whether the node reads these channels by that input, and does not make them."""
    readers = (reader for reader in maps.readers if reader.node is node and reader.index == index)
    return any(np.isin(channels, reader.read.channels).all() for reader in readers)


def kept(roots: Ints, gone: set[int]) -> Mask:
    """Which positions stay."""
    return ~np.isin(roots, np.array(sorted(gone), np.int64))
