from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxopt
from onnxopt import api
from onnxopt.errors import BudgetError, ModelError, NothingCompared, UsageError
from onnxopt.feeds import open_feeds
from onnxopt.model import load
from onnxopt.report import Report, Verdict
from onnxopt.runtime import Session
from tests.pipeline.breaking_passes import DropIdentity, Round
from tests.pipeline.builders import classifier, write_example


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, a rounded copy of it, and feeds."""
    model, data = write_example(tmp_path)
    small = tmp_path / "small.onnx"
    api.optimize(model, Round(step=0.1), feeds=data, output=small, latency_seconds=0)
    return model, small, data


def test_the_package_shows_the_api_lazily() -> None:
    code = "import sys, onnxopt; assert 'onnx' not in sys.modules; onnxopt.optimize; assert 'onnx' in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
    assert all(hasattr(onnxopt, name) for name in onnxopt.__all__)
    with pytest.raises(AttributeError):
        _ = onnxopt.optimise


def test_load(tmp_path: Path) -> None:
    model, _ = write_example(tmp_path)
    assert onnxopt.load(model).node_count() == onnxopt.load(str(model)).node_count() == 4
    assert onnxopt.load(onnx.load(model)).opset == 17
    with pytest.raises(UsageError):
        onnxopt.load(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(ModelError):
        onnxopt.load(tmp_path / "bad.onnx")


def test_compare_measures_both_models_on_all_feeds(pair: tuple[Path, Path, Path]) -> None:
    model, small, data = pair
    same = onnxopt.compare(model, model, data)
    assert same.bit_equal
    assert same.feeds == 30
    different = onnxopt.compare(model, small, data)
    assert not different.bit_equal
    output = different.outputs["logits"]
    assert output.sqnr_db is not None
    assert 20 < output.sqnr_db < math.inf
    assert different.outputs["logits"].max_abs == onnxopt.compare(small, model, data).outputs["logits"].max_abs


def test_compare_takes_one_shot_feeds(pair: tuple[Path, Path, Path]) -> None:
    model, small, _ = pair

    def stream() -> Iterator[dict[str, Any]]:
        for at in range(4):
            yield {"x": np.full((2, 12), at, np.float32)}

    assert onnxopt.compare(model, small, stream()).feeds == 4
    assert onnxopt.compare(model, small, list(stream())).feeds == 4


def test_check_gives_a_report(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, small, data = pair
    report = onnxopt.check(small, model, data, {"max_drop": "top1=10pt"}, min_sqnr="20dB", latency_seconds=0.05)
    assert report.command == "check"
    assert report.verdict is Verdict.PASSED
    assert [budget.name for budget in report.budgets] == ["max_drop[top1]", "min_sqnr"]
    assert report.latency is not None
    assert report.candidate is not None
    assert report.candidate.path == str(small)
    assert report.feeds is not None
    assert report.feeds.evaluate == 30
    failed = onnxopt.check(small, model, data, min_sqnr=90, latency_seconds=0, reports=tmp_path / "r.json")
    assert failed.verdict is Verdict.FAILED
    assert failed.exit_code == 1
    assert Report.from_json((tmp_path / "r.json").read_text()) == failed


def test_check_takes_the_evaluation_part_of_a_parted_folder(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, small, data = pair
    folder = tmp_path / "feeds"
    folder.mkdir()
    x = np.load(data)["x"]
    for name, rows in (("fit", x[:20]), ("evaluate", x[20:])):
        np.savez(folder / f"{name}.npz", x=rows)
    report = onnxopt.check(small, model, folder, latency_seconds=0)
    assert report.feeds is not None
    assert (report.feeds.fit, report.feeds.evaluate) == (0, 10)


def test_check_needs_real_inputs(pair: tuple[Path, Path, Path]) -> None:
    model, small, _ = pair
    with pytest.raises(NothingCompared):
        onnxopt.check(small, model)


def test_check_finds_a_candidate_that_fails_to_run(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, _, data = pair
    other = classifier()
    other.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(other, tmp_path / "seven.onnx")
    report = onnxopt.check(tmp_path / "seven.onnx", model, data, latency_seconds=0)
    assert report.verdict is Verdict.FAILED
    assert "expected 7 at axis 0" in report.reason


def test_feeds_may_be_parted_by_the_caller(pair: tuple[Path, Path, Path]) -> None:
    model, _, data = pair
    split = open_feeds([data], Session(load(model)).inputs, seed=3)
    result = onnxopt.optimize(model, DropIdentity(), feeds=split, latency_seconds=0)
    assert result.report.feeds is not None
    assert result.report.feeds.fingerprint == split.evaluate.fingerprint


def test_a_refused_result_is_an_error_that_carries_it(pair: tuple[Path, Path, Path]) -> None:
    model, _, data = pair
    with pytest.raises(BudgetError) as caught:
        onnxopt.optimize(model, Round(step=0.3), feeds=data, max_size="10B", latency_seconds=0)
    assert isinstance(caught.value, api.VerdictError)
    assert caught.value.result.report.budgets[0].name == "max_size"
    assert caught.value.result.model.node_count() == 4


def test_metrics_of_the_users_own(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, _, data = pair
    (tmp_path / "mine.py").write_text("def mean(outputs, labels):\n    return float(outputs[0]['logits'].mean())\n")
    metric = f"{tmp_path}/mine.py:mean"
    report = onnxopt.optimize(model, DropIdentity(), feeds=data, metrics=[metric, "top1"], latency_seconds=0).report
    assert [figures.name for figures in report.metrics] == ["mean", "top1"]
    assert report.metrics[0].drop == 0
