from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.errors import NothingCompared
from onnxopt.verification import Comparer, holds, reordering, rounding_tolerance, warnings
from onnxopt.verification.tolerances import EFFECTS
from tests.verification.builders import compare_values, random_outputs

Y = random_outputs(8, (1, 100))
LARGEST = max(float(np.abs(y).max()) for y in Y)


def shifted(amount: float) -> list[Any]:
    """Y with one element changed by exactly `amount`, as float64 so that the test sets the boundary."""
    wide = [y.astype(np.float64) for y in Y]
    wide[2][0, 7] += amount
    return wide


@pytest.mark.parametrize("effect", EFFECTS)
def test_equal_outputs_hold_every_promise(effect: str) -> None:
    assert holds(compare_values(Y, [y.copy() for y in Y]), effect) == []


def damaged(change: Callable[[Any], Any]) -> list[Any]:
    return [*Y[:3], change(Y[3].copy()), *Y[4:]]


def with_value(value: float) -> Callable[[Any], Any]:
    def change(y: Any) -> Any:
        y[0, 5] = value
        return y

    return change


BROKEN: dict[str, list[Any]] = {
    "nan": damaged(with_value(np.nan)),
    "infinite": damaged(with_value(np.inf)),
    "permuted": [y[:, ::-1] for y in Y],
    "off by one": [np.roll(y, 1, axis=1) for y in Y],
    "other feed": [*Y[1:], Y[0]],
    "negated": [-y for y in Y],
    "dtype": [y.astype(np.float16) for y in Y],
    "transposed": [y.T for y in Y],
    "rank": [y[0] for y in Y],
    "saturated": [np.clip(y, -0.01, 0.01) for y in Y],
    "zero": [np.zeros_like(y) for y in Y],
    "constant": [np.full_like(y, 1) for y in Y],
    "scaled": [y * 10 for y in Y],
    "noise": random_outputs(8, (1, 100), seed=9),
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("damage", BROKEN)
def test_broken_outputs_break_every_promise(damage: str, effect: str) -> None:
    failures = holds(compare_values(Y, BROKEN[damage]), effect)
    assert [failure.output for failure in failures] == ["y"]
    assert "'y'" in failures[0].reason


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a"], "'b' is missing"),
        (["a", "b", "c"], "'c' was added"),
        (["a", "c"], "'b' is gone, 'c' is in its place"),
        (["b", "a"], "another order"),
    ],
)
def test_a_changed_signature_breaks_every_promise(names: list[str], reason: str, effect: str) -> None:
    comparer = Comparer(["a", "b"], names)
    comparer.add(dict.fromkeys("ab", Y[0]), dict.fromkeys("abc", Y[0]), "feed")
    failures = holds(comparer.result(), effect)
    assert len(failures) == 1
    assert failures[0].rule == "signature"
    assert reason in failures[0].reason


def test_one_bit_breaks_exact_and_not_rounding() -> None:
    comparison = compare_values(Y, [np.nextafter(y, np.float32(9)) for y in Y])
    assert holds(comparison, "exact")[0].rule == "exact"
    assert "800 of 800 elements differ" in holds(comparison, "exact")[0].reason
    assert holds(comparison, "rounding") == []
    assert holds(comparison, "lossy") == []


def test_the_sign_of_zero_breaks_exact_and_is_said() -> None:
    comparison = compare_values([np.zeros(3, np.float32)], [-np.zeros(3, np.float32)])
    assert "only in the sign of zero" in holds(comparison, "exact")[0].reason
    assert holds(comparison, "rounding") == []


def test_rounding_is_relative_to_the_largest_element_and_the_limit_passes() -> None:
    ours = [np.array([[4.0, 0.0]], np.float64)]
    limit = rounding_tolerance("float64") * 4.0

    def off(amount: float) -> Any:
        return holds(compare_values(ours, [ours[0] + np.array([[0.0, amount]])]), "rounding")

    assert rounding_tolerance("float64") == 1e-13
    assert off(limit) == []
    failure = off(float(np.nextafter(limit, 1)))[0]
    assert (failure.rule, failure.limit) == ("rounding", 1e-13)
    assert "feed[0][0][1]" in failure.reason


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 4e-3), (ml_dtypes.bfloat16, 3.2e-2), (np.float64, 1e-13)]
)
def test_rounding_tolerances_by_type(dtype: Any, tolerance: float) -> None:
    # A power of two far above the tolerance's step keeps the sum representable in every type.
    ours = [np.array([[1.0, 0.0]]).astype(dtype)]
    inside = [np.array([[1.0, tolerance * 0.98]]).astype(dtype)]
    outside = [np.array([[1.0, tolerance * 1.02]]).astype(dtype)]
    assert holds(compare_values(ours, inside), "rounding") == []
    assert holds(compare_values(ours, outside), "rounding") != []


