"""The axis maps that pruning looks at: shapes inferred, constants computed by the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper, numpy_helper

from onnxopt.graph import infer, sort_model
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.axes.maps import Split
from onnxopt.model import Model, Node
from onnxopt.passbase import Context


def axis_maps(model: Model, context: Context, split: Split = "fewest") -> AxisMaps:
    """The axis maps of a model, put in order and with shapes inferred first. split: see `AxisMaps.build`."""
    model.normalize()
    sort_model(model)
    infer(model)

    def evaluate(node: Node, inputs: list[NDArray[Any] | None]) -> NDArray[Any] | None:
        return _evaluate(model, context, node, inputs)

    return AxisMaps.build(model, evaluate, split)


def channel_maps(model: Model, context: Context) -> AxisMaps:
    """The maps that lossy pruning cuts by: whole heads where two tensors are multiplied, as in attention."""
    maps = axis_maps(model, context)
    return axis_maps(model, context, "outer") if maps.products else maps


def _evaluate(model: Model, context: Context, node: Node, inputs: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    """The node's first output over small inputs, by the runtime; None when it refuses."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    call = helper.make_node(node.op, names, ["y"], **{k: v for k, v in node.attrs.items() if not _is_body(v)})
    constants = [numpy_helper.from_array(value, name) for value, name in zip(inputs, names, strict=True) if name]
    output = ValueInfoProto(name="y")  # the runtime infers its type
    graph = helper.make_graph([call], "element", [], [output], constants)
    proto = helper.make_model(graph, opset_imports=model.carrier.opset_import, ir_version=max(model.ir_version, 4))
    try:
        return np.asarray(context.evaluate(proto, {})[0])
    except Exception:  # noqa: BLE001  what can't be computed is not known to be constant
        return None


def _is_body(value: Any) -> bool:
    return hasattr(value, "nodes")
