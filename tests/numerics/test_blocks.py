"""Codes in blocks: what a search and error feedback gain, and what they never do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from onnxopt.numerics.blocks import (
    Levels,
    Scaling,
    feedback_round,
    output_error,
    refined,
    round_to_nearest,
    search_scales,
    searched,
    shrunk,
)

FOUR = Levels.signed(4)
PLAIN = Scaling(FOUR)
TURNING = Scaling(FOUR, negative=True)


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def moments(inputs: int, rows: int = 4000, together: float = 0.8, seed: int = 1) -> npt.NDArray[np.float64]:
    """Second moments of inputs that move together."""
    mixing = (1 - together) * np.eye(inputs) + together * normal(inputs, inputs, seed=seed) / inputs**0.5
    x = normal(rows, inputs, seed=seed + 1) @ mixing
    return np.asarray(x.T @ x / rows)


def test_levels_are_those_of_twos_complement() -> None:
    assert (FOUR.lowest, FOUR.highest) == (-8, 7)
    assert Levels.signed(2).round(np.array([-9.0, -0.4, 0.5, 1.5, 9.0])).tolist() == [-2, 0, 0, 1, 1]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("how", ["nearest", "searched", "feedback"])
def test_codes_stay_within_levels_and_values_are_scale_times_code(width: int, how: str) -> None:
    matrix = normal(5, width)
    if how == "nearest":
        found = round_to_nearest(matrix, 32, FOUR)
    elif how == "searched":
        found = searched(matrix, 32, PLAIN)
    else:
        found = feedback_round(matrix, moments(width), 32, PLAIN)
    assert found.codes.shape == (5, width)
    assert found.scales.shape == (5, -(-width // 32))
    assert found.codes.min() >= -8
    assert found.codes.max() <= 7
    assert (found.scales > 0).all()
    expected = [[found.scales[r, k // 32] * found.codes[r, k] for k in range(width)] for r in range(5)]
    assert np.array_equal(found.values(), np.array(expected, np.float32))


def test_nearest_is_within_half_a_step() -> None:
    matrix = normal(8, 64)
    found = round_to_nearest(matrix, 16, FOUR)
    steps = np.repeat(found.scales, 16, axis=1)
    assert (np.abs(found.values() - matrix) <= 0.5001 * steps).all()


def test_a_search_is_never_worse_than_nearest() -> None:
    for seed in range(20):
        matrix = np.random.default_rng(seed).standard_t(3, (16, 64))
        made = (round_to_nearest(matrix, 32, FOUR), searched(matrix, 32, PLAIN), searched(matrix, 32, TURNING))
        plain, better, best = (np.square(each.values() - matrix).sum() for each in made)
        assert best <= better * (1 + 1e-6) <= plain * (1 + 2e-6)


def test_a_search_finds_the_best_of_a_fine_grid() -> None:
    cut = normal(6, 2, 16)
    found = search_scales(cut, PLAIN)
    largest = np.abs(cut).max(axis=2)

    def error(scales: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        wide = scales[:, :, None].astype(np.float64)
        return np.asarray(np.square(cut - wide * FOUR.round(cut / wide)).sum(axis=2))

    fine = np.min([error(largest * share / 7) for share in np.linspace(0.4, 1.1, 400)], axis=0)
    assert error(found).sum() <= 1.05 * fine.sum()


def test_importance_decides_what_is_rounded_well() -> None:
    matrix, heavy = normal(1, 32), np.ones(32)
    matrix[0, 3] = 10.0
    heavy[3] = 1e-6
    plain, weighted = searched(matrix, 32, PLAIN), searched(matrix, 32, PLAIN, heavy)
    rest = np.arange(32) != 3
    errors = [np.square((f.values() - matrix)[:, rest]).sum() for f in (plain, weighted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("inputs", [32, 96, 300])
def test_feedback_leaves_less_than_six_tenths_of_the_error(inputs: int) -> None:
    matrix, second = normal(24, inputs), moments(inputs)
    plain = output_error(matrix, round_to_nearest(matrix, 32, FOUR).values(), second)
    fed = output_error(matrix, feedback_round(matrix, second, 32, PLAIN).values(), second)
    assert fed < 0.6 * plain


def test_feedback_equals_the_textbook_one_input_at_a_time() -> None:
    """Scales as found; codes by the definition, with an explicit inverse and no stretches."""
    matrix, second = normal(4, 160), moments(160, together=0.5)
    found = feedback_round(matrix, second, 16, PLAIN)
    damped = second + 0.01 * np.diagonal(second).mean() * np.eye(160)
    left, codes = matrix.copy(), np.zeros((4, 160), int)
    inverse = np.linalg.inv(damped)
    for k in range(160):
        scale = found.scales[:, k // 16].astype(np.float64)
        codes[:, k] = FOUR.round(left[:, k] / scale)
        error = (left[:, k] - scale * codes[:, k]) / inverse[k, k]
        left[:, k:] -= np.outer(error, inverse[k, k:])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    assert np.array_equal(found.codes, codes)


def test_inputs_that_are_always_zero_round_to_nearest() -> None:
    second = moments(64)
    dead = [5, 40]
    second[dead] = second[:, dead] = 0.0
    matrix = normal(3, 64)
    found = feedback_round(matrix, second, 64, PLAIN)
    scale = found.scales.astype(np.float64)
    assert np.array_equal(found.codes[:, dead[0]], FOUR.round(matrix[:, dead[0]] / scale[:, 0]))
    assert np.isfinite(found.values()).all()


def test_nothing_is_known_of_inputs_without_moments() -> None:
    found = feedback_round(normal(3, 40), np.zeros((40, 40)), 32, PLAIN)
    assert np.isfinite(found.scales).all()


def test_zero_blocks_stay_zero() -> None:
    matrix = np.zeros((2, 64))
    matrix[0, :32] = normal(32)
    for found in (
        round_to_nearest(matrix, 32, FOUR),
        searched(matrix, 32, PLAIN),
        feedback_round(matrix, moments(64), 32, PLAIN),
    ):
        assert not found.values()[1].any()
        assert (found.scales[1] == 1).all()


def test_half_scales_are_float16_values() -> None:
    half = Scaling(FOUR, half=True)
    found = searched(normal(4, 64) * 1e-3, 32, half)
    assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    assert half.stored(np.array([1e-12, -1e-12, 0.0])).tolist() == [2.0**-24, -(2.0**-24), 1.0]


def test_a_negative_scale_gives_a_large_positive_weight_the_lowest_code() -> None:
    matrix = np.full((1, 16), 0.01)
    matrix[0, 4] = 8.0
    found = searched(matrix, 16, TURNING)
    assert found.scales[0, 0] < 0
    assert found.codes[0, 4] == -8
    assert (searched(matrix, 16, PLAIN).scales > 0).all()


@pytest.mark.parametrize("width", [32, 50, 96])
def test_refining_only_lowers_the_error_of_every_row(width: int) -> None:
    matrix, second = normal(12, width), moments(width)
    for scaling in (PLAIN, TURNING, Scaling(FOUR, half=True)):
        start = feedback_round(matrix, second, 16, scaling)
        before, errors = start, []
        for rounds in (0, 1, 2):
            better = refined(matrix, second, start, scaling, rounds)
            assert better.codes.min() >= -8
            assert better.codes.max() <= 7
            assert np.array_equal(np.sign(better.scales), np.sign(start.scales))
            if scaling.half:
                assert np.array_equal(better.scales, better.scales.astype(np.float16).astype(np.float32))
            apart = matrix - better.values()
            errors.append(np.einsum("rk,kj,rj->r", apart, second, apart))
            before = better
        assert np.array_equal(refined(matrix, second, start, scaling, 0).codes, start.codes)
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
        assert errors[2].sum() < 0.98 * errors[0].sum()
        assert before.size == 16


def test_shrinking_helps_on_inputs_not_seen() -> None:
    truth, errors = moments(128), {True: 0.0, False: 0.0}
    matrix = normal(16, 128)
    factor = np.linalg.cholesky(truth)
    for seed in range(5):
        x = normal(40, 128, seed=100 + seed) @ factor.T
        few = x.T @ x / 40
        for shrink in errors:
            second = shrunk(few, 40) if shrink else few
            errors[shrink] += output_error(matrix, feedback_round(matrix, second, 32, PLAIN).values(), truth)
    assert errors[True] < 0.9 * errors[False]


def test_shrinking_keeps_the_diagonal() -> None:
    second = moments(20)
    assert np.allclose(np.diagonal(shrunk(second, 5)), np.diagonal(second))
    assert np.allclose(shrunk(second, 10**9), second)


def test_output_error_is_what_inputs_see() -> None:
    x = normal(500, 30)
    matrix, rounded = normal(7, 30, seed=3), normal(7, 30, seed=4)
    expected = np.square(x @ (matrix - rounded).T).sum() / np.square(x @ matrix.T).sum()
    assert output_error(matrix, rounded, x.T @ x / 500) == pytest.approx(expected)
    assert output_error(np.zeros((2, 30)), rounded[:2], x.T @ x) == 0.0


@pytest.mark.parametrize("power", [-300, 300])
def test_importance_beyond_float32_counts_as_it_does_within(power: int) -> None:
    matrix, importance = normal(6, 64), np.square(normal(64, seed=3))
    with np.errstate(over="raise", invalid="raise"):
        far = searched(matrix, 32, TURNING, np.ldexp(importance, power))
    near = searched(matrix, 32, TURNING, importance)
    assert np.array_equal(far.scales, near.scales)
    assert np.array_equal(far.codes, near.codes)
