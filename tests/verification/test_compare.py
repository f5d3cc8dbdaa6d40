from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.runtime import Session
from onnxopt.verification import Comparer, RecordedOutputs, compare
from tests.runtime.builders import build_bytes
from tests.verification.builders import compare_one, compare_values, random_outputs, record

Y = random_outputs()


def test_equal_outputs_are_equal_in_every_figure() -> None:
    found = compare_one(Y, [y.copy() for y in Y])
    assert found.bit_equal
    assert (found.kind, found.dtype, found.elements, found.differing) == ("float", "float32", 80, 0)
    assert (found.max_abs, found.relative, found.sqnr_db) == (0, 0, math.inf)
    assert found.cosine == pytest.approx(1)
    assert (found.argmax_agreement, found.close) == (1, 1)
    assert found.agreement is None
    assert found.worst == ()


def test_figures_are_those_of_their_formulas() -> None:
    rng = np.random.default_rng(1)
    theirs = [y + rng.standard_normal(y.shape).astype(np.float32) / 10 for y in Y]
    found = compare_one(Y, theirs)
    y, x = (np.concatenate(values).astype(np.float64) for values in (Y, theirs))
    d = x - y
    assert found.max_abs == np.abs(d).max()
    assert found.max_reference == np.abs(y).max()
    assert found.relative == pytest.approx(np.abs(d).max() / np.abs(y).max())
    assert found.sqnr_db == pytest.approx(10 * np.log10(y.var() * y.size / (d * d).sum()))
    varying = y.var(axis=0, ddof=1).sum() * len(Y)
    assert found.sqnr_over_feeds_db == pytest.approx(10 * np.log10(varying / (d * d).sum()))
    assert found.cosine == pytest.approx((y * x).sum() / np.sqrt((y * y).sum() * (x * x).sum()))
    assert found.argmax_agreement == (y.argmax(-1) == x.argmax(-1)).mean()
    close = [np.abs(b.astype(float) - a) <= 0.1 * np.abs(a).max() for a, b in zip(Y, theirs, strict=True)]
    assert found.close == np.mean(close)
    assert found.differing == (y != x).sum()


def test_the_worst_five_carry_source_index_and_both_values() -> None:
    theirs = [y.copy() for y in Y]
    for rank in range(7):
        theirs[rank][0, rank] += rank + 1
    found = compare_one(Y, theirs)
    assert [item.source for item in found.worst] == [f"feed[{rank}]" for rank in (6, 5, 4, 3, 2)]
    assert found.worst[0].index == (0, 6)
    assert found.worst[0].reference == Y[6][0, 6]
    assert found.worst[0].candidate == theirs[6][0, 6]


def test_blocks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ours = [(100 + rng.standard_normal((3, 37))).astype(np.float32) for _ in range(3)]
    theirs = [y + rng.standard_normal(y.shape).astype(np.float32) for y in ours]
    whole = compare_one(ours, theirs)
    monkeypatch.setattr("onnxopt.verification.accumulate._BLOCK", 10)
    parts = compare_one(ours, theirs)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert parts.worst == whole.worst
    assert (parts.max_abs, parts.close, parts.differing) == (whole.max_abs, whole.close, whole.differing)


def test_the_variance_survives_a_large_mean() -> None:
    rng = np.random.default_rng(0)
    ours = [1e8 + rng.standard_normal((4, 5)) for _ in range(5)]
    found = compare_one(ours, [y + 0.1 for y in ours])
    noise = np.concatenate(ours)
    assert found.sqnr_db == pytest.approx(10 * np.log10(noise.var() / 0.01), abs=1e-3)


def test_sqnr_is_against_the_variance_not_the_power() -> None:
    ours = [np.array([[100.0, 101.0]], np.float32)] * 3
    theirs = [np.array([[101.0, 100.0]], np.float32)] * 3
    assert compare_one(ours, theirs).sqnr_db == pytest.approx(10 * math.log10(0.25))


@pytest.mark.parametrize("constant", [5.0, 1 / 3])
def test_a_constant_reference_is_measured_by_its_power(constant: float) -> None:
    ours = [np.full((1, 4), constant, np.float32)] * 3
    theirs = [y * np.float32(1.01) for y in ours]
    assert compare_one(ours, theirs).sqnr_db == pytest.approx(40, abs=0.1)
    # A softmax over one class, equal to 1 up to a rounding step, is constant too.
    jitter = [np.nextafter(y, np.float32(9)) for y in ours[:1]] + ours[1:]
    found = compare_one(jitter, ours)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 100


def test_an_all_zero_reference() -> None:
    zeros = [np.zeros((1, 4), np.float32)] * 2
    found = compare_one(zeros, [z + 1 for z in zeros])
    assert (found.sqnr_db, found.relative, found.cosine) == (-math.inf, math.inf, 0)
    assert compare_one(zeros, zeros).cosine == 1


