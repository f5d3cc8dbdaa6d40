"""Random networks with random dead, constant and duplicate filters: pruning never changes what they compute.

Unlike the oracle over topologies, the damage here is done to raw weights without asking the engine what belongs
together.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, checker, numpy_helper

from onnxopt.graph import remove_dead
from onnxopt.graph.axes.maps import Split
from onnxopt.model import load
from onnxopt.passes.prune import Prune
from tests.graph.oracle import cut, float_elements, maps_of, silenced, some_sets
from tests.graph.test_channels import context, relative_error
from tests.graph.topologies import IMAGE, Net
from tests.helpers import random_feeds, run
from tests.pruning.nets import feeds_of, optimized, record
from tests.pruning.test_sizes import macs_of

SPLITS: tuple[Split, ...] = ("fewest", "outer", "inner")
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Neg", "Elu", "Abs")


class Growth:
    """Grows a network of 8x8 images by random steps; `pool` holds (name, channels) of all tensors so far."""

    def __init__(self, seed: int) -> None:
        self.net = Net(seed)
        self.rng = np.random.default_rng(seed)
        self.pool: list[tuple[str, int]] = []

    def pick(self) -> tuple[str, int]:
        return self.pool[int(self.rng.integers(max(0, len(self.pool) - 4), len(self.pool)))]

    def step(self) -> None:
        kind = self.rng.choice(
            ["conv", "conv1", "act", "add", "mul", "concat", "split", "depthwise", "grouped", "gate", "bn", "pool",
             "shuffle", "scale", "pad", "valid", "blocks", "transposed", "tokens", "heads", "cells", "measured",
             "groups", "every"]
        )  # fmt: skip
        name, count = self.pick()
        self.pool.append(getattr(self, f"grow_{kind}")(name, count))

    def width(self) -> int:
        return int(self.rng.choice([4, 6, 8, 12]))

    def grow_conv(self, x: str, c: int) -> tuple[str, int]:
        out = self.width()
        return self.net.conv(x, c, out), out

    def grow_conv1(self, x: str, c: int) -> tuple[str, int]:
        out = self.width()
        return self.net.conv(x, c, out, 1), out

    def grow_valid(self, x: str, c: int) -> tuple[str, int]:
        return self.net.call("Pad", self.net.conv(x, c, 6, pads=[0] * 4), self.net.ints(0, 0, 1, 1, 0, 0, 1, 1)), 6

    def grow_act(self, x: str, c: int) -> tuple[str, int]:
        return self.net.call(str(self.rng.choice(ACTIVATIONS)), x), c

    def same(self, x: str, c: int) -> str:
        others = [name for name, count in self.pool if count == c]
        return str(self.rng.choice(others))

    def grow_add(self, x: str, c: int) -> tuple[str, int]:
        return self.net.call("Add", x, self.same(x, c)), c

    def grow_mul(self, x: str, c: int) -> tuple[str, int]:
        return self.net.call("Mul", self.net.call("Sigmoid", x), self.same(x, c)), c

    def grow_concat(self, x: str, c: int) -> tuple[str, int]:
        y, d = self.pick()
        return (self.net.call("Concat", x, y, axis=1), c + d) if c + d <= 32 else (x, c)

    def grow_split(self, x: str, c: int) -> tuple[str, int]:
        if c < 2:
            return x, c
        left, right = self.net.calls("Split", 2, x, self.net.ints(c // 2, c - c // 2), axis=1)
        self.pool.append((left, c // 2))
        return right, c - c // 2

    def grow_depthwise(self, x: str, c: int) -> tuple[str, int]:
        return self.net.conv(x, c, c, group=c) if c > 1 else x, c

    def grow_grouped(self, x: str, c: int) -> tuple[str, int]:
        return (self.net.conv(x, c, 8, group=2), 8) if c % 2 == 0 else (x, c)

    def grow_gate(self, x: str, c: int) -> tuple[str, int]:
        pooled = self.net.call("GlobalAveragePool", x)
        return self.net.call("Mul", x, self.net.call("Sigmoid", self.net.conv(pooled, c, c, 1))), c

    def grow_bn(self, x: str, c: int) -> tuple[str, int]:
        positive = self.net.value(np.abs(self.rng.standard_normal(c)).astype(np.float32) + 0.5)
        weights = [self.net.weights(c) for _ in range(3)]
        return self.net.call("BatchNormalization", x, *weights, positive), c

    def grow_pool(self, x: str, c: int) -> tuple[str, int]:
        kind = str(self.rng.choice(["MaxPool", "AveragePool"]))
        include = {"count_include_pad": int(self.rng.integers(2))} if kind == "AveragePool" else {}
        return self.net.call(kind, x, kernel_shape=[3, 3], pads=[1] * 4, **include), c

    def grow_shuffle(self, x: str, c: int) -> tuple[str, int]:
        if c % 2:
            return x, c
        y = self.net.call("Reshape", x, self.net.ints(-1, 2, c // 2, 8, 8))
        return self.net.call(
            "Reshape", self.net.call("Transpose", y, perm=[0, 2, 1, 3, 4]), self.net.ints(0, c, 8, 8)
        ), c

    def grow_scale(self, x: str, c: int) -> tuple[str, int]:
        return self.net.call("Mul", x, self.net.weights(c, 1, 1)), c

    def grow_pad(self, x: str, c: int) -> tuple[str, int]:
        padded = self.net.call("Pad", x, self.net.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")
        return self.net.conv(padded, c, 6, pads=[0] * 4), 6

    def grow_blocks(self, x: str, c: int) -> tuple[str, int]:
        if c % 4:
            return x, c
        mode = str(self.rng.choice(["DCR", "CRD"]))
        y = self.net.call("DepthToSpace", x, blocksize=2, mode=mode)
        return self.net.call("SpaceToDepth", self.net.relu(y), blocksize=2), c

    def grow_transposed(self, x: str, c: int) -> tuple[str, int]:
        groups = 2 if c % 2 == 0 else 1
        weights = self.net.weights(c, 4, 3, 3)
        y = self.net.call("ConvTranspose", x, weights, self.net.weights(4 * groups), pads=[1] * 4, group=groups)
        return y, 4 * groups

    def tokens(self, x: str, c: int) -> str:
        return self.net.call("Transpose", self.net.call("Reshape", x, self.net.ints(0, c, 64)), perm=[0, 2, 1])

    def image(self, x: str, c: int) -> str:
        target = self.net.ints(0, int(self.rng.choice([-1, c])), 8, 8)
        return self.net.call("Reshape", self.net.call("Transpose", x, perm=[0, 2, 1]), target)

    def grow_tokens(self, x: str, c: int) -> tuple[str, int]:
        inner, out = self.width(), self.width()
        y = self.net.linear(self.net.relu(self.net.linear(self.tokens(x, c), c, inner)), inner, out)
        return self.image(y, out), out

    def grow_heads(self, x: str, c: int) -> tuple[str, int]:
        t, n = self.tokens(x, c), self.net
        parts = [n.call("Reshape", n.linear(t, c, 12), n.ints(0, 0, 3, 4)) for _ in range(3)]
        q, v = (n.call("Transpose", part, perm=[0, 2, 1, 3]) for part in parts[:2])
        k = n.call("Transpose", parts[2], perm=[0, 2, 3, 1])
        scores = n.call("Softmax", n.call("Mul", n.call("MatMul", q, k), n.value(np.float32(0.1))), axis=-1)
        mixed = n.call("Reshape", n.call("Transpose", n.call("MatMul", scores, v), perm=[0, 2, 1, 3]), n.ints(0, 0, 12))
        return self.image(n.linear(mixed, 12, c), c), c

    def grow_cells(self, x: str, c: int) -> tuple[str, int]:
        """A recurrent layer over the pixels of the first sample's row, both directions side by side."""
        n, hidden = self.net, int(self.rng.choice([3, 4]))
        op, gates = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][int(self.rng.integers(3))]
        sequence = n.call("Transpose", self.tokens(x, c), perm=[1, 0, 2])
        weights = [
            n.weights(2, gates * hidden, c),
            n.weights(2, gates * hidden, hidden),
            n.weights(2, 2 * gates * hidden),
        ]
        y = n.call(op, sequence, *weights, hidden_size=hidden, direction="bidirectional")
        y = n.call("Reshape", n.call("Transpose", y, perm=[2, 0, 1, 3]), n.ints(0, 0, 2 * hidden))
        return self.image(y, 2 * hidden), 2 * hidden

    def grow_measured(self, x: str, c: int) -> tuple[str, int]:
        """There and back by the shape that was there."""
        n = self.net
        flat = n.call("Sigmoid", n.call("Flatten", x))
        return n.call("Reshape", flat, n.call("Shape", x)), c

    def grow_groups(self, x: str, c: int) -> tuple[str, int]:
        if c % 2:
            return x, c
        parts = self.net.call("Reshape", x, self.net.ints(0, 2, -1))
        parts = self.net.call("InstanceNormalization", parts, self.net.weights(2), self.net.weights(2))
        return self.net.call("Reshape", parts, self.net.ints(0, c, 8, 8)), c

    def grow_every(self, x: str, c: int) -> tuple[str, int]:
        if c % 2:
            return x, c
        first = int(self.rng.integers(2))
        return self.net.call("Slice", x, *(self.net.ints(v) for v in (first, 2**40, 1, 2))), c // 2


