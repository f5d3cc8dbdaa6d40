from __future__ import annotations

import math

import pytest

from onnxopt.report import MetricFigures, quantities


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (380_123, "380.1 kB"),
        (1_468_055, "1.47 MB"),
        (25 * 10**8, "2.50 GB"),
    ],
)
def test_size(number: int, text: str) -> None:
    assert quantities.size(number) == text


def test_change() -> None:
    assert quantities.change(100, 26) == "-74.0 %"
    assert quantities.change(100, 100) == "same"
    assert quantities.change(0, 3) == "new"


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23 ms"), (0.0655, "0.0655 ms"), (123.4, "123 ms"), (0.0, "0.00 ms")]
)
def test_milliseconds_show_three_digits(value: float, text: str) -> None:
    assert quantities.milliseconds(value) == text


def test_a_share_short_of_one_is_never_shown_as_all() -> None:
    assert quantities.share(0.999999) == "99.99 %"
    assert quantities.share(1.0) == "100 %"
    assert quantities.share(None) == ""


def test_decibels() -> None:
    assert quantities.decibels(math.inf) == "exact"
    assert quantities.decibels(28.44) == "28.4 dB"


def test_shares_change_by_points_and_other_metrics_by_their_own_unit() -> None:
    share = MetricFigures("top1", 0.9, 0.895, 0.005, True, True, 10)
    error = MetricFigures("mse", 0.5, 0.75, 0.25, False, False, 10)
    assert quantities.drop(share) == "-0.50 pt"
    assert quantities.metric(share, 0.895) == "89.50 %"
    assert quantities.drop(error) == "+0.25"
    assert quantities.metric(error, 0.123456) == "0.1235"


def test_names_are_cut_in_the_middle() -> None:
    assert quantities.shortened("short", 10) == "short"
    cut = quantities.shortened("abcdefghijklmnop", 10)
    assert cut == "abc...mnop"
    assert len(cut) == 10


def test_layers() -> None:
    assert [quantities.layers(number) for number in (0, 1, 1200)] == ["0 layers", "1 layer", "1,200 layers"]
    assert quantities.layers(1, "quantized") == "1 quantized layer"
