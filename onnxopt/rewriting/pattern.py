"""Patterns: trees of operators, read from the last node towards what it is computed from.

x = tensor("x")
gate = op("Mul", x, op("Sigmoid", x))                  x * Sigmoid(x), factors in any order
op("Clip", op("Relu", x), REST, name="clip")           whatever other inputs the Clip has
op("Add|Sub", x, number(3.0), name="shift")            a constant of one element
op("MatMul", x, constant("weights"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from onnxopt.model import Constant, Node, Variable

Tensor = Variable | Constant

_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})


class _Rest:
    """The type of REST."""


REST: Final = _Rest()  # stands for all further inputs of a node, present or not


@dataclass(frozen=True)
class Match:
    """What a pattern found. nodes: all of them, the last one (`root`) first."""

    nodes: tuple[Node, ...]
    names: tuple[tuple[str, Any], ...] = ()

    @property
    def root(self) -> Node:
        """The last node, whose outputs are replaced."""
        return self.nodes[0]

    def __getitem__(self, name: str) -> Any:
        """The tensor or node that the pattern gave this name."""
        return dict(self.names)[name]

    def get(self, name: str) -> Any:
        """The tensor or node of this name; None where the alternative that matched does not hold it."""
        return dict(self.names).get(name)

    def named(self, name: str, value: Any) -> Match | None:
        """The match with one more name; None where the name already stands for something else."""
        if not name:
            return self
        there = self.get(name)
        if there is not None:
            return self if there is value else None
        return Match(self.nodes, (*self.names, (name, value)))


class Pattern:
    """One place of a tree."""

    depth: int = 0

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        """All ways in which the tensor fits."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Tensor(Pattern):
    name: str

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        extended = None if value.is_empty() else found.named(self.name, value)
        if extended is not None:
            yield extended


@dataclass(frozen=True)
class _Constant(Pattern):
    name: str

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        extended = found.named(self.name, value) if isinstance(value, Constant) else None
        if extended is not None:
            yield extended


@dataclass(frozen=True)
class _Number(Pattern):
    value: float
    relative: float

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        given = scalar(value)
        if given is not None and abs(given - self.value) <= self.relative * abs(self.value):
            yield found


@dataclass(frozen=True)
class _Any(Pattern):
    choices: tuple[Pattern, ...]

    @property
    def depth(self) -> int:  # type: ignore[override]
        return max(choice.depth for choice in self.choices)

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        for choice in self.choices:
            yield from choice.at(value, found)


@dataclass(frozen=True)
class Op(Pattern):
    """A node of one of several operators of one domain; `inputs` None for whatever inputs."""

    ops: tuple[str, ...]
    inputs: tuple[Pattern | _Rest, ...] | None
    name: str
    domain: str

    @property
    def depth(self) -> int:  # type: ignore[override]
        """How many nodes stand one behind the other."""
        below = [each.depth for each in self.inputs or () if isinstance(each, Pattern)]
        return 1 + max(below, default=0)

    def at(self, value: Tensor, found: Match) -> Iterator[Match]:
        """The node that makes the tensor as its first output."""
        if isinstance(value, Variable) and value.inputs and value.inputs[0].outputs[0] is value:
            yield from self.of(value.inputs[0], found)

    def of(self, node: Node, found: Match | None = None) -> Iterator[Match]:
        """All ways in which the node fits."""
        if node.op not in self.ops or node.kind[0] != self.domain:
            return
        nodes = (node,) if found is None else found.nodes
        nodes = nodes if any(node is each for each in nodes) else (*nodes, node)
        extended = Match(nodes, () if found is None else found.names).named(self.name, node)
        if extended is None:
            return
        if self.inputs is None:
            yield extended
            return
        for order in self._orders(node):
            yield from _all(order, extended)

    def _orders(self, node: Node) -> Iterator[list[tuple[Pattern, Tensor]]]:
        assert self.inputs is not None
        given = list(node.inputs)
        wanted = [each for each in self.inputs if isinstance(each, Pattern)]
        if len(wanted) < len(self.inputs):
            given = given[: len(wanted)]
        while len(given) > len(wanted) and given[-1].is_empty():
            given.pop()
        if len(given) != len(wanted):
            return
        yield list(zip(wanted, given, strict=True))
        if len(wanted) == 2 and node.op in _COMMUTATIVE and given[0] is not given[1]:
            yield list(zip(wanted, reversed(given), strict=True))


def _all(places: list[tuple[Pattern, Tensor]], found: Match) -> Iterator[Match]:
    if not places:
        yield found
        return
    (pattern, value), *rest = places
    for each in pattern.at(value, found):
        yield from _all(rest, each)


def tensor(name: str = "") -> Pattern:
    """Any tensor; where a name stands twice, the same one."""
    return _Tensor(name)


def constant(name: str = "") -> Pattern:
    """Any constant."""
    return _Constant(name)


def number(value: float, relative: float = 0.0) -> Pattern:
    """A constant of one element and at most one axis, near `value`."""
    return _Number(value, relative)


def any_of(*choices: Pattern) -> Pattern:
    """One of several patterns, the first that fits first."""
    return _Any(choices)


def op(kinds: str, *inputs: Pattern | _Rest, name: str = "", domain: str = "") -> Op:
    """A node: `kinds` are operator types, alternatives parted by "|". Without inputs: whatever its inputs are."""
    return Op(tuple(kinds.split("|")), inputs or None, name, domain)


def scalar(value: Any) -> float | None:
    """The number in a constant of one element and at most one axis; None where there is no such."""
    if not isinstance(value, Constant) or value.data.size != 1 or len(value.shape) > 1:
        return None
    if value.dtype.kind not in "fiu" and value.dtype.name != "bfloat16":
        return None
    return float(np.asarray(value.values).reshape(-1)[0])
