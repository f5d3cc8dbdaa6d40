from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numerics.compensated import CompensatedSum

FLOATS = st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100)


def total(terms: list[float]) -> Fraction:
    return sum((Fraction(term) for term in terms), Fraction(0))


def summed(terms: list[float]) -> CompensatedSum:
    found = CompensatedSum.zeros(())
    for term in terms:
        found.add(np.array(term))
    return found


def allowed(terms: list[float]) -> Fraction:
    """What the docstring promises: 2**-53 of the sum, and n**2 * 2**-106 of the sum of magnitudes."""
    exact = abs(total(terms))
    magnitudes = sum((abs(Fraction(term)) for term in terms), Fraction(0))
    return exact / 2**53 + Fraction(len(terms) ** 2 + 1, 2**106) * magnitudes


@settings(deadline=None)
@given(st.lists(FLOATS, max_size=40), st.randoms(use_true_random=False))
def test_a_sum_in_any_order_is_the_sum(terms: list[float], random: Any) -> None:
    for _ in range(3):
        assert abs(Fraction(float(summed(terms).value)) - total(terms)) <= allowed(terms)
        random.shuffle(terms)


@settings(deadline=None)
@given(st.lists(st.lists(FLOATS, max_size=12), max_size=6))
def test_parts_that_are_merged_give_the_sum(parts: list[list[float]]) -> None:
    whole = CompensatedSum.zeros(())
    for part in parts:
        whole.merge(summed(part))
    terms = [term for part in parts for term in part]
    assert abs(Fraction(float(whole.value)) - total(terms)) <= 2 * allowed(terms)


def test_what_cancels_leaves_what_was_small() -> None:
    assert float(summed([1e16, 1.0, -1e16]).value) == 1.0
    assert float(summed([1e30, 3.0, -1e30, 1e-3]).value) == 3.001
    merged = summed([1e30, 3.0])
    merged.merge(summed([-1e30, 1e-3]))
    assert float(merged.value) == 3.001


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_are_summed_element_by_element(dtype: npt.DTypeLike) -> None:
    terms = np.random.default_rng(0).standard_normal((100, 3, 4)).astype(dtype)
    found = CompensatedSum.zeros((3, 4))
    for term in terms:
        found.add(term)
    expected = [float(total(column.tolist())) for column in terms.reshape(100, -1).T]
    assert np.array_equal(found.value.reshape(-1), expected)


def test_a_merge_leaves_the_other_as_it_was() -> None:
    one, other = CompensatedSum(np.array([1.0, 2.0])), CompensatedSum(np.array([3.0, 4.0]), np.array([1e-20, 0.0]))
    one.merge(other)
    one.add(np.array([1.0, 1.0]))
    assert other.high.tolist() == [3.0, 4.0]
    assert other.low.tolist() == [1e-20, 0.0]
    assert one.value.tolist() == [5.0, 7.0]


def test_the_pair_is_normalized_by_a_merge() -> None:
    whole = CompensatedSum.zeros(())
    for _ in range(1000):
        whole.merge(summed([0.1]))
    assert abs(float(whole.low)) <= float(whole.high) * 2**-53
    assert float(whole.value) == float(1000 * Fraction(0.1))
