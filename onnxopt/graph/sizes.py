"""Bytes of the tensors that a graph computes, as far as shapes alone tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import GraphProto, ModelProto, ValueInfoProto, helper, shape_inference

from onnxopt.errors import LimitError
from onnxopt.graph.shapes import forget
from onnxopt.model import Limits
from onnxopt.model.limits import held_graphs
from onnxopt.model.tensor_data import stored_nbytes

_SMALLER = "export the model for smaller inputs; if you trust it, repeat with --limits off"


def largest_computed(proto: ModelProto, limits: Limits, held: int) -> int:
    """Bytes of the largest tensor that inference tells the size of; 0 where it tells none.

    proto is changed. held: bytes of the model's weights. Raises LimitError for an input, or a tensor computed anywhere
    in the main graph and its bodies, above `limits`. Inference may take forever on models made for that: call it where
    it can be killed.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    given = [info for info in proto.graph.input if info.name not in weights]
    inputs = [_check(info, limits.computed(held), "input") for info in given]
    bound = limits.computed(held + sum(inputs))
    # what the file says of inner tensors could contradict inference, which then tells nothing at all
    forget(proto.graph, main=True)
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # noqa: BLE001  inference raises many types, also on models the runtime accepts
        inferred = proto
    outputs = (_check(info, bound, "tensor") for info in _described(inferred.graph))
    return max([*inputs, *outputs], default=0)


def _check(info: ValueInfoProto, limit: int | None, what: str) -> int:
    nbytes = _nbytes(info)
    if limit is not None and nbytes > limit:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        raise LimitError(
            f"{what} {info.name!r} would take {nbytes:,} bytes (dims {dims}); the limit for this model is {limit:,}",
            _SMALLER,
        )
    return nbytes


def _nbytes(info: ValueInfoProto) -> int:
    """0 for what has open dims or is no plain tensor."""
    tensor = info.type.tensor_type
    if info.type.WhichOneof("value") != "tensor_type" or not tensor.elem_type:
        return 0
    if any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in tensor.shape.dim):
        return 0
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        return 0
    return stored_nbytes(dtype, math.prod(dim.dim_value for dim in tensor.shape.dim))


def _described(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from graph.value_info
    yield from graph.output
    for node in graph.node:
        for attribute in node.attribute:
            for body in held_graphs(attribute):
                yield from _described(body)
