"""Graphs -> protos, always rebuilt from the graph.

What passes left alone is written as it was read; `write_tensor` decides whether a tensor's values stand inline, in a
table (snapshots, sessions) or in another file.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxopt.model import attributes
from onnxopt.model.importer import constants_used, describe
from onnxopt.model.ir import Constant, Dim, Graph, Node, Variable
from onnxopt.model.tensor_data import TensorData

# (content, name or None to keep the proto's own, whether it is an initializer of the main graph) -> proto
WriteTensor = Callable[[TensorData, str | None, bool], TensorProto]


def inline(data: TensorData, name: str | None, _main: bool) -> TensorProto:
    """Values inside the proto."""
    return data.to_proto(name)


class Exporter:
    """Writes the bodies of one model. Every constant must have its home: see `Model.normalize`."""

    def __init__(self, ir_version: int, write_tensor: WriteTensor) -> None:
        self.ir_version = ir_version
        self.write_tensor = write_tensor

    def model(self, carrier: ModelProto, graph: Graph, functions: list[Any]) -> ModelProto:
        """The carrier's fields plus the graph and the functions."""
        proto = ModelProto()
        proto.CopyFrom(carrier)
        proto.graph.CopyFrom(self.graph(graph))
        for function in functions:
            proto.functions.append(self.function(function))
        return proto

    def graph(self, graph: Graph) -> GraphProto:
        """One body with all bodies within."""
        proto = GraphProto()
        if isinstance(graph.proto, GraphProto):
            proto.CopyFrom(graph.proto)
        _set_text(proto, "name", graph.name)
        _set_text(proto, "doc_string", graph.doc_string)
        self._initializers(graph, proto)
        self._inputs(graph, proto)
        self._outputs(graph, proto)
        self._nodes(graph, proto.node)
        proto.value_info.extend(_value_infos(graph))
        _drop_stale_annotations(graph, proto)
        return proto

    def function(self, function: Graph) -> FunctionProto:
        """One local function."""
        proto = FunctionProto()
        if isinstance(function.proto, FunctionProto):
            proto.CopyFrom(function.proto)
        _set_text(proto, "doc_string", function.doc_string)
        proto.opset_import.extend(function.import_domains or [])
        proto.input.extend(tensor.name for tensor in function.inputs)
        proto.output.extend(tensor.name for tensor in function.outputs)
        self._nodes(function, proto.node)
        proto.value_info.extend(_value_infos(function))
        return proto

    def _initializers(self, graph: Graph, proto: GraphProto) -> None:
        main = graph.parent is None
        dense: list[tuple[int, str, TensorData]] = []
        sparse: list[tuple[int, str, TensorData]] = []
        for tensor, data, at in graph.defaults:
            (dense if data.sparse is None else sparse).append((at, tensor.name, data))
        last = 1 << 60
        for constant in graph.initializers:
            origin = constant.origin
            kind = "initializer" if origin is None else origin.kind
            if constant.data.sparse is not None and kind != "node" and not self._needs_node(graph, constant):
                at = origin.position if origin is not None and kind == "sparse_initializer" else last
                sparse.append((at, constant.name, constant.data))
            elif kind != "node" and not self._needs_node(graph, constant):
                at = origin.position if origin is not None and kind == "initializer" else last
                dense.append((at, constant.name, constant.data))
        for _, name, data in sorted(dense, key=lambda entry: entry[0]):
            proto.initializer.append(self.write_tensor(data, name, main))
        for _, name, data in sorted(sparse, key=lambda entry: entry[0]):
            each = proto.sparse_initializer.add()
            each.CopyFrom(data.sparse)
            _set_text(each.values, "name", name)

    def _inputs(self, graph: Graph, proto: GraphProto) -> None:
        """The body's inputs in their present order; initializers listed among them stay behind the same input."""
        current = {id(tensor) for tensor in graph.inputs}
        homed = {id(constant) for constant in graph.initializers}
        written: set[int] = set()
        behind: dict[int | None, list[Constant]] = {None: []}
        last: int | None = None
        for tensor in graph.listed_inputs:
            if id(tensor) in current:
                last = id(tensor)
            elif id(tensor) in homed:
                behind.setdefault(last, []).append(tensor)
                written.add(id(tensor))
        proto.input.extend(_described(constant, constant.info) for constant in behind[None])
        for tensor in graph.inputs:
            listed = (tensor, *behind.get(id(tensor), ()))
            proto.input.extend(_described(each, each.info) for each in listed)
        if self.ir_version < 4 and graph.parent is None:
            # before IR 4 every initializer must be an input too
            for constant in graph.initializers:
                kind = "initializer" if constant.origin is None else constant.origin.kind
                if kind != "node" and id(constant) not in written and constant.origin is None:
                    proto.input.append(_described(constant, constant.info))

    def _outputs(self, graph: Graph, proto: GraphProto) -> None:
        given = {name: iter(infos) for name, infos in graph.output_infos.items()}
        for tensor in graph.outputs:
            # of outputs listed twice each has its own description, as long as there are any
            infos = graph.output_infos.get(tensor.name, [None])
            proto.output.append(_described(tensor, next(given.get(tensor.name, iter(())), infos[0])))

    def _nodes(self, graph: Graph, out: Any) -> None:
        """Nodes in list order; each Constant node at its old place, or earlier where a consumer stands before it."""
        pending = sorted((c for c in graph.initializers if self._needs_node(graph, c)), key=_position)
        places = [_position(constant) for constant in pending]
        written: set[int] = set()

        def write(constant: Constant) -> None:
            if id(constant) not in written:
                written.add(id(constant))
                out.append(self._constant_node(constant))

        fixed = graph.unsorted_constants
        waiting = {id(constant) for constant in pending if not (fixed and constant.origin is not None)}
        done = 0
        for node in graph.nodes:
            position = getattr(node, "position", None)
            if position is not None:
                until = bisect.bisect_left(places, position)
                for constant in pending[done:until]:
                    write(constant)
                done = max(done, until)
            if waiting:
                for constant in constants_used(node, waiting):
                    write(constant)
            out.append(self.node(node))
        for constant in pending:
            write(constant)

    def _needs_node(self, graph: Graph, constant: Constant) -> bool:
        """Whether a constant is written as a Constant node: it was one, or the body can hold no new initializer."""
        origin = constant.origin
        if graph.is_function or (origin is not None and origin.kind == "node"):
            return True
        # before IR 4 an initializer must be an input, and those of inner bodies are not ours to extend
        return origin is None and self.ir_version < 4 and graph.parent is not None

    def _constant_node(self, constant: Constant) -> NodeProto:
        proto = NodeProto()
        origin = constant.origin
        if origin is not None and origin.node is not None:
            proto.CopyFrom(origin.node)
            proto.output[0] = constant.name
        else:
            proto.op_type = "Constant"
            proto.output.append(constant.name)
        data = constant.data
        if data.attribute is not None and origin is not None and origin.data is data:
            proto.attribute.append(data.attribute)
            return proto
        attribute = proto.attribute.add()
        if origin is not None and origin.attribute is not None:
            attribute.CopyFrom(origin.attribute)
        if (attribute.name, attribute.type) != ("value", AttributeProto.TENSOR):
            attribute.name, attribute.type = "value", AttributeProto.TENSOR
        attribute.t.CopyFrom(self.write_tensor(data, None, False))
        return proto

    def node(self, node: Node) -> NodeProto:
        """One node with all bodies within, under its tensors' present names."""
        proto = NodeProto()
        if node.proto is not None:
            proto.CopyFrom(node.proto)
        _set_text(proto, "op_type", node.op)
        _set_text(proto, "name", node.name)
        _set_text(proto, "domain", node.domain)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        self._attributes(node, proto)
        return proto

    def _attributes(self, node: Node, proto: NodeProto) -> None:
        known = node.attribute_protos or {}
        for name, value in node.attrs.items():
            proto.attribute.append(self._attribute(name, value, *known.get(name, (None, None))))

    def _attribute(self, name: str, value: Any, kept: AttributeProto | None, stored: Any) -> AttributeProto:
        of_graphs = kept is not None and kept.type == AttributeProto.GRAPHS and not value
        if isinstance(value, gs.Graph) or (isinstance(value, list) and (of_graphs or _are_graphs(value))):
            kind = AttributeProto.GRAPHS if isinstance(value, list) else AttributeProto.GRAPH
            proto = AttributeProto(name=name, type=kind)
            if kept is not None and kept.type == kind:
                proto.CopyFrom(kept)
            if isinstance(value, list):
                proto.graphs.extend(self.graph(body) for body in value)
            else:
                proto.g.CopyFrom(self.graph(value))
            return proto
        if kept is not None and attributes.unchanged(value, stored):
            return kept
        return attributes.encode(name, value)


