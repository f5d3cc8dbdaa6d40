"""Types and shapes of all tensors, inferred on the weightless skeleton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, TypeProto, ValueInfoProto, helper, shape_inference

from onnxopt.graph.loop_shapes import assume_carried
from onnxopt.graph.shape_hints import shape_hints
from onnxopt.model import Graph, Model, TensorData
from onnxopt.model.exporter import Outline
from onnxopt.model.importer import describe
from onnxopt.model.model import SKELETON_THRESHOLD

T = TypeVar("T")


def infer(model: Model, data_prop: bool = True) -> None:
    """Fill in the dtype and shape of every variable that has none, from onnx's shape inference.

    What the file states is left as it is, but that lengths it leaves open are filled in. Tensors that inference can't
    tell stay unknown (None). Works above 2 GB: large initializers of the main graph stand beside the skeleton.
    """
    proto, _ = model.skeleton()
    inferred = _inferred(proto, data_prop, shape_hints)
    if inferred is not None:
        _visit(model.graph, _described(inferred.graph, lambda info: info), _describe)


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
    proto = _outline(model)
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
    found = _remembered(model, proto)
    facts: dict[int, Fact] = {}

    def note(tensor: Any, fact: Fact) -> None:
        facts[id(tensor)] = fact

    if found is not None:
        _visit(model.graph, found, note)
    return facts


def _outline(model: Model) -> ModelProto:
    """The graphs without values that inference never reads; the weights of an inner body or a Constant node too."""

    def write(data: TensorData, name: str | None, main: bool) -> TensorProto:
        large = data.nbytes >= SKELETON_THRESHOLD and data.dtype.kind != "O"
        # integers of inner bodies and Constant nodes may be shapes that inference computes with
        if large and ((main and name is not None) or data.dtype not in (np.int32, np.int64)):
            return data.to_reference("weights", name)
        return data.to_proto(name)

    model.normalize()
    return Outline(model.ir_version, write).model(model.carrier, model.graph, list(model.functions))


# What was inferred last of each model, and from what, byte by byte: many passes in a row change nothing.
_LAST: WeakKeyDictionary[Model, tuple[bytes, _Described[Fact] | None]] = WeakKeyDictionary()


def _remembered(model: Model, proto: ModelProto) -> _Described[Fact] | None:
    """What follows from a model's outline, which is changed on the way; None where inference fails."""
    key = proto.SerializeToString()
    last = _LAST.get(model)
    if last is None or last[0] != key:
        inferred = assume_carried(proto, _inferred)
        last = _LAST[model] = (key, None if inferred is None else _described(inferred.graph, _fact))
    return last[1]


def _fact(info: ValueInfoProto) -> Fact:
    dtype, shape = describe(info)
    return Fact(dtype, None if shape is None else tuple(shape))


def forget(graph: GraphProto, main: bool) -> None:
    """Drop all descriptions but the main graph's inputs; element types stay."""
    graph.ClearField("value_info")
    for info in graph.output:
        _forget_shape(info.type)
    for info in graph.input:
        # the runtime checks the dims of the main graph's tensors, but not those of a sequence's elements
        if not main or info.type.WhichOneof("value") != "tensor_type":
            _forget_shape(info.type)
    for bodies in _held(graph):
        for body in bodies:
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
    bodies = [body for each in _held(graph) for body in each]
    if not bodies and not above:
        return
    own = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            own[node.output[0]] = node.attribute[0].t
    if bodies:
        small = {name: each for name, each in own.items() if each.data_type in _INTEGERS and not each.external_data}
        known = above | {name: each for name, each in small.items() if prod(each.dims) <= _HANDED_DOWN}
        for name in [name for node in graph.node for name in node.output if name] + [info.name for info in graph.input]:
            if name not in own:
                known.pop(name, None)  # it hides the constant of that name
        for body in bodies:
            _hand_down(body, known)
    if not above:
        return
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
    asking = [(node, _SHAPE_INPUT[node.op_type]) for node in graph.node if node.op_type in _SHAPE_INPUT]
    asking = [(node, at) for node, at in asking if node.domain in ("", "ai.onnx") and len(node.input) > at]
    if not asking:
        return []
    wanted = {name for node, at in asking for name in (node.output[0], node.input[at])}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer if tensor.name in wanted}
    dtypes: dict[str, int] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.name not in wanted:
            continue
        kind = info.type.tensor_type
        dtypes[info.name] = kind.elem_type
        if kind.HasField("shape"):
            shapes[info.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    hints = []
    for node, at in asking:
        length = shapes.get(node.input[at], ())
        if node.output[0] not in shapes and len(length) == 1 and length[0] > 0 and dtypes.get(node.output[0]):
            hints.append(helper.make_tensor_value_info(node.output[0], dtypes[node.output[0]], [None] * length[0]))
    return hints


@dataclass(frozen=True)
class _Described(Generic[T]):
    """What a graph says of its tensors: those that nodes make, its inputs, and those of the bodies of each node."""

    made: dict[str, T]
    inputs: dict[str, T]
    inner: list[list[_Described[T]]]


def _described(proto: GraphProto, read: Callable[[ValueInfoProto], T]) -> _Described[T]:
    """The descriptions of a graph and of the bodies within."""
    return _Described(
        {info.name: read(info) for info in (*proto.value_info, *proto.output)},
        {info.name: read(info) for info in proto.input},
        [[_described(body, read) for body in bodies] for bodies in _held(proto)],
    )


def _held(graph: GraphProto) -> list[list[GraphProto]]:
    """The bodies of each node that has some."""
    attributes = (node.attribute for node in graph.node)
    found = ([body for each in given for body in _bodies(each)] for given in attributes if given)
    return [bodies for bodies in found if bodies]


def _visit(body: Graph, found: _Described[T], note: Callable[[Any, T], None]) -> None:
    """Call `note` with each tensor of a body, and of the bodies within, that inference described."""
    owners: list[list[Graph]] = []
    for node in body.nodes:
        for tensor in node.outputs:
            if tensor.name in found.made:
                note(tensor, found.made[tensor.name])
        if node.attrs:
            owners.append(list(node.graphs()))
    for tensor in body.inputs:
        if tensor.name in found.inputs:
            note(tensor, found.inputs[tensor.name])
    for graphs, inner in zip(filter(None, owners), found.inner, strict=True):
        for mine, theirs in zip(graphs, inner, strict=True):
            _visit(mine, theirs, note)


def _bodies(attribute: AttributeProto) -> list[GraphProto]:
    kind = attribute.type
    if kind == AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs) if kind == AttributeProto.GRAPHS else []


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
