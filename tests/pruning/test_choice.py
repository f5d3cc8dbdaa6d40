"""Groups, what they cost, and which steps are taken."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.graph.axes.axis import Floats
from onnxopt.graph.channels import Plan, remove
from onnxopt.graph.judged import judged, judged_error, judged_outputs
from onnxopt.graph.macs import layer_macs, static_shape
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Model, Variable, load
from onnxopt.passbase import Context
from onnxopt.pruning.curves import SCOPES, Curve, allowed_counts, path, removed
from onnxopt.pruning.groups import Group, find_groups
from onnxopt.pruning.maps import axis_maps, channel_maps
from onnxopt.pruning.order import Order
from onnxopt.pruning.reads import reads_of, slot_of
from onnxopt.pruning.sizes import Sizes
from onnxopt.target import resolve
from tests.graph.topologies import TOPOLOGIES, Net
from tests.helpers import evaluate, model

CONTEXT = Context(evaluate=evaluate, target=resolve("x86"))


def groups_of(name: str) -> list[Group]:
    maps = channel_maps(load(TOPOLOGIES[name]()), CONTEXT)
    return find_groups(maps, reads_of(maps))


def test_a_residual_stream_is_one_group() -> None:
    first, *inner = groups_of("residual")
    assert len(first.nodes) == 3  # the stem and what each block adds
    assert [len(group.nodes) for group in inner] == [1, 1]
    assert first.channels == 16
    told = first.describe(set(first.sets[:4]))
    assert told.startswith("4 of 16 channels, 4 of 16 of ")
    assert first.losses(set(first.sets[:4])) == [4, 4, 4]
    assert inner[0].signature() == inner[1].signature() != first.signature()


def test_heads_are_sets_where_there_is_attention() -> None:
    [group, *_] = [each for each in groups_of("attention") if len(each.nodes) == 3]
    assert len(group.sets) == 2
    assert group.channels == 16


@pytest.mark.parametrize(
    "name", ["residual", "inverted", "grouped", "joined", "gated", "ladder", "perceptron", "plain"]
)
@pytest.mark.parametrize("unit", ["macs", "parameters"])
def test_sizes_are_those_of_the_model_once_it_is_cut(name: str, unit: str) -> None:
    the_model = load(TOPOLOGIES[name]())
    maps = axis_maps(the_model, CONTEXT)
    shapes = {t.name: [2 if not isinstance(d, int) else d for d in t.shape or ()] for t in the_model.graph.inputs}
    sizes = Sizes(the_model, maps, shapes, unit, CONTEXT.target)
    assert sizes.total == counted(the_model, unit, shapes)
    gone = {root for group in find_groups(maps, reads_of(maps)) for root in group.sets[::3]}
    costs = {**sizes.current, **sizes.after(gone, gone)}
    remove(maps, Plan(dict.fromkeys(gone, "pruned"), ()), compensate=False)
    assert sum(costs.values()) == counted(the_model, unit, shapes) < sizes.total


def counted(the_model: Model, unit: str, shapes: dict[str, list[int]]) -> float:
    """Multiply-accumulates or float parameters of a model as it stands."""
    if unit == "parameters":
        constants = {id(t): t for n in the_model.graph.nodes for t in n.inputs if isinstance(t, Constant)}
        return sum(t.data.size for t in constants.values() if t.dtype.kind == "f")
    facts = known(the_model, shapes)

    def shape_of(tensor: Constant | Variable) -> tuple[int, ...] | None:
        if isinstance(tensor, Constant):
            return static_shape(tensor)
        shape = facts[id(tensor)].shape
        return None if shape is None else tuple(dim if isinstance(dim, int) else 1 for dim in shape)

    return sum(layer_macs(node, shape_of) or 0 for node in the_model.graph.nodes)


def test_time_goes_by_blocks() -> None:
    """A convolution of 13 channels takes as long as one of 16."""
    net = Net(1)
    the_model = load(net.model(net.conv(net.call("Relu", net.conv("x", 3, 32)), 32, 8), (1, 3, 8, 8), (1, 8, 8, 8)))
    maps = axis_maps(the_model, CONTEXT)
    sizes = Sizes(the_model, maps, {}, "latency", CONTEXT.target)
    [group] = find_groups(maps, reads_of(maps))

    def total(count: int) -> float:
        gone = group.sets[:count]
        return sum({**sizes.current, **sizes.after(gone, gone)}.values())

    assert total(7) == sizes.total
    assert total(8) == total(15) == pytest.approx(sizes.total * 24 / 32)


def curves(widths: tuple[int, ...], prices: tuple[float, ...]) -> tuple[list[Curve], Sizes]:
    """A chain of convolutions; removing a channel of layer i costs prices[i]."""
    net = Net(2)
    x, inner = "x", 3
    for width in widths:
        x, inner = net.call("Relu", net.conv(x, inner, width)), width
    the_model = load(net.model(net.conv(x, inner, 4), (1, 3, 8, 8), (1, 4, 8, 8)))
    maps = axis_maps(the_model, CONTEXT)
    found = []
    for group, price in zip(find_groups(maps, reads_of(maps)), prices, strict=True):
        costs: Floats = np.asarray(np.arange(1, len(group.sets)) * price, np.float64)
        order = Order(group.sets[:-1], costs)
        found.append(Curve(group, order, allowed_counts(group, order, 8)))
    return found, Sizes(the_model, maps, {}, "macs", CONTEXT.target)


def test_counts_leave_multiples() -> None:
    found, _ = curves((32, 20), (1.0, 1.0))
    assert found[0].counts == [8, 16, 24]
    assert found[1].counts == [4, 12]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_paths_reach_their_end_in_small_steps(scope: str, share: float) -> None:
    found, sizes = curves((64, 64, 64), (1.0, 5.0, 1.0))
    steps = path(found, sizes, sizes.total * (1 - share), scope)
    assert steps[-1].size <= sizes.total * (1 - share)
    assert all(step.size > sizes.total * (1 - share) for step in steps[:-1])
    assert steps[-1].size > sizes.total * (1 - share - 0.12)
    gone = removed(found, steps)
    assert sizes.total - steps[-1].size == pytest.approx(
        sum(sizes.current[node] - cost for node, cost in sizes.after(gone, gone).items())
    )


def test_the_cheaper_layer_is_cut_and_layers_alike_when_asked() -> None:
    found, sizes = curves((64, 64, 64), (1.0, 50.0, 1.0))

    def counts(scope: str) -> list[int]:
        last = {step.curve: step.count for step in path(found, sizes, sizes.total * 0.7, scope)}
        return [last.get(at, 0) for at in range(3)]

    assert counts("global")[1] == 0
    assert max(counts("layer")) - min(counts("layer")) <= 8
    errors = {scope: path(found, sizes, sizes.total * 0.7, scope)[-1].error for scope in ("global", "layer")}
    assert errors["global"] < errors["layer"]


def test_measured_errors_scale_the_readers_costs() -> None:
    [curve], _ = curves((32,), (1.0,))
    curve.points = [(8, 16.0), (16, 64.0)]  # twice and four times the readers' cost
    assert curve.error(0) == 0
    assert curve.error(8) == 16
    assert curve.error(12) == 12 * 3
    assert curve.error(24) == 24 * 4


def test_biases_that_can_take_a_constant() -> None:
    text = """g (float[n, 4] x) => (float[n, 3] y) {
      a = MatMul(x, w)  b = Add(c, a)  r = Relu(b)
      d = MatMul(r, v)  y = Relu(d) }"""
    rng = np.random.default_rng(0)
    weights = {"w": (4, 6), "c": (6,), "v": (6, 3)}
    the_model = model(text)
    for body in the_model.bodies():
        for node in body.nodes:
            for at, tensor in enumerate(node.inputs):
                if tensor.name in weights:
                    values = rng.standard_normal(weights[tensor.name]).astype(np.float32)
                    node.inputs[at] = Constant(tensor.name, values)
    maps = axis_maps(the_model, CONTEXT)
    last = next(reader for reader in maps.readers if reader.node.inputs[1].name == "v")
    assert slot_of(last, the_model) is None
    first = [reader for reader in maps.readers if reader.node.inputs[1].name == "w"]
    for reader in first:
        slot = slot_of(reader, the_model)
        assert slot is not None
        assert slot.node.op == "Add"


def test_errors_are_measured_in_front_of_what_saturates() -> None:
    text = """g (float[n, 4] x) => (float[n, 8] y, int64[n, 1] best) {
      boxes = Relu(x)  raw = Neg(x)  scores = Sigmoid(raw)  y = Concat<axis = 1>(boxes, scores)
      best = ArgMax<axis = 1>(raw) }"""
    the_model = model(text)
    found = judged_outputs(the_model)
    assert [tensor.name for tensor in found] == ["boxes", "raw"]
    own = list(the_model.graph.outputs)
    with judged(the_model, found):
        assert list(the_model.graph.outputs) == found
    assert list(the_model.graph.outputs) == own
    assert judged_error(20.0, found) == pytest.approx(0.01)


def test_whole_numbers_are_judged_by_agreement() -> None:
    the_model = model("g (int64[n] x) => (int64[n] y) { y = Add(x, x) }")
    found = judged_outputs(the_model)
    assert [tensor.name for tensor in found] == ["y"]
    assert judged_error(0.9, found) == pytest.approx(0.1)
