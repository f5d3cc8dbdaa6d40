"""Groups: the nodes whose channels depend on each other, what of them may go, and who reads it.

A *set* of channels goes or stays as one. A *group* is all sets of the nodes that are linked by sharing any: a stream
with residual additions is one group, whatever writes into it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.axes import AxisMaps, Product, Site
from onnxopt.graph.axes.axis import Ints
from onnxopt.graph.channels import frozen_channels
from onnxopt.graph.edit import label
from onnxopt.model import Node
from onnxopt.pruning.reads import Read


@dataclass(frozen=True, eq=False)
class Group:
    """sites: nodes that make the channels; sets: those that may go; reads, products: who sums over them.

    widths: for each site how many channels of each set it makes. passing: the same for each tensor on the way, where a
    piece of a Split may not vanish.
    """

    sites: tuple[Site, ...]
    sets: tuple[int, ...]
    reads: tuple[Read, ...]
    products: tuple[Product, ...]
    widths: tuple[Counter[int], ...]
    passing: tuple[Counter[int], ...]

    @property
    def name(self) -> str:
        """That of the first node."""
        return label(self.sites[0].node)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that make the channels, each once."""
        return list(dict.fromkeys(site.node for site in self.sites))

    @property
    def channels(self) -> int:
        """How many channels its first node makes."""
        return self.widths[0].total()

    def losses(self, gone: Collection[int]) -> list[int]:
        """How many channels each node that makes them loses with these sets."""
        return [sum(count for root, count in widths.items() if root in gone) for widths in self.widths]

    def describe(self, gone: Collection[int]) -> str:
        """ "8 of 64 channels, 16 of 128 of conv3; read by conv2, fc": the first node's, then the others'."""
        told = [
            f"{lost} of {widths.total()} " + ("channels" if at == 0 else f"of {label(site.node)}")
            for at, (site, widths, lost) in enumerate(zip(self.sites, self.widths, self.losses(gone), strict=True))
        ]
        read = [label(read.node) for read in self.reads] + [label(p.node) for p in self.products if p.node]
        return f"{_named(told)}; read by {_named(read)}"

    def signature(self) -> tuple[Any, ...]:
        """Equal for groups of the same structure: operators, widths and readers."""
        made = tuple(sorted((site.node.op, len(site.channels)) for site in self.sites))
        return made, tuple(sorted(read.node.op for read in self.reads)), len(self.sets)


def _named(names: list[str]) -> str:
    each = list(dict.fromkeys(names))
    shown = ", ".join(each[:4])
    return shown if len(each) <= 4 else f"{shown} and {len(each) - 4} more"


def find_groups(maps: AxisMaps, every_read: Sequence[Read]) -> list[Group]:
    """All groups of which anything may go, in graph order. every_read: `reads_of(maps)`."""
    roots = [maps.channels.roots(site.channels) for site in maps.sites]
    frozen = frozen_channels(maps)
    members = _linked(roots)
    reads, passing = _by_root(maps, every_read)
    products: dict[int, list[Product]] = defaultdict(list)
    for product in maps.products:
        for root in np.unique(maps.channels.roots(product.channels)).tolist():
            products[root].append(product)
    groups: list[Group] = []
    for sites in members:
        every = sorted({root for at in sites for root in roots[at].tolist()})
        free = [root for root in every if root not in frozen]
        if not free:
            continue
        groups.append(
            Group(
                tuple(maps.sites[at] for at in sites),
                tuple(free),
                _each(reads, free),
                _each(products, free),
                tuple(Counter(roots[at].tolist()) for at in sites),
                _each(passing, free),
            )
        )
    return groups


def _linked(roots: list[Ints]) -> list[list[int]]:
    """Indices of sites, those that share a set together, in order."""
    owner: dict[int, int] = {}
    parent = list(range(len(roots)))

    def top(at: int) -> int:
        while parent[at] != at:
            at = parent[at]
        return at

    for at, own in enumerate(roots):
        for root in np.unique(own).tolist():
            first = top(owner.setdefault(root, at))
            here = top(at)
            parent[max(first, here)] = min(first, here)
    found: dict[int, list[int]] = defaultdict(list)
    for at in range(len(roots)):
        found[top(at)].append(at)
    return list(found.values())


def _by_root(maps: AxisMaps, every_read: Sequence[Read]) -> tuple[dict[int, list[Read]], dict[int, list[Counter[int]]]]:
    reads: dict[int, list[Read]] = defaultdict(list)
    for read in every_read:
        for root in np.unique(read.roots).tolist():
            reads[root].append(read)
    passing: dict[int, list[Counter[int]]] = defaultdict(list)
    seen: set[bytes] = set()
    for axes in maps.axes.values():
        for axis in axes.values():
            key = axis.channels.tobytes()
            if key in seen:
                continue
            seen.add(key)
            counter = Counter(maps.channels.roots(axis.channels).tolist())
            for root in counter:
                passing[root].append(counter)
    return reads, passing


def _each(by_root: dict[int, list[Any]], roots: list[int]) -> tuple[Any, ...]:
    """What is listed under any of the roots, once, in order."""
    found: dict[int, Any] = {}
    for root in roots:
        for item in by_root.get(root, ()):
            found.setdefault(id(item), item)
    return tuple(found.values())
