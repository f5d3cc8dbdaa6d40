"""Types and shapes of all tensors, inferred on the weightless skeleton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, TypeProto, ValueInfoProto, helper, shape_inference

from onnxopt.graph.loop_shapes import assume_carried
from onnxopt.graph.shape_hints import shape_hints
from onnxopt.model import Graph, Model
from onnxopt.model.importer import describe


def infer(model: Model, data_prop: bool = True) -> None:
    """Fill in the dtype and shape of every variable that has none, from onnx's shape inference.

    What the file states is left as it is, but that lengths it leaves open are filled in. Tensors that inference can't
    tell stay unknown (None). Works above 2 GB: large initializers of the main graph stand beside the skeleton.
    """
    proto, _ = model.skeleton()
    inferred = _inferred(proto, data_prop, shape_hints)
    if inferred is not None:
        _visit(model.graph, inferred.graph, _describe)


@dataclass(frozen=True)
class Fact:
    """What is certain about a tensor: dtype and dims, None for what is not known."""

    dtype: np.dtype | None = None
    shape: tuple[int | str | None, ...] | None = None


def known(model: Model, given: Mapping[str, Sequence[int]] | None = None) -> dict[int, Fact]:
    """id(tensor) -> what follows from the declarations of the model's inputs, which the runtime enforces.

    Unlike `infer` it does not believe the descriptions of inner tensors and outputs in the file, which may be stale.
    given: input name -> the shape that it has in one run, in place of the declared one.
    """
    proto, _ = model.skeleton()
    forget(proto.graph, main=True)
    for info in proto.graph.input:
        _forget_names(info)
    _hand_down(proto.graph, {})
    for info in proto.graph.input:
        if given is not None and info.name in given and info.type.WhichOneof("value") == "tensor_type":
            dims = info.type.tensor_type.shape.dim
            del dims[:]
            for size in given[info.name]:
                dims.add(dim_value=size)
    facts: dict[int, Fact] = {}

    def note(tensor: Any, info: ValueInfoProto) -> None:
        dtype, shape = describe(info)
        facts[id(tensor)] = Fact(dtype, None if shape is None else tuple(shape))

    inferred = assume_carried(proto, _inferred)
    if inferred is not None:
        _visit(model.graph, inferred.graph, note)
    return facts


def forget(graph: GraphProto, main: bool) -> None:
    """Drop all descriptions but the main graph's inputs; element types stay."""
    graph.ClearField("value_info")
    for info in graph.output:
        _forget_shape(info.type)
    for info in graph.input:
        # the runtime checks the dims of the main graph's tensors, but not those of a sequence's elements
        if not main or info.type.WhichOneof("value") != "tensor_type":
            _forget_shape(info.type)
    for node in graph.node:
        for attribute in node.attribute:
            for body in _bodies(attribute):
                forget(body, main=False)


# What exporters call every open length, or lengths of which nobody knows whether they are equal.
_NO_NAMES = frozenset({"", "?", "*", "-1", "any", "dim", "dynamic", "n/a", "nan", "none", "null", "unk", "unknown"})


def _forget_names(info: ValueInfoProto) -> None:
    """Drop names of open lengths that do not tell which are equal: placeholders, and what one shape holds twice."""
    dims = info.type.tensor_type.shape.dim
    names = [dim.dim_param for dim in dims]
    for dim, name in zip(dims, names, strict=True):
        if name and (name.strip().lower() in _NO_NAMES or names.count(name) > 1):
            dim.ClearField("dim_param")


# Elements of integer constants that bodies are shown, such as axes and target shapes.
_HANDED_DOWN = 64


def _hand_down(graph: GraphProto, above: dict[str, TensorProto]) -> None:
    """Give bodies copies of small integer constants that they read from around: inference does not look there."""
    own = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            own[node.output[0]] = node.attribute[0].t
    small = {name: each for name, each in own.items() if each.data_type in _INTEGERS and not each.external_data}
    known = above | {name: each for name, each in small.items() if np.prod(each.dims, dtype=np.int64) <= _HANDED_DOWN}
    for name in [name for node in graph.node for name in node.output if name] + [info.name for info in graph.input]:
        if name not in own:
            known.pop(name, None)  # it hides the constant of that name
    for node in graph.node:
        for attribute in node.attribute:
            for body in _bodies(attribute):
                _hand_down(body, known)
    there = {*own, *(info.name for info in graph.input), *(name for node in graph.node for name in node.output)}
    for name in dict.fromkeys(name for node in graph.node for name in node.input):
        if name in above and name not in there:
            graph.initializer.add().CopyFrom(above[name])
            graph.initializer[-1].name = name


