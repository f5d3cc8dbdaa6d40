"""Which tensors of a body carry codes: the inputs of quantized layers, and islands of integer operators between them.

An operator of role KERNEL or PASS joins when all its inputs are codes already and its output leads to a layer that
wants codes; so nothing behind the last layer is ever quantized. Layers whose conversions at the border cost more than
their integer kernel saves leave again, by the target's cost facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from onnxopt.graph import qdq
from onnxopt.graph.layers import Layer
from onnxopt.model import Constant, Graph, Node, Variable
from onnxopt.target import CostFacts

# Elements of a tensor that one run computes, on average over the feeds; 0 when unknown.
Elements = Callable[[Variable], float]


@dataclass
class Islands:
    """The plan of one body.

    layers: those with an integer kernel. codes: the tensors that pass through Q and DQ. produced: those of them whose
    producer writes codes, so that every reader sees the rounded values. nodes: integer operators between layers.
    takers: all nodes that read codes.
    """

    layers: list[Layer] = field(default_factory=list)
    codes: set[Variable] = field(default_factory=set)
    produced: set[Variable] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    takers: set[Node] = field(default_factory=set)


def plan(body: Graph, layers: list[Layer], allowed: Callable[[Node], bool], grow: bool = True) -> Islands:
    """Islands for exactly these layers of `body`. `allowed` says which nodes between layers may run on codes."""
    island = Islands(list(layers))
    for layer in layers:
        island.codes.add(layer.activation)
        if layer.needs_codes:
            island.codes.add(layer.output)
    if grow:
        _grow(body, island, allowed)
    island.produced = {layer.output for layer in layers} & island.codes
    for node in island.nodes:
        island.produced.update(node.outputs)
    island.takers = {layer.node for layer in layers} | set(island.nodes)
    return island


def _grow(body: Graph, island: Islands, allowed: Callable[[Node], bool]) -> None:
    outputs = {id(tensor) for tensor in body.outputs}
    available = set(island.codes)
    candidates: list[tuple[Node, list[Variable]]] = []
    for node in body.nodes:
        row = qdq.island_row(node)
        if row is None or any(id(tensor) in outputs for tensor in node.outputs):
            continue
        inputs = [tensor for tensor in row.code_inputs(node) if not isinstance(tensor, Constant)]
        if all(tensor in available for tensor in inputs) and allowed(node):
            candidates.append((node, inputs))
            available.update(node.outputs)
    wanted = set(island.codes)
    chosen: list[Node] = []
    for node, inputs in reversed(candidates):
        if any(tensor in wanted for tensor in node.outputs):
            wanted.update(inputs)
            wanted.update(node.outputs)
            chosen.append(node)
    island.codes |= wanted
    island.nodes = chosen[::-1]


def drop_unprofitable(
    body: Graph, layers: list[Layer], allowed: Callable[[Node], bool], elements: Elements, costs: CostFacts
) -> tuple[list[Layer], list[Layer]]:
    """(layers that pay, layers that do not) by the cost facts; what leaves changes its neighbours' balance."""
    kept, dropped = list(layers), []
    while kept:
        island = plan(body, kept, allowed)
        losing = {layer for layer in kept if saving(layer, island, elements, costs) < 0}
        if not losing:
            break
        dropped += [layer for layer in kept if layer in losing]
        kept = [layer for layer in kept if layer not in losing]
    return kept, dropped


def saving(layer: Layer, island: Islands, elements: Elements, costs: CostFacts) -> float:
    """Nanoseconds a run gains by the integer kernel of `layer`, given its neighbours; negative when it loses."""
    outputs = elements(layer.raw)
    macs = outputs * layer.macs_per_output
    if layer.depthwise:
        gain = macs * (costs.float_depthwise_mac - costs.integer_depthwise_mac)
    else:
        gain = macs * (costs.float_mac - costs.integer_mac)
    convert = elements(layer.activation) * costs.convert + costs.node
    sharers = [node for node in layer.activation.outputs if node is not layer.node and node in island.takers]
    if layer.activation in island.produced:
        # left float, this layer would read the codes through a DequantizeLinear of its own
        gain += convert if not sharers else 0.0
    elif not sharers:
        gain -= convert
    if layer.output not in island.codes:
        return gain
    readers = [node in island.takers for node in layer.output.outputs]
    convert = elements(layer.output) * costs.convert + costs.node
    if not all(readers) or not readers:
        gain -= convert
    if any(readers):
        gain += convert
    return gain
