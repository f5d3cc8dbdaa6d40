"""Small models through calibration and the int8 pass, and what the runtime makes of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
from onnx import numpy_helper

from onnxopt.calibration import collect
from onnxopt.feeds import Sample
from onnxopt.model import Constant, Model, Node, load
from onnxopt.passbase import Context, PassResult
from onnxopt.passes.int8 import Int8
from onnxopt.runtime import Session
from onnxopt.target import resolve

Array = npt.NDArray[Any]


def parse(text: str, initializers: Mapping[str, Array] | None = None, opset: int = 17) -> Model:
    """A model from textual ONNX and initializers by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, values in (initializers or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return load(proto)


def normal(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight(*shape: int, seed: int = 1) -> Array:
    """Weights that keep the variance of their input."""
    return np.asarray(normal(*shape, seed=seed) / max(1.0, float(np.prod(shape[1:]))) ** 0.5, np.float32)


def samples(feeds: Iterable[Mapping[str, Array]]) -> list[Sample]:
    """Feeds as samples."""
    return [Sample(dict(feed), None, f"feed {i}") for i, feed in enumerate(feeds)]


def quantize(
    model: Model, feeds: Iterable[Mapping[str, Array]] | None, target: str = "x86", **options: Any
) -> PassResult:
    """Calibrate `model` on `feeds` and run the pass on it, in place; every layer unless options say otherwise."""
    quantizer = Int8(**{"all_layers": True, **options})
    statistics = None if feeds is None else collect(model, quantizer.needs(model), samples(feeds))
    result = quantizer.run(model, Context(statistics=statistics, target=resolve(target)))
    model.normalize()
    return result


def optimized(model: Model, folder: Path) -> tuple[Counter[str], onnx.GraphProto]:
    """Operators of the runtime's optimised graph, all bodies, and the graph."""
    path = folder / "optimized.onnx"
    Session(model, optimized_path=path)
    graph = onnx.load(path).graph
    return Counter(node.op_type for node in walk(graph)), graph


def walk(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    """All nodes of a graph and the graphs within."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g)


def nodes(model: Model, op: str) -> list[Node]:
    """All nodes of one operator, in all bodies."""
    return [node for body in model.bodies() for node in body.nodes if node.op == op]


def integer_weights(model: Model) -> list[tuple[Node, Array, Array, int]]:
    """(layer, int8 codes, scales, axis) of every layer whose weight comes from a DequantizeLinear."""
    found = []
    for op in ("Conv", "Gemm", "MatMul"):
        for node in nodes(model, op):
            source = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
            if source is not None and source.op == "DequantizeLinear" and isinstance(source.inputs[0], Constant):
                codes, scales = source.inputs[0].values, source.inputs[1].values
                found.append((node, codes, scales, int(source.attrs.get("axis", 1))))
    return found


def qparams(model: Model) -> dict[str, tuple[float, int]]:
    """Name of each quantized tensor -> (scale, zero-point)."""
    return {
        node.inputs[0].name: (node.inputs[1].values.item(), node.inputs[2].values.item())
        for node in nodes(model, "QuantizeLinear")
    }
