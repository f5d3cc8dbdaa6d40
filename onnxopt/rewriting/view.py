"""What rules may ask about a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxopt.graph.operators import opset_of
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.rewriting.edits import Edits
from onnxopt.target import Target, resolve

Shape = tuple[int | str | None, ...]
_NOTHING = Fact()


class View:
    """A model as rules see it: who makes and reads a tensor, its type and shape, the value of a constant.

    Types and shapes are what follows from the declared inputs. `refresh` infers them anew; until then new tensors have
    none, but a tensor that a rule gave another producer keeps what it was known to be.
    """

    def __init__(self, model: Model, edits: Edits, target: Target | None = None) -> None:
        self.model, self.edits = model, edits
        self.target = target or resolve("auto")
        self._facts: dict[int, Fact] | None = None
        self._held: list[Any] = []

    def refresh(self) -> None:
        """Forget types and shapes; they are inferred again when the next rule asks."""
        self._facts = None

    @property
    def asked(self) -> bool:
        """Whether a rule asked for a type or a shape since the last refresh."""
        return self._facts is not None

    # structure

    def body(self, node: Node) -> Graph:
        """The body that holds the node."""
        return self.edits.home[id(node)]

    def opset(self, node: Node) -> int:
        """The version of the default operator set that applies to the node."""
        return opset_of(self.body(node))

    def is_output(self, value: Any) -> bool:
        """Whether the tensor is an output of a body."""
        return bool(self.edits.outputs.get(id(value)))

    def is_read_once(self, value: Any) -> bool:
        """Whether one node reads the tensor, once, and no body gives it out."""
        return len(value.outputs) == 1 and not self.is_output(value)

    def maker(self, value: Any, kinds: str = "") -> Node | None:
        """The node that makes the tensor as its first output, if it is one of these operators ("Add|Sub")."""
        if isinstance(value, Constant) or not value.inputs:
            return None
        node: Node = value.inputs[0]
        if kinds and (node.kind[0] != "" or node.op not in kinds.split("|")):
            return None
        return node if node.outputs[0] is value else None

    # what is known of tensors

    def dtype(self, value: Any) -> np.dtype | None:
        """Element type; None where it is not certain."""
        return value.dtype if isinstance(value, Constant) else self._fact(value).dtype

    def shape(self, value: Any) -> Shape | None:
        """Lengths, None or a name for an open one; None where not even the rank is certain."""
        return tuple(value.shape) if isinstance(value, Constant) else self._fact(value).shape

    def rank(self, value: Any) -> int | None:
        """How many axes; None where it is not certain."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def same_shape(self, one: Any, other: Any) -> bool:
        """Whether both certainly have the same shape."""
        left, right = self.shape(one), self.shape(other)
        return left is not None and left == right and None not in left

    def learn(self, value: Any, dtype: np.dtype | None, shape: Sequence[int | str | None] | None) -> None:
        """Note what a rule knows of a tensor that it made."""
        if self._facts is not None:
            self._held.append(value)
            self._facts[id(value)] = Fact(dtype, None if shape is None else tuple(shape))

    def _fact(self, value: Any) -> Fact:
        if self._facts is None:
            self.edits.finish()
            self._facts = known(self.model)
            # identities stay taken while facts are filed under them
            self._held = []
            for body in self.model.bodies():
                self._held += [*body.inputs, *body.outputs]
                for node in body.nodes:
                    self._held += node.inputs
                    self._held += node.outputs
        return self._facts.get(id(value), _NOTHING)


def values(tensor: Any) -> NDArray[Any] | None:
    """The values of a constant; None for what is computed."""
    return tensor.values if isinstance(tensor, Constant) else None


def integers(node: Node, at: int, name: str) -> list[int] | None:
    """A list of integers that an operator takes as an input from some opset on, and as an attribute before.

    None where it is given neither way or computed.
    """
    if name in node.attrs:
        given = node.attrs[name]
        return [int(each) for each in given] if isinstance(given, list) else None
    if at < len(node.inputs) and isinstance(node.inputs[at], Constant):
        return [int(each) for each in node.inputs[at].values.reshape(-1)]
    return None


def is_given(node: Node, at: int) -> bool:
    """Whether the node has an input at this position."""
    return at < len(node.inputs) and not node.inputs[at].is_empty()
