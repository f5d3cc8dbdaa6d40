from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from onnxopt.errors import ModelError
from onnxopt.model import Model, load
from onnxopt.runtime.optimized import optimized_graph
from tests.runtime.builders import build


def model(text: str, **initializers: np.ndarray) -> Model:
    proto = build(text)
    proto.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in initializers.items())
    return load(proto)


def test_it_shows_what_the_runtime_fused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weight = np.ones((64, 64), np.float32)
    given = model("f (float[2, 64] x) => (float[2, 64] y) { m = MatMul(x, w) y = Add(m, b) }", w=weight, b=weight[0])
    found = optimized_graph(given)
    assert [node.op for node in found.graph.nodes] == ["Gemm"]
    assert [tensor.name for tensor in found.graph.outputs] == ["y"]
    assert [node.op for node in given.graph.nodes] == ["MatMul", "Add"]
    assert list(tmp_path.iterdir()) == []


def test_weights_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    clean = tempfile.TemporaryDirectory.cleanup

    def measure(folder: tempfile.TemporaryDirectory[str]) -> None:
        written.extend(path.lstat().st_size for path in Path(folder.name).iterdir())
        clean(folder)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", measure)
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    optimized_graph(model("f (float[n, 512] x) => (float[n, 512] y) { y = MatMul(x, w) }", w=weight))
    assert 0 < sum(written) < 10_000


def test_inner_bodies_are_there() -> None:
    text = """f (bool c, float[N] x) => (float[N] y) {
        y = If (c) <
            then_branch = t () => (float[N] p) { p = Neg(x) },
            else_branch = e () => (float[N] q) { r = Exp(x) q = Neg(r) }
        >
    }"""
    found = optimized_graph(model(text))
    main, *inner = ([node.op for node in body.nodes] for body in found.bodies())
    assert main == ["If"]
    assert sorted(inner) == [["Exp", "Neg"], ["Neg"]]


def test_a_model_that_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(ModelError):
        optimized_graph(model("f (float[N] x) => (float[N] y) { y = NoSuchOperator(x) }"))
