"""Error feedback: each step leaves the least error that the later inputs can leave."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from onnxopt.numerics.feedback import DAMPING, Sweep, inverse_factor

Wide = npt.NDArray[np.float64]


def moments(width: int, seed: int = 0) -> Wide:
    x = np.random.default_rng(seed).standard_normal((width * 3, width))
    return np.asarray(x.T @ x / len(x))


def damped(second: Wide) -> Wide:
    return np.asarray(second + DAMPING * np.diagonal(second).mean() * np.eye(len(second)))


def test_the_factor_is_one_of_the_inverse_for_each_part() -> None:
    seconds = np.stack([moments(7), moments(7, 1)])
    upper = inverse_factor(seconds, np.zeros((2, 7), np.bool_))
    for factor, second in zip(upper, seconds, strict=True):
        np.testing.assert_allclose(factor, np.triu(factor))
        np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped(second)), rtol=1e-9)


@pytest.mark.parametrize("width", [5, 200])
def test_later_inputs_make_good_for_what_is_settled(width: int) -> None:
    second, rng = moments(width), np.random.default_rng(3)
    matrix = rng.standard_normal((1, 4, width))
    sweep, half = Sweep(matrix, second[None]), width // 2
    for k in range(half):
        np.testing.assert_array_equal(sweep.ahead(k + 1)[0], sweep.column(k))
        sweep.settle(np.rint(sweep.column(k)))
    left = sweep.ahead(width)[:, 0].T
    settled, exact = np.rint(sweep.result()[0, :, :half]), matrix[0]
    h = damped(second)
    best = exact[:, half:] + (exact[:, :half] - settled) @ h[:half, half:] @ np.linalg.inv(h[half:, half:])
    np.testing.assert_allclose(left, best, atol=1e-8)


def test_values_that_stay_move_nothing() -> None:
    matrix = np.random.default_rng(1).standard_normal((2, 3, 150))
    sweep = Sweep(matrix, np.stack([moments(150), moments(150, 1)]))
    for k in range(150):
        sweep.settle(sweep.column(k))
    np.testing.assert_array_equal(sweep.result(), matrix)


def test_inputs_that_were_always_zero_pass_nothing_on() -> None:
    second = moments(6)
    second[2] = second[:, 2] = 0
    matrix = np.random.default_rng(1).standard_normal((1, 3, 6))
    sweep = Sweep(matrix, second[None])
    for k in range(2):
        sweep.settle(sweep.column(k))
    sweep.settle(sweep.column(2) + 5)
    np.testing.assert_allclose(sweep.ahead(6)[:, 0].T, matrix[0, :, 3:])
