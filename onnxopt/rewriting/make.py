"""How a rule makes nodes and constants."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from onnxopt.graph import label
from onnxopt.model import Constant, Node, Variable
from onnxopt.rewriting.edits import Edits

Tensor = Variable | Constant


class Make:
    """Makes what takes the place of `root`: `make("Transpose", x, perm=[1, 0])` is a node's output tensor.

    An input that is None is omitted. The node that gives the root's output inherits its name, metadata and docs.
    """

    def __init__(self, edits: Edits, root: Node) -> None:
        self.edits, self.root = edits, root
        self.nodes: list[Node] = []

    def __call__(self, kind: str, *inputs: Tensor | None, domain: str = "", **attrs: Any) -> Variable:
        """A new node; returns its output."""
        return self.several(kind, *inputs, domain=domain, **attrs)[0]

    def several(
        self, kind: str, *inputs: Tensor | None, outputs: int = 1, domain: str = "", **attrs: Any
    ) -> list[Variable]:
        """A new node of so many outputs; returns them."""
        base = f"{label(self.root)}_{kind}"
        made = [Variable(self.edits.names.tensor(f"{base}_output")) for _ in range(outputs)]
        given = [Variable.empty() if each is None else each for each in inputs]
        attrs = {name: value for name, value in attrs.items() if value is not None}
        self.nodes.append(Node(kind, self.edits.names.node(base), attrs, given, made, domain=domain or None))
        return made

    def like(self, node: Node, *inputs: Tensor | None, **attrs: Any) -> Variable:
        """The same operator with other inputs, and attributes that replace its own (None: leave that one out)."""
        return self(node.op, *inputs, domain=node.domain or "", **{**node.attrs, **attrs})

    def constant(self, values: ArrayLike, name: str = "") -> Constant:
        """A new constant; `name` is what it is to be called where that is free."""
        return Constant(self.edits.names.tensor(name or f"{label(self.root)}_constant"), np.asarray(values))

    def integers(self, values: ArrayLike, name: str = "") -> Constant:
        """A new int64 constant, the type of axes, shapes and positions."""
        return self.constant(np.asarray(values, np.int64), name)
