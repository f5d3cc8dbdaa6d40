"""Contents that are equal byte by byte.

Samples tell most large contents apart, so that only what may be equal is read. Those that the samples leave together
are held against the first of them, all at once: n contents that are equal are read once each, and none is hashed. What
differs from the first is held against the next; where much remains then, hashes keep the comparisons few.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

from onnxopt.model import TensorData

# rounds of comparison before contents are hashed
_ROUNDS = 2


class Stored(Protocol):
    """Whatever has a content: a Constant, or the default of an input."""

    @property
    def data(self) -> TensorData:
        """The content."""
        ...


S = TypeVar("S", bound=Stored)
T = TypeVar("T")


def equal_groups(stored: Sequence[S]) -> list[list[S]]:
    """Groups of two and more whose bytes are equal; of one element type and shape, all dense or all sparse."""
    groups: list[list[S]] = []
    for alike in parted(stored, lambda each: each.data.fingerprint()):
        by_content: dict[int, list[S]] = {}
        for each in alike:
            by_content.setdefault(each.data.uid, []).append(each)
        contents = [members[0].data for members in by_content.values()]
        groups += [[each for data in same for each in by_content[data.uid]] for same in _same(contents)]
    return [group for group in groups if len(group) > 1]


def parted(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items by equal keys, in their order; only parts of two and more."""
    parts: dict[Hashable, list[T]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return [part for part in parts.values() if len(part) > 1]


def _same(contents: list[TensorData]) -> list[list[TensorData]]:
    """Distinct content objects by equal bytes; one that equals none stands alone."""
    groups: list[list[TensorData]] = []
    rest = contents
    for _ in range(_ROUNDS):
        same, rest = _held_against_first(rest)
        groups.append(same)
        if not rest:
            return groups
    groups += [_held_against_first(alike)[0] for alike in parted(rest, lambda data: data.digest())]
    grouped = {data.uid for group in groups for data in group}
    return groups + [[data] for data in rest if data.uid not in grouped]


def _held_against_first(contents: list[TensorData]) -> tuple[list[TensorData], list[TensorData]]:
    """(the first and those equal to it, the others)."""
    first, *others = contents
    equal = first.equal_to(others)
    same = [first, *(data for data, is_same in zip(others, equal, strict=True) if is_same)]
    return same, [data for data, is_same in zip(others, equal, strict=True) if not is_same]
