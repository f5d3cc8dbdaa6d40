"""Types and shapes of all tensors, inferred on the weightless skeleton."""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, GraphProto, shape_inference

from onnxopt.model import Graph, Model
from onnxopt.model.importer import describe


def infer(model: Model, data_prop: bool = True) -> None:
    """Fill in the dtype and shape of every variable that has none, from onnx's shape inference.

    What the file states is left as it is. Tensors that inference can't tell stay unknown (None). Works above 2 GB:
    large initializers of the main graph stand beside the skeleton.
    """
    proto, _ = model.skeleton()
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=data_prop)
    except Exception:  # noqa: BLE001  inference raises many types on models the runtime accepts
        return
    _fill(model.graph, inferred.graph)


def _fill(body: Graph, proto: GraphProto) -> None:
    infos = {info.name: info for info in (*proto.value_info, *proto.output)}
    for node in body.nodes:
        for tensor in node.outputs:
            if tensor.name in infos:
                _describe(tensor, infos[tensor.name])
    for tensor, info in zip(body.inputs, (i for i in proto.input), strict=False):
        if tensor.name == info.name:
            _describe(tensor, info)
    nodes = [node for node in proto.node if node.attribute]
    owners = [node for node in body.nodes if any(True for _ in node.graphs())]
    holding = [node for node in nodes if any(_bodies(attribute) for attribute in node.attribute)]
    for node, twin in zip(owners, holding, strict=True):
        inner = [graph for attribute in twin.attribute for graph in _bodies(attribute)]
        for mine, theirs in zip(node.graphs(), inner, strict=True):
            _fill(mine, theirs)


def _bodies(attribute: AttributeProto) -> list[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs)


def _describe(tensor: Any, info: Any) -> None:
    dtype, shape = describe(info)
    if tensor.dtype is None and dtype is not None:
        tensor.dtype = dtype
        if tensor.shape is None:
            tensor.shape = shape
        tensor.settle()
    elif tensor.shape is None and shape is not None:
        tensor.shape = shape
        tensor.settle()
