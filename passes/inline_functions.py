"""Put the nodes of local functions in the place of their calls.

    Before                                        After
    y = local.Scale(x, w)                         t = Mul(x, w)
    Scale(a, b) { c = Mul(a, b)  d = Relu(c) }    y = Relu(t)

Other passes leave functions alone: one function stands for several calls, and its shapes are those of none. A function
that was written for another version of an operator set than the model imports stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

from onnxopt.model import Model, Snapshot
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip

_Key = tuple[str, str, str]  # domain, name, overload


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the nodes of local functions in the place of their calls."""

    name: ClassVar[str] = "inline_functions"

    @property
    def effect(self) -> Effect:
        """The same nodes run."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Inline all functions, those that functions call too."""
        if not model.functions:
            return PassResult()
        before = model.snapshot()
        inliner = _Inliner(ModelProto.FromString(before.skeleton))
        changes = [Change("inlined", function.name) for function in inliner.functions.values()]
        skipped = [Skip(name, "it is of another operator set version than the model") for name in inliner.left]
        if changes:
            model.restore(Snapshot(inliner.inlined().SerializeToString(), before.tensors))
        return PassResult(changes, skipped)


class _Inliner:
    """Inlines the functions of one model whose operator sets are the model's. `left` names the others."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        imports = {_domain(entry.domain): entry.version for entry in proto.opset_import}
        fitting = {_key(function): function for function in proto.functions if _fits(function, imports)}
        self.functions: dict[_Key, FunctionProto] = fitting
        self.left = [function.name for function in proto.functions if _key(function) not in fitting]
        self.taken = set(_names(proto.graph))
        self.next: dict[str, int] = {}
        self.taken_nodes = set(_node_names(proto.graph))

    def inlined(self) -> ModelProto:
        """The model with all calls replaced, in functions that stay too."""
        there = {_domain(entry.domain) for entry in self.proto.opset_import}
        for function in self.functions.values():
            for entry in function.opset_import:
                if _domain(entry.domain) not in there:
                    there.add(_domain(entry.domain))
                    self.proto.opset_import.append(entry)
        self._graph(self.proto.graph)
        staying = [function for function in self.proto.functions if _key(function) not in self.functions]
        for function in staying:
            self.taken.update(name for node in function.node for name in (*node.input, *node.output))
            nodes = list(self._expanded(function.node, function.value_info))
            del function.node[:]
            function.node.extend(nodes)
        self.proto.ClearField("functions")
        self.proto.functions.extend(staying)
        return self.proto

    def _graph(self, graph: GraphProto) -> None:
        nodes = list(self._expanded(graph.node, graph.value_info))
        del graph.node[:]
        graph.node.extend(nodes)

    def _expanded(self, nodes: Any, value_info: Any) -> Iterator[NodeProto]:
        """The nodes with calls replaced; what functions say of their tensors is added to `value_info`."""
        pending = list(nodes)[::-1]
        while pending:
            node = pending.pop()
            function = self.functions.get((node.domain, node.op_type, node.overload))
            if function is not None:
                pending += self._body(node, function, value_info)[::-1]
                continue
            for body in _bodies(node):
                self._graph(body)
            yield node

    def _body(self, call: NodeProto, function: FunctionProto, value_info: Any) -> list[NodeProto]:
        """Copies of a function's nodes, with the tensors and attributes of a call."""
        given = [*call.input, *[""] * (len(function.input) - len(call.input))]
        names = {"": "", **dict(zip(function.input, given, strict=True))}
        copies: list[NodeProto] = []
        for inner, outer in zip(function.output, call.output, strict=False):
            if inner in names and outer:
                copies.append(NodeProto(op_type="Identity", input=[names[inner]], output=[outer]))
            elif outer:
                names[inner] = outer
        attributes = {each.name: each for each in function.attribute_proto} | {
            each.name: each for each in call.attribute
        }
        made = [self._copy(node, names, attributes, f"{call.name}/" if call.name else "") for node in function.node]
        for info in function.value_info:
            if info.name in names and info.name not in function.input and names[info.name] not in call.output:
                value_info.append(_renamed_info(info, names[info.name]))
        return [*made, *copies]

    def _copy(
        self, node: NodeProto, names: dict[str, str], attributes: dict[str, AttributeProto], prefix: str
    ) -> NodeProto:
        """A node whose tensors are renamed; `names` learns what it makes."""
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = self._fresh(prefix + node.name, self.taken_nodes) if node.name else ""
        inputs = [names.get(name, name) for name in node.input]
        del copy.input[:], copy.output[:], copy.attribute[:]
        copy.input.extend(inputs)
        for attribute in node.attribute:
            kept = _given(attribute, attributes)
            if kept is not None:
                copy.attribute.append(kept)
        for body in _bodies(copy):
            self._rename(body, dict(names), attributes, prefix)
        copy.output.extend(self._named(name, names) for name in node.output)
        return copy

    def _rename(
        self, graph: GraphProto, names: dict[str, str], attributes: dict[str, AttributeProto], prefix: str
    ) -> None:
        """Rename, in place, all that a body within a function defines and reads."""
        own = [info.name for info in graph.input] + [tensor.name for tensor in graph.initializer]
        own += [sparse.values.name for sparse in graph.sparse_initializer]
        for name in own:
            names.pop(name, None)
        for part in (graph.input, graph.initializer):
            for each in part:
                each.name = self._named(each.name, names)
        for sparse in graph.sparse_initializer:
            sparse.values.name = self._named(sparse.values.name, names)
        for name in [name for node in graph.node for name in node.output if name]:
            names.pop(name, None)
        nodes = [self._copy(node, names, attributes, prefix) for node in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        for part in (graph.output, graph.value_info):
            for each in part:
                each.name = names.get(each.name, each.name)

    def _named(self, name: str, names: dict[str, str]) -> str:
        """The name that a tensor has here, a new one where it has none yet."""
        if name not in names:
            names[name] = self._fresh(name, self.taken)
        return names[name]

    def _fresh(self, name: str, taken: set[str]) -> str:
        """`name` where it is free, else with a number; taken then. The runtime wants names of nodes unique too."""
        fresh, number = name, self.next.get(name, 0)
        while fresh in taken:
            number += 1
            fresh = f"{name}_{number}"
        self.next[name] = number
        taken.add(fresh)
        return fresh


def _given(attribute: AttributeProto, attributes: dict[str, AttributeProto]) -> AttributeProto | None:
    """An attribute, or what a call gives in its place; None where it gives nothing."""
    if not attribute.ref_attr_name:
        return attribute
    given = attributes.get(attribute.ref_attr_name)
    if given is None:
        return None
    copy = AttributeProto()
    copy.CopyFrom(given)
    copy.name = attribute.name
    return copy


def _renamed_info(info: ValueInfoProto, name: str) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(info)
    copy.name = name
    return copy


def _key(function: FunctionProto) -> _Key:
    return function.domain, function.name, function.overload


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _fits(function: FunctionProto, imports: dict[str, int]) -> bool:
    entries = [(_domain(entry.domain), entry.version) for entry in function.opset_import]
    return all(imports.get(domain, version) == version for domain, version in entries)


def _names(graph: GraphProto) -> Iterator[str]:
    yield from (info.name for info in (*graph.input, *graph.output, *graph.value_info))
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for body in _bodies(node):
            yield from _names(body)


def _node_names(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        for body in _bodies(node):
            yield from _node_names(body)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
