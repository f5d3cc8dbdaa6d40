"""Numbers of values: two tensors that are computed alike from the same constants get the same number."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from onnxopt.model import Constant, Node
from onnxopt.model.exporter import Exporter, inline

# Constants up to this many bytes are compared by content, larger ones by identity of their content.
_BY_CONTENT = 1024


class ValueNumbers:
    """Value numbering of pure nodes, added in topological order."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._of: dict[int, int] = {}

    def add(self, node: Node, opset: int) -> None:
        """Number the outputs of a node whose inputs are constants or numbered; `opset` applies to its operator."""
        inputs = tuple(self.number(tensor) for tensor in node.inputs)
        key = (attribute_key(node), opset, inputs)
        for at, tensor in enumerate(node.outputs):
            self._of[id(tensor)] = self._intern((key, at))

    def number(self, tensor: Any) -> int:
        """The number of a tensor's value; -1 for an omitted input."""
        if tensor.is_empty():
            return -1
        if not isinstance(tensor, Constant):
            return self._of[id(tensor)]
        return self._intern(constant_key(tensor))

    def _intern(self, key: Any) -> int:
        return self._known.setdefault(key, len(self._known))


def attribute_key(node: Node) -> bytes:
    """Operator and attributes, byte by byte, in whatever order they stand."""
    proto = Exporter(0, inline).node(node)
    for name in ("name", "input", "output", "doc_string", "metadata_props"):
        proto.ClearField(name)
    attributes = sorted(proto.attribute, key=lambda attribute: attribute.name)
    proto.ClearField("attribute")
    proto.attribute.extend(attributes)
    return bytes(proto.SerializeToString(deterministic=True))


def constant_key(constant: Constant) -> Hashable:
    """Equal for constants of equal type, shape and bytes, where these are few; else for one and the same content."""
    data = constant.data
    if data.nbytes > _BY_CONTENT or data.dtype.kind == "O" or data.sparse is not None:
        return data.uid
    return str(data.dtype), data.shape, bytes(data.raw_bytes())
