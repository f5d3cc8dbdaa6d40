"""benchmarks.compression.lowrank, on a model small enough for a test."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from benchmarks.compression.lowrank import Layers, WholeBench, layer_lines, model_lines
from tests.lowrank.nets import together
from tests.passes.quantizing import normal, parse, weight

TEXT = """g (float[n, 96] x) => (float[n, 64] y) {
    a = MatMul(x, w) b = Add(a, c) h = Relu(b) y = Gemm<transB = 1, alpha = 0.5>(h, v, e) }"""
CONSTANTS = {"w": weight(96, 96), "c": normal(96), "v": weight(64, 96), "e": normal(64)}


class Task:
    def calib_feeds(self) -> list[dict[str, np.ndarray]]:
        return [{"x": together(200, 96, seed=seed)} for seed in range(6)]

    def feeds(self) -> list[dict[str, np.ndarray]]:
        return [{"x": together(100, 96, seed=seed)} for seed in range(100, 104)]


def test_layers_one_by_one(tmp_path: Path) -> None:
    parse(TEXT, CONSTANTS).save(path := tmp_path / "m.onnx")
    lines = list(layer_lines(path, Task(), argparse.Namespace(samples=6, feeds=4, layers=12)))
    assert len(lines) == 3
    for line in lines[:2]:
        plain, mean, whitened, predicted, achieved = map(float, re.findall(r" (\d\.\d{4})", line))
        assert plain > mean > whitened
        assert abs(achieved / predicted - 1) < 0.05
    assert lines[-1].startswith("  2 layers: whitened 0.")


def test_only_some_layers_where_few_are_asked_for(tmp_path: Path) -> None:
    parse(TEXT, CONSTANTS).save(path := tmp_path / "m.onnx")
    assert len(Layers(path, Task().calib_feeds(), Task().feeds()).layers) == 2
    assert len(list(layer_lines(path, Task(), argparse.Namespace(samples=2, feeds=1, layers=1)))) == 2


def test_whole_models(zoo: Path, tmp_path: Path) -> None:
    from benchmarks.tasks import load_tasks

    tasks = load_tasks(zoo, [])
    args = argparse.Namespace(
        samples=8, feeds=4, seconds=0.05, timeout=300.0, memory=8.0, target="x86", log=None, rounds=1
    )
    bench = WholeBench(tasks, "digits", tasks.find_model("digits"), args, tmp_path)
    lines = list(model_lines(bench, ["lowrank:ratio=0.3:forms=factors", "no_such_pass"]))
    assert lines[0].startswith("  float ")
    assert " MACs, " in lines[1]
    assert "no_such_pass" in lines[-1]
    assert " MACs, " not in lines[-1]
