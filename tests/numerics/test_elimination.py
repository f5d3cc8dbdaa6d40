"""Which inputs can be told from the others, against least squares over the inputs themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxopt.numerics.elimination import RIDGE, Dropping, Elimination, damped, prediction

Floats = npt.NDArray[np.float64]


def problem(size: int, rows: int = 400, outputs: int = 5, seed: int = 0) -> tuple[Floats, Floats]:
    """(x [rows, size] correlated, W [outputs, size])."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size)) @ rng.standard_normal((size, size)) + 0.3 * rng.standard_normal((rows, size))
    return x, rng.standard_normal((outputs, size))


def second_of(x: Floats) -> Floats:
    return np.asarray(x.T @ x / len(x))


def least(x: Floats, weights: Floats, gone: Any) -> float:
    """The mean squared error of the outputs with the best weights on the inputs that stay, by lstsq."""
    keep = np.setdiff1d(np.arange(x.shape[1]), gone)
    wanted = x @ weights.T
    if not len(keep):
        return float((wanted**2).sum() / len(x))
    best = np.linalg.lstsq(x[:, keep], wanted, rcond=None)[0]
    return float(((wanted - x[:, keep] @ best) ** 2).sum() / len(x))


def start(x: Floats, weights: Floats) -> Elimination:
    return Elimination(second_of(x), weights.T @ weights)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_the_cost_of_each_input_is_that_of_least_squares(size: int) -> None:
    x, weights = problem(size)
    costs = start(x, weights).costs(np.arange(size)[:, None])
    assert costs == pytest.approx([least(x, weights, [at]) for at in range(size)], rel=1e-6)


@pytest.mark.parametrize("block", [2, 3, 5])
def test_the_cost_of_blocks_is_that_of_least_squares(block: int) -> None:
    x, weights = problem(3 * block)
    blocks = np.random.default_rng(1).permutation(3 * block).reshape(-1, block)
    costs = start(x, weights).costs(blocks)
    assert costs == pytest.approx([least(x, weights, gone) for gone in blocks], rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_costs_of_a_sequence_add_up_to_least_squares(seed: int) -> None:
    """Whatever goes in whatever order, by ones and by blocks: the errors in all are those of removing it together."""
    x, weights = problem(16, seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(16)
    elimination = start(x, weights)
    total, done = 0.0, 0
    while done < 15:
        count = int(rng.integers(1, min(4, 16 - done)))
        gone = order[done : done + count]
        assert elimination.costs(gone[None])[0] == pytest.approx(
            least(x, weights, order[: done + count]) - least(x, weights, order[:done]), rel=1e-5, abs=1e-9
        )
        total += elimination.remove(gone)
        done += count
        assert total == pytest.approx(least(x, weights, order[:done]), rel=1e-5)


def test_costs_after_a_removal_know_what_is_gone() -> None:
    x, weights = problem(10)
    elimination = start(x, weights)
    elimination.remove(np.array([7, 2]))
    left = np.array([9, 0, 4])
    found = elimination.costs(left[:, None])
    base = least(x, weights, [7, 2])
    assert found == pytest.approx([least(x, weights, [7, 2, at]) - base for at in left], rel=1e-5)


def test_all_may_go() -> None:
    x, weights = problem(6)
    elimination = start(x, weights)
    total = elimination.remove(np.arange(4)) + elimination.remove(np.array([5, 4]))
    assert total == pytest.approx(float(((x @ weights.T) ** 2).sum() / len(x)), rel=1e-6)


def test_greedy_removal_takes_what_can_be_told_first() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 6))
    x[:, 4] = x[:, 0] + x[:, 1]
    weights = np.ones((1, 6))
    costs = Elimination(second_of(x) + 1e-9 * np.eye(6), weights.T @ weights).costs(np.arange(6)[:, None])
    assert set(np.argsort(costs)[:3].tolist()) == {0, 1, 4}
    assert costs[[0, 1, 4]].max() < 1e-6 < costs[[2, 3, 5]].min()


