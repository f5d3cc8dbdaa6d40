"""Does every operator give the same codes optimized and not, when it is given the same codes?

Over a whole network a tie that is rounded the other way grows from layer to layer, so a difference at the end says
little about any kernel. Here the part of the graph between one QuantizeLinear and those before it is run by itself,
optimized, on the codes that the whole unoptimized model has there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxopt.feeds import Feeds
from onnxopt.runtime import Array, Session

STEPS = 1


@dataclass(frozen=True)
class Part:
    """What leads to the tensor `output` from the tensors `inputs`: codes, or inputs of the model."""

    nodes: list[NodeProto]
    inputs: list[str]
    output: str


def told_steps(path: Path, feeds: Feeds) -> str:
    """The largest difference in quantization steps over all parts of the main graph, on the first feed."""
    found = differences(onnx.load(path), next(iter(feeds)).inputs)
    if not found:
        return "no operator between codes"
    worst = max(found, key=lambda name: found[name])
    beyond = sum(steps > STEPS for steps in found.values())
    told = f"{len(found)} operators on the same codes: {found[worst]} steps apart at most"
    return f"{told}, bound {STEPS}: yes" if not beyond else f"{told}, bound {STEPS}: NO, {beyond} of them; {worst}"


def differences(proto: ModelProto, feed: dict[str, Array]) -> dict[str, int]:
    """Name of a code tensor -> the largest difference of its codes; proto: with its weights."""
    parts = list(parts_of(proto))
    if not parts:
        return {}
    wanted = {name for part in parts for name in [part.output, *part.inputs]} - set(feed)
    whole = ModelProto()
    whole.CopyFrom(proto)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    values = {**feed, **Session(whole.SerializeToString(), optimize=False).run(feed)}
    found = {}
    for part in parts:
        given = {name: values[name] for name in part.inputs}
        codes = Session(part_model(proto, part, given).SerializeToString()).run(given)[part.output]
        apart = np.abs(codes.astype(np.int64) - values[part.output].astype(np.int64))
        found[part.output] = int(apart.max(initial=0))
    return found


def parts_of(proto: ModelProto) -> Iterator[Part]:
    """One part for each QuantizeLinear of the main graph that does not only convert an input of the model."""
    given = {port.name for port in proto.graph.input}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            part = part_of(proto, node.output[0])
            if set(part.inputs) - given:
                yield part


def part_of(proto: ModelProto, output: str) -> Part:
    """The part of the main graph that leads to one of its tensors, `output`."""
    nodes = list(proto.graph.node)
    makers = {name: at for at, node in enumerate(nodes) for name in node.output if name}
    ends = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear"}
    ends |= {port.name for port in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    mine = {makers[output]}
    inputs: set[str] = set()
    todo = _read(nodes[makers[output]])
    while todo:
        name = todo.pop()
        if name in ends:
            inputs.add(name)
        elif name in makers and makers[name] not in mine:
            mine.add(makers[name])
            todo |= _read(nodes[makers[name]])
    return Part([nodes[number] for number in sorted(mine)], sorted(inputs), output)


def _read(node: NodeProto) -> set[str]:
    """Names that the node reads, its bodies included; names of a body's own tensors lead nowhere outside."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            found |= {name for inner in body.node for name in _read(inner)}
            found |= {port.name for port in body.output}
    return found


def part_model(proto: ModelProto, part: Part, given: dict[str, Array]) -> ModelProto:
    """The part as a model; given: values of its inputs, from which it takes their types and shapes."""
    wanted = {name for node in part.nodes for name in _read(node)}
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    model = ModelProto(ir_version=proto.ir_version)
    model.opset_import.extend(proto.opset_import)
    model.functions.extend(proto.functions)
    model.graph.name = "part"
    model.graph.node.extend(part.nodes)
    model.graph.input.extend(ports)
    model.graph.output.add(name=part.output)
    weights: list[TensorProto] = [tensor for tensor in proto.graph.initializer if tensor.name in wanted]
    model.graph.initializer.extend(weights)
    return model
