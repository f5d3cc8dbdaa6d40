"""Which tensors of a body carry codes: the inputs of quantized layers, and islands of integer operators between them.

An operator of role KERNEL or PASS joins when all its inputs are codes already and its output leads to a layer that
wants codes; so nothing behind the last layer is ever quantized. Layers whose conversions at the border cost more than
their integer kernel saves leave again, by the target's cost facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from onnxopt.model import Graph, Node, Variable
from onnxopt.quantization import qdq
from onnxopt.quantization.layers import Layer, only_consumer
from onnxopt.target import CostFacts

# Elements of a tensor that one run computes, on average over the feeds; 0 when unknown.
Elements = Callable[[Variable], float]
# Whether what is known of a tensor lets it carry codes.
Allowed = Callable[[Variable], bool]


@dataclass
class Islands:
    """The plan of one body.

    layers: those with an integer kernel. codes: the tensors that pass through Q and DQ. produced: those of them whose
    producer writes codes, so that every reader sees the rounded values. nodes: integer operators between layers, each
    with the tensors by which codes leave it (behind the Relu that they imply, if there is one). takers: all nodes that
    read codes. pads: the Pad nodes that go into their layers.
    """

    layers: list[Layer] = field(default_factory=list)
    codes: dict[Variable, None] = field(default_factory=dict)
    produced: set[Variable] = field(default_factory=set)
    nodes: dict[Node, list[Variable]] = field(default_factory=dict)
    takers: set[Node] = field(default_factory=set)
    pads: set[Node] = field(default_factory=set)

    def reads_codes(self, node: Node) -> bool:
        """Whether codes are all that `node` needs of its input."""
        return node in self.takers or node in self.pads


def plan(
    body: Graph,
    layers: list[Layer],
    outputs: set[int],
    allowed: Allowed,
    grow: bool = True,
    left_float: frozenset[str] = qdq.LEFT_FLOAT,
) -> Islands:
    """Islands for exactly these layers of `body`.

    outputs: the model's `shared_tensors`. left_float: operators that carry no codes. A layer that may write float does
    so where nobody takes its codes.
    """
    island = Islands(list(layers))
    for layer in layers:
        island.codes[layer.activation] = None
        offered = layer.writes_float and id(layer.output) not in outputs and allowed(layer.output)
        if layer.needs_codes or offered:
            island.codes[layer.output] = None
    if grow:
        _grow(body, island, outputs, allowed, left_float)
    _withdraw(island)
    island.produced = {layer.output for layer in layers if layer.output in island.codes}
    for leaving in island.nodes.values():
        island.produced.update(leaving)
    island.takers = {layer.node for layer in layers} | set(island.nodes)
    island.pads = {layer.pad for layer in layers if layer.pad is not None}
    return island


def _grow(body: Graph, island: Islands, outputs: set[int], allowed: Allowed, left_float: frozenset[str]) -> None:
    available = set(island.codes)
    candidates: list[tuple[Node, list[Variable], list[Variable]]] = []
    for node in body.nodes:
        row = qdq.island_row(node, left_float)
        if row is None:
            continue
        inputs = [tensor for tensor in row.code_inputs(node) if isinstance(tensor, Variable)]
        leaving = _leaving(node, row, outputs)
        if any(id(tensor) in outputs or not allowed(tensor) for tensor in leaving):
            continue
        if all(tensor in available for tensor in inputs):
            candidates.append((node, inputs, leaving))
            available.update(leaving)
    wanted = dict(island.codes)
    for node, inputs, leaving in reversed(candidates):
        if any(tensor in wanted for tensor in leaving):
            wanted |= dict.fromkeys(inputs + leaving)
            island.nodes[node] = leaving
    island.codes = wanted


def _withdraw(island: Islands) -> None:
    """Take out the outputs of layers that may write float where neither a layer nor a node of the island reads them."""
    read = {layer.activation for layer in island.layers}
    for layer in island.layers:
        if not layer.writes_float or layer.output in read:
            continue
        if not any(reader in island.nodes for reader in layer.output.outputs):
            island.codes.pop(layer.output, None)


def _leaving(node: Node, row: qdq.Row, outputs: set[int]) -> list[Variable]:
    """Where the codes of an integer operator leave it: codes that start at zero imply a Relu behind it."""
    if row.role is qdq.Role.KERNEL:
        follower = only_consumer(node.outputs[0], outputs)
        if follower is not None and follower.kind == ("", "Relu"):
            return list(follower.outputs)
    return [tensor for tensor in node.outputs if not tensor.is_empty()]


def drop_unprofitable(
    body: Graph,
    layers: list[Layer],
    outputs: set[int],
    allowed: Allowed,
    elements: Elements,
    costs: CostFacts,
    grow: bool = True,
    left_float: frozenset[str] = qdq.LEFT_FLOAT,
) -> tuple[list[Layer], list[Layer]]:
    """(layers that pay, layers that do not) by the cost facts; what leaves changes its neighbours' balance.

    A layer between two tensors of codes stays even if it loses: the runtime would quantize its weight by itself, with
    one scale for the whole tensor (`weight_bias_quantization.cc`).
    """
    kept = list(layers)
    while kept:
        island = plan(body, kept, outputs, allowed, grow, left_float)
        losing = {layer for layer in kept if saving(layer, island, elements, costs) < 0}
        losing = losing or _losing_together(island, elements, costs)
        if not losing:
            break
        kept = [layer for layer in kept if layer not in losing]
    while True:
        island = plan(body, kept, outputs, allowed, grow, left_float)
        inside = {
            layer
            for layer in layers
            if layer not in kept and layer.activation in island.produced and layer.output in island.codes
        }
        if not inside:
            return kept, [layer for layer in layers if layer not in kept]
        chosen = set(kept) | inside
        kept = [layer for layer in layers if layer in chosen]


def saving(layer: Layer, island: Islands, elements: Elements, costs: CostFacts) -> float:
    """Nanoseconds a run gains by the integer kernel of `layer`, given its neighbours; negative when it loses."""
    gain = _kernel_gain(layer, elements, costs)
    convert = elements(layer.activation) * costs.convert + costs.node
    own = (layer.node, layer.pad)
    sharers = [node for node in layer.activation.outputs if node not in own and island.reads_codes(node)]
    if layer.activation in island.produced:
        # left float, this layer would read the codes through a DequantizeLinear of its own
        gain += convert if not sharers else 0.0
    elif not sharers:
        gain -= convert
    if layer.output not in island.codes:
        return gain
    readers = [island.reads_codes(node) for node in layer.output.outputs]
    convert = elements(layer.output) * costs.convert + costs.node
    if not all(readers) or not readers:
        gain -= convert
    if any(readers):
        gain += convert
    return gain


def _kernel_gain(layer: Layer, elements: Elements, costs: CostFacts) -> float:
    """Nanoseconds that the integer kernel saves, borders aside."""
    macs = multiply_adds(layer, elements)
    if layer.depthwise:
        return macs * (costs.float_depthwise_mac - costs.integer_depthwise_mac)
    return macs * (costs.float_mac - costs.integer_mac)


def multiply_adds(layer: Layer, elements: Elements) -> float:
    """Multiply-adds of one run, on average over the feeds; 0 when unknown."""
    outputs = elements(layer.output)
    if layer.node.op != "Conv":
        outputs = elements(layer.activation) / layer.macs_per_output * layer.channels
    return outputs * layer.macs_per_output


def _losing_together(island: Islands, elements: Elements, costs: CostFacts) -> set[Layer]:
    """Layers of those connected parts of the plan that lose as a whole, though each layer gains by its neighbours."""
    leader = {tensor: tensor for tensor in island.codes}

    def find(tensor: Variable) -> Variable:
        while leader[tensor] is not tensor:
            leader[tensor] = leader[leader[tensor]]
            tensor = leader[tensor]
        return tensor

    groups = [[layer.activation, layer.output] for layer in island.layers]
    groups += [[*node.inputs, *leaving] for node, leaving in island.nodes.items()]
    for group in groups:
        members = [tensor for tensor in group if tensor in leader]
        for tensor in members[1:]:
            leader[find(tensor)] = find(members[0])
    total = dict.fromkeys(leader, 0.0)
    for layer in island.layers:
        total[find(layer.activation)] += _kernel_gain(layer, elements, costs)
    for tensor in island.codes:
        inside = tensor in island.produced
        read = bool(tensor.outputs) and all(island.reads_codes(node) for node in tensor.outputs)
        if not (inside and read):
            total[find(tensor)] -= elements(tensor) * costs.convert + costs.node
    return {layer for layer in island.layers if total[find(layer.activation)] < 0}
