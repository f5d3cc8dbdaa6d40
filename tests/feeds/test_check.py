from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.errors import FeedError
from onnxopt.feeds.check import check_inputs, to_inputs
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, RATE, X, row

GOOD: dict[str, Any] = {"x": row(1, 2, 3), "ids": np.zeros((1, 5), np.int64)}


def check(values: dict[str, Any], ports: list[Port], **options: bool) -> dict[str, Any]:
    inputs = to_inputs(values, ports)
    check_inputs(inputs, ports, "feed.npz", **options)
    return inputs


def test_what_fits_passes() -> None:
    check(GOOD, [X, IDS])
    check({**GOOD, "x": np.zeros((7, 3), ">f4")}, [X, IDS])
    check({"sr": np.array(16000)}, [RATE])


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        ({"idx": GOOD["ids"]}, "no input 'idx'; its inputs are x: float32", "did you mean 'ids'?"),
        ({"x": None}, "no value for x: float32", "every input"),
        ({"x": row(1, 2, 3).astype(np.float64)}, "input 'x': expected float32, got float64", "astype('float32')"),
        ({"ids": np.zeros((1, 5), np.int32)}, "input 'ids': expected int64, got int32", "astype('int64')"),
        ({"x": np.array([["a", "b", "c"]])}, "expected float32, got string", "astype"),
        ({"x": row(1, 2, 3)[0]}, "expected rank 2 [N,3], got rank 1 [3]", "array[None]"),
        ({"x": row(1, 2, 3)[None]}, "expected rank 2 [N,3], got rank 3 [1,1,3]", "reshape it to [N,3]"),
        ({"x": row(1, 2)}, "expected 3 at axis 1 of [N,3], got 2 in [1,2]", "reshape"),
        ({"x": [1.0, 2.0]}, "expected float32, got float64", "astype"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], cause: str, remedy: str) -> None:
    values = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(FeedError) as caught:
        check(values, [X, IDS])
    assert caught.value.cause.startswith("feed.npz: ")
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_defaults_may_be_left_out() -> None:
    weights = Port("w", np.dtype(np.float32), (3,), required=False)
    check(GOOD, [X, IDS, weights])
    check({**GOOD, "w": np.zeros(3, np.float32)}, [X, IDS, weights])
    with pytest.raises(FeedError, match="expected 3 at axis 0"):
        check({**GOOD, "w": np.zeros(4, np.float32)}, [X, IDS, weights])


def test_nan_and_infinity_are_values_unless_refused() -> None:
    values = {"x": row(1, np.nan, np.inf)}
    check(values, [X])
    with pytest.raises(FeedError, match=r"feed.npz: input 'x' holds NaN"):
        check(values, [X], reject_nan=True)
    check({"x": row(1, 2, np.inf)}, [X], reject_nan=True)


def test_raw_bytes_become_bfloat16_without_a_cast() -> None:
    port = Port("x", np.dtype(ml_dtypes.bfloat16), ("N",))
    values = np.array([1.5, -2]).astype(ml_dtypes.bfloat16)
    got = check({"x": values.view("V2")}, [port])["x"]
    assert got.dtype == port.dtype
    assert got.astype(np.float32).tolist() == [1.5, -2]
    with pytest.raises(FeedError, match="expected bfloat16, got float16"):
        check({"x": np.zeros(2, np.float16)}, [port])


def test_strings_of_any_kind_feed_a_string_input() -> None:
    port = Port("s", np.dtype(object), (None,))
    for array in (np.array(["a", "b"]), np.array(["a"], object)):
        check({"s": array}, [port])
    with pytest.raises(FeedError, match="expected string, got int64"):
        check({"s": np.array([1])}, [port])


def test_sequences_are_checked_element_by_element() -> None:
    port = Port("parts", np.dtype(np.float32), None, "sequence")
    check({"parts": [np.zeros(2, np.float32), np.zeros((1, 3), np.float32)]}, [port])
    with pytest.raises(FeedError, match="input 'parts', element 1: expected float32, got int64"):
        check({"parts": [np.zeros(2, np.float32), np.array([1])]}, [port])
    with pytest.raises(FeedError, match="expected parts: sequence of float32, got ndarray"):
        check({"parts": np.zeros(2, np.float32)}, [port])


def test_optionals_take_none() -> None:
    port = Port("x", np.dtype(np.float32), (None,), "optional", required=False)
    check({"x": None}, [port])
    check({}, [port])
    with pytest.raises(FeedError, match="got None"):
        check({"x": None}, [X])
