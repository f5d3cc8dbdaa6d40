from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnxopt.errors import UsageError
from onnxopt.runtime.latency import Latency
from onnxopt.runtime.loads import Memory
from onnxopt.verification import (
    CHANGE,
    Budget,
    Measured,
    MetricChange,
    Verdict,
    check_outputs,
    judge,
    metric_names,
    parse,
    parse_all,
)
from tests.verification.builders import compare_values, random_outputs

Y = random_outputs(8, (1, 100))


@pytest.mark.parametrize(
    ("kind", "text", "target", "limit", "unit"),
    [
        ("max_drop", "top1=0.5pt", "top1", 0.005, "pt"),
        ("max_drop", "top1=1%", "top1", 0.01, "%"),
        ("max_drop", "top1=0.03", "top1", 0.03, ""),
        ("max_drop", "top1=30pt", "top1", 0.3, "pt"),
        ("max_drop", "nll=0.5", "nll", 0.5, ""),
        ("max_drop", "0.5pt", "", 0.005, "pt"),
        ("max_drop", "top1@logits = 1 pt", "top1@logits", 0.01, "pt"),
        ("min_sqnr", "20dB", "", 20, "dB"),
        ("min_sqnr", "20", "", 20, ""),
        ("min_sqnr", "save/scale_0.tmp_1=30dB", "save/scale_0.tmp_1", 30, "dB"),
        ("min_agreement", "99%", "", 0.99, "%"),
        ("min_agreement", "0.99", "", 0.99, ""),
        ("max_size", "0.35x", "", 0.35, "x"),
        ("max_size", "35%", "", 0.35, "%"),
        ("max_size", "5MB", "", 5e6, "MB"),
        ("max_size", "1.5 MiB", "", 1.5 * 2**20, "MiB"),
        ("max_size", "-65%", "", 0.35, CHANGE),
        ("max_size", "+5%", "", 1.05, CHANGE),
        ("max_compressed", "4 MB", "", 4e6, "MB"),
        ("max_compressed", "-60%", "", 0.4, CHANGE),
        ("max_memory", "50MB", "", 5e7, "MB"),
        ("max_memory", "-100%", "", 0, CHANGE),
        ("max_load", "+10%", "", 1.1, CHANGE),
        ("max_load", "0.2s", "", 200, "s"),
        ("max_latency", "1.05x", "", 1.05, "x"),
        ("max_latency", "-20%", "", 0.8, CHANGE),
        ("max_latency", "3ms", "", 3, "ms"),
        ("max_abs", "1e-3", "", 1e-3, ""),
        ("max_relative", "y=.5%", "y", 0.005, "%"),
    ],
)
def test_parse(kind: str, text: str, target: str, limit: float, unit: str) -> None:
    (budget,) = parse(kind, text)
    assert (budget.kind, budget.target, budget.unit) == (kind, target, unit)
    assert budget.limit == pytest.approx(limit)


def test_parse_takes_lists_mappings_and_numbers() -> None:
    expected = parse("max_drop", "top1=0.5pt") + parse("max_drop", "nll=0.02")
    assert [b.limit for b in parse("max_drop", "top1=0.5pt,nll=0.02")] == [b.limit for b in expected]
    assert parse("max_drop", ["top1=0.5pt", "nll=0.02"]) == expected
    assert parse("max_drop", {"top1": "0.5pt", "nll": 0.02}) == expected
    assert parse("min_sqnr", 20)[0].limit == 20
    budgets = parse_all({"min_sqnr": 20, "max_size": None, "max_drop": {"top1": "1%", "nll": 1}})
    assert [budget.name for budget in budgets] == ["min_sqnr", "max_drop[top1]", "max_drop[nll]"]
    assert metric_names(budgets) == ["top1", "nll"]


