"""Lossy pruning: channels that carry signal go, and what stays makes up for them as well as it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.calibration.channels import gather
from onnxopt.errors import UsageError
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.channels import Plan, frozen_channels, remove
from onnxopt.model import Model, load
from onnxopt.passbase import Effect
from onnxopt.passes.prune import Prune
from onnxopt.pruning.fit import MEAN_FOLD, NOTHING, REFIT, Fitting
from onnxopt.pruning.groups import find_groups
from onnxopt.pruning.reads import reads_of
from tests.graph.net import IMAGE, Net
from tests.graph.oracle import float_elements
from tests.graph.test_channels import relative_error
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import random_feeds, run
from tests.pruning.nets import (
    convolutions,
    error,
    feeds_of,
    images,
    incompressible,
    latent,
    mapped,
    measuring,
    mlp,
    optimized,
    perceptron,
    record,
)

HALF = "prune:ratio=0.5:of=parameters:round_to=1"
ROOT = Path(__file__).parents[2]
MANY = (
    "plain", "flattened", "joined", "divided", "shuffled", "gated", "inverted", "unet", "lstm", "gru", "rnn", "heads",
    "packed_heads", "branching", "chosen", "stacked", "mixed_space", "recommender", "superresolution", "measured_state",
)  # fmt: skip


def widths(model: Model, op: str = "Conv") -> list[int]:
    return [node.inputs[1].shape[0] for node in model.graph.nodes if node.op == op]


def hidden(model: Model) -> list[int]:
    return [node.inputs[1].shape[1] for node in model.graph.nodes if node.op == "MatMul"]


def reduction(model: Model, proto: ModelProto) -> float:
    return float_elements(model) / float_elements(load(proto))


@pytest.mark.parametrize("name", MANY)
def test_half_of_the_parameters_go(name: str) -> None:
    proto = TOPOLOGIES[name]()
    feeds = feeds_of(proto)
    result = optimized(proto, feeds, HALF)
    small = result.model.to_proto()
    onnx.checker.check_model(small, full_check=True)
    assert reduction(result.model, proto) <= 0.55
    assert [(port.name, port.type) for port in small.graph.input] == [(p.name, p.type) for p in proto.graph.input]
    assert [(port.name, port.type) for port in small.graph.output] == [(p.name, p.type) for p in proto.graph.output]
    for batch in (1, 3):
        feed = random_feeds(proto, 5, free=batch)
        before, after = run(proto, feed), run(small, feed)
        assert all(after[key].shape == before[key].shape and np.isfinite(after[key]).all() for key in before)
    assert 0 < error(proto, small, feeds) < 1
    assert any("channels" in change.detail for change in record(result).changes)


NETS: dict[str, Any] = {
    "mlp": (mlp, lambda seed, count: latent(count, 12, 64, 40, seed)),
    "convolutions": (convolutions, lambda seed, count: images(count, seed)),
}


@pytest.mark.parametrize("name", NETS)
def test_each_way_to_make_up_comes_closer(name: str) -> None:
    """On feeds that nothing was fitted to: nothing done, means folded, least squares, layer after layer."""
    build, make = NETS[name]
    proto = build()
    held = make(1000, 6)
    base = "prune:ratio=0.7:round_to=1:of=parameters"
    ways = (":refit=false:mean_fold=false", ":refit=false", ":sequential=false", "")
    raw, folded, fitted, again = (error(proto, optimized(proto, make(1, 30), base + way).model, held) for way in ways)
    assert folded <= raw * 1.1
    assert fitted < 0.5 * folded
    assert again <= fitted * 1.15


def test_a_network_of_correlated_inputs_is_halved_and_hardly_errs() -> None:
    proto = perceptron()
    feeds = latent(40, 10, 64, 50)
    result = optimized(proto, feeds, "prune:ratio=0.5")
    assert hidden(result.model) == [128, 10]
    assert error(proto, result.model, latent(5, 10, 64, 50, 7)) < 0.01


def masked_and_cut(proto: ModelProto, how: str, seed: int) -> tuple[ModelProto, ModelProto, int]:
    """The model with sets of channels silenced and made up for, the same model with them cut, and their number."""
    model, maps = mapped(proto)
    context = measuring(feeds_of(proto), proto)
    assert context.measure is not None
    reads = reads_of(maps)
    seen = gather(model, [read.source for read in reads if read.source is not None], context.measure)
    moments = {read: seen.moments[s].of(read.positions) for read in reads if (s := read.source) in seen.moments}
    groups = find_groups(maps, reads)
    chosen = some_of(maps, seed)
    fitting = Fitting(model, maps, reads, moments)
    fitting.apply(chosen, how, groups)
    masked = model.to_proto()
    fitting.keep()
    remove(maps, Plan(dict.fromkeys(chosen, "chosen"), ()), compensate=False)
    return masked, model.to_proto(), len(chosen)


def some_of(maps: AxisMaps, seed: int) -> set[int]:
    made = {root for site in maps.sites for root in maps.channels.roots(site.channels).tolist()}
    free = sorted(made - frozen_channels(maps))
    drawn = np.random.default_rng(seed).permutation(free).tolist()
    chosen: set[int] = set()
    axes = [maps.channels.roots(axis.channels).tolist() for each in maps.axes.values() for axis in each.values()]
    for root in drawn[: max(1, len(drawn) * 2 // 5)]:
        if all(set(axis) - chosen - {root} for axis in axes):
            chosen.add(root)
    return chosen


@pytest.mark.parametrize("how", [REFIT, MEAN_FOLD, NOTHING])
@pytest.mark.parametrize(
    "name",
    ["plain", "flattened", "divided", "shuffled", "grouped", "gated", "unet", "lstm", "gru", "rnn", "stacked", "heads",
     "branching", "upsampled", "transposed_groups", "looped", "standard_heads"],
)  # fmt: skip
def test_what_is_judged_is_what_is_cut(name: str, how: str) -> None:
    proto = TOPOLOGIES[name]()
    masked, small, count = masked_and_cut(proto, how, 3)
    assert count
    feed = random_feeds(proto, 9)
    assert relative_error(run(masked, feed), run(small, feed)) < 1e-5


def test_trials_leave_the_model_as_it_was() -> None:
    proto = TOPOLOGIES["heads"]()
    model, maps = mapped(proto)
    before = model.to_proto().SerializeToString(deterministic=True)
    reads = reads_of(maps)
    groups = find_groups(maps, reads)
    fitting = Fitting(model, maps, reads, {})
    for group in groups:
        fitting.apply(set(group.sets[:2]), NOTHING, groups)
        assert model.to_proto().SerializeToString(deterministic=True) != before
        fitting.restore()
    feed = random_feeds(proto)
    assert relative_error(run(proto, feed), run(model, feed)) == 0


def test_a_constant_channel_costs_nothing() -> None:
    """Half the units say the same whatever comes in: exactly they go, and the bias takes them in."""
    n = Net(9)
    first = n.rng.standard_normal((8, 24)).astype(np.float32)
    first[:, ::2] *= 1e-7
    x = n.call("Sigmoid", n.call("Add", n.call("MatMul", "x", n.value(first)), n.weights(24)))
    proto = n.model(n.linear(x, 24, 5), ("N", 8), ("N", 5))
    feeds = feeds_of(proto, 20, 10)
    result = optimized(proto, feeds, "prune:ratio=0.49:of=parameters:round_to=1")
    assert hidden(result.model) == [12, 5]
    assert error(proto, result.model, feeds) < 1e-8


def test_auto_keeps_a_budget_and_takes_what_it_allows() -> None:
    proto = perceptron()
    feeds = latent(40, 10, 64, 50)
    results = [optimized(proto, feeds, "prune:ratio=auto", min_sqnr=limit, keep_failed=False) for limit in (15, 35)]
    assert all(result.report.passed for result in results)
    loose, strict = (hidden(result.model)[0] for result in results)
    assert loose < strict < 256
    assert error(proto, results[1].model, latent(5, 10, 64, 50, 7)) < 10**-3.3


def test_auto_takes_nothing_from_a_network_that_needs_all() -> None:
    proto = incompressible()
    before = load(proto)
    result = optimized(proto, feeds_of(proto, 30, 40), "prune:ratio=auto", min_sqnr=30)
    assert float_elements(result.model) == float_elements(before)
    assert not record(result).changes


def firing(threshold: float = 0.0) -> tuple[ModelProto, list[dict[str, Any]]]:
    """Five of 20 units never rise above 0 on inputs above 0, four more never above a half."""
    n = Net(12)
    first = np.abs(n.rng.standard_normal((6, 20))).astype(np.float32)
    first[:, :5] *= -1
    bias = np.zeros(20, np.float32)
    bias[:5] = -0.1
    first[:, 5:9] *= 0.01
    x = n.relu(n.call("Add", n.call("MatMul", "x", n.value(first)), n.value(bias)))
    proto = n.model(n.linear(x, 20, 4), ("N", 6), ("N", 4))
    rng = np.random.default_rng(0)
    return proto, [{"x": rng.uniform(0, 1, (8, 6)).astype(np.float32)} for _ in range(12)]


def test_units_that_never_fire_go_at_no_cost() -> None:
    proto, feeds = firing()
    result = optimized(proto, feeds, "prune:criterion=never_fires")
    assert hidden(result.model) == [15, 4]
    assert error(proto, result.model, feeds) < 1e-12


def test_the_threshold_says_what_fires() -> None:
    proto, feeds = firing()
    result = optimized(proto, feeds, "prune:criterion=never_fires:threshold=0.5")
    assert hidden(result.model) == [11, 4]
    assert error(proto, result.model, feeds) < 1e-2


def test_a_network_of_which_all_fires_stays() -> None:
    proto, _ = firing()
    feeds = feeds_of(proto, 12, 30)
    assert hidden(optimized(proto, feeds, "prune:criterion=never_fires").model) == [20, 4]


def test_only_and_exclude_choose_the_nodes() -> None:
    proto = mlp(hidden=32)
    feeds = latent(12, 12, 64, 20)
    names = [node.name for node in proto.graph.node if node.op_type == "MatMul"]
    only = optimized(proto, feeds, f"{HALF}:only={names[1]}")
    assert hidden(only.model)[0] == 32
    assert hidden(only.model)[1] < 16
    assert any("not among" in skip.reason for skip in record(only).skipped)
    without = optimized(proto, feeds, f"{HALF}:exclude={names[1]}")
    assert hidden(without.model)[1] == 16
    assert hidden(without.model)[0] < 32


def test_a_misspelt_node_is_refused() -> None:
    proto = mlp(hidden=32)
    with pytest.raises(UsageError, match="n0_MatMool") as caught:
        optimized(proto, latent(6, 12, 64, 4), "prune:ratio=0.5:only=n0_MatMool")
    assert "n0_MatMul" in caught.value.remedy


@pytest.mark.parametrize("criterion", ["obs", "l1", "l2", "variance", "activation", "never_fires"])
def test_every_criterion_reaches_the_ratio(criterion: str) -> None:
    proto = mlp(hidden=64)
    feeds = latent(12, 12, 64, 20)
    result = optimized(proto, feeds, f"{HALF}:criterion={criterion}")
    assert 0.4 < reduction(result.model, proto) <= 0.5
    assert np.isfinite(error(proto, result.model, feeds))


def test_what_costs_least_beats_what_is_small() -> None:
    proto = mlp(hidden=64)
    feeds, held = latent(20, 12, 64, 40), latent(4, 12, 64, 40, 77)
    errors = {
        name: error(proto, optimized(proto, feeds, f"prune:ratio=0.6:scope=layer:criterion={name}").model, held)
        for name in ("obs", "l1", "never_fires")
    }
    assert errors["obs"] < errors["l1"]
    assert errors["obs"] < errors["never_fires"]


def test_layers_lose_the_same_share() -> None:
    proto = mlp(hidden=64)
    result = optimized(proto, latent(12, 12, 64, 20), "prune:ratio=0.6:scope=layer")
    one, two, _ = hidden(result.model)
    assert abs(one / 64 - two / 32) < 0.06


def test_blocks_of_one_structure_lose_the_same_share() -> None:
    n = Net(31)
    x = n.relu(n.linear("x", 16, 24))
    for _ in range(3):
        x = n.call("Add", x, n.linear(n.relu(n.linear(x, 24, 40)), 40, 24))
    proto = n.model(n.linear(x, 24, 4), ("N", 16), ("N", 4))
    result = optimized(proto, feeds_of(proto, 12, 20), "prune:ratio=0.5:scope=isomorphic")
    inner = hidden(result.model)[1:-1:2]
    assert len(inner) == 3
    assert max(inner) - min(inner) <= 1
    assert max(inner) < 40


def test_steps_get_to_the_same_ratio() -> None:
    proto = mlp(hidden=64)
    result = optimized(proto, latent(12, 12, 64, 20), f"{HALF}:steps=2")
    assert 0.45 < reduction(result.model, proto) <= 0.51
    assert sum(change.kind == "channels pruned" for change in record(result).changes) >= 2


@pytest.mark.parametrize(
    ("given", "target", "multiple"),
    [("", "x86", 8), ("", "openvino", 16), (":round_to=4", "x86", 4), (":round_to=16", "x86", 16)],
)
def test_convolutions_keep_multiples(given: str, target: str, multiple: int) -> None:
    proto = convolutions()
    result = optimized(proto, images(10), f"prune:ratio=0.5{given}", target=target)
    found = widths(result.model)
    assert all(width % multiple == 0 for width in found)
    assert sum(found) < 64


def test_a_width_that_no_multiple_is_below_is_told() -> None:
    proto = TOPOLOGIES["plain"]()
    result = optimized(proto, feeds_of(proto), "prune:ratio=0.5:round_to=32")
    assert widths(result.model) == [20, 6]
    assert any("multiple of 32" in skip.reason for skip in record(result).skipped)
    assert any("what can go saves 0.0%" in note for note in record(result).notes)


def test_without_data_only_what_is_lossless_goes() -> None:
    proto = TOPOLOGIES["plain"]()
    for tensor in proto.graph.initializer:
        if tensor.name in ("c0", "c1"):
            array = numpy_helper.to_array(tensor).copy()
            array[:4] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    result = optimized(proto, None, "prune:ratio=0.5:round_to=1")
    assert widths(result.model) == [16, 6]
    assert [skip.reason for skip in record(result).skipped if skip.node == "ratio"] == [
        "there are no real inputs to measure on (--data), so only what costs nothing went"
    ]


def test_the_same_bytes_come_out_twice() -> None:
    proto = TOPOLOGIES["stacked"]()
    feeds = feeds_of(proto)
    first, second = (
        optimized(proto, feeds, HALF).model.to_proto().SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "abc", "0.96", "nan", "true"])
def test_a_ratio_that_is_none_is_refused(ratio: str) -> None:
    with pytest.raises(UsageError, match="ratio") as caught:
        optimized(incompressible(), None, f"prune:ratio={ratio}")
    assert caught.value.remedy


def test_its_effect_is_lossy_once_it_loses_something() -> None:
    assert Prune(ratio=0.5).effect is Prune(ratio="auto").effect is Effect.LOSSY
    assert Prune(criterion="never_fires").effect is Effect.LOSSY
    assert Prune(criterion="l1").effect is Effect.ROUNDING


def test_a_dry_run_shows_the_groups_and_writes_nothing(tmp_path: Any) -> None:
    proto = TOPOLOGIES["residual"]()
    result = optimized(proto, feeds_of(proto), HALF, dry_run=True, output=tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    details = [change.detail for change in record(result).changes]
    assert any("read by" in detail for detail in details)
    assert any("fewer parameters, from" in note for note in record(result).notes)


def typed(proto: ModelProto, dtype: Any, kind: int) -> ModelProto:
    """The float32 proto in another float type."""
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for port in [*proto.graph.input, *proto.graph.output]:
        port.type.tensor_type.elem_type = kind
    return proto


@pytest.mark.parametrize("name", ["perceptron", "residual", "lstm", "heads"])
def test_half_precision(name: str) -> None:
    proto = typed(TOPOLOGIES[name](), np.float16, TensorProto.FLOAT16)
    result = optimized(proto, feeds_of(proto), HALF)
    assert reduction(result.model, proto) <= 0.55
    assert error(proto, result.model, feeds_of(proto)) < 0.5


def test_double_precision() -> None:
    proto = typed(TOPOLOGIES["perceptron"](), np.float64, TensorProto.DOUBLE)
    result = optimized(proto, feeds_of(proto), HALF)
    assert reduction(result.model, proto) <= 0.55
    assert all(node.inputs[1].dtype == np.dtype(np.float64) for node in result.model.graph.nodes if node.op == "MatMul")


def test_weights_in_constant_nodes_stay_there() -> None:
    proto = TOPOLOGIES["plain"]()
    made = [
        helper.make_node("Constant", [], [t.name], value=numpy_helper.from_array(numpy_helper.to_array(t)))
        for t in proto.graph.initializer
    ]
    del proto.graph.initializer[:]
    for node in reversed(made):
        proto.graph.node.insert(0, node)
    result = optimized(proto, feeds_of(proto), HALF)
    assert widths(result.model)[0] < 12


def twice_read(width: int) -> ModelProto:
    """Two layers that read one constant [width, width], each behind units of its own."""
    n = Net(33)
    weight, bias = n.weights(width, width), n.weights(width)
    parts = [n.relu(n.linear("x", 16, width)) for _ in range(2)]
    left, right = (n.relu(n.call("Add", n.call("MatMul", part, weight), bias)) for part in parts)
    return n.model(n.linear(n.call("Sub", left, right), width, 4), ("N", 16), ("N", 4))


def test_a_large_constant_that_two_layers_read_stays_one() -> None:
    proto = twice_read(80)
    feeds = latent(20, 6, 16, 30)
    result = optimized(proto, feeds, HALF)
    assert reduction(result.model, proto) <= 0.55
    readers = [node for node in result.model.graph.nodes if node.op == "MatMul"][2:4]
    shared = [node.inputs[1] for node in result.model.graph.nodes if node.op == "MatMul" and node.name]
    assert len(readers) == 2
    assert len({id(weight) for weight in shared}) == len(shared) - 1
    assert error(proto, result.model, latent(4, 6, 16, 30, 5)) < 0.3


def test_a_small_constant_that_two_layers_read() -> None:
    proto = twice_read(12)
    feeds = latent(20, 6, 16, 30)
    assert error(proto, optimized(proto, feeds, HALF).model, feeds) < 0.5


@pytest.mark.parametrize("opset", [9, 11, 21])
def test_opsets(opset: int) -> None:
    n = Net(4, opset=opset)
    proto = n.model(n.conv(n.relu(n.conv("x", 3, 16)), 16, 4), IMAGE, ("N", 4, 8, 8))
    assert reduction(optimized(proto, feeds_of(proto), HALF).model, proto) <= 0.5


def test_images_of_any_size() -> None:
    n = Net(5)
    proto = n.model(n.conv(n.relu(n.conv("x", 3, 16)), 16, 4), ("N", 3, "H", "W"), ("N", 4, "H", "W"))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1 + at % 2, 3, 5 + at, 9 - at)).astype(np.float32)} for at in range(6)]
    result = optimized(proto, feeds, HALF)
    assert reduction(result.model, proto) <= 0.5
    assert run(result.model, feeds[5])["y"].shape == (2, 4, 10, 4)


@pytest.mark.parametrize("count", [1, 2])
def test_one_feed_or_two(count: int) -> None:
    proto = TOPOLOGIES["perceptron"]()
    feeds = feeds_of(proto, count)
    assert np.isfinite(error(proto, optimized(proto, feeds, HALF).model, feeds))


def test_feeds_that_are_all_zero() -> None:
    proto = TOPOLOGIES["perceptron"]()
    feeds = [{"x": np.zeros((2, 5, 6), np.float32)} for _ in range(6)]
    result = optimized(proto, feeds, HALF)
    assert reduction(result.model, proto) <= 0.5
    before, after = (run(model, feeds[0])["y"] for model in (proto, result.model))
    assert np.abs(before - after).max() < 0.01 * np.abs(before).max()


def test_activations_that_are_not_finite_leave_a_group_alone() -> None:
    proto = TOPOLOGIES["perceptron"]()
    feeds = feeds_of(proto, 8)
    for feed in feeds:
        feed["x"][0, 0, 0] = np.inf
    result = optimized(proto, feeds, HALF, verify=False)
    assert reduction(result.model, proto) == 1
    assert any("infinities" in skip.reason for skip in record(result).skipped)


def chooses(op: str) -> ModelProto:
    n = Net(41)
    y = n.linear(n.relu(n.linear("x", 6, 40)), 40, 5)
    if op == "ArgMax":
        n.nodes.append(helper.make_node("ArgMax", [y], ["y"], axis=-1, keepdims=0))
    else:
        n.nodes.append(helper.make_node("Greater", [y, n.value(np.float32(0))], ["above"]))
        n.nodes.append(helper.make_node("Cast", ["above"], ["y"], to=TensorProto.INT64))
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 6))]
    shape = ("N",) if op == "ArgMax" else ("N", 5)
    graph = helper.make_graph(
        n.nodes, "net", ports, [helper.make_tensor_value_info("y", TensorProto.INT64, shape)], n.constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("op", ["ArgMax", "Greater"])
@pytest.mark.parametrize("ratio", ["0.5", "auto"])
def test_outputs_that_are_integers(op: str, ratio: str) -> None:
    proto = chooses(op)
    feeds = feeds_of(proto, 30, 20)
    result = optimized(proto, feeds, f"prune:ratio={ratio}:of=parameters")
    assert reduction(result.model, proto) < 1
    pairs = [(run(proto, feed)["y"], run(result.model, feed)["y"]) for feed in feeds]
    assert np.mean([np.mean(one == two) for one, two in pairs]) > 0.85


def test_a_model_of_which_nothing_can_go_says_why() -> None:
    n = Net(42)
    proto = n.model(n.linear("x", 6, 4), ("N", 6), ("N", 4))
    for passes in (HALF, "prune:ratio=auto", "prune:criterion=never_fires"):
        result = optimized(proto, feeds_of(proto), passes)
        assert not record(result).changes
        assert any("output of the model" in skip.reason for skip in record(result).skipped)
    assert any("what can go saves 0.0%" in note for note in record(optimized(proto, feeds_of(proto), HALF)).notes)


def test_what_was_only_tried_leaves_no_weights_behind() -> None:
    proto = incompressible()
    before = load(proto).to_proto()
    model = optimized(proto, feeds_of(proto, 20, 40), "prune:ratio=auto", min_sqnr=40).model.to_proto()
    assert [tensor.name for tensor in model.graph.initializer] == [tensor.name for tensor in before.graph.initializer]


def test_a_shared_session_with_other_passes() -> None:
    """BatchNormalization goes into convolutions first, and integers come after."""
    folder = ROOT / "models" / "digits_cnn"
    result = optimized(
        str(folder / "digits_cnn.onnx"),
        str(folder / "feeds" / "fit.npz"),
        "fold_constants,fuse_bn,prune:ratio=0.3,int8",
        evaluate=str(folder / "feeds" / "select.npz"),
    )
    assert [each.name for each in result.report.passes if each.status.value == "failed"] == []
    saved = float(record(result).notes[1].split("%")[0])
    assert saved >= 30
    assert any(node.op == "QuantizeLinear" for node in result.model.graph.nodes)
    fed = np.load(folder / "feeds" / "select.npz")
    logits = run(result.model, {"image": fed["image"]}, optimize=True)["logits"]
    assert np.mean(logits.argmax(-1) == fed["labels"].reshape(-1)) > 0.93
