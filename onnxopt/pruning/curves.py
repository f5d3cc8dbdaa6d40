"""What removing more and more of a group costs at the outputs of the model, and how much of each group is to go.

The order of a group says which sets go first and what that costs its readers. What it costs the model is measured: with
that group alone pruned to a few widths, the outputs are compared with the original's on feeds that chose nothing else.
In between the measured figure follows the readers' cost. Errors of different groups are taken to add up, as independent
noise does. Removal is then greedy: always the step that costs the outputs least for what it saves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxopt.pruning.groups import Group
from onnxopt.pruning.order import Order
from onnxopt.pruning.sizes import Sizes

# shares of a group's sets at which it is tried
TRIED = (0.125, 0.25, 0.5, 0.75)
# a group is not tried further once noise is this share of the outputs
HOPELESS = 0.3


@dataclass
class Curve:
    """One group: its order, how many sets may go at once, and what was measured.

    counts: numbers of sets whose removal leaves widths that are wanted, ascending, without 0. points: (count, squared
    error over the variance of the outputs), ascending.
    """

    group: Group
    order: Order
    counts: list[int]
    points: list[tuple[int, float]] = field(default_factory=list)

    def error(self, count: int) -> float:
        """Squared error at the outputs with the first `count` sets gone."""
        if count == 0:
            return 0.0
        cost = self.order.cost(count)
        if not self.points:
            return cost
        ratios = [(at, error / max(self.order.cost(at), 1e-30)) for at, error in self.points]
        place = bisect_right([at for at, _ in ratios], count)
        if place in (0, len(ratios)):
            ratio = ratios[min(place, len(ratios) - 1)][1]
        else:
            (low, first), (high, second) = ratios[place - 1], ratios[place]
            ratio = first + (second - first) * (count - low) / (high - low)
        return cost * ratio

    def tried(self) -> list[int]:
        """The counts to measure: those nearest to `TRIED`."""
        if not self.counts:
            return []
        wanted = [share * len(self.group.sets) for share in TRIED]
        return sorted({min(self.counts, key=lambda count: (abs(count - each), count)) for each in wanted})

    def measure(self, error: Callable[[set[int]], float]) -> None:
        """Measure at a few counts; stops where the outputs are lost."""
        highest = 0.0
        for count in self.tried():
            highest = max(highest, error(set(self.order.sets[:count])))
            self.points.append((count, highest))
            if highest > HOPELESS:
                break


def allowed_counts(group: Group, order: Order, round_to: int) -> list[int]:
    """Numbers of sets that may go at once: widths of blocked nodes stay multiples of `round_to`, or what they were."""
    fits = np.ones(len(order.sets), np.bool_)
    for site, widths in zip(group.sites, group.widths, strict=True):
        if not site.blocked:
            continue
        full = widths.total()
        left = full - np.cumsum([widths[root] for root in order.sets])
        fits &= (left % round_to == 0) | (left == full)
    return (np.flatnonzero(fits) + 1).tolist()


@dataclass(frozen=True)
class Step:
    """One step of the removal: `count` sets of a group are gone after it, and `size` is left of the model."""

    curve: int
    count: int
    size: float
    error: float


SCOPES = ("global", "isomorphic", "layer")


def path(curves: Sequence[Curve], sizes: Sizes, until: float, scope: str = "global") -> list[Step]:
    """Steps, the cheapest for what it saves first, until at most `until` (a size) is left or nothing more can go.

    scope: "global" looks at each group by itself; "isomorphic" takes the same share of groups of the same structure
    (Fang et al., "Isomorphic Pruning for Vision Models", 2024); "layer" takes the same share of all.
    """
    walk = _Walk(curves, sizes)
    classes = _classes(curves, scope)
    while walk.size > until:
        chosen = walk.cheapest(classes)
        if chosen is None:
            break
        walk.take(*walk.last(chosen, classes, until))
    return walk.steps


def _classes(curves: Sequence[Curve], scope: str) -> list[list[int]]:
    """Groups that are cut alike, by their places."""
    if scope == "global":
        return [[at] for at in range(len(curves))]
    found: dict[object, list[int]] = {}
    for at, curve in enumerate(curves):
        found.setdefault(curve.group.signature() if scope == "isomorphic" else None, []).append(at)
    return list(found.values())


class _Walk:
    def __init__(self, curves: Sequence[Curve], sizes: Sizes) -> None:
        self._curves, self._sizes = curves, sizes
        self._costs = dict(sizes.current)
        self._gone: set[int] = set()
        self._counts = [0] * len(curves)
        self._savings: list[dict[int, float]] = [{} for _ in curves]
        self._nodes = [set(sizes.after((), curve.group.sets)) for curve in curves]
        self.size = sizes.total
        self.error = 0.0
        self.steps: list[Step] = []

    def cheapest(self, classes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
        """(group, count) of the step that costs least for what it saves; None where nothing saves any more."""
        best: tuple[float, int, int] | None = None
        for members in classes:
            for at, count in self._options(members):
                saved = self._saving(at, count)
                if saved <= 0:
                    continue
                price = max(self._rise(at, count), 1e-12) / saved
                if best is None or price < best[0]:
                    best = (price, at, count)
        return None if best is None else best[1:]

    def _options(self, members: Sequence[int]) -> list[tuple[int, int]]:
        """Next steps: of groups that are cut alike that of the one which is behind."""
        if len(members) == 1:
            # a step that costs little may stand behind one that costs much, so a few are looked at
            return [(members[0], count) for count in self._next(members[0])[:4]]
        shares = [
            (after[0] / len(self._curves[at].group.sets), at, after[0]) for at in members if (after := self._next(at))
        ]
        return [min(shares)[1:]] if shares else []

    def last(self, chosen: tuple[int, int], classes: Sequence[Sequence[int]], until: float) -> tuple[int, int]:
        """The same step; where it gets to `until`, the one that gets there at the least error."""
        if self.size - self._saving(*chosen) > until:
            return chosen
        options = [each for members in classes for each in self._options(members)]
        enough = [each for each in options if self.size - self._saving(*each) <= until]
        return min(enough or [chosen], key=lambda each: self._rise(*each))

    def _rise(self, at: int, count: int) -> float:
        return self._curves[at].error(count) - self._curves[at].error(self._counts[at])

    def take(self, at: int, count: int) -> None:
        curve = self._curves[at]
        lately = curve.order.sets[self._counts[at] : count]
        self._gone.update(lately)
        self._costs.update(self._sizes.after(self._gone, lately))
        self.error += curve.error(count) - curve.error(self._counts[at])
        self._counts[at] = count
        for other, nodes in enumerate(self._nodes):
            if not nodes.isdisjoint(self._nodes[at]):
                self._savings[other].clear()
        self.size = sum(self._costs.values())
        self.steps.append(Step(at, count, self.size, self.error))

    def _next(self, at: int) -> list[int]:
        counts = self._curves[at].counts
        return counts[bisect_right(counts, self._counts[at]) :]

    def _saving(self, at: int, count: int) -> float:
        known = self._savings[at]
        if count not in known:
            lately = self._curves[at].order.sets[self._counts[at] : count]
            after = self._sizes.after(self._gone | set(lately), lately)
            known[count] = sum(self._costs[node] for node in after) - sum(after.values())
        return known[count]


def removed(curves: Sequence[Curve], steps: Sequence[Step]) -> set[int]:
    """All sets that are gone after these steps."""
    counts = {step.curve: step.count for step in steps}
    return {root for at, count in counts.items() for root in curves[at].order.sets[:count]}
