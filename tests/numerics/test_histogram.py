import math
from collections.abc import Callable
from fractions import Fraction
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numerics import histogram
from onnxopt.numerics.histogram import BINS, HALF, MIN_EXPONENT, Histogram, HistogramSet

Values = npt.NDArray[np.float32]
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149


def near_an_edge(parts: tuple[int, int, int]) -> float:
    """A bin's edge of some range, or one of the two float32 next to it."""
    bin_, exponent, side = parts
    edge = np.float32(math.ldexp(bin_ - HALF, exponent + 1 - 13))
    return float(edge if side == 0 else np.nextafter(edge, np.float32(side)))


EDGES = st.tuples(st.integers(0, BINS), st.integers(MIN_EXPONENT, 127), st.integers(-1, 1)).map(near_an_edge)
POWERS = st.integers(-149, 127).flatmap(lambda power: st.sampled_from([2.0**power, -(2.0**power)]))
SPECIAL = st.sampled_from([0.0, -0.0, SMALLEST, -SMALLEST, 1e-40, -1e-40, LARGEST, -LARGEST])
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-8, 8, width=32)
VALUES = st.lists(NUMBERS | EDGES | POWERS | SPECIAL, max_size=40).map(lambda values: np.array(values, np.float32))


def filled(*parts: Values) -> Histogram:
    tensors = HistogramSet(1)
    for part in parts:
        tensors.add(0, part)
    return tensors[0]


def slow_exponent(values: Values) -> int:
    largest = max((abs(Fraction(float(value))) for value in values), default=Fraction(0))
    exponent = MIN_EXPONENT
    while largest >= Fraction(2) ** exponent:
        exponent += 1
    return exponent


def slow_bin(value: np.float32, exponent: int) -> int:
    return math.floor(Fraction(float(value)) * BINS / Fraction(2) ** (exponent + 1)) + HALF


def offset_before_floor(value: np.float32, exponent: int) -> int:
    return int(np.floor(value * np.float32(2.0 ** (12 - exponent)) + np.float32(HALF)))


def assert_counts(values: Values, bin_of: Callable[[np.float32, int], int]) -> None:
    """The counts of `values` are those that `bin_of` gives one by one."""
    found = filled(values)
    assert found.exponent == slow_exponent(values)
    expected = np.zeros(BINS, np.int64)
    for value in values:
        expected[bin_of(value, found.exponent)] += 1
    assert np.array_equal(found.counts, expected)


def same(one: Histogram, other: Histogram) -> bool:
    return one.exponent == other.exponent and np.array_equal(one.counts, other.counts)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_every_value_is_in_the_bin_of_exact_arithmetic(values: Values) -> None:
    assert_counts(values, slow_bin)


@pytest.mark.parametrize(
    "broken",
    [
        offset_before_floor,
        lambda value, exponent: slow_bin(value, exponent) + 1,
        lambda value, exponent: math.trunc(Fraction(float(value)) * HALF / Fraction(2) ** exponent) + HALF,
        lambda value, exponent: math.ceil(Fraction(float(value)) * HALF / Fraction(2) ** exponent) + HALF,
    ],
    ids=["offset before floor", "off by one", "towards zero", "upper edges"],
)
def test_other_rules_for_bins_are_told_apart(broken: Callable[[np.float32, int], int]) -> None:
    values = np.array([-1e-9, 0.4, -0.4, 0.25, 0.7], np.float32)
    assert_counts(values, slow_bin)
    with pytest.raises(AssertionError):
        assert_counts(values, broken)


