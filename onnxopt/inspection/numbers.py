"""Numbers for structures: two nodes, of one model or of two, that compute alike get the same number.

A node's forward number stands for its operator, its attributes and the forward numbers of what it reads: all of the
graph above it. Its backward number stands for operator, attributes and weights, and for everything below it: which
consumers read its outputs at which position, and which outputs of the body they reach. Equal keys are interned in one
table, so that numbers of two models can be compared, and no hash can collide.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, defs

from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Constant, Graph, Node
from onnxopt.model.attributes import decode

Number = int


class Numbering:
    """One table for both models. loose: constants count by element type and shape, not by content.

    opset: of the operators that are numbered; set it before those of another model.
    """

    def __init__(self, *, loose: bool = False) -> None:
        self.loose = loose
        self.opset = 1
        self._table: dict[Any, Number] = {}
        self._constants: dict[int, Number] = {}

    def intern(self, key: Any) -> Number:
        """The number of a key, a new one where it is new."""
        return self._table.setdefault(key, len(self._table))

    def forward(self, nodes: list[Node], found: dict[int, Number]) -> dict[int, Number]:
        """id(tensor) -> number, for what the sorted nodes make: put into `found`, which has what is from outside."""
        for node in nodes:
            number = self.intern(("node", node.kind, self.attributes(node, found), self._inputs(node, found)))
            for at, tensor in enumerate(node.outputs):
                if not tensor.is_empty():
                    found[id(tensor)] = self.intern(("output", number, at))
        return found

    def backward(self, nodes: list[Node], outputs: Mapping[int, list[Any]]) -> dict[int, Number]:
        """id(node) -> number, for sorted nodes. outputs: id(tensor) -> what it is as outputs of the body."""
        readers: dict[int, list[Number]] = {}
        found: dict[int, Number] = {}
        for node in reversed(nodes):
            below = tuple(
                (tuple(outputs.get(id(tensor), ())), tuple(sorted(readers.get(id(tensor), ()))))
                for tensor in node.outputs
            )
            weights = tuple(self._constant(t) if isinstance(t, Constant) else t.is_empty() for t in node.inputs)
            number = self.intern(("below", node.kind, self.attributes(node, {}), weights, below))
            found[id(node)] = number
            for at, tensor in enumerate(node.inputs):
                if not isinstance(tensor, Constant) and not tensor.is_empty():
                    readers.setdefault(id(tensor), []).append(self.intern(("reads", number, at)))
            for body in node.graphs():
                for tensor in captured(body):
                    readers.setdefault(id(tensor), []).append(self.intern(("captures", number)))
        return found

    def attributes(self, node: Node, known: dict[int, Number]) -> Number:
        """Of a node's attributes in any order; bodies count by what they compute."""
        given = explicit(node, self.opset).items()
        return self.intern(tuple(sorted((name, self.attribute(value, known)) for name, value in given)))

    def attribute(self, value: Any, known: dict[int, Number]) -> Number:
        """Of one attribute's value."""
        if isinstance(value, gs.Graph):
            return self._body(value, known)
        if isinstance(value, list) and value and isinstance(value[0], gs.Graph):
            return self.intern(("bodies", tuple(self._body(body, known) for body in value)))
        return self.intern(attribute_key(value))

    def _body(self, body: Graph, found: dict[int, Number]) -> Number:
        found.update((id(tensor), self.intern(("inner input", at))) for at, tensor in enumerate(body.inputs))
        self.forward(sorted_nodes(body), found)
        return self.intern(("body", len(body.inputs), tuple(self.tensor(tensor, found) for tensor in body.outputs)))

    def _inputs(self, node: Node, found: Mapping[int, Number]) -> tuple[Number, ...]:
        return tuple(self.tensor(tensor, found) for tensor in node.inputs)

    def tensor(self, tensor: Any, found: Mapping[int, Number]) -> Number:
        """Of a tensor that is read."""
        if tensor.is_empty():
            return self.intern("nothing")
        if isinstance(tensor, Constant):
            return self._constant(tensor)
        return found[id(tensor)] if id(tensor) in found else self.intern("outside")

    def _constant(self, constant: Constant) -> Number:
        data = constant.data
        if data.uid not in self._constants:
            content = b"" if self.loose else data.fingerprint()
            self._constants[data.uid] = self.intern(("constant", str(data.dtype), data.shape, content))
        return self._constants[data.uid]


def explicit(node: Node, opset: int) -> dict[str, Any]:
    """The node's attributes without those that say what their absence would."""
    defaults = _defaults(*node.kind, opset)
    if not defaults:
        return dict(node.attrs)
    return {
        name: value
        for name, value in node.attrs.items()
        if name not in defaults or attribute_key(value) != defaults[name]
    }


@functools.lru_cache(maxsize=4096)
def _defaults(domain: str, op: str, opset: int) -> dict[str, Any]:
    """Attribute -> key of its default, of an operator of the default domain."""
    if domain:
        return {}
    try:
        schema = defs.get_schema(op, opset, domain)
    except defs.SchemaError:
        return {}
    found = {name: item.default_value for name, item in schema.attributes.items()}
    return {
        name: attribute_key(decode(value)) for name, value in found.items() if value.type != AttributeProto.UNDEFINED
    }


def attribute_key(value: Any) -> Any:
    """A key that is equal for equal values of attributes that hold no body."""
    if isinstance(value, np.ndarray):
        content = tuple(value.reshape(-1).tolist()) if value.dtype.kind == "O" else value.tobytes()
        return ("tensor", str(value.dtype), value.shape, content)
    if isinstance(value, AttributeProto):
        return ("proto", value.SerializeToString(deterministic=True))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(attribute_key(item) for item in value))
    # by their texts: 1 equals 1.0, and 0.0 equals -0.0, but they are not the same; NaN is
    return (type(value).__name__, repr(value))


def captured(body: Graph) -> list[Any]:
    """Tensors from outside that a body, or one within, reads."""
    own = {id(tensor) for tensor in body.inputs} | {id(tensor) for node in body.nodes for tensor in node.outputs}
    read = [tensor for node in body.nodes for tensor in node.inputs]
    read += [tensor for node in body.nodes for inner in node.graphs() for tensor in captured(inner)]
    read += body.outputs
    found = {id(t): t for t in read if id(t) not in own and not t.is_empty() and not isinstance(t, Constant)}
    return list(found.values())
