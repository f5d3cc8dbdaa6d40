"""Remove what no output depends on.

Nodes whose results nobody reads, initializers that no node reads, local functions that nothing calls, and operator sets
that nothing uses. Nodes of ONNX's own domains do nothing but compute, whether they are random or hold bodies; what a
custom operator does besides is not known, so it stays, and so does what it reads. Inputs and outputs of the model stay,
and what a quantization annotation names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnxopt.graph import label
from onnxopt.graph.edit import named_elsewhere
from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Graph, Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option
from onnxopt.rewriting import Edits

_ONNX = frozenset({"", "ai.onnx.ml"})


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove nodes, initializers, functions and operator sets that nothing uses."""

    name: ClassVar[str] = "eliminate_dead_code"
    operator_sets: bool = option(True, "also drop imports of operator sets that no node is of")

    @property
    def effect(self) -> Effect:
        """Nothing that is read changes."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Remove nodes, then what they used."""
        edits = Edits(model)
        nodes = [node for body in edits.bodies() for node in sorted_nodes(body)][::-1]
        harmless = _Harmless(model)
        free = [node for node in nodes if harmless(node)]
        names = {id(node): label(node) for node in nodes}
        edits.remove(free)
        idle = [node for node in nodes if edits.is_alive(node) and not any(map(edits.is_used, node.outputs))]
        gone = [node for node in nodes if not edits.is_alive(node)]
        edits.finish()
        changes = [Change("removed", names[id(node)], f"nothing reads this {node.op}") for node in reversed(gone)]
        changes += [Change("removed", name, "no node reads this initializer") for name in _drop_initializers(model)]
        changes += [Change("removed", name, "nothing calls this function") for name in _drop_functions(model)]
        if self.operator_sets:
            dropped = _drop_operator_sets(model)
            changes += [Change("removed", name, "no node is of this operator set") for name in dropped]
        return PassResult(changes, [Skip(label(node), "what this operator does besides is not known") for node in idle])


class _Harmless:
    """Whether a node does nothing but compute its outputs, and so do the nodes within it."""

    def __init__(self, model: Model) -> None:
        self.functions = {(body.domain, body.name, body.overload): body for body in model.functions}
        self.known: dict[int, bool] = {}

    def __call__(self, node: Node) -> bool:
        if id(node) not in self.known:
            self.known[id(node)] = False  # functions that call each other in a circle
            self.known[id(node)] = self._find(node)
        return self.known[id(node)]

    def _find(self, node: Node) -> bool:
        overload = node.proto.overload if node.proto is not None else ""
        called = self.functions.get((node.domain or "", node.op, overload))
        if called is not None:
            return all(map(self, called.nodes))
        return node.kind[0] in _ONNX and all(self(inner) for body in Node.graphs(node) for inner in body.nodes)


def _drop_initializers(model: Model) -> list[str]:
    dropped = []
    kept = named_elsewhere(model)
    for body in model.bodies():
        if body.is_function:
            continue
        idle = {id(c) for c in body.initializers if not c.outputs and id(c) not in kept}
        dropped += [constant.name for constant in body.initializers if id(constant) in idle]
        if idle:
            body.initializers = [constant for constant in body.initializers if id(constant) not in idle]
    return dropped


def _drop_functions(model: Model) -> list[str]:
    called: set[tuple[str, str, str]] = set()
    pending: list[Graph] = [model.graph]
    by_key = {(body.domain, body.name, body.overload): body for body in model.functions}
    while pending:
        for node in _all_nodes(pending.pop()):
            key = (node.domain or "", node.op, node.proto.overload if node.proto is not None else "")
            if key in by_key and key not in called:
                called.add(key)
                pending.append(by_key[key])
    dropped = [body.name for key, body in by_key.items() if key not in called]
    if dropped:
        model.functions = [body for key, body in by_key.items() if key in called]
    return dropped


def _all_nodes(body: Graph) -> Iterator[Node]:
    pending = list(body.nodes)
    while pending:
        node = pending.pop()
        yield node
        pending += [inner for each in Node.graphs(node) for inner in each.nodes]


def _drop_operator_sets(model: Model) -> list[str]:
    used = {node.kind[0] for root in (model.graph, *model.functions) for node in _all_nodes(root)} | {""}
    imports = list(model.carrier.opset_import)
    # functions state what they use themselves, and the model must import their domains
    used |= {entry.domain for body in model.functions for entry in body.import_domains or []}
    used |= {"" if domain == "ai.onnx" else domain for domain in used}
    idle = [entry.domain for entry in imports if ("" if entry.domain == "ai.onnx" else entry.domain) not in used]
    if idle:
        kept = [entry for entry in imports if entry.domain not in idle]
        model.carrier.ClearField("opset_import")
        model.carrier.opset_import.extend(kept)
        for body in model.bodies():
            if body.function is None:
                body.import_domains = list(model.carrier.opset_import)
    return idle