@given(VALUES, st.randoms(use_true_random=False), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_counts_do_not_depend_on_order_parts_or_merges(values: Values, random: Random, at: int) -> None:
    whole = filled(values)
    order = list(range(values.size))
    random.shuffle(order)
    shuffled = values[order]
    assert same(filled(*(value.reshape(1) for value in shuffled)), whole)
    assert same(filled(shuffled[:at], shuffled[at:]), whole)
    assert same(filled(shuffled[:at]).merged(filled(shuffled[at:])), whole)
    first, second = HistogramSet(1), HistogramSet(1)
    first.add(0, shuffled[:at])
    second.add(0, shuffled[at:])
    first.merge(second)
    assert same(first[0], whole)


@given(VALUES, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_widened_counts_are_those_of_the_wider_range(values: Values, steps: int) -> None:
    narrow = filled(values)
    wide = narrow.widened(narrow.exponent + steps)
    expected = np.zeros(BINS, np.int64)
    for value in values:
        expected[slow_bin(value, wide.exponent)] += 1
    assert np.array_equal(wide.counts, expected)


@pytest.mark.parametrize("order", [1, -1])
def test_a_subnormal_keeps_its_side_of_zero_beside_huge_values(order: int) -> None:
    found = filled(*np.array([[-SMALLEST], [3e38], [SMALLEST]], np.float32)[::order])
    assert found.exponent == 128
    assert found.counts[HALF - 1] == 1
    assert found.counts[HALF] == 1


def test_negative_zero_counts_as_zero() -> None:
    assert filled(np.array([-0.0, 0.0, 1.0], np.float32)).counts[HALF] == 2


@pytest.mark.parametrize(
    ("magnitude", "exponent"),
    [(0.0, MIN_EXPONENT), (SMALLEST, MIN_EXPONENT), (1.0, 1), (0.99, 0), (2.0, 2), (3.5, 2), (LARGEST, 128)],
)
def test_exponent_is_the_smallest_that_holds_the_magnitude(magnitude: float, exponent: int) -> None:
    assert histogram.exponent_of(magnitude) == exponent
    assert filled(np.array([-magnitude], np.float32)).exponent == exponent


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_none_counted(bad: float) -> None:
    tensors = HistogramSet(2)
    tensors.add(1, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="cannot be counted"):
        tensors.add(1, np.array([1, bad, 2], np.float32))
    assert tensors[1].count == 3
    assert tensors[1].exponent == 1


@pytest.mark.parametrize("size", [1, 500, 32767, 32768, 32769, 100_000])
def test_parts_of_every_size_are_counted_once(size: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    expected = np.histogram(values.astype(np.float64), BINS, (-(2.0**3), 2.0**3))[0]
    assert slow_exponent(np.abs(values).max(keepdims=True).reshape(1)) <= 3
    assert np.array_equal(filled(*values).widened(3).counts, expected)


def test_any_shape_is_counted() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert same(filled(values.transpose(2, 0, 1)[::2]), filled(values[:, :, ::2].reshape(-1)))
    assert same(filled(np.array(3, np.float32), np.zeros((0, 2), np.float32)), filled(np.array([3], np.float32)))


def test_tensors_of_a_set_do_not_mix() -> None:
    tensors = HistogramSet(3)
    tensors.add(2, np.full(5, 100, np.float32))
    tensors.add(0, np.full(2, -0.3, np.float32))
    assert tensors.exponents.tolist() == [-1, MIN_EXPONENT, 7]
    assert tensors.counts.sum(axis=1).tolist() == [2, 0, 5]
    assert len(tensors) == 3


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_end_of_a_range_is_outside_of_it(value: float) -> None:
    found = filled(np.array([0.9], np.float32), np.array([value], np.float32))
    assert found.exponent == 1
    assert found.counts[HALF + int(value * HALF / 2)] == 1


def test_what_was_read_is_not_changed_by_later_values() -> None:
    tensors = HistogramSet(1)
    tensors.add(0, np.ones(1, np.float32))
    before = tensors[0]
    tensors.add(0, np.ones(1, np.float32))
    assert (before.count, tensors[0].count) == (1, 2)


def test_sets_of_other_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="merged"):
        HistogramSet(2).merge(HistogramSet(3))


def test_bins_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="split"):
        filled(np.ones(1, np.float32)).widened(0)


def test_bins_of_a_range() -> None:
    found = filled(np.array([-3.0, 1.5], np.float32))
    assert found.exponent == 2
    assert found.width == 8 / BINS
    assert found.centres()[[0, HALF, -1]].tolist() == [-4 + found.width / 2, found.width / 2, 4 - found.width / 2]
    assert found.occupied() == (-3.0, 1.5 + found.width)


@pytest.mark.parametrize("shape", ["normal", "exponential", "uniform"])
def test_quantiles_and_magnitude_are_those_of_the_values(shape: str) -> None:
    values = getattr(np.random.default_rng(1), shape)(size=200_000).astype(np.float32)
    found = filled(values)
    for q in (0.0, 0.0005, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0):
        below, above = (float(np.quantile(values, q, method=side)) for side in ("lower", "higher"))
        assert below - found.width <= found.quantile(q) <= above + found.width
    assert found.mean_absolute() == pytest.approx(np.abs(values.astype(np.float64)).mean(), abs=found.width / 2)


def test_quantiles_are_interpolated_inside_a_bin() -> None:
    counts = np.zeros(BINS, np.int64)
    counts[HALF + 8], counts[HALF + 100] = 4, 12
    found = Histogram(12, counts)  # bins of width 1
    quantiles = [found.quantile(q) for q in (0, 1 / 8, 1 / 4, 5 / 8, 1)]
    assert quantiles == [8, 8.5, 9, 100.5, 101]


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
def test_quantiles_outside_the_unit_interval_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        filled(np.ones(1, np.float32)).quantile(q)


def test_nothing_counted() -> None:
    found = HistogramSet(1)[0]
    assert (found.exponent, found.count, found.mean_absolute(), found.occupied()) == (MIN_EXPONENT, 0, 0.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="no values"):
        found.quantile(0.5)
