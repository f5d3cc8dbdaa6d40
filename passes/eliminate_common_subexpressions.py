"""Compute once what is computed twice.

    Before                                After
    a = Shape(x)    b = Shape(x)          a = Shape(x)
    c = Gather(a, i)                      c = Gather(a, i)
    d = Gather(b, i)                      y = Mul(c, c)
    y = Mul(c, d)

Two nodes are the same where operator, attributes (byte by byte), inputs and the outputs in use agree; constants count
by type, shape and bytes. Only what the operator table knows as pure is merged: never random nodes, nodes in training
mode, nodes that hold bodies, or custom operators. A node within a body may be the same as one of an enclosing body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from onnxopt.graph import label, operators
from onnxopt.graph.operators import opset_of
from onnxopt.graph.sort import sorted_nodes
from onnxopt.graph.values import attribute_key, constant_key
from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip
from onnxopt.rewriting import Edits


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Compute once what several nodes compute alike."""

    name: ClassVar[str] = "eliminate_common_subexpressions"

    @property
    def effect(self) -> Effect:
        """Readers get the same values."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Merge in the main graph and the bodies within it."""
        search = _Search(Edits(model))
        search.visit(model.graph, [])
        search.edits.finish()
        return PassResult(search.changes, search.skipped)


class _Table:
    """The nodes of a body by what they compute; attributes are looked at only where all else agrees."""

    def __init__(self) -> None:
        self._single: dict[Any, Node] = {}
        self._several: dict[Any, dict[bytes, Node]] = {}

    def find(self, key: Any, node: Node) -> Node | None:
        """The node added before that computes the same."""
        if key in self._single:
            first = self._single.pop(key)
            self._several[key] = {attribute_key(first): first}
        alike = self._several.get(key)
        return None if alike is None else alike.get(attribute_key(node))

    def add(self, key: Any, node: Node) -> None:
        """Note a node for which nothing was found."""
        if key in self._several:
            self._several[key][attribute_key(node)] = node
        else:
            self._single[key] = node


@dataclass
class _Search:
    edits: Edits
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)  # tables are keyed by identities, which must stay taken

    def visit(self, body: Graph, above: list[_Table]) -> None:
        """Merge in one body, then in the bodies of its nodes, which see all that is computed here."""
        table = _Table()
        scopes = [*above, table]
        version = opset_of(body)
        for node in sorted_nodes(body):
            if not self.edits.is_alive(node) or not operators.is_pure(node):
                continue
            key = self._key(node, version)
            twin = next((found for scope in scopes if (found := scope.find(key, node)) is not None), None)
            if twin is None:
                table.add(key, node)
            else:
                self._merge(node, twin)
        for node in list(body.nodes):
            for inner in Node.graphs(node):
                self.visit(inner, scopes)

    def _key(self, node: Node, version: int) -> Any:
        inputs = tuple(constant_key(t) if isinstance(t, Constant) else id(t) * (not t.is_empty()) for t in node.inputs)
        self.held.append((node, list(node.inputs)))
        return node.kind, version, inputs, tuple(tensor.is_empty() for tensor in node.outputs)

    def _merge(self, node: Node, twin: Node) -> None:
        name = label(node)
        results = list(zip(node.outputs, twin.outputs, strict=True))
        merged = [self.edits.redirect(old, new) for old, new in results if self.edits.is_used(old)]
        self.edits.remove([node])
        if self.edits.is_alive(node):
            self.skipped.append(Skip(name, f"it is the same as {label(twin)}, but gives an output its name"))
        elif all(merged):
            self.changes.append(Change("merged", name, f"into {node.op} {label(twin)}"))
