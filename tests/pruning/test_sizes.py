"""What is predicted of a pruned model, against the model that was cut."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from onnxopt.calibration.elements import Seen
from onnxopt.graph.channels import Plan, remove
from onnxopt.graph.macs import LAYERS, layer_macs
from onnxopt.graph.shapes import known
from onnxopt.model import Model, load
from onnxopt.pruning.sizes import Sizes
from onnxopt.target import resolve
from tests.graph.oracle import float_elements, some_sets
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import random_feeds
from tests.pruning.nets import mapped

NAMES = (
    "plain", "residual", "flattened", "joined", "divided", "shuffled", "upsampled", "inverted", "multiplied", "grouped",
    "gated", "unet", "mobile", "perceptron", "recurrent", "lstm", "gru", "stacked", "heads", "packed_heads",
    "recommender", "transposed_groups", "chosen", "speech", "superresolution",
)  # fmt: skip


def macs_of(model: Model, proto: ModelProto) -> float:
    """Counted from what the model's own shapes are in one run."""
    facts = known(model, {name: value.shape for name, value in random_feeds(proto).items()})

    def shape(tensor: object) -> tuple[int, ...] | None:
        own = getattr(tensor, "shape", None)
        fact = facts.get(id(tensor))
        dims = fact.shape if fact is not None and fact.shape is not None else own
        return None if dims is None else tuple(d if isinstance(d, int) else 1 for d in dims)

    nodes = [node for body in model.bodies() for node in body.nodes if node.op in LAYERS]
    return float(sum(layer_macs(node, shape) or 0 for node in nodes))


@pytest.mark.parametrize("unit", ["macs", "parameters"])
@pytest.mark.parametrize("name", NAMES)
def test_predicted_sizes_are_those_of_the_cut_model(name: str, unit: str) -> None:
    proto = TOPOLOGIES[name]()
    for seed in range(2):
        model, maps = mapped(proto)
        shapes = {key: value.shape for key, value in random_feeds(proto).items()}
        sizes = Sizes(model, maps, shapes, unit, resolve("x86"))
        gone = some_sets(maps, 0.5, seed)
        assert gone
        now = dict(sizes.current)
        now.update(sizes.after(gone, gone))
        predicted = sum(now.values())
        assert sizes.total == (macs_of(model, proto) if unit == "macs" else float_elements(load(proto)))
        remove(maps, Plan(dict.fromkeys(gone, "gone"), ()), compensate=False)
        small = load(model.to_proto())
        found = macs_of(small, proto) if unit == "macs" else float_elements(small)
        assert predicted == pytest.approx(found, rel=1e-9)
        assert predicted < sizes.total


def test_only_layers_that_are_touched_are_reckoned_again() -> None:
    proto = TOPOLOGIES["residual"]()
    model, maps = mapped(proto)
    sizes = Sizes(model, maps, {"x": (2, 3, 8, 8)}, "macs", resolve("x86"))
    root = int(maps.channels.roots(maps.sites[1].channels)[0])
    assert len(sizes.after([root], [root])) == 2


def test_latency_goes_down_by_whole_blocks() -> None:
    proto = TOPOLOGIES["plain"]()
    model, maps = mapped(proto)
    target = resolve("x86")
    sizes = Sizes(model, maps, {"x": (1, 3, 8, 8)}, "latency", target)
    roots = maps.channels.roots(maps.sites[0].channels).tolist()

    def left(count: int) -> float:
        return sum((sizes.current | sizes.after(roots[:count], roots[:count])).values())

    assert target.channels == 8
    assert left(0) == left(1) == left(3) == sizes.total
    assert left(4) < left(3)
    assert left(4) == left(11) > left(12) == left(19)


def test_matrices_take_time_by_the_channel() -> None:
    proto = TOPOLOGIES["perceptron"]()
    model, maps = mapped(proto)
    sizes = Sizes(model, maps, {"x": (1, 5, 6)}, "latency", resolve("x86"))
    roots = maps.channels.roots(maps.sites[0].channels).tolist()
    assert sum((sizes.current | sizes.after(roots[:1], roots[:1])).values()) < sizes.total


def test_idle_nodes_cost_parameters_only() -> None:
    proto = TOPOLOGIES["branching"]()
    model, maps = mapped(proto)
    idle = [node for body in model.bodies() if body.parent is not None for node in body.nodes][:1]

    def total(unit: str, seen: Seen) -> float:
        return Sizes(model, maps, {"x": (2, 6)}, unit, resolve("x86"), seen).total

    assert total("macs", Seen(idle=frozenset(idle))) < total("macs", Seen())
    assert total("parameters", Seen(idle=frozenset(idle))) == total("parameters", Seen())


def test_a_constant_that_two_nodes_read_is_counted_once() -> None:
    proto = TOPOLOGIES["plain"]()
    model, maps = mapped(proto)
    sizes = Sizes(model, maps, {"x": (1, 3, 8, 8)}, "parameters", resolve("x86"))
    assert sizes.total == sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
