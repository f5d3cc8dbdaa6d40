"""Networks of sequences: recurrent cells, heads of attention, bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from tests.graph.net import Net

STEPS = (7, 2, 6)


def cell(n: Net, op: str, x: str, inner: int, hidden: int, directions: int = 1, **attrs: Any) -> list[str]:
    """A recurrent node with biases; returns its outputs."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    inputs = [x, n.weights(directions, gates * hidden, inner), n.weights(directions, gates * hidden, hidden)]
    inputs += [n.weights(directions, 2 * gates * hidden), *attrs.pop("more", [])]
    direction = "bidirectional" if directions == 2 else "forward"
    return n.calls(op, 3 if op == "LSTM" else 2, *inputs, hidden_size=hidden, direction=direction, **attrs)


def lstm() -> ModelProto:
    """LSTM read step by step."""
    n = Net(51)
    y = cell(n, "LSTM", "x", 6, 14)[0]
    return n.model(n.linear(n.relu(n.linear(n.call("Squeeze", y, n.ints(1)), 14, 9)), 9, 4), STEPS, (7, 2, 4))


def gru() -> ModelProto:
    """GRU of which the last state is read."""
    n = Net(52)
    h = cell(n, "GRU", "x", 6, 14, linear_before_reset=1)[1]
    return n.model(n.linear(n.call("Gather", h, n.value(np.int64(0))), 14, 4), STEPS, (2, 4))


def rnn() -> ModelProto:
    """Plain recurrent cells with Relu, in reverse."""
    n = Net(53)
    y = n.calls("RNN", 1, "x", n.weights(1, 12, 6), n.weights(1, 12, 12), hidden_size=12, activations=["Relu"],
                direction="reverse")[0]  # fmt: skip
    return n.model(n.linear(n.call("Squeeze", y, n.ints(1)), 12, 4), STEPS, (7, 2, 4))


def stacked() -> ModelProto:
    """Two bidirectional layers: the second reads columns d H + k."""
    n = Net(54)
    x, width = "x", 6
    for hidden in (10, 8):
        y = cell(n, "LSTM", x, width, hidden, 2)[0]
        x, width = n.call("Reshape", n.call("Transpose", y, perm=[0, 2, 1, 3]), n.ints(0, 0, 2 * hidden)), 2 * hidden
    return n.model(n.linear(x, width, 4), STEPS, (7, 2, 4))


def seeded() -> ModelProto:
    """An LSTM with peepholes and constant states; a GRU that starts from its last state."""
    n = Net(55)
    more = ["", n.weights(1, 2, 10), n.weights(1, 2, 10), n.weights(1, 30)]
    y, h, _ = cell(n, "LSTM", "x", 6, 10, more=more)
    y = cell(n, "GRU", n.call("Squeeze", y, n.ints(1)), 10, 10, more=["", h])[0]
    return n.model(n.linear(n.call("Squeeze", y, n.ints(1)), 10, 4), STEPS, (7, 2, 4))


def measured_state() -> ModelProto:
    """Initial states made at run time for the batch: ConstantOfShape, and Expand of a constant and of zero."""
    n = Net(56)
    x = n.relu(n.linear("x", 6, 8))
    batch = n.call("Slice", n.call("Shape", x), n.ints(1), n.ints(2), n.ints(0))
    target = n.call("Concat", n.ints(1), batch, n.ints(10), axis=0)
    zeros = n.call("ConstantOfShape", target)
    states = n.call("Expand", n.value(np.float32(0.25)), target)
    y = cell(n, "LSTM", x, 8, 10, more=["", zeros, states])[0]
    first = n.call("Expand", n.weights(1, 1, 12), n.call("Concat", n.ints(1), batch, n.ints(12), axis=0))
    y = cell(n, "GRU", n.call("Squeeze", y, n.ints(1)), 10, 12, more=["", first])[0]
    return n.model(n.linear(n.call("Squeeze", y, n.ints(1)), 12, 4), (7, "N", 6), (7, "N", 4))


def speech() -> ModelProto:
    """Convolutions over time, a bidirectional GRU, both directions added."""
    n = Net(57)
    x = n.relu(n.call("Conv", "x", n.weights(12, 5, 3), n.weights(12), pads=[1, 1]))
    y = cell(n, "GRU", n.call("Transpose", x, perm=[2, 0, 1]), 12, 9, 2)[0]
    x = n.call("ReduceSum", y, n.ints(1), keepdims=0)
    return n.model(n.linear(n.call("Transpose", x, perm=[1, 0, 2]), 9, 4), ("N", 5, 11), ("N", 11, 4))


