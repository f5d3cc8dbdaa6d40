"""What the quantization benchmark computes itself: bounds, errors of rounded weights, counts, limits on processes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.children import Failed, Limits, run_child
from benchmarks.quantization import bounds, levels, rounding, steps
from benchmarks.quantization.bounds import Figures
from benchmarks.quantization.weights import cast_chains
from onnxopt.feeds import Feeds
from onnxopt.feeds.function import from_items
from onnxopt.model import load
from onnxopt.runtime import Session
from tests.passes.quantizing import normal, parse, quantize, weight

NO_LIMITS = Limits(60, 64e9)


def figures(recipe: str, score: float, latency: float, size: float = 0.3) -> Figures:
    return Figures(recipe, {"top1": score}, size, latency)


@pytest.mark.parametrize(
    ("before", "peer", "allowed"),
    [(0.9, None, 0.005), (0.9, 0.004, 0.005), (0.9, 0.06, 0.03), (0.9, -0.1, 0.005), (3.0, None, 0.015)],
)
def test_the_allowed_drop_is_half_a_point_or_half_of_a_peers(before: float, peer: float | None, allowed: float) -> None:
    assert bounds.allowed_drop(before, peer) == pytest.approx(allowed)


def test_the_best_peer_is_the_most_accurate_of_the_fast_ones() -> None:
    peers = [figures("fast", 0.5, 0.4), figures("good", 0.8, 1.0), figures("slow", 0.9, 1.5)]
    for peers_seen in (peers, peers[::-1]):
        found = bounds.best_peer(peers_seen, "top1", True)
        assert found is not None
        assert found.recipe == "good"
    lower = bounds.best_peer(peers, "top1", False)
    assert lower is not None
    assert lower.recipe == "fast"
    assert bounds.best_peer(peers[2:], "top1", True) is None


def test_each_broken_bound_is_told() -> None:
    peers = [figures("peer", 0.86, 0.9)]
    held = list(bounds.verdicts("model", figures("ours", 0.88, 1.0), {"top1": 0.9}, peers, True))
    assert [line.rpartition(" ")[2] for line in held] == ["yes"] * 3
    broken = list(bounds.verdicts("model", figures("ours", 0.87, 1.1, 0.4), {"top1": 0.9}, peers, True))
    assert [line.rpartition(" ")[2] for line in broken] == ["NO"] * 3
    assert "yes" in bounds.beside_fastest("open_nsfw", "peer", 1.04, 1, 1.1)
    assert "NO" in bounds.beside_fastest("open_nsfw", "peer", 1.06, 1, 1.1)


def test_bounds_of_stored_weights() -> None:
    def told(name: str, recipe: str, size: float, sqnr_db: float, chains: int, cosine: float) -> list[str]:
        stored = bounds.Stored(recipe, {"mean_score": 0.6, "cosine": cosine}, size, sqnr_db, chains)
        return [line.rpartition(" ")[2] for line in bounds.storage_verdicts(name, stored)]

    assert told("any", "fp16", 0.504, 51, 0, 1) == ["yes"] * 3
    assert told("any", "fp16", 0.51, 49, 1, 1) == ["NO"] * 3
    assert told("minilm_l6_ts", "int4", 0.19, 10, 0, 0.98) == ["yes"] * 2
    assert told("minilm_l6_ts", "int4", 0.21, 10, 0, 0.96) == ["NO"] * 2
    assert told("any", "int4", 0.5, 10, 0, 0.9) == []


@pytest.mark.parametrize("groups", [1, 3])
def test_the_relative_error_is_that_of_outputs(groups: int) -> None:
    rows = normal(groups, 5, 7).astype(np.float64)
    other = rows + 0.1 * normal(groups, 5, 7, seed=2)
    inputs = normal(groups, 40, 7, seed=3).astype(np.float64)
    gram = np.matmul(inputs.transpose(0, 2, 1), inputs) / 40
    outputs, wrong = (np.matmul(inputs, w.transpose(0, 2, 1)) for w in (rows, other - rows))
    found = rounding.relative_error(rows, other, gram)
    assert found == pytest.approx(np.square(wrong).sum() / np.square(outputs).sum(), rel=1e-9)
    assert rounding.relative_error(rows, rows, gram) == 0.0
    assert rounding.relative_error(0 * rows, 0 * rows, gram) == 0.0
    assert rounding.relative_error(0 * rows, other, gram) == float("inf")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [1, 4, 5, 16, 64])
def test_nearest_rounding_stays_within_half_a_step_of_each_block(symmetric: bool, block: int) -> None:
    rows = normal(2, 3, 16).astype(np.float64)
    rows[0, 0] = 0.0
    found = rounding.nearest(rows, block, symmetric)
    assert found.shape == rows.shape
    for start in range(0, 16, min(block, 16)):
        part = np.s_[..., start : start + block]
        extent = np.abs(rows[part]).max(axis=-1) / 8 if symmetric else np.ptp(np.append(rows[part], 0)) / 15
        # of the symmetric codes +8 does not exist: weights near the far end lose up to a whole step
        most = extent if symmetric else extent / 2 * 1.001
        assert (np.abs(found[part] - rows[part]).max(axis=-1) <= most + 1e-12).all()
        levels_used = [len(np.unique(line)) for line in found[part].reshape(-1, found[part].shape[-1])]
        assert max(levels_used) <= 16
    assert not found[0, 0].any()
    if block == 1:
        np.testing.assert_allclose(found, rows, rtol=1e-12)


def blocked(opset: int = 21) -> onnx.ModelProto:
    """MatMul of int4 codes with a scale to 16 inputs, then Conv of Cast and Mul, then a MatMul of two activations."""
    codes = np.random.default_rng(0).integers(-8, 8, (32, 6)).astype(np.int8)
    scales = np.abs(normal(2, 6)) + 0.1
    small = np.random.default_rng(1).integers(-127, 128, (4, 1, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Unsqueeze", ["y", "one"], ["y3"]),
        helper.make_node("Cast", ["small"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["v"]),
        helper.make_node("Conv", ["y3", "v"], ["z"]),
        helper.make_node("Transpose", ["z"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["z", "t"], ["out"]),
    ]
    values = [
        helper.make_tensor("codes", TensorProto.INT4, [32, 6], codes.reshape(-1).tolist()),
        numpy_helper.from_array(scales, "scales"),
        numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(small, "small"),
        numpy_helper.from_array(np.full((4, 1, 1), 0.01, np.float32), "s"),
    ]
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32]),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 4, 4]),
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_effective_weights_are_what_the_constants_give() -> None:
    proto = blocked()
    found = rounding.effective_weights(load(proto))
    assert set(found) == {"y", "z"}
    assert found["y"].block == 16
    assert found["z"].block == 3
    # the identity through the MatMul shows its weight
    model = load(proto)
    model.graph.outputs[:] = [next(n for n in model.graph.nodes if n.op == "MatMul").outputs[0]]
    shown = Session(model, optimize=False).run({"x": np.eye(32, dtype=np.float32)})["y"]
    np.testing.assert_allclose(found["y"].rows[0].T, shown, rtol=1e-6)
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in ("small", "s")}
    np.testing.assert_allclose(
        found["z"].rows[0], (values["small"].astype(np.float32) * values["s"]).reshape(4, 3), rtol=1e-6
    )


@pytest.mark.parametrize("zero_points", [False, True])
def test_effective_weights_of_blocks_of_bits(zero_points: bool) -> None:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (6, 2, 8)).astype(np.uint8)  # [N, blocks, bytes]
    scales = (rng.random((6, 2)) + 0.5).astype(np.float32)
    zeros = rng.integers(0, 256, (6, 1)).astype(np.uint8)
    values = {"b": packed, "s": scales.reshape(-1), **({"z": zeros.reshape(-1)} if zero_points else {})}
    node = helper.make_node(
        "MatMulNBits", ["x", *values], ["y"], domain="com.microsoft", K=30, N=6, bits=4, block_size=16, accuracy_level=4
    )
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 30]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6]),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    found = rounding.effective_weights(load(helper.make_model(graph, opset_imports=opsets, ir_version=10)))["y"]

    def unpacked(data: Any) -> Any:  # the lower half of a byte comes first
        return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1).astype(np.float64)

    middle = unpacked(zeros)[:, :, None] if zero_points else 8.0
    expected = ((unpacked(packed) - middle) * scales[:, :, None]).reshape(6, 32)[:, :30]
    assert found.block == 16
    np.testing.assert_allclose(found.rows[0], expected, rtol=1e-5, atol=1e-5)


MATMULS = """
m (float[n, 32] x) => (float[n, 6] y) {
    h = MatMul(x, w)
    r = Relu(h)
    y = MatMul(r, v)
}
"""


CHAIN = {"w": weight(32, 48), "v": weight(48, 6), "u": weight(6, 6)}


def test_layer_errors_rank_finer_weights_lower() -> None:
    model = parse(MATMULS, {"w": weight(32, 48), "v": weight(48, 6)})
    feeds = Feeds(from_items([{"x": normal(8, 32, seed=n)} for n in range(4)], "x"), Session(model).inputs)
    plain, left = rounding.layer_errors(model, None, feeds, 32, 2048)
    assert [error.name for error in plain] == ["h", "y"]
    assert not left
    assert all(0.01 < error.symmetric < 0.3 and 0.01 < error.asymmetric < 0.3 for error in plain)
    exact = rounding.effective_weights(model)
    none, left = rounding.layer_errors(model, exact, feeds, 32, 2048)
    assert (none, left) == ([], {"left as they were": 2})
    halved = {
        k: rounding.Effective(e.rows + (rounding.nearest(e.rows, 32, True) - e.rows) / 2, 32) for k, e in exact.items()
    }
    found, _ = rounding.layer_errors(model, halved, feeds, 32, 2048)
    assert [error.ours / error.symmetric for error in found] == pytest.approx([0.5, 0.5])
    assert "over symmetric 0.50 [0.50, 0.50], squared 0.25, bound 0.6: yes" in rounding.summary("m", found, {}, True)
    narrow, left = rounding.layer_errors(model, None, feeds, 32, 40)
    assert [error.name for error in narrow] == ["h"]
    assert left == {"of more than 40 inputs": 1}


def test_integer_kernels_are_counted_beside_quantized_layers(tmp_path: Path) -> None:
    model = parse(MATMULS, {"w": weight(32, 48), "v": weight(48, 6)})
    feeds = [{"x": normal(8, 32, seed=n)} for n in range(4)]
    assert not levels.quantized_layers(model)
    quantize(model, feeds)
    model.save(tmp_path / "q.onnx")
    assert levels.quantized_layers(load(tmp_path / "q.onnx")) == {"MatMul": 2}
    assert levels.told_kernels(tmp_path / "q.onnx").startswith("2 quantized layers (MatMul 2), 2 integer ones")
    assert levels.told_levels(tmp_path / "q.onnx") == "loads at all 5 levels: yes"


def test_operators_are_run_apart_on_the_codes_before_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = parse(MATMULS.replace("y = MatMul(r, v)", "a = MatMul(r, v) b = Relu(a) y = MatMul(b, u)"), CHAIN)
    feeds = [{"x": normal(8, 32, seed=n)} for n in range(4)]
    assert list(steps.parts_of(model.to_proto())) == []
    assert steps.differences(model.to_proto(), feeds[0]) == {}
    quantize(model, feeds)
    proto = model.to_proto()
    parts = list(steps.parts_of(proto))
    codes = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    # the first one only converts the input; each other stands between one layer's codes and the next one's
    assert [(part.inputs, part.output) for part in parts] == [([a], b) for a, b in itertools.pairwise(codes)]
    assert [sum(node.op_type == "MatMul" for node in part.nodes) for part in parts] == [1] * (len(codes) - 1)
    found = steps.differences(proto, feeds[0])
    assert set(found) == set(codes[1:])
    assert max(found.values()) <= 1
    model.save(tmp_path / "q.onnx")
    read = Feeds(from_items(feeds, "x"), Session(model).inputs)
    assert steps.told_steps(tmp_path / "q.onnx", read).endswith("bound 1: yes")
    monkeypatch.setattr(steps, "differences", lambda *_: {"p": 1, "q": 3, "r": 2})
    assert steps.told_steps(tmp_path / "q.onnx", read).endswith("3 steps apart at most, bound 1: NO, 2 of them; q")


def test_a_model_that_no_level_loads_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert levels.told_levels(tmp_path / "broken.onnx").count("refuses it") == 5


def test_casts_behind_casts_are_counted(tmp_path: Path) -> None:
    parse("m (float[n] x) => (float[n] y) { h = Cast<to=10>(x) y = Cast<to=1>(h) }").save(tmp_path / "two.onnx")
    parse("m (float[n] x) => (float16[n] y) { h = Abs(x) y = Cast<to=10>(h) }").save(tmp_path / "one.onnx")
    assert [cast_chains(tmp_path / name) for name in ("two.onnx", "one.onnx")] == [1, 0]


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_child_tells_what_it_printed_last() -> None:
    finished = run_child(python("print('loud'); print('{\"seconds\": 1.5}')"), NO_LIMITS)
    assert finished.told == {"seconds": 1.5}
    assert run_child(python("print('no object')"), NO_LIMITS).told == {}


@pytest.mark.parametrize(
    ("text", "limits", "told"),
    [
        ("raise ValueError('why it failed')", NO_LIMITS, "failed: ValueError: why it failed"),
        ("import os; os.kill(os.getpid(), 9)", NO_LIMITS, "failed: ended by signal 9"),
        ("import time; time.sleep(60)", Limits(0.2, 64e9), "left out: takes more than 0 s"),
    ],
)
def test_a_child_that_fails_says_why(text: str, limits: Limits, told: str) -> None:
    with pytest.raises(Failed, match=told):
        run_child(python(text), limits)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is told in /proc only")
def test_a_child_that_takes_too_much_memory_is_ended() -> None:
    with pytest.raises(Failed, match=r"left out: takes more than 0.1 GB"):
        run_child(python("import time; held = bytearray(b'x' * 200_000_000); time.sleep(60)"), Limits(30, 1e8))
