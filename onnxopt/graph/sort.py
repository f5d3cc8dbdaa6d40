"""Topological order."""

from __future__ import annotations

import heapq

from onnxopt.errors import ModelError
from onnxopt.model import Graph, Model, Node


def sort_nodes(body: Graph) -> None:
    """Put the nodes of one body in topological order, in place: see `sorted_nodes`."""
    body.nodes = sorted_nodes(body)
    body.unsorted_constants = False


def sorted_nodes(body: Graph) -> list[Node]:
    """The nodes of one body in topological order, keeping the given order wherever it is valid.

    Iterative (Kahn 1962), O((V + E) log V); O(V + E) where they are in order. A node that holds bodies waits for all
    they read. Raises ModelError when the nodes form a cycle, naming one of them.
    """
    nodes = list(body.nodes)
    producer = {id(tensor): at for at, node in enumerate(nodes) for tensor in node.outputs if tensor.name}
    sources = [{producer[key] for key in _reads(node) if key in producer} for node in nodes]
    if all(max(each, default=-1) < at for at, each in enumerate(sources)):
        return nodes
    waiting = [len(each) for each in sources]
    followers: list[list[int]] = [[] for _ in nodes]
    for at, each in enumerate(sources):
        for source in each:
            followers[source].append(at)
    ready = [at for at, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        at = heapq.heappop(ready)
        order.append(at)
        for follower in followers[at]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, follower)
    if len(order) < len(nodes):
        stuck = next(node for at, node in enumerate(nodes) if waiting[at])
        raise ModelError(
            f"the nodes of graph {body.name!r} form a cycle through {stuck.op} {stuck.name!r}",
            "the last edit connected a node to its own output; undo it",
        )
    return [nodes[at] for at in order]


def sort_model(model: Model) -> None:
    """Sort every body of a model."""
    for body in list(model.bodies()):
        sort_nodes(body)


def _reads(node: Node) -> list[int]:
    """Identities of all tensors the node or a body within it reads."""
    found = list(map(id, node.inputs))
    pending = list(Node.graphs(node)) if node.attrs else []
    while pending:
        inner = pending.pop()
        found += map(id, inner.outputs)
        for each in inner.nodes:
            found += map(id, each.inputs)
            if each.attrs:
                pending += Node.graphs(each)
    return found
