"""Protos -> graphs.

Names are resolved by scope, after all names a body defines are known: order in the file does not matter, and the same
name in two sibling bodies means two tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxopt.errors import ModelError
from onnxopt.model import attributes
from onnxopt.model.ir import Constant, Dim, Function, Graph, Node, Origin, Variable
from onnxopt.model.protos import copy_without
from onnxopt.model.tensor_data import TensorData

ReadTensor = Callable[[TensorProto], TensorData]
_CONSTANT_ATTRIBUTES = {
    "value", "sparse_value", "value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings",
}  # fmt: skip
_GRAPH_LISTS = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")


@dataclass
class _Scope:
    """The tensors a body defines, by name, and the scope around it."""

    where: str
    parent: _Scope | None = None
    tensors: dict[str, Any] = field(default_factory=dict)

    def define(self, name: str, tensor: Any) -> None:
        if name in self.tensors:
            raise ModelError(
                f"two tensors are named {name!r} in {self.where}",
                "names must be unique within a graph; export the model again or rename one of them",
            )
        self.tensors[name] = tensor

    def find(self, name: str) -> Any | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.tensors:
                return scope.tensors[name]
            scope = scope.parent
        return None


@dataclass
class Importer:
    """Builds graphs from protos without keeping or changing them.

    `read_tensor` turns a TensorProto into its content (inline, external or from a snapshot's table).
    """

    proto: ModelProto
    read_tensor: ReadTensor

    def main_graph(self) -> Graph:
        """The main graph with all bodies within."""
        return self._graph(self.proto.graph, None, None, None)

    def functions(self) -> list[Function]:
        """The local functions with all bodies within."""
        return [self._function(proto) for proto in self.proto.functions]

    def _settings(self, imports: Any) -> dict[str, Any]:
        opset = next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), None)
        return {"opset": opset, "import_domains": list(imports), "ir_version": self.proto.ir_version}

    def _graph(self, proto: GraphProto, parent: Graph | None, owner: Node | None, around: _Scope | None) -> Graph:
        graph = Graph(proto.name, doc_string=proto.doc_string, **self._settings(self.proto.opset_import))
        graph.proto = copy_without(proto, *_GRAPH_LISTS)
        graph.parent, graph.owner = parent, owner
        scope = _Scope(f"graph {proto.name!r}", around)
        self._initializers(graph, proto, scope)
        self._body(graph, proto.node, scope)
        self._value_infos(graph, proto.value_info, scope)
        for info in proto.output:
            graph.output_infos.setdefault(info.name, []).append(_copy_info(info))
            tensor = self._resolve(info.name, scope)
            _describe(tensor, info)
            graph.outputs.append(tensor)
        graph.annotated = [scope.tensors.get(entry.tensor_name) for entry in proto.quantization_annotation]
        return graph

    def _function(self, proto: FunctionProto) -> Function:
        function = Function(
            proto.name, proto.domain, proto.overload, doc_string=proto.doc_string, **self._settings(proto.opset_import)
        )
        function.proto = copy_without(proto, "node", "input", "output", "value_info", "opset_import")
        scope = _Scope(f"function {proto.name!r}")
        for name in proto.input:
            tensor = Variable(name)
            scope.define(name, tensor)
            function.inputs.append(tensor)
        function.listed_inputs = list(function.inputs)
        self._body(function, proto.node, scope)
        self._value_infos(function, proto.value_info, scope)
        function.outputs = [self._resolve(name, scope) for name in proto.output]
        return function

    def _initializers(self, graph: Graph, proto: GraphProto, scope: _Scope) -> None:
        listed = {info.name for info in proto.input}
        overridable = self.proto.ir_version >= 4 or graph.parent is not None
        inputs: dict[str, Variable] = {}
        for position, tensor in enumerate(proto.initializer):
            data = self.read_tensor(tensor)
            if tensor.name in listed and overridable:
                inputs[tensor.name] = variable = Variable(tensor.name)
                graph.defaults.append((variable, data, position))
                continue
            constant = Constant(tensor.name, data)
            constant.origin = Origin("initializer", position, data)
            graph.initializers.append(constant)
            scope.define(tensor.name, constant)
        for position, sparse in enumerate(proto.sparse_initializer):
            data = TensorData.from_sparse(sparse)
            if sparse.values.name in listed and overridable:
                inputs[sparse.values.name] = variable = Variable(sparse.values.name)
                graph.defaults.append((variable, data, position))
                continue
            constant = Constant(sparse.values.name, data)
            constant.origin = Origin("sparse_initializer", position, data)
            graph.initializers.append(constant)
            scope.define(sparse.values.name, constant)
        for info in proto.input:
            known = scope.tensors.get(info.name)
            if isinstance(known, Constant):
                known.info = _copy_info(info)
                graph.listed_inputs.append(known)
                continue
            variable = inputs.get(info.name) or Variable(info.name)
            variable.info = _copy_info(info)
            _describe(variable, info)
            scope.define(info.name, variable)
            graph.inputs.append(variable)
            graph.listed_inputs.append(variable)

    def _body(self, graph: Graph, protos: Any, scope: _Scope) -> None:
        nodes: list[tuple[int, NodeProto]] = []
        for position, proto in enumerate(protos):
            if is_constant(proto):
                self._constant_node(graph, proto, position, scope)
                continue
            nodes.append((position, proto))
            for name in proto.output:
                if name:
                    scope.define(name, Variable(name))
        for position, proto in nodes:
            graph.nodes.append(self._node(graph, proto, position, scope))
        places = {id(c): c.origin.position for c in graph.initializers if c.origin and c.origin.kind == "node"}
        graph.unsorted_constants = bool(places) and any(
            places[key] > position
            for (position, _), node in zip(nodes, graph.nodes, strict=True)
            for key in map(id, constants_used(node, places))
        )

    def _constant_node(self, graph: Graph, proto: NodeProto, position: int, scope: _Scope) -> None:
        attribute = proto.attribute[0]
        is_value = attribute.name == "value"
        data = self.read_tensor(attribute.t) if is_value else TensorData.from_attribute(attribute)
        constant = Constant(proto.output[0], data)
        kept = attributes.shell(attribute) if is_value else None
        constant.origin = Origin("node", position, data, copy_without(proto, "attribute"), kept)
        graph.initializers.append(constant)
        scope.define(proto.output[0], constant)

    def _node(self, graph: Graph, proto: NodeProto, position: int, scope: _Scope) -> Node:
        node = Node(
            proto.op_type,
            proto.name,
            inputs=[self._resolve(name, scope) for name in proto.input],
            outputs=[scope.tensors[name] if name else Variable.empty() for name in proto.output],
            domain=proto.domain or None,
        )
        node.proto = copy_without(proto, "input", "output", "attribute")
        node.position = position
        node.attribute_protos = {}
        for attribute in proto.attribute:
            if attribute.name in node.attrs:
                raise ModelError(
                    f"{proto.op_type} {proto.name!r} in {scope.where} has two attributes {attribute.name!r}",
                    "an attribute may be given once; export the model again or remove one of them",
                )
            node.attrs[attribute.name] = self._attribute(attribute, graph, node, scope)
        return node

    def _attribute(self, attribute: AttributeProto, graph: Graph, node: Node, scope: _Scope) -> Any:
        assert node.attribute_protos is not None
        protos = attributes.graphs_of(attribute)
        if protos is not None:
            bodies = [self._graph(proto, graph, node, scope) for proto in protos]
            node.attribute_protos[attribute.name] = (attributes.shell(attribute), None)
            return bodies[0] if attribute.type == AttributeProto.GRAPH else bodies
        kept = AttributeProto()
        kept.CopyFrom(attribute)
        value = attributes.decode(kept)
        node.attribute_protos[attribute.name] = (kept, value)
        return list(value) if isinstance(value, list) else value

    def _resolve(self, name: str, scope: _Scope) -> Any:
        if not name:
            return Variable.empty()
        tensor = scope.find(name)
        if tensor is None:
            # nobody defines it: kept as it stands, the checker and the runtime name it
            tensor = scope.tensors[name] = Variable(name)
        return tensor

    def _value_infos(self, graph: Graph, infos: Any, scope: _Scope) -> None:
        for info in infos:
            tensor = scope.tensors.get(info.name)
            graph.value_infos.append((tensor, _copy_info(info)))
            if tensor is not None:
                _describe(tensor, info)
                if tensor.info is None:
                    tensor.info = graph.value_infos[-1][1]


def is_constant(proto: NodeProto) -> bool:
    """A Constant node whose value is in the file (a function's may refer to an attribute of the call)."""
    return (
        proto.op_type == "Constant"
        and proto.domain in ("", "ai.onnx")
        and len(proto.attribute) == 1
        and not proto.attribute[0].ref_attr_name
        and proto.attribute[0].name in _CONSTANT_ATTRIBUTES
        and len(proto.output) == 1
        and bool(proto.output[0])
        and not proto.input
    )


def _copy_info(info: ValueInfoProto) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(info)
    return copy


def describe(info: ValueInfoProto) -> tuple[np.dtype | None, list[Dim] | None]:
    """(dtype, shape) that a ValueInfoProto states; None for what it leaves open or for no plain tensor."""
    if info.type.WhichOneof("value") != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    dtype = _dtype(tensor.elem_type)
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, [_dim(dim) for dim in tensor.shape.dim]


@functools.cache
def _dtype(elem_type: int) -> np.dtype | None:
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)) if elem_type else None
    except KeyError:
        return None


def _dim(dim: Any) -> Dim:
    kind = dim.WhichOneof("value")
    if kind == "dim_value":
        return int(dim.dim_value) if dim.dim_value >= 0 else None  # some exporters write -1 for an open dim
    return str(dim.dim_param) if kind == "dim_param" else None


def _describe(tensor: Any, info: ValueInfoProto) -> None:
    if not isinstance(tensor, Variable):
        return
    dtype, shape = describe(info)
    tensor.dtype = dtype if tensor.dtype is None else tensor.dtype
    tensor.shape = shape if tensor.shape is None else tensor.shape
    tensor.settle()
    if tensor.dtype is None and info.type.WhichOneof("value") not in (None, "tensor_type"):
        tensor.type = info.type.WhichOneof("value")


def constants_used(node: Node, among: Container[int]) -> list[Constant]:
    """Constants whose identity is in `among` and that the node or a body within it reads."""
    found = [tensor for tensor in node.inputs if id(tensor) in among]
    for body in Node.graphs(node):
        for inner in body.nodes:
            found += constants_used(inner, among)
        found += [tensor for tensor in body.outputs if id(tensor) in among]
    return found