def test_a_narrow_model_with_wide_outputs_may_round_more() -> None:
    comparison = compare_values(Y, [y * np.float32(1.001) for y in Y])
    assert holds(comparison, "rounding")
    assert holds(comparison, "rounding", compute_dtype="float16") == []
    assert rounding_tolerance("float16", "float32") == 4e-3


def test_flushed_denormals_are_rounding() -> None:
    tiny = [np.array([1e-40], np.float32)]
    assert holds(compare_values(tiny, [np.zeros(1, np.float32)]), "rounding") == []
    assert holds(compare_values([np.zeros(1, np.float32)], [np.array([1e-30], np.float32)]), "rounding")


def test_discrete_outputs_are_equal_or_half_equal() -> None:
    ours = [np.arange(4)]
    for effect in ("exact", "rounding"):
        assert holds(compare_values(ours, [np.array([0, 1, 2, 4])]), effect)
    assert holds(compare_values(ours, [np.array([0, 1, 9, 9])]), "lossy") == []
    failure = holds(compare_values(ours, [np.array([0, 9, 9, 9])]), "lossy")[0]
    assert (failure.measured, failure.limit) == (0.25, 0.5)


def noisy(sqnr_db: float) -> list[Any]:
    """Y and an error of exactly this SQNR."""
    y = np.concatenate(Y).astype(np.float64)
    error = np.sqrt(y.var() / 10 ** (sqnr_db / 10))
    signs = np.where(np.arange(100) % 2, 1.0, -1.0)
    return [value + error * signs for value in Y]


@pytest.mark.parametrize(
    ("sqnr_db", "passes", "warned"),
    [(2.99, False, False), (3.01, True, True), (9.99, True, True), (10.01, True, False)],
)
def test_the_floor_of_lossy_passes_and_the_warning_above_it(sqnr_db: float, passes: bool, warned: bool) -> None:
    comparison = compare_values([y.astype(np.float64) for y in Y], noisy(sqnr_db))
    assert comparison.outputs["y"].sqnr_db == pytest.approx(sqnr_db)
    assert (holds(comparison, "lossy") == []) == passes
    assert bool(warnings(comparison)) == warned


def test_data_dependent_shapes_are_judged_by_what_is_close() -> None:
    half = [*[y[:, :50] for y in Y[:4]], *Y[4:]]
    assert holds(compare_values(Y, half), "lossy") == []
    worse = [*[y[:, :50] for y in Y[:5]], *Y[5:]]
    failure = holds(compare_values(Y, worse), "lossy")[0]
    assert "elements are close" in failure.reason
    assert holds(compare_values(Y, half), "rounding")


def test_an_output_that_ignores_its_inputs_is_warned_about() -> None:
    bias = np.linspace(-30, 30, 100, dtype=np.float32)
    ours = [y + bias for y in Y]
    comparison = compare_values(ours, [np.mean(ours, axis=0)] * 8)
    assert holds(comparison, "lossy") == []
    assert "hardly follows its inputs" in warnings(comparison)[0]


def test_nothing_compared_is_no_success() -> None:
    for comparer in (Comparer(["y"], ["y"]), Comparer([], [])):
        with pytest.raises(NothingCompared):
            holds(comparer.result(), "exact")


def test_unknown_effects_are_refused() -> None:
    with pytest.raises(ValueError, match="'Exact'"):
        holds(compare_values(Y, Y), "Exact")


def narrow(amount: float) -> list[Any]:
    return [y.astype(np.float32) for y in shifted(amount)]


def test_a_model_the_runtime_itself_reorders_that_much_may_round_more() -> None:
    output = compare_values(Y, narrow(2e-4 * LARGEST))
    name = next(iter(output.outputs))
    assert holds(output, "rounding")
    assert holds(output, "rounding", noise={name: 1e-4}) == []
    assert holds(output, "rounding", noise={name: 1e-5})
    assert holds(output, "rounding", noise={"another": 1e-4})


def test_however_noisy_the_runtime_two_digits_are_never_lost() -> None:
    output = compare_values(Y, narrow(0.02 * LARGEST))
    name = next(iter(output.outputs))
    assert holds(output, "rounding", noise={name: 1.0})


def test_reordering_is_the_relative_difference_of_float_outputs() -> None:
    found = reordering(compare_values(Y, narrow(1e-3 * LARGEST)))
    assert list(found.values()) == [pytest.approx(1e-3, rel=1e-3)]
