"""Compute shapes from as little as they depend on.

    Before                                             After
    s = Shape(x)           x: float[N, 12, 64]         y = Reshape(x, [0, -1])
    n = Gather(s, 0)
    m = Mul(Gather(s, 1), 64)
    y = Reshape(x, Concat([n], [m]))

Integers that shapes are computed from are followed entry by entry, open lengths as what they are called or where they
come from. What turns out to be a number becomes a constant, though other lengths of the same shape are open; a Reshape
whose target is open in one length at most gets a constant target, 0 for a length that stays where it is; integers that
were computed before, in whatever way, are taken from there; and Gather of a Shape becomes a Shape of those axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxopt.graph import label
from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult
from onnxopt.rewriting import Edits, Make, View
from onnxopt.rewriting.symbols import Entries, Entry, Symbols

_MOST_ROUNDS = 16


@dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Compute shapes from as little as they depend on."""

    name: ClassVar[str] = "simplify_shapes"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)

    @property
    def effect(self) -> Effect:
        """The same shapes."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Simplify in all bodies until nothing changes."""
        changes: list[Change] = []
        for _ in range(_MOST_ROUNDS):
            found = _Round(model).run()
            changes += found
            if not found:
                break
        return PassResult(changes)


class _Round:
    """One visit of all nodes, with what is known before it."""

    def __init__(self, model: Model) -> None:
        self.edits = Edits(model)
        self.view = View(model, self.edits)
        self.symbols = Symbols(self.view)
        self.changes: list[Change] = []
        self.gathers: list[Node] = []

    def run(self) -> list[Change]:
        self.visit(self.view.model.graph, [])
        for node in self.gathers:
            if self.edits.is_alive(node):
                self.shorten(node)
        self.edits.finish()
        return self.changes

    def visit(self, body: Graph, above: list[dict[Any, Any]]) -> None:
        made: dict[Any, Any] = {}
        for node in sorted_nodes(body):
            if not self.edits.is_alive(node) or node.kind[0] != "":
                continue
            if node.op == "Reshape":
                self.fix_target(node)
            known = self.symbols.of(node.outputs[0]) if node.outputs and not node.outputs[0].is_empty() else None
            if known is not None and len(node.outputs) == 1:
                self.simplify(node, known, [*above, made])
        for node in list(body.nodes):
            for inner in Node.graphs(node) if self.edits.is_alive(node) else ():
                self.visit(inner, [*above, made])

    def simplify(self, node: Node, known: Entries, scopes: list[dict[Any, Any]]) -> None:
        result, dtype = node.outputs[0], self.view.dtype(node.outputs[0])
        if known.numbers is not None:
            if not (self.edits.outputs.get(id(result))):
                values = np.array(known.numbers[0] if known.scalar else known.numbers, dtype)
                self.replace(node, lambda make: make.constant(values, result.name), f"is always {values.tolist()}")
            return
        key = (known, str(dtype))
        twin = next((scope[key] for scope in scopes if key in scope and self.is_made(scope[key])), None)
        if twin is not None and twin is not node.outputs[0]:
            self.replace(node, lambda _make: twin, f"is the same as {twin.name}")
            return
        scopes[-1][key] = result
        if node.op == "Gather":
            self.gathers.append(node)

    def is_made(self, tensor: Any) -> bool:
        """Whether the node that made the tensor is still there."""
        return bool(tensor.inputs) and self.edits.is_alive(tensor.inputs[0])

    def shorten(self, node: Node) -> None:
        """Gather(Shape(x), [a, a + 1, ...]) = Shape(x)[a : ...], from opset 15 on."""
        shape, at = self.view.maker(node.inputs[0], "Shape"), node.inputs[1]
        if shape is None or not isinstance(at, Constant) or len(at.shape) != 1 or self.view.opset(node) < 15:
            return
        rank = self.view.rank(shape.inputs[0])
        if rank is None or {"start", "end"} & set(shape.attrs):
            return
        places = [int(place) % rank for place in at.values]
        if not places or places != list(range(places[0], places[-1] + 1)):
            return
        source, end = shape.inputs[0], places[-1] + 1
        self.replace(node, lambda make: make("Shape", source, start=places[0], end=end), "takes these lengths only")

    def fix_target(self, node: Node) -> None:
        """Give a Reshape a constant target, where at most one length has to be left to it."""
        if isinstance(node.inputs[1], Constant) or node.attrs.get("allowzero", 0):
            return
        target = self.target(node)
        if target is not None:
            values = np.array(target, np.int64)
            self.replace(
                node,
                lambda make: make.like(
                    node, node.inputs[0], make.integers(values, f"{label(node)}_shape"), allowzero=None
                ),
                f"to {target}, a constant",
            )

    def target(self, node: Node) -> list[int] | None:
        known, result = self.symbols.of(node.inputs[1]), self.view.shape(node.outputs[0])
        if known is None:
            lengths = self.symbols.lengths(node.outputs[0])
            if lengths is None:
                return None
            known = Entries(lengths)
        before = self.symbols.lengths(node.inputs[0])
        entries: list[int | None] = []
        for at, entry in enumerate(known.entries):
            length = result[at] if result is not None and at < len(result) else None
            entries.append(
                self.target_entry(entry, length, before[at] if before is not None and at < len(before) else None)
            )
        # beside -1 the runtime takes no length that is 0, as open ones may be
        if entries.count(None) > 1 or (None in entries and (-1 in entries or 0 in entries)):
            return None
        if entries.count(0) == 1 and None not in entries and -1 not in entries and before is not None:
            entries[entries.index(0)] = None
        return [-1 if entry is None else entry for entry in entries]

    def target_entry(self, entry: Entry, length: Any, before: Entry | None) -> int | None:
        if isinstance(length, int) and length > 0:
            return length
        if isinstance(entry, int):
            return entry
        return 0 if entry == before else None

    def replace(self, node: Node, build: Any, detail: str) -> None:
        make, name = Make(self.edits, node), label(node)
        if self.edits.replace(node, [build(make)], make.nodes, [node]):
            self.changes.append(Change("simplified", name, f"{node.op} {detail}"))