def test_inputs_that_do_not_vary_cost_nothing() -> None:
    x, weights = problem(6)
    x[:, [1, 3]] = 0
    elimination = Elimination(damped(second_of(x), len(x), 1e-3), weights.T @ weights)
    costs = elimination.costs(np.arange(6)[:, None])
    assert np.isfinite(costs).all()
    assert costs[[1, 3]].max() < 0.01 * costs[[0, 2, 4, 5]].min()


def test_no_input_varies() -> None:
    elimination = Elimination(damped(np.zeros((4, 4)), 10), np.ones((4, 4)))
    costs = elimination.costs(np.arange(4)[:, None])
    assert np.isfinite(costs).all()
    assert costs.max() < 1e-12
    assert abs(elimination.remove(np.arange(4))) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_dropping_is_the_quadratic_form(seed: int) -> None:
    """Errors of outputs where inputs are taken for their means."""
    x, weights = problem(12, seed=seed)
    x += np.random.default_rng(seed).standard_normal(12)
    centred = x - x.mean(axis=0)
    dropping = Dropping(second_of(centred), weights.T @ weights)
    gone: list[int] = []
    total = 0.0
    for block in ([3], [7, 1], [0, 11, 5], [2]):
        expected = float(((centred[:, gone + block] @ weights[:, gone + block].T) ** 2).sum() / len(x))
        assert dropping.costs(np.array([block]))[0] == pytest.approx(expected - total, rel=1e-9, abs=1e-9)
        total += dropping.remove(np.array(block))
        gone += block
        assert total == pytest.approx(expected, rel=1e-9)


def test_dropping_costs_no_less_than_refitting() -> None:
    x, weights = problem(12)
    second, energy = second_of(x), weights.T @ weights
    each = np.arange(12)[:, None]
    assert (Dropping(second, energy).costs(each) >= Elimination(second, energy).costs(each) - 1e-9).all()


def test_prediction_is_that_of_least_squares() -> None:
    x, _ = problem(9)
    keep = np.array([True, False, True, True, False, True, True, False, True])
    expected = np.linalg.lstsq(x[:, keep], x[:, ~keep], rcond=None)[0].T
    assert prediction(second_of(x), keep) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_prediction_where_nothing_or_all_stays() -> None:
    second = second_of(problem(4)[0])
    assert prediction(second, np.zeros(4, np.bool_)).shape == (4, 0)
    assert prediction(second, np.ones(4, np.bool_)).shape == (0, 4)


def test_damping_fades_with_rows_and_keeps_the_diagonal() -> None:
    second = second_of(problem(5)[0])
    spread = np.diagonal(second)
    few, many = damped(second, 5), damped(second, 10**9)
    off = ~np.eye(5, dtype=np.bool_)
    assert few[off] == pytest.approx(second[off] / 2)
    assert many[off] == pytest.approx(second[off], rel=1e-6)
    for each in (few, many):
        assert np.diagonal(each) == pytest.approx(spread + RIDGE * spread.mean())


def test_damping_leaves_its_argument_alone() -> None:
    second = np.ones((3, 3), np.float32)
    found = damped(second, 2)
    assert found.dtype == np.float64
    assert (second == 1).all()


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_fewer_rows_than_inputs(rows: int) -> None:
    x, weights = problem(20, rows=rows)
    second = damped(second_of(x), rows)
    assert np.linalg.eigvalsh(second).min() > 0
    elimination = Elimination(second, weights.T @ weights)
    total = sum(elimination.remove(np.array([at])) for at in range(20))
    assert np.isfinite(total)
    assert total == pytest.approx(float(np.sum(second * (weights.T @ weights))), rel=1e-6)


def test_one_input() -> None:
    elimination = Elimination(np.array([[4.0]]), np.array([[9.0]]))
    assert elimination.costs(np.array([[0]])).tolist() == [36.0]
    assert elimination.remove(np.array([0])) == pytest.approx(36.0)


def test_no_inputs() -> None:
    assert damped(np.zeros((0, 0)), 3).shape == (0, 0)
