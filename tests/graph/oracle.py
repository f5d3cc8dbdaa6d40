"""What pruning is judged by: any sets of channels may go, and the rest computes what it did with them silenced.

A network is silenced where its channels are read: the weights on them are zeroed at every reader, and one factor of
every product is. That needs nothing of what the sets contribute, so the oracle also holds for sets that carry signal.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxopt.graph import infer, sort_model
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.axes.maps import Split
from onnxopt.graph.channels import Plan, frozen_channels, remove
from onnxopt.graph.edit import insert_before
from onnxopt.model import Constant, Model, Node, Variable, load


def maps_of(model: Model, split: Split = "fewest") -> AxisMaps:
    """Axis maps of a model that no values are computed for."""
    model.normalize()
    sort_model(model)
    infer(model)
    return AxisMaps.build(model, lambda _node, _inputs: None, split)


def free_sets(maps: AxisMaps) -> list[int]:
    """The sets of channels that can be cut, signal or not."""
    made = {root for site in maps.sites for root in maps.channels.roots(site.channels).tolist()}
    return sorted(made - frozen_channels(maps))


def some_sets(maps: AxisMaps, share: float, seed: int) -> list[int]:
    """A random share of the free sets, so chosen that every tracked axis keeps a channel."""
    axes = [axis.channels for axes in maps.axes.values() for axis in axes.values()]
    counters = [Counter(maps.channels.roots(channels).tolist()) for channels in axes]
    left = [counter.total() for counter in counters]
    order = np.random.default_rng(seed).permutation(free_sets(maps)).tolist()
    chosen: list[int] = []
    for root in order[: max(1, round(share * len(order)))]:
        if all(rest > counter[root] for rest, counter in zip(left, counters, strict=True)):
            left = [rest - counter[root] for rest, counter in zip(left, counters, strict=True)]
            chosen.append(int(root))
    return chosen


def silenced(proto: ModelProto, chosen: list[int], split: Split = "fewest") -> ModelProto:
    """The network with the chosen sets zeroed at every reader and in every product."""
    model = load(proto)
    maps = maps_of(model, split)
    for reader in maps.readers:
        gone = np.isin(maps.channels.roots(reader.read.channels), chosen)
        if not gone.any():
            continue
        old = np.asarray(reader.node.inputs[reader.index].values)
        weights = np.array(reader.spread(old))
        for position in np.flatnonzero(gone).tolist():
            group, place = divmod(position, len(gone) // reader.groups)
            weights[group, :, place] = 0
        values = reader.gather(weights, old).astype(old.dtype)
        reader.node.inputs[reader.index] = Constant(f"silenced{id(reader)}", values)
    for product in maps.products:
        if np.isin(maps.channels.roots(product.channels), chosen).any():
            assert product.node is not None
            for factor in product.factors:
                _mask(model, maps, product.node, factor, chosen)
            _silence_biases(maps, product.node, chosen)
    return model.to_proto()


def _mask(model: Model, maps: AxisMaps, node: Node, factor: tuple[int, int], chosen: list[int]) -> None:
    index, at = factor
    tensor = node.inputs[index]
    kept = ~np.isin(maps.channels.roots(maps.of(tensor)[at].channels), chosen)
    shape = [-1 if axis == at else 1 for axis in range(len(tensor.shape))]
    masked = Variable(f"masked{id(node)}_{index}", tensor.dtype, list(tensor.shape))
    mask = Constant(f"mask{id(node)}_{index}", kept.reshape(shape).astype(tensor.dtype))
    body = next(body for body in model.bodies() if any(other is node for other in body.nodes))
    insert_before(node, [Node("Mul", inputs=[tensor, mask], outputs=[masked])], body)
    node.inputs[index] = masked


def _silence_biases(maps: AxisMaps, node: Node, chosen: list[int]) -> None:
    """Zero what the node itself adds to factors."""
    for parameter in maps.parameters:
        if parameter.node is not node or not isinstance(node.inputs[parameter.index], Constant):
            continue
        values = np.array(node.inputs[parameter.index].values)
        gone = np.isin(maps.channels.roots(parameter.channels), chosen)
        np.moveaxis(values, parameter.axis, 0)[gone] = 0
        node.inputs[parameter.index] = Constant(f"quiet{id(parameter)}", values)


def predicted(maps: AxisMaps, chosen: list[int]) -> dict[int, tuple[int, ...]]:
    """id(constant) -> its shape after the cut, by its first use."""
    shapes: dict[int, list[int]] = {}
    users: dict[int, tuple[int, int]] = {}
    for parameter in maps.parameters:
        if parameter.index >= len(parameter.node.inputs):
            continue
        constant = parameter.node.inputs[parameter.index]
        shape = getattr(constant, "shape", None)
        if constant.is_empty() or not shape or shape[parameter.axis] != len(parameter.channels):
            continue
        user = users.setdefault(id(constant), (id(parameter.node), parameter.index))
        if user == (id(parameter.node), parameter.index):
            kept = ~np.isin(maps.channels.roots(parameter.channels), chosen)
            shapes.setdefault(id(constant), list(shape))[parameter.axis] = int(kept.sum())
    return {key: tuple(shape) for key, shape in shapes.items()}


def float_elements(model: Model) -> int:
    """Elements of all float constants that nodes read."""
    return sum(size for size, _ in _floats(model))


def _floats(model: Model) -> list[tuple[int, Any]]:
    found = {
        id(tensor): tensor
        for body in model.bodies()
        for node in body.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant) and tensor.dtype.kind == "f"
    }
    return [(tensor.data.size, tensor) for tensor in found.values()]


def cut(proto: ModelProto, chosen: list[int], split: Split = "fewest") -> tuple[Model, int]:
    """(the network without the chosen sets, float elements that it was predicted to keep)."""
    model = load(proto)
    maps = maps_of(model, split)
    shapes = predicted(maps, chosen)
    expected = sum(
        int(np.prod(shapes[id(tensor)], dtype=np.int64)) if id(tensor) in shapes else size
        for size, tensor in _floats(model)
    )
    remove(maps, Plan(dict.fromkeys(chosen, "chosen"), ()), compensate=False)
    return model, expected
