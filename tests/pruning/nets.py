"""Redundant and other small networks, their feeds, and pruning of them as users run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnxopt import api
from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.feeds import Sample
from onnxopt.graph.axes import AxisMaps
from onnxopt.model import Model, load
from onnxopt.passbase import Context
from onnxopt.pipeline import Result
from onnxopt.pruning.maps import channel_maps
from onnxopt.report import PassRecord
from tests.graph.net import IMAGE, Net
from tests.helpers import evaluate, random_feeds, run

Floats = npt.NDArray[Any]
Feed = Mapping[str, Floats]


def feeds_of(proto: ModelProto, count: int = 12, free: int = 2, seed: int = 0) -> list[dict[str, Floats]]:
    """Random feeds."""
    return [random_feeds(proto, seed + at, free) for at in range(count)]


def latent(count: int, rank: int, width: int, rows: int, seed: int = 0) -> list[dict[str, Floats]]:
    """Feeds x [rows, width] that are mixed from few directions, and a little noise."""
    rng = np.random.default_rng(99)
    mixing = rng.standard_normal((rank, width)) / np.sqrt(rank)
    rng = np.random.default_rng(seed)
    return [
        {
            "x": (rng.standard_normal((rows, rank)) @ mixing + 0.02 * rng.standard_normal((rows, width))).astype(
                np.float32
            )
        }
        for _ in range(count)
    ]


def images(count: int, seed: int = 0, size: int = 8) -> list[dict[str, Floats]]:
    """Smooth images [4, 3, size, size]: sums of few waves."""
    rng = np.random.default_rng(seed)
    at = np.arange(size) / size
    found = []
    for _ in range(count):
        waves = [np.cos(2 * np.pi * (a * at[:, None] + b * at[None])) for a in (0, 0.5, 1) for b in (0, 0.5, 1)]
        mixed = np.einsum("ncw,whv->nchv", rng.standard_normal((4, 3, len(waves))), np.array(waves))
        found.append({"x": mixed.astype(np.float32)})
    return found


def mlp(seed: int = 1, width: int = 64, hidden: int = 256) -> ModelProto:
    """x [N, width] -> hidden -> hidden / 2 -> 10."""
    n = Net(seed)
    x = n.relu(n.linear("x", width, hidden))
    x = n.relu(n.linear(x, hidden, hidden // 2))
    return n.model(n.linear(x, hidden // 2, 10), ("N", width), ("N", 10))


def perceptron(seed: int = 2) -> ModelProto:
    """64-256-10."""
    n = Net(seed)
    return n.model(n.linear(n.relu(n.linear("x", 64, 256)), 256, 10), ("N", 64), ("N", 10))


def convolutions(seed: int = 3) -> ModelProto:
    """Three convolutions, pooled, and a classifier."""
    n = Net(seed)
    x = n.relu(n.conv("x", 3, 32))
    x = n.relu(n.conv(x, 32, 32))
    x = n.call("Flatten", n.call("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4]))
    return n.model(n.call("Gemm", x, n.weights(128, 6), n.weights(6)), IMAGE, ("N", 6))


def incompressible(seed: int = 4) -> ModelProto:
    """Each of 16 units carries one of 16 independent inputs to an output."""
    n = Net(seed)
    eye = n.value(np.eye(16, dtype=np.float32))
    x = n.call("Tanh", n.call("MatMul", "x", eye))
    return n.model(n.call("MatMul", x, n.value(np.eye(16, dtype=np.float32))), ("N", 16), ("N", 16))


def optimized(proto: ModelProto | Model, feeds: Any, passes: Any, **settings: Any) -> Result:
    """`onnxopt.optimize` without timing; poor quality is no failure here."""
    return api.optimize(proto, passes, feeds, **{"latency_seconds": 0, "keep_failed": True, **settings})


def record(result: Result, name: str = "prune") -> PassRecord:
    """What a report says of a pass."""
    return next(each for each in result.report.passes if each.name == name)


def error(proto: ModelProto | Model, other: ModelProto | Model, feeds: Sequence[Feed]) -> float:
    """Squared difference over variance of the float outputs of two models."""
    wrong, power = 0.0, 0.0
    for feed in feeds:
        one, two = run(proto, feed), run(other, feed)
        for name, value in one.items():
            wrong += float(np.sum((value.astype(np.float64) - two[name]) ** 2))
            power += float(np.sum((value.astype(np.float64) - value.mean()) ** 2))
    return wrong / power


def samples_of(feeds: Sequence[Feed]) -> list[Sample]:
    """Feeds as samples."""
    return [Sample(dict(feed), None, f"feed {at}") for at, feed in enumerate(feeds)]


def measuring(feeds: Sequence[Feed], original: ModelProto, held: Sequence[Feed] = (), **settings: Any) -> Context:
    """A context that measures on `feeds` and compares on `held` (or the same) with the original or another model."""
    chosen = list(held or feeds)

    def measure(model: Model, requests: Requests) -> Statistics:
        model.normalize()
        return collect(model, requests, samples_of(feeds))

    def compare(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        model.normalize()
        wanted: Any = original if reference is None else reference
        wrong, power = 0.0, 0.0
        for feed in chosen[:most]:
            one, two = run(wanted, feed), run(model, feed)
            for expected, found in zip(one.values(), two.values(), strict=True):
                wrong += float(np.sum((expected.astype(np.float64) - found) ** 2))
                power += float(np.sum((expected.astype(np.float64) - expected.mean()) ** 2))
        return float(-10 * np.log10(max(wrong / max(power, 1e-30), 1e-15)))

    shapes = {name: value.shape for name, value in feeds[0].items()}
    return Context(evaluate=evaluate, measure=measure, compare=compare, shapes=shapes, **settings)


def mapped(proto: ModelProto) -> tuple[Model, AxisMaps]:
    """A model and the maps that lossy pruning looks at."""
    model = load(proto)
    return model, channel_maps(model, Context(evaluate=evaluate))
