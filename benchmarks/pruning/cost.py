"""What a model costs: multiply-accumulates of one run, and float parameters.

A run is profiled unoptimized, so that the shapes are those of the tensors there were, in bodies of If and Loop too:
what a branch holds counts where it was taken, and a loop's body as often as it ran.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto

from onnxopt.graph.macs import LAYERS, Shape, layer_macs
from onnxopt.model import Constant, Model, Node, load

_ATTENTION = ("com.microsoft", "Attention")
# How many layers that did not run are told by name.
_TOLD = 3


@dataclass(frozen=True)
class Cost:
    """macs: of one run. parameters: elements of float constants. idle: names of layers that did not run."""

    macs: int
    parameters: int
    idle: tuple[str, ...] = ()

    def told_idle(self) -> str:
        """Layers left out, "" where there are none."""
        if not self.idle:
            return ""
        return f"{len(self.idle)} layers did not run and are left out: {', '.join(self.idle[:_TOLD])} ..."


def cost(path: Path, feed: Mapping[str, Any]) -> Cost:
    """The cost of a model on one feed."""
    proto = onnx.load(path)
    names = _number(proto.graph)
    model = load(proto)
    runs = profiled(proto, feed)
    total, idle = 0, []
    for node in (node for body in model.bodies() for node in body.nodes):
        if node.op not in LAYERS and node.kind != _ATTENTION:
            continue
        found = [_counted(node, shapes) for shapes in runs.get(node.name, [])]
        total += sum(found)
        if not found:
            idle.append(names[node.name] or node.op)
    return Cost(total, parameters(model), tuple(idle))


def parameters(model: Model) -> int:
    """Elements of all float constants, in all bodies, each tensor once; single numbers are no parameters."""
    nodes = [node for body in model.bodies() for node in body.nodes]
    tensors = {id(tensor): tensor for node in nodes for tensor in node.inputs if isinstance(tensor, Constant)}
    floats = [tensor for tensor in tensors.values() if np.issubdtype(tensor.dtype, np.floating)]
    return sum(math.prod(tensor.shape) for tensor in floats if tensor.shape)


Shapes = tuple[list[Shape], list[Shape]]  # of the inputs and of the outputs that are there


def profiled(proto: ModelProto, feed: Mapping[str, Any]) -> dict[str, list[Shapes]]:
    """Name of a node, as _number gives them -> the shapes of each of its runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    # a packed weight is not among the inputs that the profile tells
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[Shapes]] = {}
    for event in events:
        # in front of the name there may be that of a node around it
        name = re.search(r"(node\d+#)_kernel_time$", event["name"])
        if name and "output_type_shape" in event["args"]:
            sides = (event["args"]["input_type_shape"], event["args"]["output_type_shape"])
            inputs, outputs = ([tuple(next(iter(port.values()))) for port in side] for side in sides)
            found.setdefault(name[1], []).append((inputs, outputs))
    return found


def _number(graph: GraphProto, names: dict[str, str] | None = None) -> dict[str, str]:
    """Give each node a name of its own, in all bodies; returns the old ones by the new."""
    names = {} if names is None else names
    for node in graph.node:
        new = f"node{len(names)}#"
        names[new], node.name = node.name, new
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for body in bodies:
                _number(body, names)
    return names


def _counted(node: Node, shapes: Shapes) -> int:
    """Of one run. Raises ValueError where the profile does not tell a shape that is needed."""
    known: dict[int, Shape] = {}
    for tensors, found in zip((node.inputs, node.outputs), shapes, strict=True):
        known |= {id(tensor): shape for tensor, shape in zip(_there(tensors), found, strict=False)}
    if node.kind == _ATTENTION:
        return _attention(*shapes[0][:2])
    macs = layer_macs(node, lambda tensor: known.get(id(tensor)))
    if macs is None:
        raise ValueError(f"{node.op} {node.name!r}: its profile tells too few shapes")
    return macs


def _there(tensors: list[Any]) -> list[Any]:
    return [tensor for tensor in tensors if not tensor.is_empty()]


def _attention(inputs: Shape, weights: Shape) -> int:
    """com.microsoft.Attention on [batch, length, width]: three projections in one, scores and their mixing."""
    batch, length, width = inputs
    joined = weights[1]
    return batch * length * width * joined + 2 * batch * length * length * joined // 3
