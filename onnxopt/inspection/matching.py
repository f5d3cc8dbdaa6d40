"""Which nodes of two bodies are the same one, whatever their tensors are called.

From the surest sign to the weakest, each looking only at nodes that no earlier one matched:

1. all of the graph above is equal, weights included      forward numbers; what was merely renamed is matched here
2. all of the graph below is equal, weights included      backward numbers; what stands behind a change is matched here
3. an output of the same name, and the same operator
4. as 1 and 2, with weights equal in type and shape only  trained on, and renamed
5. the same operator in the same place: it makes what a matched node reads at the same position, from the outputs
   backwards, or reads what a matched node makes
6. the same name of a node, and the same operator
7. the same operator with weights of the same dims, of which there are as many in both: in order; then 5 again

Where several nodes show the same sign, those with an output of the same name are matched first, the others in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxopt.graph.operators import opset_of
from onnxopt.graph.sort import sorted_nodes
from onnxopt.inspection.numbers import Number, Numbering
from onnxopt.model import Constant, Graph, Node


@dataclass
class Pairs:
    """Tensors and nodes of A and what they are in B. Variables that a body gets from outside are in `tensors` too."""

    tensors: dict[int, Any] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)

    def add(self, one: Node, other: Node) -> None:
        """Match two nodes, and their outputs by position."""
        self.nodes[id(one)] = other
        self.taken.add(id(other))
        for mine, theirs in zip(one.outputs, other.outputs, strict=False):
            if not mine.is_empty() and not theirs.is_empty():
                self.tensors[id(mine)] = theirs


def match_bodies(one: Graph, other: Graph, outside: Mapping[int, Any]) -> Pairs:
    """Match the nodes of two bodies. outside: id(tensor of A) -> tensor of B, for inputs and what is captured."""
    pairs = Pairs(dict(outside))
    sides = sorted_nodes(one), sorted_nodes(other)
    both = (one, other)
    exact, loose = Numbering(), Numbering(loose=True)
    steps: tuple[Callable[[], None], ...] = (
        lambda: _by_number(sides, pairs, _forward(sides, both, exact, outside)),
        lambda: _by_number(sides, pairs, _backward(sides, both, exact)),
        lambda: _by_key(sides, pairs, _output_names),
        lambda: _by_number(sides, pairs, _forward(sides, both, loose, outside)),
        lambda: _by_number(sides, pairs, _backward(sides, both, loose)),
        lambda: _by_place(sides, pairs, both),
        lambda: _by_key(sides, pairs, lambda node: [(node.kind, node.name)] if node.name else []),
        lambda: _by_place(sides, pairs, both),
        lambda: _by_weights(sides, pairs),
        lambda: _by_place(sides, pairs, both),
    )
    for step in steps:
        if min(len(sides[0]), len(sides[1])) == len(pairs.nodes):
            break
        step()
    return pairs


_Sides = tuple[list[Node], list[Node]]
_NumberOf = tuple[Callable[[Node], Number], Callable[[Node], Number]]


def _forward(sides: _Sides, bodies: tuple[Graph, Graph], numbering: Numbering, outside: Mapping[int, Any]) -> _NumberOf:
    known: tuple[dict[int, Number], dict[int, Number]] = ({}, {})
    for at, (key, theirs) in enumerate(outside.items()):
        known[0][key] = known[1][id(theirs)] = numbering.intern(("outside", at))
    found = []
    for nodes, start, body in zip(sides, known, bodies, strict=True):
        numbering.opset = opset_of(body)
        found.append(numbering.forward(nodes, start))

    def of(side: int) -> Callable[[Node], Number]:
        def number(node: Node) -> Number:
            made = next((tensor for tensor in node.outputs if not tensor.is_empty()), None)
            at = next((at for at, tensor in enumerate(node.outputs) if tensor is made), 0)
            return numbering.intern(("makes", at, found[side].get(id(made), -1)))

        return number

    return of(0), of(1)


def _backward(sides: _Sides, bodies: tuple[Graph, Graph], numbering: Numbering) -> _NumberOf:
    names = ({tensor.name for tensor in body.outputs} for body in bodies)
    shared = set.intersection(*names)
    found = []
    for nodes, body in zip(sides, bodies, strict=True):
        ends: dict[int, list[Any]] = {}
        for at, tensor in enumerate(body.outputs):
            # outputs of the main graph and of functions are told apart by name, those of other bodies by position
            by_name = body.parent is None and tensor.name in shared
            ends.setdefault(id(tensor), []).append(("output", tensor.name if by_name else str(at)))
        numbering.opset = opset_of(body)
        found.append(numbering.backward(nodes, ends))
    return (lambda node: found[0][id(node)]), (lambda node: found[1][id(node)])


def _by_number(sides: _Sides, pairs: Pairs, number_of: _NumberOf) -> None:
    groups: dict[Number, list[Node]] = {}
    for node in sides[1]:
        if id(node) not in pairs.taken:
            groups.setdefault(number_of[1](node), []).append(node)
    mine: dict[Number, list[Node]] = {}
    for node in sides[0]:
        if id(node) not in pairs.nodes:
            number = number_of[0](node)
            if number in groups:
                mine.setdefault(number, []).append(node)
    for number, nodes in mine.items():
        _pair_up(nodes, groups[number], pairs)


def _pair_up(mine: Sequence[Node], theirs: Sequence[Node], pairs: Pairs) -> None:
    """Match nodes that look alike: first by the name of an output, then in order."""
    named = {name: node for node in reversed(theirs) for _, name in _output_names(node)}
    for node in mine:
        twin = next((named[name] for _, name in _output_names(node) if name in named), None)
        if twin is not None and id(twin) not in pairs.taken:
            pairs.add(node, twin)
    rest = [node for node in theirs if id(node) not in pairs.taken]
    for node, twin in zip((node for node in mine if id(node) not in pairs.nodes), rest, strict=False):
        pairs.add(node, twin)


def _output_names(node: Node) -> list[tuple[tuple[str, str], str]]:
    return [(node.kind, tensor.name) for tensor in node.outputs if tensor.name]


def _by_key(sides: _Sides, pairs: Pairs, keys: Callable[[Node], Iterable[Hashable]]) -> None:
    """Match nodes that share a key which no other unmatched node of their body has."""
    owners: list[dict[Hashable, Node | None]] = [{}, {}]
    for side, done in enumerate((pairs.nodes, pairs.taken)):
        for node in sides[side]:
            if id(node) not in done:
                for key in keys(node):
                    owners[side][key] = None if key in owners[side] else node
    for key, one in owners[0].items():
        other = owners[1].get(key)
        if one is not None and other is not None and id(one) not in pairs.nodes and id(other) not in pairs.taken:
            pairs.add(one, other)


def _by_weights(sides: _Sides, pairs: Pairs) -> None:
    """Match nodes whose weights of two axes and more have the same dims, where both bodies hold as many, in order."""
    groups: list[dict[Hashable, list[Node]]] = [{}, {}]
    for side, done in enumerate((pairs.nodes, pairs.taken)):
        for node in sides[side]:
            dims = tuple(
                (at, tensor.shape)
                for at, tensor in enumerate(node.inputs)
                if isinstance(tensor, Constant) and len(tensor.shape) > 1
            )
            if dims and id(node) not in done:
                groups[side].setdefault((node.kind, dims), []).append(node)
    for key, nodes in groups[0].items():
        twins = groups[1].get(key, [])
        if len(nodes) == len(twins):
            _pair_up(nodes, twins, pairs)


def _by_place(sides: _Sides, pairs: Pairs, bodies: tuple[Graph, Graph]) -> None:
    """Match the neighbours of matched nodes, from the outputs backwards, until none is left."""
    producers = [{id(t): node for node in nodes for t in node.outputs if not t.is_empty()} for nodes in sides]
    readers = [_readers(nodes) for nodes in sides]
    pending: deque[tuple[Node, Node]] = deque()

    def match(one: Node | None, other: Node | None) -> None:
        free = one is not None and other is not None and id(one) not in pairs.nodes and id(other) not in pairs.taken
        if free and one is not None and other is not None and one.kind == other.kind:
            pairs.add(one, other)
            pending.append((one, other))

    for mine, theirs in _ends(bodies):
        match(producers[0].get(id(mine)), producers[1].get(id(theirs)))
    pending.extend((node, pairs.nodes[id(node)]) for node in reversed(sides[0]) if id(node) in pairs.nodes)
    while pending:
        one, other = pending.popleft()
        for mine, theirs in zip(one.inputs, other.inputs, strict=False):
            if not isinstance(mine, Constant) and not isinstance(theirs, Constant):
                match(producers[0].get(id(mine)), producers[1].get(id(theirs)))
        for mine, theirs in zip(one.outputs, other.outputs, strict=False):
            free = _alone(node for node in readers[0].get(id(mine), ()) if id(node) not in pairs.nodes)
            others = _alone(node for node in readers[1].get(id(theirs), ()) if id(node) not in pairs.taken)
            for kind, node in free.items():
                match(node, others.get(kind))


def _alone(nodes: Iterable[Node]) -> dict[tuple[str, str], Node | None]:
    """Operator -> the node, None where several have it."""
    found: dict[tuple[str, str], Node | None] = {}
    for node in nodes:
        found[node.kind] = None if node.kind in found else node
    return found


def _ends(bodies: tuple[Graph, Graph]) -> Iterable[tuple[Any, Any]]:
    one, other = bodies
    if one.parent is not None:
        return list(zip(one.outputs, other.outputs, strict=False))
    named = {tensor.name: tensor for tensor in other.outputs}
    same = [(tensor, named[tensor.name]) for tensor in one.outputs if tensor.name in named]
    return same or list(zip(one.outputs, other.outputs, strict=False))


def _readers(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in nodes:
        for key in dict.fromkeys(id(t) for t in node.inputs if not isinstance(t, Constant) and not t.is_empty()):
            found.setdefault(key, []).append(node)
    return found
