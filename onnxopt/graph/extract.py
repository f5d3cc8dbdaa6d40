"""A part of a graph as a model of its own, to be computed by the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxopt.model import Constant, Node, Variable
from onnxopt.model.exporter import Exporter, inline

# Constants up to this many bytes stand in the model, larger ones are its inputs.
_INLINE_BYTES = 1024
# The first IR version of which the runtime knows everything that such a model holds.
_IR_VERSION = 8


def extract(
    nodes: Sequence[Node], wanted: Sequence[Variable], opset: int, ir_version: int
) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
    """A model that computes `wanted` from constants, and the values of its inputs: the larger ones of the constants.

    nodes: sorted, from any bodies; what they read is constant or made by one of them. Tensors get new names, so that
    equal names in different bodies don't meet.
    """
    names: dict[int, str] = {}

    def name(tensor: Any) -> str:
        return "" if tensor.is_empty() else names.setdefault(id(tensor), f"t{len(names)}")

    exporter = Exporter(ir_version, inline)
    model = ModelProto(ir_version=max(ir_version, _IR_VERSION))
    model.opset_import.add(domain="", version=opset)
    model.graph.name = "part"
    inputs: dict[str, NDArray[Any]] = {}
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant) and id(tensor) not in names:
                _give(tensor, name(tensor), model, inputs)
        proto = exporter.node(node)
        # names of nodes repeat across bodies, and the runtime knows the default operator set under one name only
        for field in ("input", "output", "name", *(("domain",) if not node.kind[0] else ())):
            proto.ClearField(field)
        proto.input.extend(map(name, node.inputs))
        proto.output.extend(map(name, node.outputs))
        model.graph.node.append(proto)
    for tensor in wanted:
        model.graph.output.add(name=name(tensor))
    return model, inputs


def _give(constant: Constant, name: str, model: ModelProto, inputs: dict[str, NDArray[Any]]) -> None:
    data = constant.data
    if data.nbytes <= _INLINE_BYTES or data.dtype.kind not in "fiub":
        model.graph.initializer.append(data.to_proto(name))
        return
    kind = helper.np_dtype_to_tensor_dtype(data.dtype)
    model.graph.input.append(helper.make_tensor_value_info(name, kind, data.shape))
    inputs[name] = data.array()
