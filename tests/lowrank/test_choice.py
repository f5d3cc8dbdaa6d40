"""Forms beside each other, curves through what was measured, and the order in which layers are split."""

from __future__ import annotations

import itertools

import pytest

from onnxopt.lowrank.choice import Curve, chosen, frontier, path
from onnxopt.lowrank.forms import Form, Work
from onnxopt.lowrank.layers import Kind, Layer
from onnxopt.model import Constant
from tests.passes.quantizing import weight

WHOLE = Work(100.0, 100.0, 100.0)


def form(left: float, error: float, name: str = "factors") -> Form:
    return Form(name, (int(left),), error, Work(left, left, left))


def curve(*forms: Form, points: list[tuple[int, float]] | None = None) -> Curve:
    return Curve(Layer(Constant("w", weight(8, 8)), (), Kind.ROWS), WHOLE, list(forms), points or [])


def test_forms_that_others_beat_are_left_out() -> None:
    forms = [form(80, 0.1), form(60, 0.3), form(70, 0.4), form(60, 0.2, "strips"), form(120, 0.0), form(40, 0.3)]
    kept = frontier(forms, WHOLE, "macs")
    assert [(each.name, each.work.macs, each.error) for each in kept] == [
        ("factors", 80, 0.1),
        ("strips", 60, 0.2),
        ("factors", 40, 0.3),
    ]


def test_errors_follow_what_was_measured_and_between_what_was_predicted() -> None:
    forms = [form(80, 0.1), form(60, 0.2), form(40, 0.4), form(20, 0.8)]
    assert curve(*forms).error(2) == 0.4
    measured = curve(*forms, points=[(1, 0.1), (3, 0.8)])
    assert [measured.error(at) for at in (-1, 0, 1, 3)] == pytest.approx([0, 0.05, 0.1, 0.8])
    assert measured.error(2) == pytest.approx(0.4 * 0.75)


def test_measuring_stops_where_the_outputs_are_lost() -> None:
    found = curve(*(form(90 - at, at + 1.0) for at in range(9)))
    asked: list[int] = []

    def error(at: int) -> float:
        asked.append(at)
        return 0.9

    found.measure(error)
    assert asked == [2]
    assert found.points == [(2, 0.9)]


@pytest.mark.parametrize("wanted", [5.0, 25.0, 60.0, 90.0, 1e9])
def test_greedy_steps_come_close_to_the_best_of_all_choices(wanted: float) -> None:
    curves = [
        curve(form(90, 0.01), form(70, 0.05), form(40, 0.4)),
        curve(form(80, 0.001), form(75, 0.1), form(30, 0.2)),
        curve(form(50, 0.9)),
    ]
    steps = path(curves, "macs", wanted)
    saved = [step.saved for step in steps]
    assert saved == sorted(saved)
    choices = itertools.product(*(range(-1, len(each.forms)) for each in curves))
    most = sum(each.saved(len(each.forms) - 1, "macs") for each in curves)
    best = min(
        sum(each.error(at) for each, at in zip(curves, choice, strict=True))
        for choice in choices
        if sum(each.saved(at, "macs") for each, at in zip(curves, choice, strict=True)) >= min(wanted, most)
    )
    assert steps[-1].saved >= min(wanted, most)
    assert best <= steps[-1].error + 1e-12
    assert steps[-1].error <= 2.1 * best
    total = sum(curves[at].saved(which, "macs") for at, which in chosen(steps).items())
    assert total == pytest.approx(steps[-1].saved)


def test_the_last_step_goes_no_further_than_asked() -> None:
    fine = curve(*(form(100 - at, 0.001 * at) for at in range(1, 60)))
    assert 10 <= path([fine], "macs", 10.0)[-1].saved <= 11