_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


def _forget_shape(kind: TypeProto) -> None:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        getattr(kind, which).ClearField("shape")
    elif which in ("sequence_type", "optional_type"):
        _forget_shape(getattr(kind, which).elem_type)


# Operators whose output has as many axes as their shape input, at this position, has elements.
_SHAPE_INPUT = {"Reshape": 1, "ConstantOfShape": 0}
_MAX_HINTS = 24
_Hints = Callable[[GraphProto], list[ValueInfoProto]]


def _inferred(proto: ModelProto, data_prop: bool = True, more: _Hints | None = None) -> ModelProto | None:
    """The model with inferred descriptions; `proto` is changed on the way. more: hints besides those of ranks."""
    given_out = {info.name for info in proto.graph.output}
    ours = {info.name: info for info in proto.graph.value_info}
    for info in proto.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_value < 0:  # some exporters write -1 for an open dim
                dim.ClearField("dim_value")
    for _ in range(_MAX_HINTS):
        try:
            result: ModelProto = shape_inference.infer_shapes(proto, data_prop=data_prop)
        except Exception:  # noqa: BLE001  inference raises many types on models the runtime accepts
            return None
        hints = _rank_hints(result.graph)
        if not hints and more is not None:
            hints = [hint for hint in more(result.graph) if hint.name not in given_out]
        if not hints:
            break
        for hint in hints:
            if hint.name not in ours:
                ours[hint.name] = proto.graph.value_info.add()
                ours[hint.name].CopyFrom(hint)
            else:
                _refine(ours[hint.name], hint)
    return result


def _refine(info: ValueInfoProto, hint: ValueInfoProto) -> None:
    """Fill in what a description leaves open."""
    mine, theirs = info.type.tensor_type, hint.type.tensor_type
    if not mine.HasField("shape") or len(mine.shape.dim) != len(theirs.shape.dim):
        info.CopyFrom(hint)
        return
    for dim, found in zip(mine.shape.dim, theirs.shape.dim, strict=True):
        if not dim.HasField("dim_value") and (found.HasField("dim_value") or not dim.dim_param):
            dim.CopyFrom(found)


def _rank_hints(graph: GraphProto) -> list[ValueInfoProto]:
    """Ranks that onnx leaves open: the output of a Reshape to a computed shape has a rank all the same."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    dtypes = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info, *graph.output)}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
    hints = []
    for node in graph.node:
        at = _SHAPE_INPUT.get(node.op_type)
        if at is None or node.domain not in ("", "ai.onnx") or len(node.input) <= at or node.output[0] in shapes:
            continue
        length = shapes.get(node.input[at], ())
        if len(length) == 1 and length[0] > 0 and dtypes.get(node.output[0]):
            kind = dtypes[node.output[0]]
            hints.append(helper.make_tensor_value_info(node.output[0], kind, [None] * length[0]))
    return hints


def _visit(body: Graph, proto: GraphProto, note: Callable[[Any, ValueInfoProto], None]) -> None:
    """Call `note` with each tensor of a body, and of the bodies within, that inference described."""
    infos = {info.name: info for info in (*proto.value_info, *proto.output)}
    for node in body.nodes:
        for tensor in node.outputs:
            if tensor.name in infos:
                note(tensor, infos[tensor.name])
    inputs = {info.name: info for info in proto.input}
    for tensor in body.inputs:
        if tensor.name in inputs:
            note(tensor, inputs[tensor.name])
    owners = [node for node in body.nodes if any(True for _ in node.graphs())]
    holding = [node for node in proto.node if any(_bodies(attribute) for attribute in node.attribute)]
    for node, twin in zip(owners, holding, strict=True):
        inner = [graph for attribute in twin.attribute for graph in _bodies(attribute)]
        for mine, theirs in zip(node.graphs(), inner, strict=True):
            _visit(mine, theirs, note)


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
    elif shape is not None and not tensor.redescribed():
        _fill_in(tensor, shape)


def _fill_in(tensor: Any, shape: Sequence[Any]) -> None:
    """Numbers for lengths that a description leaves open."""
    if len(tensor.shape) != len(shape):
        return
    filled = [
        new if isinstance(new, int) and not isinstance(old, int) else old
        for old, new in zip(tensor.shape, shape, strict=True)
    ]
    if filled != list(tensor.shape):
        tensor.shape = filled
        tensor.settle()
