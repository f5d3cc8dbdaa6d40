"""The benchmark of simplify: what counts and what does not, and that ours runs in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from benchmarks.children import Failed, run_child
from benchmarks.simplify.__main__ import _LIMITS, Judged, chain, command, judged, told
from tests.helpers import proto, with_weights

FEEDS = [{"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}]


def saved(path: Path, factor: float, ballast: int = 0) -> Path:
    """y = factor * x, with so many bytes that nothing reads."""
    source = proto("g (float[2, 4] x) => (float[2, 4] y) { y = Mul(x, f) }")
    onnx.save(with_weights(source, f=np.array(factor, np.float32), unread=np.zeros(ballast, np.uint8)), path)
    return path


def test_what_counts(tmp_path: Path) -> None:
    source = saved(tmp_path / "source.onnx", 2.0)
    assert judged(source, saved(tmp_path / "same.onnx", 2.0), FEEDS) == Judged(1, 0.0)
    differs = judged(source, saved(tmp_path / "other.onnx", 2.1), FEEDS)
    assert differs.problem == "differs"
    assert 0.04 < differs.difference < 0.06
    assert judged(source, saved(tmp_path / "large.onnx", 2.0, 10_000), FEEDS).problem == "grown"
    broken = proto("g (float[2, 4] x) => (float[2, 4] y) { y = NoSuchOperator(x) }")
    onnx.save(broken, tmp_path / "broken.onnx")
    assert judged(source, tmp_path / "broken.onnx", FEEDS).problem


def test_words() -> None:
    assert told(Judged(7, 0.0)) == "7"
    assert told(Judged(7, 1.0, "differs")) == "(7: differs)"
    assert told(Failed("why")) == "failed"


def test_ours_leaves_two_of_five_nodes(tmp_path: Path) -> None:
    chain(50, tmp_path / "chain.onnx")
    out = tmp_path / "out.onnx"
    finished = run_child(command("ours", "", tmp_path / "chain.onnx", out), _LIMITS)
    assert isinstance(finished.told["seconds"], float)
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Relu", "Neg"] * 10
