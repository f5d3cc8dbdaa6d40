"""Moments of channels wherever in the model they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from onnxopt.calibration.channels import WIDEST, Moments, Seen, Source, _parts, gather
from onnxopt.calibration.elements import seen_sizes
from onnxopt.calibration.moments import MOST_BYTES
from onnxopt.model import Model, load
from onnxopt.pruning.reads import reads_of
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import random_feeds, run
from tests.passes.quantizing import parse, weight
from tests.pruning.nets import feeds_of, mapped, measuring

BRANCHES = """g (float[N, 6] x, bool c) => (float[N, 4] y) {
    h = MatMul(x, w1)
    y = If (c) <
        then_branch = t () => (float[N, 4] a) { r = Relu(h)  m = MatMul(r, w2)  s = Tanh(m)  a = MatMul(s, w3) },
        else_branch = e () => (float[N, 4] b) { q = Sigmoid(h)  b = MatMul(q, w4) }
    >
}"""
WEIGHTS: dict[str, Any] = {
    "w1": weight(6, 9), "w2": weight(9, 5, seed=2), "w3": weight(5, 4, seed=3), "w4": weight(9, 4, seed=4)
}  # fmt: skip


def branches(flags: list[bool]) -> tuple[ModelProto, list[dict[str, Any]]]:
    proto = parse(BRANCHES, WEIGHTS).to_proto()
    rng = np.random.default_rng(0)
    return proto, [{"x": rng.standard_normal((7, 6)).astype(np.float32), "c": np.array(flag)} for flag in flags]


def seen_of(proto: ModelProto, feeds: list[dict[str, Any]], threshold: float | None = None) -> tuple[Model, Any, Seen]:
    model, maps = mapped(proto)
    context = measuring(feeds, proto)
    assert context.measure is not None
    reads = reads_of(maps)
    return model, reads, gather(model, [r.source for r in reads if r.source is not None], context.measure, threshold)


def expected(rows: Any) -> tuple[Any, Any]:
    rows = np.asarray(rows, np.float64)
    return rows.T @ rows / len(rows), rows.mean(axis=0)


def test_tensors_in_branches_are_seen() -> None:
    proto, feeds = branches([True, False, True, True])
    _, reads, seen = seen_of(proto, feeds)
    assert not seen.reasons
    found = {read.source.tensor.name: seen.moments[read.source] for read in reads}
    assert {"r", "q", "s"} <= set(found)
    taken = np.concatenate([feed["x"] @ WEIGHTS["w1"] for feed in feeds if feed["c"]])
    second, mean = expected(np.maximum(taken, 0))
    assert found["r"].second == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert found["r"].mean == pytest.approx(mean, rel=1e-4)
    assert (found["r"].rows, found["q"].rows) == (21, 7)


def test_a_branch_that_no_feed_takes_is_told() -> None:
    proto, feeds = branches([True, True])
    model, _reads, seen = seen_of(proto, feeds)
    reasons = {source.tensor.name: reason for source, reason in seen.reasons.items()}
    assert set(reasons) == {"q"}
    assert reasons["q"]
    context = measuring(feeds, proto)
    assert context.measure is not None
    idle = seen_sizes(model, {}, context.measure).idle
    assert {node.outputs[0].name for node in idle} == {"b"}


def test_branches_that_are_taken_are_not_idle() -> None:
    proto, feeds = branches([True, False])
    context = measuring(feeds, proto)
    assert context.measure is not None
    assert not seen_sizes(load(proto), {}, context.measure).idle


def test_bodies_of_loops_hide_what_they_hold() -> None:
    proto = TOPOLOGIES["looped"]()
    _, _, seen = seen_of(proto, feeds_of(proto, 3))
    assert any("body of a Loop" in reason for reason in seen.reasons.values())
    assert seen.moments


@pytest.mark.parametrize("direction", [0, 1])
def test_directions_are_seen_apart(direction: int) -> None:
    proto = TOPOLOGIES["stacked"]()
    feeds = feeds_of(proto, 4)
    _, reads, seen = seen_of(proto, feeds)
    read = next(read for read in reads if read.source.direction == direction)
    name = read.source.tensor.name
    shown = load(proto).to_proto()
    shown.graph.output.add().name = name
    rows = np.concatenate([run(shown, feed)[name][:, direction].reshape(-1, 10) for feed in feeds])
    second, mean = expected(rows)
    assert seen.moments[read.source].second == pytest.approx(second, rel=1e-3, abs=1e-6)
    assert seen.moments[read.source].mean == pytest.approx(mean, rel=1e-3, abs=1e-6)


def test_firing_is_a_share_of_positions() -> None:
    proto = TOPOLOGIES["perceptron"]()
    feeds = feeds_of(proto, 6)
    _, reads, seen = seen_of(proto, feeds, 0.1)
    source = next(read.source for read in reads if read.source.tensor.name == "v2_0")
    shown = load(proto).to_proto()
    shown.graph.output.add().name = "v2_0"
    rows = np.concatenate([run(shown, feed)["v2_0"].reshape(-1, 20) for feed in feeds])
    assert seen.firing[source] == pytest.approx((rows > 0.1).mean(axis=0))
    assert not seen_of(proto, feeds)[2].firing


def test_the_model_is_left_alone() -> None:
    proto, feeds = branches([True, False])
    model, maps = mapped(proto)
    before = model.digest()
    context = measuring(feeds, proto)
    assert context.measure is not None
    gather(model, [r.source for r in reads_of(maps) if r.source is not None], context.measure)
    assert model.digest() == before
    assert run(model, feeds[0])["y"].shape == (7, 4)


def sources(*widths: Any) -> list[Source]:
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
    found = []
    for width in widths:
        tensor = parse(text).graph.inputs[0]
        tensor.shape = ["N", width]
        found.append(Source(tensor, -1))
    return found


def test_matrices_that_memory_does_not_hold_are_gathered_apart() -> None:
    reasons: dict[Source, str] = {}
    wide = sources(4096, 4096, 16)
    parts = _parts(wide, reasons)
    assert not reasons
    assert [len(part) for part in parts] == [1, 2]
    assert all(sum(s.tensor.shape[1] ** 2 * 16 for s in part) <= MOST_BYTES or len(part) == 1 for part in parts)


@pytest.mark.parametrize("width", [WIDEST + 1, "C", None])
def test_too_many_channels_are_told(width: Any) -> None:
    reasons: dict[Source, str] = {}
    assert _parts(sources(width), reasons) == []
    assert "channels" in next(iter(reasons.values()))


def test_moments_join() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((30, 4)) + 5, 2 * rng.standard_normal((50, 4))
    joined = Moments.taken(*expected(one), 30).joined(Moments.taken(*expected(other), 50))
    second, mean = expected(np.concatenate([one, other]))
    assert joined.second == pytest.approx(second, rel=1e-5)
    assert joined.mean == pytest.approx(mean)
    assert joined.rows == 80
    assert joined.of(slice(1, 3)).covariance == pytest.approx(joined.covariance[1:3, 1:3])


def test_small_variances_beside_large_means_are_kept() -> None:
    rows = 1000 + 0.01 * np.random.default_rng(0).standard_normal((500, 3))
    moments = Moments.taken(*expected(rows), 500)
    assert np.diagonal(moments.covariance) == pytest.approx(rows.var(axis=0), rel=1e-3)
    assert np.linalg.eigvalsh(moments.covariance).min() > 0


def test_random_feeds_reach_every_source() -> None:
    for name in ("unet", "heads", "lstm", "chosen", "branching"):
        proto = TOPOLOGIES[name]()
        _, reads, seen = seen_of(proto, [random_feeds(proto, seed) for seed in range(6)])
        assert all(read.source in seen.moments for read in reads), name