@pytest.mark.parametrize(
    ("kind", "text", "cause", "remedy"),
    [
        ("max_dropp", "top1=1pt", "unknown budget", "max_drop"),
        ("max_drop", "topp1=1pt", "unknown metric 'topp1'", "top1"),
        ("max_drop", "top1=1dB", "can't be given in 'dB'", "pt"),
        ("max_drop", "top1=", "no number", "top1=0.5pt"),
        ("max_drop", "top1=much", "no number", "top1=0.5pt"),
        ("max_drop", "nll=1pt", "points are for metrics between 0 and 1", "nll=0.02"),
        ("max_drop", "top1=1", "can't fail", "0.5pt"),
        ("max_drop", "top1=100pt", "can't fail", "0.5pt"),
        ("max_drop", "top1=-1pt", "negative", "0 or more"),
        ("max_drop", "top1=0.5", "this means 50 points", "top1=0.5pt for 0.5 points, or 50pt"),
        ("max_drop", "auc=0.2", "this means 20 points", "auc=0.2pt"),
        ("max_size", "5", "given as a plain number", "5MB"),
        ("max_size", "5Mb", "'Mb'", "MB"),
        ("max_size", "a=5MB", "takes no name", "5MB"),
        ("max_size", "-5MB", "negative", "0 or more"),
        ("max_size", "-101%", "nothing shrinks by more than 100 %", "-60%"),
        ("max_size", "-0.5x", "negative", "0 or more"),
        ("max_compressed", "4", "given as a plain number", "5MB"),
        ("max_memory", "5ms", "'ms'", "MB"),
        ("max_load", "5MB", "'MB'", "ms"),
        ("max_memory", "a=5MB", "takes no name", "50MB"),
        ("min_agreement", "-99%", "negative", "0 or more"),
        ("max_latency", "1.05", "plain number", "1.05x"),
        ("min_agreement", "99", "can't exceed 1", "99%"),
        ("min_sqnr", "20x", "'x'", "dB"),
        ("max_abs", "1e999", "not finite", "1e-3"),
        ("max_abs", "nan", "no number", "1e-3"),
    ],
)
def test_what_can_not_be_read_is_refused(kind: str, text: str, cause: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        parse(kind, text)
    assert remedy in caught.value.remedy


def test_budgets_on_outputs_that_are_not_there_are_refused() -> None:
    check_outputs(parse("min_sqnr", "logits=20") + parse("max_drop", "top1@logits=1pt,0.5pt"), ["logits"])
    check_outputs(parse("max_size", "5MB"), [])
    for kind, text in (("min_sqnr", "logit=20"), ("max_abs", "logit=1"), ("max_drop", "top1@logit=1pt")):
        with pytest.raises(UsageError, match="no output 'logit'") as caught:
            check_outputs(parse(kind, text), ["logits", "boxes"])
        assert caught.value.remedy == "did you mean 'logits'?"


def verdict(kind: str, text: str, **measured: Any) -> Verdict:
    (found,) = judge(parse(kind, text), Measured(**measured))
    return found


def change(reference: float, candidate: float, *, higher: bool = True, share: bool = True) -> dict[str, MetricChange]:
    name = "top1" if higher else "nll"
    return {name: MetricChange(name, higher, reference, candidate, share)}


@pytest.mark.parametrize(
    ("text", "reference", "candidate", "passed"),
    [
        ("top1=0.5pt", 0.875, 0.870, True),
        ("top1=0.5pt", 0.875, 0.8699, False),
        ("top1=0.5pt", 0.875, 0.9, True),
        ("top1=0pt", 0.875, 0.875, True),
        ("top1=0pt", 0.875, 0.8749, False),
        ("top1=1%", 0.8, 0.792, True),
        ("top1=1%", 0.8, 0.7919, False),
        ("top1=0.03", 0.9, 0.87, True),
        ("top1=0.03", 0.9, 0.869, False),
        ("top1=1%", 0.0, 0.0, True),
        ("top1=0.5pt", 0.875, math.nan, False),
        ("top1=1%", 0.875, math.nan, False),
    ],
)
def test_a_drop_up_to_the_limit_passes(text: str, reference: float, candidate: float, passed: bool) -> None:
    found = verdict("max_drop", text, metrics=change(reference, candidate))
    assert found.passed is passed
    assert found.name == "max_drop[top1]"
    assert f"{reference:.6g} became" in found.reason


def test_a_drop_of_a_loss_is_a_rise() -> None:
    assert verdict("max_drop", "nll=0.02", metrics=change(0.5, 0.52, higher=False, share=False)).passed
    failed = verdict("max_drop", "nll=0.02", metrics=change(0.5, 0.53, higher=False, share=False))
    assert not failed.passed
    assert failed.measured == pytest.approx(0.03)
    assert not verdict("max_drop", "nll=1%", metrics=change(0.0, 0.1, higher=False, share=False)).passed


def test_a_drop_without_a_name_is_for_every_metric() -> None:
    metrics = {**change(0.9, 0.8), **change(0.5, 0.5, higher=False)}
    verdicts = judge(parse("max_drop", "1%"), Measured(metrics=metrics))
    assert [(found.name, found.passed) for found in verdicts] == [("max_drop[top1]", False), ("max_drop[nll]", True)]


def test_points_of_a_metric_beyond_one_fail_with_the_reason(tmp_path: Any) -> None:
    (tmp_path / "m.py").write_text("def map50(outputs, labels): ...")
    metrics = {"map50": MetricChange("map50", True, 56.0, 55.9, share=False)}
    found = verdict("max_drop", f"{tmp_path / 'm.py'}:map50=3pt", metrics=metrics)
    assert (found.passed, found.measured) == (False, None)
    assert "points are for metrics between 0 and 1" in found.reason
    assert verdict("max_drop", f"{tmp_path / 'm.py'}:map50=0.2", metrics=metrics).passed


COMPARISON = compare_values(Y, [y + np.float32(0.125) for y in Y])
SQNR = COMPARISON.outputs["y"].sqnr_db or 0.0


@pytest.mark.parametrize(
    ("kind", "text", "passed"),
    [
        ("min_sqnr", f"{SQNR}dB", True),
        ("min_sqnr", f"{SQNR + 0.01}dB", False),
        ("min_sqnr", f"y={SQNR}", True),
        ("max_abs", f"{COMPARISON.outputs['y'].max_abs}", True),
        ("max_abs", f"{COMPARISON.outputs['y'].max_abs * 0.999}", False),
        ("max_relative", f"{COMPARISON.outputs['y'].relative}", True),
        ("max_relative", f"{COMPARISON.outputs['y'].relative * 0.999}", False),
        ("min_agreement", "100%", True),
    ],
)
def test_figures_of_outputs_equal_to_the_limit_pass(kind: str, text: str, passed: bool) -> None:
    found = verdict(kind, text, comparison=COMPARISON)
    assert found.passed is passed
    assert "'y'" in found.reason


def test_agreement_of_discrete_and_of_reshaped_outputs() -> None:
    numbers = compare_values([np.arange(4)], [np.array([0, 1, 2, 9])])
    assert verdict("min_agreement", "0.75", comparison=numbers).passed
    assert not verdict("min_agreement", "0.76", comparison=numbers).passed
    assert not verdict("min_agreement", "0.5", comparison=compare_values(Y, [y.T for y in Y])).passed


def test_broken_outputs_fail_every_limit() -> None:
    broken = compare_values(Y, [np.full_like(y, np.nan) for y in Y])
    for kind, text in (("min_sqnr", "-99dB"), ("max_abs", "1e30"), ("max_relative", "1e30"), ("min_agreement", "0.01")):
        assert not verdict(kind, text, comparison=broken).passed


@pytest.mark.parametrize(
    ("text", "sizes", "passed"),
    [
        ("0.35x", (1000, 350), True),
        ("0.35x", (1000, 351), False),
        ("35%", (1000, 350), True),
        ("1kB", (5, 1000), True),
        ("1kB", (5, 1001), False),
        ("1KiB", (5, 1024), True),
        ("-65%", (1000, 350), True),
        ("-65%", (1000, 351), False),
        ("+10%", (1000, 1100), True),
        ("+10%", (1000, 1101), False),
        ("0.35x", (0, 10), False),
    ],
)
def test_sizes(text: str, sizes: tuple[int, int], passed: bool) -> None:
    assert verdict("max_size", text, sizes=sizes).passed is passed
    assert verdict("max_compressed", text, compressed=sizes).passed is passed
    assert verdict("max_memory", text, memory=Memory(*sizes, 0, 8)).passed is passed


def test_memory_near_the_limit_is_told_with_its_noise() -> None:
    memory = Memory(1000, 480, 30, 8)
    for text, passed, near in (
        ("0.5x", True, True),
        ("0.4x", False, False),
        ("470B", False, True),
        ("1kB", True, False),
    ):
        found = verdict("max_memory", text, memory=memory)
        assert found.passed is passed
        assert ("within 30 B of noise of the limit" in found.reason) is near


def test_loading_is_judged_as_latency_is_and_few_rounds_are_no_interval() -> None:
    load = Latency(ratio=1.05, low=0.9, high=1.2, pairs=4, reference_ms=2.0, candidate_ms=2.1)
    assert verdict("max_load", "+5%", load=load).passed
    assert not verdict("max_load", "+4%", load=load).passed
    assert not verdict("max_load", "2ms", load=load).passed
    assert verdict("max_load", "1.1x", load=load).reason.startswith("range 0.900x to 1.200x of 4 rounds")


def test_why_a_figure_is_missing_is_told() -> None:
    found = verdict("max_memory", "1MB", unmeasured={"max_memory": "this system does not tell it"})
    assert (found.passed, found.reason) == (False, "not measured: this system does not tell it")


def test_latency_is_judged_by_the_median_and_the_interval_is_told() -> None:
    latency = Latency(ratio=1.05, low=0.9, high=1.2, pairs=20, reference_ms=2.0, candidate_ms=2.1)
    found = verdict("max_latency", "1.05x", latency=latency)
    assert (found.passed, found.measured) == (True, 1.05)
    assert "0.900x to 1.200x" in found.reason
    assert "holds the limit" in found.reason
    assert not verdict("max_latency", "1.04x", latency=latency).passed
    assert "holds the limit" not in verdict("max_latency", "1.5x", latency=latency).reason
    assert verdict("max_latency", "2.1ms", latency=latency).passed
    assert not verdict("max_latency", "2.09ms", latency=latency).passed


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("max_drop", "top1=1pt"),
        ("max_drop", "1pt"),
        ("max_size", "1MB"),
        ("max_latency", "1x"),
        ("max_compressed", "1MB"),
        ("max_memory", "1MB"),
        ("max_load", "1x"),
        ("min_sqnr", "1dB"),
        ("max_abs", "1"),
        ("min_agreement", "0.1"),
    ],
)
def test_what_was_not_measured_fails_and_says_so(kind: str, text: str) -> None:
    found = verdict(kind, text)
    assert (found.passed, found.measured) == (False, None)
    assert found.reason.startswith("not measured")


def test_outputs_that_do_not_exist_or_have_no_such_figure_fail() -> None:
    found = verdict("min_sqnr", "z=1dB", comparison=COMPARISON)
    assert (found.passed, found.measured) == (False, None)
    assert "no output 'z'" in found.reason
    numbers = compare_values([np.arange(4)], [np.arange(4)])
    assert "no output has a figure" in verdict("min_sqnr", "1dB", comparison=numbers).reason
    assert "no output was compared" in verdict("min_sqnr", "1dB", comparison=compare_values([], [])).reason


def test_budgets_know_their_names() -> None:
    assert Budget("max_drop", "top1", 0.0, "pt", "top1=0pt").name == "max_drop[top1]"
    assert Budget("max_size", "", 1.0, "x", "1x").name == "max_size"
