"""Values of the integers that shapes are computed from, entry by entry: numbers, and lengths that have a name or not.

    s = Shape(x)             x: float[N, 3, ?]        [N, 3, length 2 of x]
    n = Gather(s, 0)                                  N
    t = Concat([n], [-1])                             [N, -1]

Two entries that are equal here are equal whenever the model runs. Sums and products of lengths are told apart by how
they are computed, so that N * 3 is N * 3 wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Constant, Node
from onnxopt.rewriting.view import View, integers, is_given

# a number, or what tells one unknown number from others
Entry = int | tuple[Any, ...]
_MOST_ENTRIES = 64


@dataclass(frozen=True)
class Entries:
    """The entries of a tensor of at most one axis. scalar: whether it has none."""

    entries: tuple[Entry, ...]
    scalar: bool = False

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """All entries, where they are numbers."""
        found = tuple(entry for entry in self.entries if isinstance(entry, int))
        return found if len(found) == len(self.entries) else None


@dataclass
class Symbols:
    """What is known of the integers in a model, as it is when this is made."""

    view: View
    _known: dict[int, Entries | None] = field(default_factory=dict)
    _held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for body in self.view.edits.bodies():
            for node in sorted_nodes(body):
                self.learn(node)

    def learn(self, node: Node) -> None:
        """Work out what a node makes, if it makes such integers."""
        rule = _RULES.get(node.op) if node.kind[0] == "" else None
        if rule is None or not node.outputs or node.outputs[0].is_empty():
            return
        result = node.outputs[0]
        dtype = self.view.dtype(result)
        if dtype is None or (dtype.kind not in "iu" and dtype.kind != "b"):
            return
        found = rule(node, self)
        if found is not None and len(found.entries) <= _MOST_ENTRIES:
            self._known[id(result)] = found
            self._held.append(result)

    def of(self, tensor: Any) -> Entries | None:
        """The entries of a tensor; None where it is not of that kind or nothing is known of it."""
        if isinstance(tensor, Constant):
            data = tensor.data
            if data.size > _MOST_ENTRIES or len(data.shape) > 1 or data.dtype.kind not in "iub":
                return None
            return Entries(tuple(int(value) for value in tensor.values.reshape(-1)), scalar=not data.shape)
        return self._known.get(id(tensor))

    def lengths(self, tensor: Any) -> tuple[Entry, ...] | None:
        """The lengths of a tensor's axes as entries; None where its rank is not known."""
        shape = self.view.shape(tensor)
        if shape is None:
            return None
        self._held.append(tensor)
        return tuple(
            length if isinstance(length, int) else ("named", length) if length else ("length", id(tensor), axis)
            for axis, length in enumerate(shape)
        )


_Rule = Callable[[Node, Symbols], Entries | None]


def _shape(node: Node, symbols: Symbols) -> Entries | None:
    lengths = symbols.lengths(node.inputs[0])
    if lengths is None:
        return None
    return Entries(lengths[slice(node.attrs.get("start", 0), node.attrs.get("end"))])


def _size(node: Node, symbols: Symbols) -> Entries | None:
    lengths = symbols.lengths(node.inputs[0])
    return None if lengths is None else Entries((_product(lengths),), scalar=True)


def _product(factors: Sequence[Entry]) -> Entry:
    numbers = [factor for factor in factors if isinstance(factor, int)]
    others = sorted((factor for factor in factors if not isinstance(factor, int)), key=repr)
    known = int(np.prod(numbers, dtype=object)) if numbers else 1
    if not others or known == 0:
        return known
    if known == 1 and len(others) == 1:
        return others[0]
    return ("product", *others, known)


def _gather(node: Node, symbols: Symbols) -> Entries | None:
    data, at = symbols.of(node.inputs[0]), symbols.of(node.inputs[1])
    if data is None or at is None or data.scalar or at.numbers is None:
        return None
    count = len(data.entries)
    if not all(-count <= place < count for place in at.numbers):
        return None
    return Entries(tuple(data.entries[place] for place in at.numbers), at.scalar)


def _slice(node: Node, symbols: Symbols) -> Entries | None:
    data = symbols.of(node.inputs[0])
    starts, ends = integers(node, 1, "starts"), integers(node, 2, "ends")
    steps = integers(node, 4, "steps") if is_given(node, 4) else [1]
    if data is None or data.scalar or steps is None or any(x is None or len(x) != 1 for x in (starts, ends, steps)):
        return None
    assert starts is not None
    assert ends is not None
    if steps[0] <= 0:
        return None
    return Entries(data.entries[slice(starts[0], ends[0], steps[0])])


def _concat(node: Node, symbols: Symbols) -> Entries | None:
    parts = [symbols.of(each) for each in node.inputs]
    joined: list[Entry] = []
    for part in parts:
        if part is None or part.scalar:
            return None
        joined += part.entries
    return Entries(tuple(joined))


def _one_more_axis(node: Node, symbols: Symbols) -> Entries | None:
    data = symbols.of(node.inputs[0])
    return (
        Entries(data.entries) if data is not None and data.scalar and symbols.view.rank(node.outputs[0]) == 1 else None
    )


def _other_rank(node: Node, symbols: Symbols) -> Entries | None:
    data, rank = symbols.of(node.inputs[0]), symbols.view.rank(node.outputs[0])
    return Entries(data.entries, scalar=rank == 0) if data is not None and rank in (0, 1) else None


