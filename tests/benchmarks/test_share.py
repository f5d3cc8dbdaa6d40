"""The figures of benchmarks.compression.share, on a model small enough to know them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compression.share import LEVELS, PASSES, Bench, evenly, layer_error, lines, made, zipped
from onnxopt.model import load
from tests.passes.quantizing import normal, parse, weight


class Task:
    """A task that measures nothing."""

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = [{"x": normal(64, 80, seed=seed)} for seed in range(3)]

    def calib_feeds(self) -> list[dict[str, Any]]:
        return self.samples[1:]

    def feeds(self) -> list[dict[str, Any]]:
        return self.samples[:1]

    def run(self, path: Path) -> dict[str, float]:
        assert path.is_file()
        return {"top1": 0.5, "seconds": 1.0}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    text = "g (float[n, 80] x) => (float[n, 90] y) { [one] a = MatMul(x, w) y = Add(a, b) }"
    parse(text, {"w": weight(80, 90), "b": normal(90)}).save(tmp_path / "model.onnx")
    return made(Task(), tmp_path / "model.onnx", tmp_path, argparse.Namespace(samples=4, feeds=4))


def test_there_is_a_line_for_everybody(bench: Bench, tmp_path: Path) -> None:
    found = list(lines(bench, PASSES, tmp_path))
    assert len(found) == 1 + len(LEVELS) + len(PASSES)
    layers = [float(line.split("layers ")[1].split()[0]) for line in found]
    errors = [float(line.split("outputs ")[1].split()[0]) for line in found]
    assert layers[0] == errors[0] == 0
    assert 0 < errors[3] < 0.7 * errors[1]
    assert 0 < layers[5] < 0.3 * layers[3] < layers[1]
    assert all("top1 0.5000" in line and "seconds" not in line for line in found)


def test_levels_are_evenly_spread(bench: Bench, tmp_path: Path) -> None:
    evenly(bench.ready, 4, tmp_path / "rounded.onnx")
    stored = np.unique(next(node for node in load(tmp_path / "rounded.onnx").graph.nodes).inputs[1].values)
    assert len(stored) <= 4
    np.testing.assert_allclose(np.diff(stored), np.diff(stored)[0], rtol=1e-4)


def test_the_error_of_a_layer_is_that_of_its_outputs() -> None:
    exact, other, x = normal(6, 8), normal(6, 8, seed=1), normal(500, 8, seed=2)
    second = (x.T @ x / 500)[None]
    expected = np.linalg.norm(x @ (exact - other).T) / np.linalg.norm(x @ exact.T)
    assert layer_error(exact, other, second) == pytest.approx(expected, rel=1e-4)


def test_a_zip_of_few_values_is_small(tmp_path: Path) -> None:
    parse("g (float[n, 80] x) => (float[n, 90] y) { y = MatMul(x, w) }", {"w": np.zeros((80, 90), np.float32)}).save(
        tmp_path / "model.onnx"
    )
    assert zipped(tmp_path / "model.onnx") < 1500