def network(seed: int, steps: int) -> ModelProto:
    growth = Growth(seed)
    growth.pool.append((growth.net.conv("x", 3, 8), 8))
    for _ in range(steps):
        growth.step()
    name, count = growth.pool[-1]
    tail = growth.net.conv(name, count, 5)
    head = growth.net.call("Gemm", growth.net.call("Flatten", tail), growth.net.weights(320, 4), growth.net.weights(4))
    return growth.net.model(head, IMAGE, ("N", 4))


def damage(proto: ModelProto, seed: int) -> None:
    """Make random rows of all weights zero, copies or multiples of others, and biases likewise."""
    rng = np.random.default_rng(seed)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.dtype != np.float32 or array.ndim == 0 or rng.random() < 0.3:
            continue
        for row in range(len(array)):
            draw = rng.random()
            if draw < 0.3:
                array[row] = 0
            elif draw < 0.5:
                array[row] = array[0] * rng.choice([1.0, 1.0, 0.5, 3.0])
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def check(seed: int, steps: int) -> int:
    proto = network(seed, steps)
    damage(proto, seed + 1)
    model = load(proto)
    result = Prune(round_to=1 if seed % 2 else 4).run(model, context())
    pruned = model.to_proto()
    checker.check_model(pruned, full_check=True)
    feeds = random_feeds(proto, seed)
    expected, found = run(proto, feeds), run(model, feeds)
    if np.abs(expected["y"]).max() > 1e-3:
        assert relative_error(expected, found) < 1e-4
    else:
        assert np.abs(expected["y"] - found["y"]).max() < 1e-6
    return len(result.changes)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_random_networks_compute_the_same(seed: int, steps: int) -> None:
    check(seed, steps)