def _cast(node: Node, symbols: Symbols) -> Entries | None:
    data, dtype = symbols.of(node.inputs[0]), symbols.view.dtype(node.outputs[0])
    if data is None or dtype is None:
        return None
    if dtype.kind == "b":
        return None if data.numbers is None else Entries(tuple(int(n != 0) for n in data.numbers), data.scalar)
    if dtype.itemsize < 4 or (data.numbers is not None and not all(abs(n) < 2**31 for n in data.numbers)):
        return None
    return data


def _identity(node: Node, symbols: Symbols) -> Entries | None:
    return symbols.of(node.inputs[0])


def _pairs(node: Node, symbols: Symbols) -> tuple[list[tuple[Entry, Entry]], bool] | None:
    """The entries of two inputs side by side, broadcast, and whether both are scalars."""
    one, other = symbols.of(node.inputs[0]), symbols.of(node.inputs[1])
    if one is None or other is None:
        return None
    count = max(len(one.entries), len(other.entries))
    if any(len(each.entries) not in (1, count) for each in (one, other)):
        return None
    spread = [each.entries * (count if len(each.entries) == 1 else 1) for each in (one, other)]
    return list(zip(*spread, strict=True)), one.scalar and other.scalar


def _entrywise(combine: Callable[[Entry, Entry], Entry | None]) -> _Rule:
    def rule(node: Node, symbols: Symbols) -> Entries | None:
        pairs = _pairs(node, symbols)
        if pairs is None:
            return None
        found = [combine(*pair) for pair in pairs[0]]
        known = tuple(entry for entry in found if entry is not None)
        return Entries(known, pairs[1]) if len(known) == len(found) else None

    return rule


def _add(one: Entry, other: Entry) -> Entry:
    if isinstance(one, int) and isinstance(other, int):
        return one + other
    if one == 0 or other == 0:
        return other if one == 0 else one
    return ("sum", *sorted((one, other), key=repr))


def _subtract(one: Entry, other: Entry) -> Entry:
    if isinstance(one, int) and isinstance(other, int):
        return one - other
    return 0 if one == other else one if other == 0 else ("difference", one, other)


def _multiply(one: Entry, other: Entry) -> Entry:
    return _product((one, other))


def _divide(one: Entry, other: Entry) -> Entry | None:
    if isinstance(one, int) and isinstance(other, int):
        # towards zero, as integers are divided
        return None if other == 0 else abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)
    return one if other == 1 else ("quotient", one, other)


def _equal(one: Entry, other: Entry) -> Entry | None:
    if isinstance(one, int) and isinstance(other, int):
        return int(one == other)
    # a length is never negative
    lengths = [each for each in (one, other) if not isinstance(each, int) and each[0] in ("named", "length")]
    numbers = [each for each in (one, other) if isinstance(each, int)]
    if lengths and numbers and numbers[0] < 0:
        return 0
    return 1 if one == other else None


def _compare(test: Callable[[int, int], bool]) -> Callable[[Entry, Entry], Entry | None]:
    def combine(one: Entry, other: Entry) -> Entry | None:
        return int(test(one, other)) if isinstance(one, int) and isinstance(other, int) else None

    return combine


def _not(node: Node, symbols: Symbols) -> Entries | None:
    data = symbols.of(node.inputs[0])
    return None if data is None or data.numbers is None else Entries(tuple(1 - n for n in data.numbers), data.scalar)


def _where(node: Node, symbols: Symbols) -> Entries | None:
    condition, one, other = (symbols.of(each) for each in node.inputs)
    if condition is None or condition.numbers is None or one is None or other is None:
        return None
    count = max(len(each.entries) for each in (condition, one, other))
    if any(len(each.entries) not in (1, count) for each in (condition, one, other)):
        return None
    tests, yes, no = (e * (count if len(e) == 1 else 1) for e in (condition.numbers, one.entries, other.entries))
    scalar = condition.scalar and one.scalar and other.scalar
    return Entries(tuple(a if test else b for test, a, b in zip(tests, yes, no, strict=True)), scalar)


def _constant_of_shape(node: Node, symbols: Symbols) -> Entries | None:
    shape = symbols.of(node.inputs[0])
    numbers = None if shape is None else shape.numbers
    if numbers is None or len(numbers) > 1 or (numbers and numbers[0] > _MOST_ENTRIES):
        return None
    value = node.attrs.get("value")
    fill = 0 if value is None else int(np.asarray(value).reshape(-1)[0])
    return Entries((fill,) * (numbers[0] if numbers else 1), scalar=not numbers)


def _reduce_product(node: Node, symbols: Symbols) -> Entries | None:
    data, rank = symbols.of(node.inputs[0]), symbols.view.rank(node.outputs[0])
    if (
        data is None
        or data.scalar
        or rank is None
        or (is_given(node, 1) and integers(node, 1, "axes") not in ([0], [-1]))
    ):
        return None
    return Entries((_product(data.entries),), scalar=rank == 0)


_RULES: dict[str, _Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _one_more_axis,
    "Squeeze": _other_rank,
    "Reshape": _other_rank,
    "Flatten": _other_rank,
    "Cast": _cast,
    "Identity": _identity,
    "Add": _entrywise(_add),
    "Sub": _entrywise(_subtract),
    "Mul": _entrywise(_multiply),
    "Div": _entrywise(_divide),
    "Equal": _entrywise(_equal),
    "Less": _entrywise(_compare(int.__lt__)),
    "LessOrEqual": _entrywise(_compare(int.__le__)),
    "Greater": _entrywise(_compare(int.__gt__)),
    "GreaterOrEqual": _entrywise(_compare(int.__ge__)),
    "And": _entrywise(_compare(lambda a, b: bool(a and b))),
    "Or": _entrywise(_compare(lambda a, b: bool(a or b))),
    "Not": _not,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduce_product,
}
