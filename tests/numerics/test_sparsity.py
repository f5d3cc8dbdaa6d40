"""Masks, and weights that make good for zeros: against definitions, brute force and inputs not seen."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from onnxopt.numerics.blocks import output_error
from onnxopt.numerics.feedback import DAMPING
from onnxopt.numerics.sparsity import (
    Groups,
    Mask,
    Share,
    descended,
    kept_by,
    lamp_scores,
    least_squares,
    refitted,
    sparse_gpt,
    wanda_scores,
)

Wide = npt.NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(rows: int, width: int, seed: int = 0, mean: float = 0.5) -> Wide:
    """Inputs that move together, of different sizes, around a mean."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(7).standard_normal((width // 4, width))
    sizes = np.exp(np.random.default_rng(8).normal(0, 0.6, width))
    middle = mean * np.random.default_rng(9).random(width)
    return np.asarray(
        (rng.standard_normal((rows, width // 4)) @ mixed * 0.5 + rng.standard_normal((rows, width)) + middle) * sizes
    )


def second(x: Wide) -> Wide:
    return np.asarray(x.T @ x / len(x))


# masks


@pytest.mark.parametrize(
    ("share", "size", "gone"), [(0.29, 100, 29), (0.5, 1, 0), (0.9, 10, 9), (0.5, 9, 4), (0, 7, 0)]
)
def test_a_share_is_of_whole_weights(share: float, size: int, gone: int) -> None:
    assert Share(share).count(size) == gone


def test_every_count_of_many_weights_is_the_one_asked_for() -> None:
    for size in (7, 864, 147_456, 99_999_989):
        for gone in {0, 1, size // 3, size // 2, size - 1}:
            assert Share(gone / size).count(size) == gone


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_the_smallest_scores_go(share: float, by_row: bool) -> None:
    scores = np.abs(normal(7, 40))
    kept = kept_by(scores, Share(share, by_row))
    for mine, stays in zip(scores, kept, strict=True) if by_row else [(scores, kept)]:
        assert (~stays).sum() == int(share * mine.size + 1e-9)
        assert not stays.all() or share == 0
        assert mine[~stays].max(initial=0) <= mine[stays].min()


@pytest.mark.parametrize("by_row", [False, True])
def test_of_equal_scores_exactly_as_many_go(by_row: bool) -> None:
    kept = kept_by(np.ones((4, 10)), Share(0.5, by_row))
    assert kept.sum() == 20
    assert kept[-1, -1]
    assert not kept[0, 0]


@pytest.mark.parametrize("groups", [Groups(2, 4), Groups(1, 4), Groups(4, 8), Groups(2, 4, 6), Groups(2, 4, 3)])
def test_of_each_group_the_largest_stay(groups: Groups) -> None:
    scores = np.abs(normal(5, 24))
    kept = kept_by(scores, groups)
    pieces = list(groups.within(24))
    assert sorted(k for start, end in pieces for k in range(start, end)) == list(range(24))
    for start, end in pieces:
        assert (kept[:, start:end].sum(axis=1) == min(groups.kept, end - start)).all()
        for row, stays in zip(scores[:, start:end], kept[:, start:end], strict=True):
            assert row[~stays].max(initial=0) <= row[stays].min()


def test_groups_do_not_cross_a_stretch() -> None:
    assert list(Groups(2, 4, 6).within(12)) == [(0, 4), (4, 6), (6, 10), (10, 12)]
    assert list(Groups(2, 4).within(6)) == [(0, 4), (4, 6)]


def test_inputs_that_hardly_vary_lose_their_weights_first() -> None:
    scores = wanda_scores(np.array([[1.0, -3.0]]), np.array([16.0, 1.0]))
    assert scores.tolist() == [[4.0, 3.0]]


def test_lamp_scores_are_those_of_the_paper() -> None:
    weights = normal(3, 5)
    flat = np.square(weights).reshape(-1)
    scores = lamp_scores(np.abs(weights)).reshape(-1)
    for at, square in enumerate(flat):
        assert scores[at] == pytest.approx(square / flat[flat >= square].sum())
    assert scores.max() == pytest.approx(1)
    assert not lamp_scores(np.zeros((2, 2))).any()
    np.testing.assert_allclose(lamp_scores(np.abs(weights) * 1e-9).reshape(-1), scores)


# SparseGPT


def one_by_one(weights: Wide, h: Wide, kept: Mask) -> Wide:
    """Algorithm 1 with a given mask, by its definition: the inverse of what is left is taken anew for every input."""
    left = weights.copy()
    damped = h + DAMPING * np.diagonal(h).mean() * np.eye(len(h))
    for k in range(weights.shape[1]):
        inverse = np.linalg.inv(damped[k:, k:])
        error = np.where(kept[:, k], 0.0, left[:, k]) / inverse[0, 0]
        left[:, k:] -= np.outer(error, inverse[0])
        left[~kept[:, k], k] = 0.0
    return left


@pytest.mark.parametrize("width", [12, 150])
def test_a_sweep_with_a_given_mask_is_its_definition(width: int) -> None:
    weights, h = normal(5, width), second(inputs(400, width))
    kept = kept_by(np.abs(weights), Share(0.5))
    np.testing.assert_allclose(sparse_gpt(weights, h, kept), one_by_one(weights, h, kept), atol=1e-9)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(6, 300), (9, 7), (1, 1), (3, 129)])
def test_as_many_go_in_a_sweep_as_by_score(rows: int, width: int, by_row: bool) -> None:
    wanted = Share(0.5, by_row)
    found = sparse_gpt(normal(rows, width), second(normal(400, width, seed=1)), wanted)
    gone = (found == 0).sum(axis=1)
    if by_row:
        assert (gone == wanted.count(width)).all()
    assert gone.sum() == (wanted.count(width) * rows if by_row else wanted.count(rows * width))


@pytest.mark.parametrize("groups", [Groups(2, 4), Groups(1, 3), Groups(2, 4, 6), Groups(3, 5, 30)])
@pytest.mark.parametrize("width", [60, 300])
def test_a_sweep_keeps_to_groups(groups: Groups, width: int) -> None:
    found = sparse_gpt(normal(8, width), second(inputs(500, width)), groups)
    for start, end in groups.within(width):
        assert ((found[:, start:end] != 0).sum(axis=1) == min(groups.kept, end - start)).all()


def test_nothing_asked_for_changes_nothing() -> None:
    weights, h = normal(4, 140), second(inputs(300, 140))
    for wanted in (Share(0.0), Share(0.0, True), Groups(4, 4), np.ones(weights.shape, np.bool_)):
        np.testing.assert_array_equal(sparse_gpt(weights, h, wanted), weights)


def test_inputs_that_were_always_zero_lose_their_weights_first_and_take_no_part() -> None:
    weights, x = normal(4, 20), inputs(300, 20)
    x[:, ::2] = 0
    found = sparse_gpt(weights, second(x), Share(0.5))
    assert not found[:, ::2].any()
    np.testing.assert_array_equal(found[:, 1::2], weights[:, 1::2])
    assert np.isfinite(sparse_gpt(weights, np.zeros((20, 20)), Share(0.5))).all()


# least squares


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_weights_that_stay_solve_least_squares(share: float) -> None:
    weights, x = normal(6, 24), inputs(500, 24)
    kept = kept_by(np.abs(weights), Share(share))
    found = least_squares(weights, kept, second(x), damping=1e-12)
    assert not found[~kept].any()
    for row, stays, mine in zip(weights, kept, found, strict=True):
        solved = np.linalg.lstsq(x[:, stays], x @ row, rcond=None)[0]
        np.testing.assert_allclose(mine[stays], solved, atol=1e-6)


def test_rows_of_any_length_are_solved_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, h = normal(9, 24), second(inputs(500, 24))
    kept = np.arange(24)[None] < np.array([0, 24, 3, 3, 1, 17, 24, 0, 8])[:, None]
    whole = least_squares(weights, kept, h)
    monkeypatch.setattr("onnxopt.numerics.sparsity._SOLVED", 8 * 24 * 24 * 2)
    np.testing.assert_allclose(least_squares(weights, kept, h), whole, atol=1e-12)
    np.testing.assert_allclose(whole[[1, 6]], weights[[1, 6]], atol=1e-12)
    assert not whole[[0, 7]].any()


def test_damping_keeps_weights_of_inputs_that_do_not_vary_where_they_were() -> None:
    weights = np.ones((1, 3))
    h = np.array([[1.0, 1e-6, 0], [1e-6, 1e-12, 0], [0, 0, 1.0]])
    kept = np.array([[False, True, True]])
    found = least_squares(weights, kept, h)
    np.testing.assert_allclose(found, [[0, 1, 1]], atol=1e-3)
    assert least_squares(weights, kept, h, damping=1e-15)[0, 1] > 100


@pytest.mark.parametrize("start", ["plain", "swept"])
def test_steps_come_to_least_squares(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, h = normal(20, 96), second(inputs(800, 96))
    found = sparse_gpt(weights, h, Share(0.5))
    kept = found != 0
    first = np.where(kept, weights, 0.0) if start == "plain" else found
    best = least_squares(weights, kept, h)
    few = descended(weights, first, kept, h)
    assert not few[~kept].any()
    assert output_error(weights, few, h) <= output_error(weights, best, h) * 1.01
    monkeypatch.setattr("onnxopt.numerics.sparsity._STEPS", 300)
    monkeypatch.setattr("onnxopt.numerics.sparsity._AT_ONCE", 96 * 7)
    np.testing.assert_allclose(descended(weights, first, kept, h), best, atol=1e-9)


def test_wide_matrices_take_steps_and_narrow_ones_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, h = normal(5, 40), second(inputs(300, 40))
    kept = kept_by(np.abs(weights), Share(0.5))
    plain = np.where(kept, weights, 0.0)
    np.testing.assert_array_equal(refitted(weights, plain, kept, h), least_squares(weights, kept, h))
    monkeypatch.setattr("onnxopt.numerics.sparsity._EXACT", 39)
    np.testing.assert_array_equal(refitted(weights, plain, kept, h), descended(weights, plain, kept, h))


def test_nothing_that_was_never_seen_is_refitted() -> None:
    weights, kept = normal(3, 8), kept_by(np.abs(normal(3, 8)), Share(0.5))
    plain = np.where(kept, weights, 0.0)
    for found in (least_squares(weights, kept, np.zeros((8, 8))), descended(weights, plain, kept, np.zeros((8, 8)))):
        np.testing.assert_array_equal(found, plain)


# what it is for


def lost(weights: Wide, found: Wide, x: Wide, mean: Wide | None = None) -> float:
    """Root of the relative squared error on inputs x; mean: of the inputs, where its part went into the bias."""
    apart = x @ (weights - found).T - (0 if mean is None else (weights - found) @ mean)
    return float(np.sqrt(np.square(apart).sum() / np.square(x @ weights.T).sum()))


def ladder(wanted: Share | Groups) -> dict[str, float]:
    """Errors on inputs that were not seen, of what is better from one to the next."""
    seen, other = inputs(4000, 128, mean=3.0), inputs(2000, 128, seed=1, mean=3.0)
    weights = normal(96, 128, seed=2)
    h, mean = second(seen), seen.mean(axis=0)
    c = h - np.outer(mean, mean)
    size, wanda = (kept_by(s, wanted) for s in (np.abs(weights), wanda_scores(weights, np.diagonal(h))))
    centred = kept_by(wanda_scores(weights, np.diagonal(c)), wanted)
    swept = sparse_gpt(weights, c, wanted)
    return {
        "magnitude": lost(weights, weights * size, other),
        "Wanda": lost(weights, weights * wanda, other),
        "Wanda, mean in the bias": lost(weights, weights * wanda, other, mean),
        "SparseGPT": lost(weights, sparse_gpt(weights, h, wanted), other),
        "SparseGPT of the covariance": lost(weights, swept, other, mean),
        "Wanda, least squares": lost(weights, least_squares(weights, centred, c), other, mean),
        "SparseGPT, least squares": lost(weights, least_squares(weights, swept != 0, c), other, mean),
    }


@pytest.mark.parametrize("wanted", [Share(0.5), Groups(2, 4)], ids=["half", "2:4"])
def test_on_inputs_not_seen_each_method_beats_what_it_was_made_to_beat(wanted: Share | Groups) -> None:
    found = ladder(wanted)
    assert found["Wanda"] < 0.9 * found["magnitude"]
    assert found["Wanda, mean in the bias"] < 0.9 * found["Wanda"]
    assert found["SparseGPT"] < 0.75 * found["Wanda"]
    assert found["SparseGPT of the covariance"] < found["SparseGPT"]
    for mended in ("Wanda, least squares", "SparseGPT, least squares"):
        assert found[mended] < 0.75 * found["Wanda, mean in the bias"]
    assert found["SparseGPT, least squares"] < found["SparseGPT of the covariance"]


def test_the_mask_of_a_sweep_is_near_the_best_there_is() -> None:
    weights, h = normal(3, 8, seed=3), second(inputs(500, 8))

    def best(row: Wide) -> float:
        masks = [np.isin(np.arange(8), four)[None] for four in itertools.combinations(range(8), 4)]
        return min(output_error(row[None], least_squares(row[None], mask, h), h) for mask in masks)

    for row in weights:
        swept = sparse_gpt(row[None], h, Share(0.5, True))
        assert output_error(row[None], least_squares(row[None], swept != 0, h), h) <= 2 * best(row)