def test_random_networks_are_pruned_at_all() -> None:
    assert sum(check(seed, 8) > 0 for seed in range(12)) >= 10


def check_lossy(seed: int, steps: int) -> int:
    """Cut sets that carry signal: the rest computes what it did with them silent."""
    proto = network(seed, steps)
    split: Split = SPLITS[seed % 3]
    chosen = some_sets(maps_of(load(proto), split), 0.4, seed)
    if not chosen:
        return 0
    small, size = cut(proto, chosen, split)
    assert float_elements(small) == size
    checker.check_model(small.to_proto(), full_check=True)
    feeds = random_feeds(proto, seed)
    expected, found = run(silenced(proto, chosen, split), feeds), run(small, feeds)
    largest = float(np.abs(expected["y"]).max())
    assert np.abs(expected["y"] - found["y"]).max() < max(1e-4 * largest, 1e-6)
    return len(chosen)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 10))
def test_random_networks_lose_channels_as_if_they_had_been_silent(seed: int, steps: int) -> None:
    check_lossy(seed, steps)


def test_random_networks_have_channels_to_lose() -> None:
    assert sum(check_lossy(seed, 6) > 0 for seed in range(12)) >= 10


CRITERIA = ("obs", "obs", "l1", "variance", "activation")
SCOPES = ("global", "isomorphic", "layer")


def check_by_data(seed: int, steps: int) -> int:
    """Prune by what is measured: the result loads, gives like outputs, and is as much smaller as was told."""
    proto = network(seed, steps)
    rng = np.random.default_rng(seed)
    ratio, criterion, scope = rng.uniform(0.1, 0.7), rng.choice(CRITERIA), rng.choice(SCOPES)
    text = f"prune:ratio={ratio:.2f}:criterion={criterion}:scope={scope}:round_to={rng.choice([1, 2, 4])}"
    feeds = feeds_of(proto, 6)
    result = optimized(proto, feeds, text, on_error="skip")
    done = record(result)
    if done.error is not None:
        assert "quality floor" in done.error.cause  # what is left of the outputs is no use, and was taken back
        return 0
    small = result.model.to_proto()
    checker.check_model(small, full_check=True)
    for batch in (1, 3):
        feed = random_feeds(proto, seed, free=batch)
        before, after = run(proto, feed)["y"], run(small, feed)["y"]
        assert after.shape == before.shape
        assert np.isfinite(after).all() or not np.isfinite(before).all()
    told = [float(note.split("%")[0]) / 100 for note in done.notes if "fewer macs, from" in note]
    original = load(proto)
    remove_dead(original)
    whole, left = macs_of(original, proto), macs_of(load(small), proto)
    assert left <= whole
    if told and not any(change.kind == "channels removed" for change in done.changes):
        assert abs((1 - left / whole) - told[0]) < 0.01
    return sum(change.kind == "channels pruned" for change in done.changes)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_random_networks_lose_what_costs_least(seed: int, steps: int) -> None:
    check_by_data(seed, steps)


def test_random_networks_lose_something() -> None:
    assert sum(check_by_data(seed, 4) > 0 for seed in range(8)) >= 5


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(2, 14))
def test_many_random_networks_lose_what_costs_least(seed: int, steps: int) -> None:
    check_by_data(seed, steps)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(2, 14))
def test_many_random_networks_lose_channels_as_if_they_had_been_silent(seed: int, steps: int) -> None:
    check_lossy(seed, steps)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(2, 20))
def test_many_random_networks_compute_the_same(seed: int, steps: int) -> None:
    check(seed, steps)
