"""What folding decides before anything is computed: which nodes, which results, and what pays for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onnxopt.graph.operators import opset_of
from onnxopt.graph.values import ValueNumbers
from onnxopt.model import Constant, Graph, Node


@dataclass
class Plan:
    """What one round may compute, in topological order, outer bodies first; and which of these nodes stay anyhow."""

    nodes: dict[int, tuple[Node, Graph]] = field(default_factory=dict)
    numbers: ValueNumbers = field(default_factory=ValueNumbers)
    stored: list[Node] = field(default_factory=list)
    staying: set[int] = field(default_factory=set)
    dear: set[int] = field(default_factory=set)  # those that stay because the model would grow
    keys: set[tuple[int, int]] = field(default_factory=set)  # values that are stored
    credit: dict[int, int] = field(default_factory=dict)  # id(constant) -> bytes it can still pay for
    paying: dict[int, Constant] = field(default_factory=dict)
    rounding: set[int] = field(default_factory=set)  # those that compute 16-bit floats on the way
    _sources: dict[int, dict[int, Constant]] = field(default_factory=dict)
    lasting: set[int] = field(default_factory=set)  # constants that stay although some readers go

    def add(self, node: Node, body: Graph, rounds: bool) -> None:
        """Plan a node all of whose inputs are known. `rounds`: it computes what the runtime would not round."""
        sources: dict[int, Constant] = {}
        for tensor in node.inputs:
            if isinstance(tensor, Constant):
                sources[id(tensor)] = tensor
            for producer in tensor.inputs:
                sources.update(self._sources[id(producer)])
                rounds = rounds or id(producer) in self.rounding
        self.nodes[id(node)] = (node, body)
        self.numbers.add(node, opset_of(body))
        self._sources[id(node)] = sources
        if rounds:
            self.rounding.add(id(node))

    def sources_of(self, node: Node) -> list[Constant]:
        """The constants a planned node is computed from, each once."""
        return list(self._sources[id(node)].values())

    def key(self, tensor: Any, body: Graph) -> tuple[int, int]:
        """The value of a tensor; functions share none with each other or the main graph."""
        return self.numbers.number(tensor), id(body.function)

    def begin(self, lasting: set[int]) -> None:
        """Forget all decisions."""
        for each in (self.stored, self.staying, self.dear, self.keys, self.credit, self.paying):
            each.clear()
        self.lasting = lasting

    def goes(self, node: Node) -> bool:
        """Whether the node will be gone."""
        return id(node) in self.nodes and id(node) not in self.staying


def cone(nodes: list[Node], plan: Plan) -> Iterator[Node]:
    """The nodes and all planned nodes they are computed from."""
    seen = {id(node) for node in nodes}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for tensor in node.inputs:
            for producer in tensor.inputs:
                if id(producer) in plan.nodes and id(producer) not in seen:
                    seen.add(id(producer))
                    pending.append(producer)
