"""Shapes that tensors carried through a Loop keep in every round, by induction.

ONNX's inference says nothing of a carried tensor's shape, for any round may change it. Here a body's input is assumed
to have the shape of the initial value; where the body, so described, gives the same shape back, it has that shape in
every round. A length that comes back otherwise is taken back, until what is left holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorShapeProto, ValueInfoProto

Dims = list[int | str | None]
_MOST_ROUNDS = 16


@dataclass
class _Carried:
    """One carried tensor: the body's input, and where its output of one round stands."""

    info: ValueInfoProto
    body: GraphProto
    at: int
    path: tuple[tuple[int, int], ...]  # (node, graph) positions that lead to the body


def assume_carried(proto: ModelProto, infer: Callable[[ModelProto], ModelProto | None]) -> ModelProto | None:
    """Inferred descriptions of a model, the shapes of what Loops carry written into `proto`. None: inference fails."""
    result = infer(proto)
    if result is None or not any(node.op_type == "Loop" for graph in _graphs(proto.graph) for node in graph.node):
        return result
    carried = list(_assume(proto.graph, result.graph, {}, ()))
    if not carried:
        return result
    for _ in range(_MOST_ROUNDS):
        result = infer(proto)
        if result is None:
            break
        wrong = [each for each in carried if _take_back(each, result.graph)]
        if not wrong:
            return result
    for each in carried:
        each.info.type.tensor_type.ClearField("shape")
    return infer(proto)


def _assume(
    graph: GraphProto, found: GraphProto, above: dict[str, Dims], path: tuple[tuple[int, int], ...]
) -> Iterator[_Carried]:
    """Describe the inputs of Loop bodies by what the initial values are known to be."""
    shapes = above | _shapes(found)
    for at, (node, twin) in enumerate(zip(graph.node, found.node, strict=True)):
        for number, (body, other) in enumerate(zip(_bodies(node), _bodies(twin), strict=True)):
            here = (*path, (at, number))
            if node.op_type == "Loop" and node.domain in ("", "ai.onnx"):
                yield from _assume_inputs(node, body, shapes, here)
            yield from _assume(body, other, shapes, here)


def _assume_inputs(
    node: NodeProto, body: GraphProto, shapes: dict[str, Dims], path: tuple[tuple[int, int], ...]
) -> Iterator[_Carried]:
    for at, (name, info) in enumerate(zip(node.input[2:], body.input[2:], strict=False)):
        dims = shapes.get(name)
        if dims is None or info.type.WhichOneof("value") != "tensor_type":
            continue
        info.type.tensor_type.ClearField("shape")
        info.type.tensor_type.shape.SetInParent()
        for length in dims:
            dim = info.type.tensor_type.shape.dim.add()
            if isinstance(length, int):
                dim.dim_value = length
            elif length is not None and not length.startswith("unk__"):
                dim.dim_param = length
        yield _Carried(info, body, 1 + at, path)


def _take_back(carried: _Carried, found: GraphProto) -> bool:
    """Open the lengths of an input that the body does not give back; whether there were any."""
    kind = carried.info.type.tensor_type
    if not kind.HasField("shape"):
        return False
    graph = found
    for node, number in carried.path:
        graph = _bodies(graph.node[node])[number]
    given = graph.output[carried.at].type.tensor_type
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    name = graph.output[carried.at].name
    now = constants.get(name, _dims(given.shape) if given.HasField("shape") else None)
    assumed = _dims(kind.shape)
    if now is None or len(now) != len(assumed):
        kind.ClearField("shape")
        return True
    wrong = [at for at, (old, new) in enumerate(zip(assumed, now, strict=True)) if old is not None and old != new]
    for at in wrong:
        kind.shape.dim[at].ClearField("value")
    return bool(wrong)


def _shapes(graph: GraphProto) -> dict[str, Dims]:
    found: dict[str, Dims] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            found[info.name] = _dims(info.type.tensor_type.shape)
    return found


def _dims(shape: TensorShapeProto) -> Dims:
    return [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) if dim.HasField("dim_param") else None
        for dim in shape.dim
    ]


def _bodies(node: NodeProto) -> list[GraphProto]:
    found: list[GraphProto] = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
    return found


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)
