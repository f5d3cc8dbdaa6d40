"""The figures of benchmarks.sparsity, on a model small enough to know them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sparsity import OURS, Bench, lines, outputs, prepared, relative_error, zeros
from tests.passes.quantizing import normal, parse, weight


class Task:
    """A task that measures nothing."""

    def run(self, path: Path) -> dict[str, float]:
        assert path.is_file()
        return {"top1": 0.5, "seconds": 1.0}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    model = parse(
        "g (float[n, 40] x) => (float[n, 30] y) { a = MatMul(x, w) y = Add(a, b) }",
        {"w": weight(40, 30), "b": normal(30)},
    )
    model.save(tmp_path / "model.onnx")
    prepared(tmp_path / "model.onnx", tmp_path / "ready.onnx")
    samples: list[dict[str, Any]] = [{"x": normal(64, 40, seed=seed)} for seed in range(3)]
    exact = outputs(tmp_path / "ready.onnx", samples[:1])
    return Bench(Task(), tmp_path / "ready.onnx", samples[1:], samples[:1], exact)


def test_errors_are_relative_to_all_outputs_together() -> None:
    exact = [[np.array([3.0, 0.0])], [np.array([4.0])]]
    assert relative_error(exact, exact) == 0
    assert relative_error(exact, [[np.array([3.0, 0.5])], [np.array([4.0])]]) == pytest.approx(0.1)
    assert np.isnan(relative_error([[]], [[]]))


@pytest.mark.parametrize("asked", ["0.5", "2:4"])
def test_there_is_a_line_for_each_criterion(bench: Bench, tmp_path: Path, asked: str) -> None:
    found = list(lines(bench, asked, tmp_path, argparse.Namespace(onnxsim=None, timeout=1.0)))
    assert len(found) == len(OURS) - 1 - (":" in asked)  # nothing is depthwise
    assert all("50.0% zero" in line for line in found)
    assert all("top1 0.5000" in line and "seconds" not in line for line in found)
    errors = [float(line.split("error ")[1].split()[0]) for line in found]
    assert min(errors) > 0
    assert max(errors) < 1


def test_a_peer_that_fails_is_told(bench: Bench, tmp_path: Path) -> None:
    found = list(lines(bench, "0.5", tmp_path, argparse.Namespace(onnxsim="/bin/false", timeout=5.0)))
    assert len([line for line in found if "onnxsim-" in line and "failed" in line]) == 3


def test_zeros_are_counted_in_weights(bench: Bench) -> None:
    assert zeros(bench.ready) == 0