def test_a_model_that_gives_its_average_answer_shows_over_feeds() -> None:
    bias = np.linspace(-10, 10, 10, dtype=np.float32)
    ours = [y + bias for y in Y]
    average = np.mean(ours, axis=0)
    found = compare_one(ours, [average] * len(ours))
    assert found.sqnr_db is not None
    assert found.sqnr_db > 10
    assert found.sqnr_over_feeds_db == pytest.approx(10 * math.log10(8 / 7), abs=1e-4)
    assert compare_one(ours[:1], [average]).sqnr_over_feeds_db is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.float64])
def test_narrow_and_wide_types_do_not_overflow(dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max
    ours = [np.array([[largest, -largest, 1]]).astype(dtype)] * 2
    found = compare_one(ours, [-y for y in ours])
    assert found.max_abs >= float(largest)
    assert found.sqnr_db is not None
    assert found.sqnr_db < 3
    assert compare_one(ours, ours).sqnr_db == math.inf
    assert compare_one(ours, ours).bit_equal


def test_nan_equals_nan_and_zero_has_a_sign() -> None:
    payload = np.array([[0x7FC00001, 0x3F800000]], np.uint32).view(np.float32)
    quiet = np.array([[np.nan, 1]], np.float32)
    assert compare_one([payload], [quiet]).bit_equal
    found = compare_one([np.array([0.0], np.float32)], [np.array([-0.0], np.float32)])
    assert (found.bit_equal, found.differing, found.max_abs, found.sqnr_db) == (False, 1, 0, math.inf)


def test_matching_infinities_are_no_difference() -> None:
    masked = np.array([[-np.inf, 1, 2, np.nan]], np.float32)
    found = compare_one([masked], [masked + np.float32(0.01)])
    assert found.nonfinite_mismatches == 0
    assert (found.nonfinite_reference, found.nonfinite_candidate) == (2, 2)
    assert found.max_abs == pytest.approx(0.01, rel=1e-3)
    assert found.sqnr_db == pytest.approx(10 * math.log10(0.25 / 1e-4), rel=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_finite_on_one_side_only_is_a_mismatch(bad: float) -> None:
    theirs = [y.copy() for y in Y]
    theirs[3][0, 2] = bad
    for ours, other in ((Y, theirs), (theirs, Y)):
        found = compare_one(ours, other)
        assert (found.nonfinite_mismatches, found.max_abs, found.sqnr_db) == (1, math.inf, -math.inf)
        assert (found.worst[0].source, found.worst[0].index) == ("feed[3]", (0, 2))
    flipped = compare_one([np.array([np.inf])], [np.array([-np.inf])])
    assert flipped.nonfinite_mismatches == 1


def test_argmax_of_nan_never_agrees() -> None:
    theirs = [np.full_like(y, np.nan) for y in Y]
    assert compare_one(Y, theirs).argmax_agreement == 0
    # argmax of NaN alone is 0, which must not count as agreement with a true 0.
    assert compare_one([np.array([[9, 1]], np.float32)], [np.full((1, 2), np.nan, np.float32)]).argmax_agreement == 0


def test_a_shape_difference_disagrees_in_all_elements() -> None:
    found = compare_one(Y, [*Y[:-1], Y[-1].T])
    assert (found.shape_mismatches, found.sqnr_db, found.max_abs) == (1, -math.inf, math.inf)
    assert found.close == 7 / 8
    assert found.argmax_agreement == 7 / 8
    assert found.differing == 10
    assert (found.worst[0].reference, found.worst[0].candidate) == ("shape [1,10]", "shape [10,1]")


def test_types_must_be_the_same() -> None:
    found = compare_one(Y, [y.astype(np.float64) for y in Y])
    assert (found.dtype, found.candidate_dtype, found.dtype_mismatch) == ("float32", "float64", True)
    assert not found.bit_equal
    assert found.max_abs == 0
    assert compare_one([np.array([1])], [np.array(["1"])]).agreement == 0


def test_discrete_outputs_count_equal_elements() -> None:
    found = compare_one([np.array([1, 2, 3, 4])], [np.array([1, 2, 3, 9])])
    assert (found.kind, found.agreement, found.max_abs, found.sqnr_db) == ("discrete", 0.75, 5, None)
    assert (found.worst[0].index, found.worst[0].reference, found.worst[0].candidate) == ((3,), 4, 9)
    large = compare_one([np.array([2**62])], [np.array([2**62 + 1])])
    assert (large.agreement, large.max_abs) == (0, 1)
    bools = compare_one([np.array([True, False])], [np.array([True, True])])
    assert (bools.agreement, bools.dtype) == (0.5, "bool")
    strings = compare_one([np.array(["a", "b"], object)], [np.array(["a", "c"], object)])
    assert (strings.agreement, strings.worst[0].reference, strings.worst[0].candidate) == (0.5, "b", "c")
    packed = compare_one([np.array([1, 2]).astype(ml_dtypes.int4)], [np.array([1, 3]).astype(ml_dtypes.int4)])
    assert packed.agreement == 0.5


def test_a_discrete_shape_difference_disagrees() -> None:
    found = compare_one([np.array([1, 2]), np.array([3])], [np.array([1, 2]), np.array([3, 4])])
    assert (found.agreement, found.shape_mismatches) == (0.5, 1)


def test_empty_tensors_compare() -> None:
    empty = [np.zeros((0, 4), np.float32)] * 2
    found = compare_one(empty, empty)
    assert (found.bit_equal, found.elements, found.sqnr_db, found.close) == (True, 0, math.inf, 1)
    gone = compare_one(empty, [np.zeros((1, 4), np.float32)] * 2)
    assert not gone.bit_equal
    assert gone.shape_mismatches == 2
    numbers = compare_one([np.zeros(0, np.int64)], [np.zeros(0, np.int64)])
    assert (numbers.agreement, numbers.bit_equal) == (1, True)


def test_scalars_compare() -> None:
    found = compare_one([np.float32(2)], [np.float32(2.2)])
    assert found.max_abs == pytest.approx(0.2, rel=1e-5)
    assert found.worst[0].index == ()


def test_sequences_and_maps_are_compared_part_by_part() -> None:
    ours = [[np.zeros(2, np.float32), np.ones(3, np.float32)]]
    assert compare_one(ours, ours).bit_equal
    found = compare_one(ours, [[np.zeros(2, np.float32), np.array([1, 1, 4], np.float32)]])
    assert (found.worst[0].index, found.max_abs) == ((1, 2), 3)
    shorter = compare_one(ours, [[np.zeros(2, np.float32)]])
    assert (shorter.shape_mismatches, shorter.worst[0].candidate) == (1, "nothing")
    maps: list[Any] = [[{1: 0.25, 2: 0.75}]]
    assert compare_one(maps, [[{2: 0.75, 1: 0.25}]]).bit_equal
    assert compare_one(maps, maps).dtype == "float32"
    assert compare_one(maps, [[{1: 0.25, 2: 0.5}]]).worst[0].index == (0, "2")
    assert compare_one(maps, [[{1: 0.25, 3: 0.75}]]).shape_mismatches == 2
    assert compare_one(ours, [np.zeros(2, np.float32)]).shape_mismatches == 1


def test_a_feed_without_the_output_leaves_the_variance_over_feeds_open() -> None:
    assert compare_one([Y[0], Y[1]], [Y[1], Y[0]]).sqnr_over_feeds_db is not None
    assert compare_one([Y[0], Y[1], None], [Y[1], Y[0], None]).sqnr_over_feeds_db is None
    ragged = [Y[0], Y[1], Y[2][:, :4]]
    assert compare_one(ragged, [y + 1 for y in ragged]).sqnr_over_feeds_db is None


def test_optionals_are_there_or_not() -> None:
    assert compare_one([None], [None]).bit_equal
    assert compare_one([None], [np.zeros(1, np.float32)]).shape_mismatches == 1
    assert compare_one([np.zeros(1, np.float32)], [None]).shape_mismatches == 1


def test_missing_added_and_reordered_outputs_are_noted() -> None:
    values = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    comparer = Comparer(["a", "b"], ["a", "c"])
    comparer.add(values, {"a": values["a"], "c": values["b"]}, "feed")
    comparison = comparer.result()
    assert (comparison.missing, comparison.added, list(comparison.outputs)) == (("b",), ("c",), ["a"])
    assert not comparison.bit_equal
    assert Comparer(["a", "b"], ["b", "a"]).result().reordered
    assert not Comparer(["a", "b"], ["a", "b"]).result().reordered


def test_a_session_and_its_recorded_outputs_compare_alike() -> None:
    reference = record(Y)
    candidate = Session(build_bytes("f (float[N,C] x) => (float[N,C] y) { t = Neg(x)\n y = Neg(t) }"))
    seen: list[tuple[int, int]] = []
    running = compare(reference, candidate, progress=lambda done, total: seen.append((done, total)))
    assert running.bit_equal
    assert (running.feeds, running.elements) == (8, 80)
    assert seen[-1] == (8, 8)
    recorded = RecordedOutputs(candidate, reference.feeds)
    assert compare(reference, recorded) == running
    with pytest.raises(ValueError, match="different feeds"):
        compare(reference, RecordedOutputs(candidate, reference.feeds.take(3)))


def test_a_session_that_errs_is_seen() -> None:
    broken = Session(build_bytes("f (float[N,C] x) => (float[N,C] y) { y = Neg(x) }"))
    found = compare(record(Y), broken).outputs["y"]
    assert found.sqnr_db is not None
    assert found.sqnr_db < 0
    assert found.cosine == pytest.approx(-1)


def test_min_sqnr_is_of_the_worst_float_output() -> None:
    comparer = Comparer(["a", "b", "n"], ["a", "b", "n"])
    numbers = np.arange(3)
    comparer.add({"a": Y[0], "b": Y[0], "n": numbers}, {"a": Y[0], "b": -Y[0], "n": numbers}, "feed")
    comparison = comparer.result()
    assert comparison.min_sqnr_db == comparison.outputs["b"].sqnr_db
    assert compare_values([numbers], [numbers]).min_sqnr_db is None
