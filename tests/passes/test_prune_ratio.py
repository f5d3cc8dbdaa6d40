"""prune with ratio: channels that carry signal go, and what stays makes up for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.model import Constant, Model, load
from onnxopt.passes.prune import Prune
from tests.graph.topologies import TOPOLOGIES, Net
from tests.helpers import random_feeds, run

Array = NDArray[Any]
HALVED = "prune:ratio=0.5:of=parameters:round_to=1"


def feeds_of(model: ModelProto, count: int, first: int = 0) -> list[dict[str, Array]]:
    return [random_feeds(model, seed) for seed in range(first, first + count)]


def floats(model: ModelProto | Model) -> int:
    """Elements of float constants that nodes read."""
    the_model = model if isinstance(model, Model) else load(model)
    found = {id(t): t for b in the_model.bodies() for n in b.nodes for t in n.inputs if isinstance(t, Constant)}
    return sum(tensor.data.size for tensor in found.values() if tensor.dtype.kind == "f")


def optimized(model: ModelProto, passes: str, feeds: Any, **options: Any) -> Any:
    verify = "min_sqnr" in options
    return onnxopt.optimize(model, passes=passes, feeds=feeds, verify=verify, keep_failed=True, target="x86", **options)


def error(before: ModelProto, after: ModelProto | Model, feeds: list[dict[str, Array]]) -> float:
    """Relative error of all outputs."""
    pairs = [(run(before, feed)[name], found) for feed in feeds for name, found in run(after, feed).items()]
    wrong = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(wrong / sum(float(np.square(a).sum()) for a, _ in pairs)))


@pytest.mark.parametrize(
    "name",
    [
        "plain", "normalized", "residual", "flattened", "reshaped", "joined", "divided", "shuffled", "upsampled",
        "inverted", "grouped", "gated", "ladder", "perceptron", "recurrent", "looked_up", "attention", "branching",
    ],
)  # fmt: skip
def test_half_of_the_parameters_go(name: str) -> None:
    before = TOPOLOGIES[name]()
    result = optimized(before, HALVED, feeds_of(before, 24))
    left = floats(result.model) / floats(before)
    assert left <= 0.55, result.report.passes[-1].notes
    found = error(before, result.model, feeds_of(before, 4, first=100))
    assert np.isfinite(found)
    assert found < 1.0  # closer than nothing at all
    record = result.report.passes[-1]
    assert sum(change.count for change in record.changes if change.kind == "channels pruned") > 0
    assert [tensor.name for tensor in result.model.graph.outputs] == [info.name for info in before.graph.output]


def correlated(kind: str) -> tuple[ModelProto, list[dict[str, Array]]]:
    """A net and feeds whose inputs follow a few factors, so that hidden units tell of each other."""
    rng = np.random.default_rng(7)
    net = Net(7)
    if kind == "dense":
        x = net.call("Relu", net.call("Gemm", "x", net.weights(256, 64), net.weights(256), transB=1))
        model = net.model(net.call("Gemm", x, net.weights(10, 256), net.weights(10), transB=1), ("N", 64), ("N", 10))
        factors = rng.standard_normal((12, 64))
        draws = [rng.standard_normal((8, 12)) @ factors + 0.1 * rng.standard_normal((8, 64)) for _ in range(80)]
    else:
        x = net.call("Relu", net.conv("x", 6, 48))
        model = net.model(net.conv(net.call("Relu", net.conv(x, 48, 32)), 32, 8), ("N", 6, 8, 8), ("N", 8, 8, 8))
        factors = rng.standard_normal((3, 6))
        draws = [np.einsum("nfhw,fc->nchw", rng.standard_normal((2, 3, 8, 8)), factors) for _ in range(80)]
    return model, [{"x": (draw + 0.5).astype(np.float32)} for draw in draws]


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_each_recovery_comes_closer(kind: str) -> None:
    model, feeds = correlated(kind)
    held_out = feeds[60:]
    errors = []
    for option in (":refit=false:mean_fold=false", ":refit=false", ":sequential=false", ""):
        result = optimized(model, f"prune:ratio=0.4:round_to=1{option}", feeds[:60])
        errors.append(error(model, result.model, held_out))
    raw, folded, fitted, again = errors
    assert raw > folded > fitted
    assert fitted < (0.7 if kind == "dense" else 1.0) * folded
    assert again < 1.05 * fitted


def test_half_of_the_hidden_units_cost_little_once_refitted() -> None:
    """A perceptron of 64, 256 and 10 units."""
    model, feeds = correlated("dense")
    result = optimized(model, HALVED, feeds[:60])
    raw = optimized(model, f"{HALVED}:refit=false:mean_fold=false:criterion=l2", feeds[:60])
    assert floats(result.model) <= 0.5 * floats(model) + 10
    assert error(model, result.model, feeds[60:]) < 0.35 * error(model, raw.model, feeds[60:])


@pytest.mark.parametrize("criterion", ["obs", "variance", "activation", "l1", "l2", "never_fires", "fisher"])
def test_criteria(criterion: str) -> None:
    if criterion == "fisher":
        pytest.importorskip("onnx_ad")
    before = TOPOLOGIES["residual"]()
    feeds = [random_feeds(before, seed, free=1) for seed in range(12)]
    result = optimized(before, f"prune:ratio=0.3:round_to=1:criterion={criterion}", feeds)
    [note] = [note for note in result.report.passes[-1].notes if "fewer macs" in note]
    assert 30 <= float(note.partition("%")[0]) < 36
    assert error(before, result.model, feeds_of(before, 3, first=50)) < 1.0


@pytest.mark.parametrize("options", ["scope=layer", "scope=isomorphic", "steps=2", "of=latency", "of=parameters"])
def test_other_ways_to_choose(options: str) -> None:
    before = TOPOLOGIES["residual"]()
    result = optimized(before, f"prune:ratio=0.3:round_to=1:{options}", feeds_of(before, 12))
    assert floats(result.model) < 0.85 * floats(before)
    assert error(before, result.model, feeds_of(before, 3, first=50)) < 1.0


def test_convolutions_keep_multiples_of_eight() -> None:
    net = Net(3)
    x = net.call("Relu", net.conv(net.call("Relu", net.conv("x", 3, 40)), 40, 48))
    before = net.model(net.conv(x, 48, 5), ("N", 3, 8, 8), ("N", 5, 8, 8))
    result = optimized(before, "prune:ratio=0.3", feeds_of(before, 12))
    widths = [node.inputs[1].shape[0] for node in result.model.graph.nodes if node.op == "Conv"]
    assert widths[0] < 40 or widths[1] < 48
    assert [width % 8 for width in widths[:2]] == [0, 0]


def test_named_nodes_are_left_alone() -> None:
    before = TOPOLOGIES["plain"]()
    first = before.graph.node[0].name
    result = optimized(before, f"prune:ratio=0.3:round_to=1:exclude={first}", feeds_of(before, 8))
    assert floats(result.model) == floats(before)
    assert any(skip.node == first and "excluded" in skip.reason for skip in result.report.passes[-1].skipped)
    with pytest.raises(UsageError, match="no node is called"):
        optimized(before, "prune:exclude=nowhere", feeds_of(before, 8))


def test_auto_takes_what_the_budget_allows_and_leaves_no_trace_of_trials() -> None:
    model, feeds = correlated("dense")
    loose = optimized(model, "prune:ratio=auto", feeds[:60], min_sqnr=10)
    tight = optimized(model, "prune:ratio=auto", feeds[:60], min_sqnr=30)
    none = optimized(model, "prune:ratio=auto:steps=2", feeds[:60], min_sqnr=200)
    assert floats(loose.model) < floats(tight.model) < floats(none.model) == floats(model)
    assert loose.report.verdict.value == "passed"
    kept = none.model.to_proto()
    assert len(kept.graph.initializer) == len(model.graph.initializer)
    assert kept.ByteSize() <= model.ByteSize() + 200


def test_channels_that_never_fire_go_without_a_ratio() -> None:
    net = Net(5)
    x = net.call("Relu", net.conv("x", 3, 12))
    before = net.model(net.conv(x, 12, 4), ("N", 3, 8, 8), ("N", 4, 8, 8))
    bias = numpy_helper.to_array(before.graph.initializer[1]).copy()
    bias[[2, 5, 7]] = -1e3  # never above zero
    before.graph.initializer[1].CopyFrom(numpy_helper.from_array(bias, before.graph.initializer[1].name))
    result = optimized(before, "prune:criterion=never_fires:round_to=1", feeds_of(before, 10))
    assert result.model.graph.nodes[0].inputs[1].shape[0] == 9
    assert error(before, result.model, feeds_of(before, 3, first=50)) < 1e-6
    everything = optimized(before, "prune:criterion=never_fires:threshold=1000000:round_to=1", feeds_of(before, 10))
    assert everything.model.graph.nodes[0].inputs[1].shape[0] == 1


def test_shared_weights_are_cut_and_fitted_together() -> None:
    """Two convolutions of one weight, behind one tensor each, stay the same weight."""
    net = Net(6)
    weight, bias = net.weights(5, 16, 3, 3), net.weights(5)
    branches = [net.call("Relu", net.conv("x", 3, 16)) for _ in range(2)]
    ends = [net.call("Conv", x, weight, bias, pads=[1] * 4) for x in branches]
    before = net.model(net.call("Add", *ends), ("N", 3, 8, 8), ("N", 5, 8, 8))
    result = optimized(before, "prune:ratio=0.4:round_to=1", feeds_of(before, 12))
    assert floats(result.model) < floats(before)
    assert error(before, result.model, feeds_of(before, 3, first=50)) < 0.8


def test_without_data_only_what_costs_nothing_goes() -> None:
    before = TOPOLOGIES["plain"]()
    result = onnxopt.optimize(before, passes="prune:ratio=0.5", target="x86")
    assert floats(result.model) == floats(before)
    assert any("--data" in skip.reason for skip in result.report.passes[-1].skipped)


def test_a_model_without_channels_to_spare_says_why() -> None:
    net = Net(8)
    before = net.model(net.call("Softmax", net.conv("x", 3, 8), axis=1), ("N", 3, 8, 8), ("N", 8, 8, 8))
    result = optimized(before, "prune:ratio=0.5", feeds_of(before, 8))
    record = result.report.passes[-1]
    assert not record.changes
    assert any("Softmax normalises over it" in skip.reason for skip in record.skipped)
    assert any("asked for 50% fewer macs" in note for note in record.notes)


@pytest.mark.parametrize("feeds", [1, 2, 3])
def test_few_feeds_serve(feeds: int) -> None:
    before = TOPOLOGIES["plain"]()
    result = optimized(before, "prune:ratio=0.3:round_to=1", feeds_of(before, feeds))
    assert floats(result.model) < floats(before)


def test_the_same_bytes_each_time() -> None:
    before = TOPOLOGIES["gated"]()
    made = [optimized(before, "prune:ratio=0.3:round_to=1", feeds_of(before, 8)).model for _ in range(2)]
    assert made[0].to_proto().SerializeToString() == made[1].to_proto().SerializeToString()


@pytest.mark.parametrize("ratio", [-0.1, 0.96, "much"])
def test_shares_that_are_none_are_refused(ratio: float | str) -> None:
    with pytest.raises(UsageError, match="option 'ratio'") as refused:
        Prune(ratio=ratio)
    assert refused.value.remedy == "use a number from 0 to 0.95, or auto"