class Outline(Exporter):
    """Writes only what shape inference looks at: no descriptions of inner tensors, no texts or metadata of nodes."""

    def graph(self, graph: Graph) -> GraphProto:
        """One body with all bodies within."""
        proto = GraphProto()
        _set_text(proto, "name", graph.name)
        self._initializers(graph, proto)
        self._inputs(graph, proto)
        self._outputs(graph, proto)
        self._nodes(graph, proto.node)
        return proto

    def node(self, node: Node) -> NodeProto:
        """One node with all bodies within, under its tensors' present names."""
        proto = NodeProto(
            op_type=node.op,
            domain=node.domain,
            input=[tensor.name for tensor in node.inputs],
            output=[tensor.name for tensor in node.outputs],
        )
        if node.proto is not None and node.proto.overload:
            proto.overload = node.proto.overload
        self._attributes(node, proto)
        return proto


def _are_graphs(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], gs.Graph)


def _position(constant: Constant) -> int:
    return constant.origin.position if constant.origin is not None else 1 << 60


def _set_text(proto: Any, field: str, text: str | None) -> None:
    """Set a string field only where that changes it: an explicit empty string and an absent one stay apart."""
    if (text or "") != getattr(proto, field):
        setattr(proto, field, text or "")


def _described(tensor: Any, info: ValueInfoProto | None) -> ValueInfoProto:
    """`info` brought up to date with what a pass changed of the tensor."""
    proto = ValueInfoProto()
    if info is not None:
        proto.CopyFrom(info)
    _set_text(proto, "name", tensor.name)
    if info is not None and not _redescribed(tensor):
        return proto
    dtype, shape = describe(proto)
    wanted: list[Dim] | None = None if tensor.shape is None else list(tensor.shape)
    # numpy takes None for float64 where it compares types
    if tensor.dtype is not None and (dtype is None or dtype != tensor.dtype):
        proto.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    if tensor.dtype is not None and wanted is not None and wanted != shape:
        _set_shape(proto, wanted)
    return proto


