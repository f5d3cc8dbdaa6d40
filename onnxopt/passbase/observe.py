"""What a function did to a body, seen by comparing before and after."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from google.protobuf.message import Message

from onnxopt.model import Graph, Node
from onnxopt.passbase.result import Change


class Observation:
    """A body as it is now, to be compared with what becomes of it.

    Holds on to nodes and tensors, so that no new one can take the identity of one that is gone.
    """

    def __init__(self, body: Graph) -> None:
        self.body = body
        self.nodes = {id(node): (node, label(node), _settings(node), _wiring(node)) for node in body.nodes}
        self.tensors = {id(tensor): tensor for tensor in _tensors(body)}
        self.signature = (tuple(map(id, body.inputs)), tuple(map(id, body.outputs)))
        self.values = {id(constant): (constant, constant.data.uid) for constant in body.initializers}

    def changes(self) -> list[Change]:
        """Nodes removed, added and changed, constants with other values, other inputs and outputs.

        That a neighbour reads something else because a node was taken out or put in between is part of that change.
        """
        body = self.body
        after = {id(node) for node in body.nodes}
        there = {id(tensor) for tensor in _tensors(body)}
        found = [Change("removed", name) for key, (_, name, _, _) in self.nodes.items() if key not in after]
        found += [Change("added", label(node)) for node in body.nodes if id(node) not in self.nodes]
        found += [change for node in body.nodes for change in self._changed(node, there)]
        found += [
            Change("replaced values", constant.name)
            for constant in body.initializers
            if id(constant) in self.values and self.values[id(constant)][1] != constant.data.uid
        ]
        if not found and self.signature != (tuple(map(id, body.inputs)), tuple(map(id, body.outputs))):
            found.append(Change("changed", f"inputs or outputs of graph {body.name}".strip()))
        return found

    def _changed(self, node: Node, there: set[int]) -> Iterator[Change]:
        if id(node) not in self.nodes:
            return
        _, name, settings, wiring = self.nodes[id(node)]
        now = _wiring(node)
        pairs = [pair for old, new in zip(wiring, now, strict=True) for pair in zip(old, new, strict=False)]
        rewired = any(old != new and old in there and new in self.tensors for old, new in pairs)
        if settings != _settings(node) or rewired or [len(ids) for ids in wiring] != [len(ids) for ids in now]:
            renamed = label(node)
            yield Change("changed", name, "" if renamed == name else f"now {renamed}")


def label(node: Node) -> str:
    """Operator type and name (or first output) of a node."""
    return f"{node.op} {node.name or (node.outputs[0].name if node.outputs else '')}".strip()


def _wiring(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(map(id, node.inputs)), tuple(map(id, node.outputs))


def _tensors(body: Graph) -> Iterator[Any]:
    yield from (*body.inputs, *body.outputs, *body.initializers)
    for node in body.nodes:
        yield from node.inputs
        yield from node.outputs


def _settings(node: Node) -> tuple[Hashable, ...]:
    attributes = sorted((name, _key(value)) for name, value in node.attrs.items())
    return (node.op, node.name or "", node.domain or "", tuple(attributes))


def _key(value: Any) -> str:
    """A text that differs where the attribute differs. Graphs are told by identity: what is in them is theirs."""
    if isinstance(value, Graph):
        return f"graph {id(value)}"
    if isinstance(value, Message):
        return repr(value.SerializeToString(deterministic=True))
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes()!r}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_key, value))}]"
    return f"{type(value).__name__} {value!r}"