def _attend(n: Net, q: str, k: str, v: str, mask: str = "") -> str:
    """Scaled products of heads [N, H, S, D], k already transposed."""
    scores = n.call("Mul", n.call("MatMul", q, k), n.value(np.float32(0.35)))
    scores = n.call("Add", scores, mask) if mask else scores
    return n.call("MatMul", n.call("Softmax", scores, axis=-1), v)


def heads() -> ModelProto:
    """Self-attention with biases, masks from the input, heads taken back by a computed target; two layers."""
    n = Net(58)
    x = n.linear("x", 6, 16)
    mask = n.call("Unsqueeze", n.call("ReduceSum", "x", n.ints(2), keepdims=0), n.ints(1, 2))
    shape = n.call("Shape", "x")
    lengths = [n.call("Slice", shape, n.ints(at), n.ints(at + 1), n.ints(0)) for at in (0, 1)]
    for _ in range(2):
        target = n.call("Concat", *lengths, n.ints(4), n.ints(6), axis=0)
        q, k, v = (n.call("Reshape", n.linear(x, 16, 24), target) for _ in range(3))
        q, v = (n.call("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        mixed = n.call(
            "Transpose", _attend(n, q, n.call("Transpose", k, perm=[0, 2, 3, 1]), v, mask), perm=[0, 2, 1, 3]
        )
        x = n.call("Add", x, n.linear(n.call("Reshape", mixed, n.ints(0, 0, 24)), 24, 16))
        x = n.call("Add", x, n.linear(n.call("Tanh", n.linear(x, 16, 20)), 20, 16))
    return n.model(n.linear(x, 16, 3), ("N", 5, 6), ("N", 5, 3))


def packed_heads() -> ModelProto:
    """One product for queries, keys and values, taken apart by Reshape, Transpose and Gather."""
    n = Net(59)
    x = n.call("Reshape", n.linear("x", 6, 96), n.ints(0, 0, 3, 4, 8))
    x = n.call("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, v = (n.call("Gather", x, n.value(np.int64(at)), axis=0) for at in range(3))
    mixed = _attend(n, q, n.call("Transpose", k, perm=[0, 1, 3, 2]), v)
    mixed = n.call("Reshape", n.call("Transpose", mixed, perm=[0, 2, 1, 3]), n.ints(0, 0, 32))
    return n.model(n.linear(mixed, 32, 3), ("N", 5, 6), ("N", 5, 3))


def split_heads() -> ModelProto:
    """One product for queries, keys and values, split along the last axis."""
    n = Net(60)
    parts = n.calls("Split", 3, n.linear("x", 6, 60), axis=-1)
    parts = [n.call("Transpose", n.call("Reshape", p, n.ints(0, 0, 4, 5)), perm=[0, 2, 1, 3]) for p in parts]
    mixed = _attend(n, parts[0], n.call("Transpose", parts[1], perm=[0, 1, 3, 2]), parts[2])
    mixed = n.call("Reshape", n.call("Transpose", mixed, perm=[0, 2, 1, 3]), n.ints(0, 0, -1))
    return n.model(n.linear(mixed, 20, 3), ("N", 5, 6), ("N", 5, 3))


def shared_keys() -> ModelProto:
    """Four query heads over two key heads, which Expand repeats."""
    n = Net(61)
    q = n.call("Transpose", n.call("Reshape", n.linear("x", 6, 24), n.ints(0, 0, 4, 6)), perm=[0, 2, 1, 3])
    repeated = []
    for _ in range(2):
        part = n.call("Transpose", n.call("Reshape", n.linear("x", 6, 12), n.ints(0, 0, 2, 6)), perm=[0, 2, 1, 3])
        part = n.call("Expand", n.call("Unsqueeze", part, n.ints(2)), n.ints(1, 2, 2, 5, 6))
        repeated.append(n.call("Reshape", part, n.ints(0, 4, 5, 6)))
    mixed = _attend(n, q, n.call("Transpose", repeated[0], perm=[0, 1, 3, 2]), repeated[1])
    mixed = n.call("Reshape", n.call("Transpose", mixed, perm=[0, 2, 1, 3]), n.ints(0, 0, 24))
    return n.model(n.linear(mixed, 24, 3), ("N", 5, 6), ("N", 5, 3))


def equations() -> ModelProto:
    """Attention in Einsum, weights [K, H, D] and [H, D, K] among the operands."""
    n = Net(62)
    q, k, v = (n.call("Einsum", "x", n.weights(6, 4, 5), equation="bik,khd->bhid") for _ in range(3))
    q = n.call("Mul", n.call("Add", q, n.weights(4, 1, 5)), n.value(np.float32(0.35)))
    scores = n.call("Softmax", n.call("Einsum", q, k, equation="bhid,bhjd->bhij"), axis=-1)
    mixed = n.call("Einsum", scores, v, equation="bhij,bhjd->bihd")
    x = n.call("Einsum", mixed, n.weights(4, 5, 12), equation="bihd,hdm->bim")
    return n.model(n.linear(n.relu(x), 12, 3), ("N", 5, 6), ("N", 5, 3))


def fused_heads() -> ModelProto:
    """The runtime's MultiHeadAttention behind projections, with a bias."""
    n = Net(63)
    parts = [n.call("MatMul", "x", n.weights(6, 24)) for _ in range(3)]
    x = n.call("MultiHeadAttention", *parts, n.weights(72), num_heads=4, domain="com.microsoft")
    return n.model(n.linear(x, 24, 3), ("N", 5, 6), ("N", 5, 3))


def fused_projections() -> ModelProto:
    """The runtime's Attention, which holds the projections, before a dense layer."""
    n = Net(64)
    x = n.relu(n.linear("x", 6, 10))
    x = n.call("Attention", x, n.weights(10, 72), n.weights(72), num_heads=4, domain="com.microsoft")
    return n.model(n.linear(x, 24, 3), ("N", 5, 6), ("N", 5, 3))


def standard_heads() -> ModelProto:
    """ONNX's Attention over flat heads, keys shared, and over separate ones."""
    n = Net(65, opset=23)
    q, k, v = (n.linear("x", 6, count * 6) for count in (4, 2, 2))
    x = n.call("Attention", q, k, v, q_num_heads=4, kv_num_heads=2)
    parts = [n.call("Reshape", n.linear(x, 24, 20), n.ints(0, 0, 5, 4)) for _ in range(3)]
    x = n.call("Attention", *(n.call("Transpose", part, perm=[0, 2, 1, 3]) for part in parts))
    x = n.call("Reshape", n.call("Transpose", x, perm=[0, 2, 1, 3]), n.ints(0, 0, 20))
    return n.model(n.linear(x, 20, 3), ("N", 5, 6), ("N", 5, 3))


def recommender() -> ModelProto:
    """Embeddings of two tables joined, and a tower of dense layers."""
    n = Net(66)
    first, second = n.call("Gather", n.weights(30, 10), "x"), n.call("Gather", n.weights(30, 8), "x")
    x = n.call("ReduceSum", n.call("Concat", first, n.call("Tanh", second), axis=-1), n.ints(1), keepdims=0)
    x = n.relu(n.call("Gemm", x, n.weights(18, 16), n.weights(16)))
    return n.model(n.call("Gemm", x, n.weights(16, 3), n.weights(3)), ("N", 4), ("N", 3), TensorProto.INT64)


def flat_experts() -> ModelProto:
    """Matrices in a batch: every head or expert has weights of its own."""
    n = Net(67)
    x = n.call("Transpose", n.call("Reshape", n.linear("x", 6, 24), n.ints(0, 0, 4, 6)), perm=[0, 2, 1, 3])
    x = n.relu(n.call("Add", n.call("MatMul", x, n.weights(4, 6, 9)), n.weights(4, 1, 9)))
    x = n.call("MatMul", x, n.weights(4, 9, 5))
    return n.model(n.call("ReduceMean", x, axes=[1], keepdims=0), ("N", 5, 6), ("N", 5, 5))


SEQUENCES: dict[str, Callable[[], ModelProto]] = {
    build.__name__: build
    for build in (
        lstm, gru, rnn, stacked, seeded, measured_state, speech, heads, packed_heads, split_heads, shared_keys,
        equations, fused_heads, fused_projections, standard_heads, recommender, flat_experts,
    )
}  # fmt: skip
