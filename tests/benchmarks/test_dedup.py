"""benchmarks.compression.dedup, on a model small enough for a test."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.compression import dedup
from benchmarks.compression.dedup import Figures, command, measured, row, write
from onnxopt.model import load


@pytest.mark.parametrize("external", [False, True])
def test_half_of_the_model_are_duplicates_and_ours_finds_them(tmp_path: Path, external: bool) -> None:
    path = write(tmp_path, 17, external)
    weights = [constant.data for constant in load(path).constants()]
    assert len(weights) == 4
    assert len({data.digest() for data in weights}) == 2
    args = argparse.Namespace(rounds=1, peers=None, external=external)
    figures = measured(path, dedup.OURS, args)
    assert not figures.problem
    assert figures.equal
    size = sum(each.stat().st_size for each in tmp_path.iterdir())
    assert figures.size / size == pytest.approx(0.5, abs=0.01)
    assert row("dedup", figures, size).count("|") == 10


def test_a_tool_that_fails_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, 8, external=False)
    args = argparse.Namespace(rounds=1, peers=Path("/bin/false"), external=False)
    assert command("onnxsim", path, tmp_path / "out.onnx", args)[0] == "/bin/false"
    figures = measured(path, "onnxsim", args)
    assert "failed" in figures.problem
    assert "failed" in row("onnxsim", figures, 1)


def test_ratios_are_taken_in_each_round() -> None:
    figures = Figures([{"run": 1.0, "read": 2.0}, {"run": 6.0, "read": 3.0}, {"run": 4.0, "read": 4.0}])
    assert figures.ratio("read") == 1.0
    assert figures.median("run") == 4.0
