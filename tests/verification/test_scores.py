from __future__ import annotations

import numpy as np
import pytest

from onnxopt.verification import scores

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])


def test_top_k_counts_ranks() -> None:
    assert scores.top_k(SCORES, np.array([1, 0, 2]), 1) == 1
    assert scores.top_k(SCORES, np.array([1, 1, 0]), 1) == pytest.approx(1 / 3)
    assert scores.top_k(SCORES, np.array([1, 1, 0]), 2) == 1
    assert scores.top_k(SCORES, np.array([1, 1, 1]), 2) == pytest.approx(2 / 3)


def test_top_1_is_argmax_also_among_equals_and_nan_is_wrong() -> None:
    equal = np.zeros((1, 4))
    assert scores.top_k(equal, np.array([0]), 1) == 1
    assert scores.top_k(equal, np.array([1]), 1) == 0
    assert scores.top_k(np.array([[np.nan, 0.0]]), np.array([0]), 1) == 0


def test_nll_of_logits_and_probabilities_agree() -> None:
    labels = np.array([1, 0, 2])
    expected = -np.log([0.7, 0.5, 0.6]).mean()
    assert scores.nll(SCORES, labels, True) == pytest.approx(expected)
    assert scores.nll(np.log(SCORES) + 1000, labels, False) == pytest.approx(expected)
    assert scores.nll(np.array([[0.0, 1.0]]), np.array([0]), True) == pytest.approx(-np.log(1e-7))


@pytest.mark.parametrize(
    ("values", "expected"),
    [(SCORES, True), (SCORES.astype(np.float16), True), (SCORES * 2, False), (np.array([[-0.5, 1.5]]), False)],
)
def test_probabilities_are_told_from_logits(
    values: np.ndarray[tuple[int, int], np.dtype[np.float64]], expected: bool
) -> None:
    assert scores.are_probabilities(values) is expected


def test_errors_are_means() -> None:
    values, labels = np.array([1.0, 2.0]), np.array([2.0, 4.0])
    assert scores.mse(values, labels) == 2.5
    assert scores.mae(values, labels) == 1.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], 0.0), ([1, 3, 2, 4], 0.75), ([1, 1, 1, 1], 0.5), ([1, 2, 2, 3], 0.875)],
)
def test_auc_is_the_share_of_ordered_pairs(values: list[float], expected: float) -> None:
    assert scores.auc(np.array(values, float), np.array([0, 0, 1, 1])) == expected