def _redescribed(tensor: Any) -> bool:
    if isinstance(tensor, Constant):
        return tensor.origin is None or tensor.origin.data is not tensor.data
    return isinstance(tensor, Variable) and tensor.redescribed()


def _set_shape(proto: ValueInfoProto, shape: list[Dim]) -> None:
    dims = proto.type.tensor_type.shape.dim
    if len(dims) != len(shape) or not dims:
        proto.type.tensor_type.ClearField("shape")
        proto.type.tensor_type.shape.SetInParent()
        for _ in shape:
            proto.type.tensor_type.shape.dim.add()
    for dim, value in zip(proto.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(value, str):
            dim.dim_param = value
        elif value is not None:
            dim.dim_value = int(value)
        else:
            dim.ClearField("value")


def _alive(graph: Graph) -> set[int]:
    """Identities of the tensors that the body defines, or reads though nothing defines them."""
    alive = {id(tensor) for tensor in (*graph.inputs, *graph.outputs, *graph.initializers)}
    for node in graph.nodes:
        alive.update(map(id, node.outputs))
        alive.update(id(tensor) for tensor in node.inputs if not tensor.inputs)
    alive.update(id(tensor) for tensor, _, _ in graph.defaults)
    return alive


def _value_infos(graph: Graph) -> list[ValueInfoProto]:
    """The body's value_info in file order, without the entries of tensors that are gone."""
    alive = _alive(graph)
    result = []
    for tensor, info in graph.value_infos:
        if tensor is None:
            result.append(info)
        elif id(tensor) in alive:
            result.append(_described(tensor, info))
    return result


def _drop_stale_annotations(graph: Graph, proto: GraphProto) -> None:
    """Remove quantization_annotation of tensors that no longer exist; entries that never had one stay."""
    if not proto.quantization_annotation:
        return
    alive = _alive(graph)
    entries = zip(graph.annotated, list(proto.quantization_annotation), strict=True)
    kept = [entry for tensor, entry in entries if tensor is None or id(tensor) in alive]
    if len(kept) != len(proto.quantization_annotation):
        proto.ClearField("quantization_annotation")
        proto.quantization_annotation.extend(kept)
