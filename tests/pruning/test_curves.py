"""How much of each group goes: greedy walks over curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from onnxopt.pruning.curves import HOPELESS, Curve, _classes, _Walk, allowed_counts, path, removed
from onnxopt.pruning.groups import find_groups
from onnxopt.pruning.order import Order
from onnxopt.pruning.reads import reads_of
from onnxopt.pruning.sizes import Sizes
from onnxopt.target import resolve
from tests.graph.net import Net
from tests.graph.topologies import TOPOLOGIES
from tests.pruning.nets import mapped

Growth = Callable[[int, int], np.ndarray]


def walkable(
    widths: tuple[int, ...] = (24, 24, 24), unit: str = "parameters", growth: Growth | None = None
) -> tuple[list[Curve], Sizes]:
    """Curves of dense layers, one after the other; by default each group costs ten times as much as the one before."""
    n = Net(5)
    x, before = "x", 16
    for width in widths:
        x, before = n.relu(n.linear(x, before, width)), width
    model, maps = mapped(n.model(n.linear(x, before, 4), ("N", 16), ("N", 4)))
    groups = find_groups(maps, reads_of(maps))
    assert len(groups) == len(widths)
    grow = growth if growth is not None else lambda at, count: 10.0 ** (at - 4) * np.arange(1, count + 1) ** 2
    curves = []
    for at, group in enumerate(groups):
        order = Order(group.sets[:-1], np.asarray(grow(at, len(group.sets) - 1), np.float64))
        curves.append(Curve(group, order, list(range(1, len(group.sets)))))
    return curves, Sizes(model, maps, {"x": (1, 16)}, unit, resolve("x86"))


@pytest.mark.parametrize("scope", ["global", "isomorphic", "layer"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_path_gets_to_its_target_and_no_further_than_it_must(scope: str, share: float) -> None:
    curves, sizes = walkable()
    steps = path(curves, sizes, share * sizes.total, scope)
    assert steps[-1].size <= share * sizes.total
    assert len(steps) == 1 or steps[-2].size > share * sizes.total
    now = dict(sizes.current)
    gone = removed(curves, steps)
    now.update(sizes.after(gone, gone))
    assert sum(now.values()) == pytest.approx(steps[-1].size)


def test_errors_and_sizes_of_steps_are_monotonic() -> None:
    curves, sizes = walkable()
    steps = path(curves, sizes, 0.0)
    assert all(a.size > b.size and a.error <= b.error for a, b in itertools.pairwise(steps))
    assert steps[-1].error == pytest.approx(sum(curve.error(curve.counts[-1]) for curve in curves))


def test_greedy_errs_less_than_the_same_share_of_all() -> None:
    curves, sizes = walkable()
    greedy, uniform = (path(curves, sizes, 0.5 * sizes.total, scope)[-1].error for scope in ("global", "layer"))
    assert greedy < 0.5 * uniform


def test_all_layers_lose_the_same_share() -> None:
    curves, sizes = walkable((24, 40, 16))
    steps = path(curves, sizes, 0.4 * sizes.total, "layer")
    counts = {step.curve: step.count for step in steps}
    shares = [counts[at] / len(curve.group.sets) for at, curve in enumerate(curves)]
    assert max(shares) - min(shares) <= 1 / 16 + 1e-9


def test_groups_of_one_structure_lose_the_same() -> None:
    curves, sizes = walkable((24, 24, 32))
    classes = _classes(curves, "isomorphic")
    assert sorted(map(sorted, classes)) == [[0, 1], [2]]
    steps = path(curves, sizes, 0.6 * sizes.total, "isomorphic")
    counts = {step.curve: step.count for step in steps}
    assert abs(counts.get(0, 0) - counts.get(1, 0)) <= 1


def test_nothing_saves_any_more() -> None:
    curves, sizes = walkable()
    steps = path(curves, sizes, 0.0)
    assert {step.curve: step.count for step in steps} == {0: 23, 1: 23, 2: 23}
    assert path([], sizes, 0.0) == []
    assert path(curves, sizes, sizes.total) == []


def test_the_last_step_is_no_longer_than_it_must_be() -> None:
    """Counts that stand close together although the cheapest step by what it saves is far."""
    curves, sizes = walkable((24,), growth=lambda _at, count: np.full(count, 0.1))
    walk = _Walk(curves, sizes)
    per_set = sizes.total - walk.size + walk._saving(0, 1)
    assert walk.last((0, 4), [[0]], walk.size - 1.5 * per_set) == (0, 2)
    assert walk.last((0, 4), [[0]], walk.size - 100 * per_set) == (0, 4)
    steps = path(curves, sizes, sizes.total - 5.5 * per_set)
    assert steps[-1].count == 6


@pytest.mark.parametrize("round_to", [1, 3, 4, 8])
def test_widths_of_convolutions_stay_multiples(round_to: int) -> None:
    _, maps = mapped(TOPOLOGIES["plain"]())
    (group,) = find_groups(maps, reads_of(maps))
    counts = allowed_counts(group, Order(group.sets[:-1], np.arange(19.0)), round_to)
    assert counts == [count for count in range(1, 20) if (20 - count) % round_to == 0]


def test_widths_of_matrices_are_free() -> None:
    curves, _ = walkable((24,))
    assert allowed_counts(curves[0].group, curves[0].order, 8) == list(range(1, 24))


def test_measured_errors_hold_where_they_were_measured() -> None:
    (curve,), _ = walkable((24,), growth=lambda _at, count: np.arange(1.0, count + 1))
    assert curve.error(0) == 0
    assert curve.error(5) == 5
    curve.measure(lambda gone: 0.001 * len(gone) ** 2)
    assert [count for count, _ in curve.points] == curve.tried() == [3, 6, 12, 18]
    assert [curve.error(count) for count, _ in curve.points] == pytest.approx([error for _, error in curve.points])
    between = [curve.error(count) for count in range(24)]
    assert all(a <= b for a, b in itertools.pairwise(between))


def test_hopeless_groups_are_tried_no_further() -> None:
    (curve,), _ = walkable((24,))
    curve.measure(lambda _gone: HOPELESS * 1.01)
    assert len(curve.points) == 1


def test_measured_errors_never_fall() -> None:
    (curve,), _ = walkable((24,))
    errors = iter([0.02, 0.01, 0.03, 0.001])
    curve.measure(lambda _gone: next(errors))
    assert [error for _, error in curve.points] == [0.02, 0.02, 0.03, 0.03]


def test_a_group_of_which_no_count_is_allowed_is_not_tried() -> None:
    curves, _ = walkable((24,))
    assert Curve(curves[0].group, curves[0].order, []).tried() == []
