"""AttributeProto <-> Python value.

Values that a pass may want to read are shown as Python objects; the rest (types, sparse tensors, references to a
function's attributes) stay AttributeProto objects and go back unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, TensorProto, helper

from onnxopt.errors import ModelError
from onnxopt.model.protos import copy_without
from onnxopt.model.tensor_data import TensorData


def decode(attribute: AttributeProto) -> Any:
    """The Python value of an attribute that is not a graph: int, float, str, list of these, ndarray, else itself."""
    if attribute.ref_attr_name:
        return attribute
    kind = attribute.type
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.FLOAT:
        return attribute.f
    if kind == AttributeProto.STRING:
        return _text(attribute.s)
    if kind == AttributeProto.INTS:
        return list(attribute.ints)
    if kind == AttributeProto.FLOATS:
        return list(attribute.floats)
    if kind == AttributeProto.STRINGS:
        return [_text(item) for item in attribute.strings]
    if kind == AttributeProto.TENSOR and attribute.t.data_location != TensorProto.EXTERNAL:
        return TensorData.from_proto(attribute.t).array()
    return attribute


def encode(name: str, value: Any) -> AttributeProto:
    """The AttributeProto of a value that a pass set. Raises ModelError for a value ONNX has no attribute kind for."""
    if isinstance(value, AttributeProto):
        return value
    if isinstance(value, gs.Constant):
        value = value.values
    if isinstance(value, TensorData):
        return helper.make_attribute(name, value.to_proto())
    if isinstance(value, np.ndarray):
        return helper.make_attribute(name, TensorData.from_array(value).to_proto())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return _encode_list(name, [item.item() if isinstance(item, np.generic) else item for item in value])
    try:
        return helper.make_attribute(name, value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"attribute {name!r} was set to {value!r}, which no ONNX attribute can hold",
            "use an int, float, str, a list of one of these, a numpy array or a Graph",
        ) from error


def _encode_list(name: str, items: list[Any]) -> AttributeProto:
    if not items:
        return helper.make_attribute(name, items, attr_type=AttributeProto.INTS)
    if any(isinstance(item, float) for item in items) and all(isinstance(item, (int, float)) for item in items):
        return helper.make_attribute(name, [float(item) for item in items])
    return helper.make_attribute(name, items)


def unchanged(value: Any, stored: Any) -> bool:
    """Whether an attribute's value is still the one that was decoded (`stored`, never given out itself if a list)."""
    if value is stored:
        return True
    if type(value) is not type(stored) or isinstance(value, np.ndarray):
        return False
    # by their texts: 0.0 equals -0.0, and 1 equals 1.0 within lists, but they are not the same
    return repr(value) == repr(stored)


def graphs_of(attribute: AttributeProto) -> list[GraphProto] | None:
    """The graph protos of a GRAPH or GRAPHS attribute, None for other kinds."""
    if attribute.ref_attr_name:
        return None
    if attribute.type == AttributeProto.GRAPH:
        return [attribute.g]
    if attribute.type == AttributeProto.GRAPHS:
        return list(attribute.graphs)
    return None


def shell(attribute: AttributeProto) -> AttributeProto:
    """The attribute without its graphs and its tensor."""
    return copy_without(attribute, "g", "graphs", "t")


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
