from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt import api
from onnxopt.errors import NothingCompared, PassError, UsageError
from onnxopt.pipeline import VerdictError
from onnxopt.report import Verdict
from tests.pipeline.breaking_passes import DropIdentity, Round, SeeStatistics
from tests.pipeline.builders import Example, bad, run


def test_a_broken_budget_writes_nothing_unless_told_to_keep_it(example: Example) -> None:
    model, _ = example
    output = model.with_name("small.onnx")
    with pytest.raises(VerdictError) as caught:
        run(example, Round(step=0.3), output=output, min_sqnr="60dB")
    refused = caught.value.result
    assert caught.value.exit_code == 1
    assert refused.report.verdict is Verdict.FAILED
    assert refused.report.exit_code == 1
    assert refused.report.budgets[0].passed is False
    assert refused.path is None
    assert sorted(path.name for path in model.parent.iterdir()) == ["data.npz", "net.onnx"]

    kept = run(example, Round(step=0.3), output=output, min_sqnr="60dB", keep_failed=True)
    assert kept.path == model.with_name("small.failed.onnx")
    assert kept.report.exit_code == 1
    assert not output.exists()
    assert kept.path.exists()


def test_a_kept_failure_never_replaces_the_input(example: Example) -> None:
    model, data = example
    source = model.rename(model.with_name("small.failed.onnx"))
    with pytest.raises(UsageError, match="is the input itself"):
        run((source, data), Round(step=0.3), output=model.with_name("small.onnx"), keep_failed=True)


def test_kept_budgets_are_told_with_their_figures(example: Example) -> None:
    report = run(example, Round(step=0.05), max_drop="top1=1pt", min_sqnr="20dB", max_size="1.5x").report
    assert [(budget.name, budget.passed) for budget in report.budgets] == [
        ("max_drop[top1]", True),
        ("min_sqnr", True),
        ("max_size", True),
    ]
    assert report.budgets[0].limit == "<= 1pt"
    assert report.budgets[1].measured.endswith("dB")


def test_a_budget_on_quality_stands_in_place_of_the_floor(example: Example) -> None:
    with pytest.raises(PassError, match="quality floor"):
        run(example, bad("Ruin:factor=0.1"))
    report = run(example, bad("Ruin:factor=0.1"), max_drop="top1=1pt").report
    assert report.verdict is Verdict.PASSED
    assert any("the budgets given decide" in warning for warning in report.warnings)


def test_budgets_are_judged_for_an_unchanged_model_too(example: Example) -> None:
    with pytest.raises(VerdictError, match="max_size"):
        run(example, SeeStatistics(), max_size="0.5x")


def test_the_final_comparison_is_on_the_evaluation_part(example: Example, tmp_path: Path) -> None:
    final = tmp_path / "final.npz"
    np.savez(final, x=np.random.default_rng(3).standard_normal((5, 12)).astype(np.float32))
    report = run(example, Round(step=0.05), evaluate=final).report
    assert report.comparison is not None
    assert report.comparison.samples == 5
    assert report.feeds is not None
    assert report.feeds.evaluate == 5


def test_the_final_rule_follows_what_the_passes_promised(example: Example, tmp_path: Path) -> None:
    def rule(passes: Any, source: Path = example[0]) -> str:
        comparison = run((source, example[1]), passes).report.comparison
        assert comparison is not None
        return comparison.rule

    assert rule(DropIdentity()) == "rounding tolerance"
    assert rule([Round(step=0.05), DropIdentity()]) == "quality floor 3 dB"
    quantized = tmp_path / "quantized.onnx"
    run(example, bad("QuantizeInput"), output=quantized)
    assert rule(DropIdentity(), quantized) == "quality floor 3 dB"


def test_made_up_inputs_are_named_where_the_floor_fails(example: Example) -> None:
    with pytest.raises(PassError) as caught:
        run(example, bad("Ruin"), feeds=None)
    assert "made up" in caught.value.remedy
    with pytest.raises(PassError) as caught:
        run(example, bad("Ruin"))
    assert "milder options" in caught.value.remedy


def test_a_kept_failure_replaces_another_only_when_told_to(example: Example) -> None:
    model, _ = example
    settings = {"output": model.with_name("small.onnx"), "min_sqnr": "60dB", "keep_failed": True}
    kept = run(example, Round(step=0.3), **settings).path
    assert kept is not None
    before = kept.read_bytes()
    with pytest.raises(UsageError, match=r"small\.failed\.onnx exists already"):
        run(example, Round(step=0.2), **settings)
    assert kept.read_bytes() == before
    run(example, Round(step=0.2), **settings, force=True)
    assert kept.read_bytes() != before


@pytest.mark.parametrize("value", [np.zeros((0, 12)), np.full((3, 12), np.nan), np.full((3, 12), np.inf)])
def test_outputs_without_a_number_prove_nothing(example: Example, value: Any) -> None:
    feeds = [{"x": value.astype(np.float32)}] * 4
    for passes in (Round(step=0.05), DropIdentity()):
        with pytest.raises(NothingCompared, match="not one number was compared"):
            run(example, passes, feeds=feeds)
    with pytest.raises(NothingCompared, match="not one number was compared"):
        api.check(example[0], example[0], feeds, latency_seconds=0)


def test_outputs_of_the_original_that_are_not_finite_are_told(example: Example) -> None:
    x = np.ones((4, 12), np.float32)
    x[0] = np.nan
    report = api.check(example[0], example[0], [{"x": x}], latency_seconds=0)
    assert report.warnings == (
        "output 'logits' of the original: 4 of 16 elements are NaN or infinite; only their places count",
    )
    assert api.check(example[0], example[0], [{"x": x[1:]}], latency_seconds=0).warnings == ()


def test_the_summary_names_what_was_held(example: Example) -> None:
    floor = run(example, Round(step=0.05)).report
    assert "held to: quality floor 3 dB" in floor.to_text()
    budgets = run(example, Round(step=0.05), min_sqnr="20dB").report
    assert "held to: budgets given" in budgets.to_text()
    size = run(example, Round(step=0.05), max_size="2x").report
    assert "held to: quality floor 3 dB" in size.to_text()


def test_a_single_feed_is_warned_of_beside_the_verdict(example: Example) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 12)).astype(np.float32)
    feeds = [{"x": value} for value in x]
    told = "one feed calibrates, chooses and judges: the figures hold for that feed alone"
    assert told in run(example, Round(step=0.05), feeds=feeds[:1]).report.warnings
    assert told not in run(example, Round(step=0.05), feeds=feeds).report.warnings
