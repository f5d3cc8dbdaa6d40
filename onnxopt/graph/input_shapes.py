"""Other dims for a model's inputs, and for everything that follows from them.

    Before                                        After  x: [1, 3, 64, 64]
    x: float[N, 3, H, W]                          x: float[1, 3, 64, 64]
    h = Conv(x, w)      h: float[N, 8, H, W]      h = Conv(x, w)      h: float[1, 8, 64, 64]
    y = Flatten(h)      y: float[N, 32768]        y = Flatten(h)      y: float[1, 32768]

A symbol stands for one length wherever it stands: where one input gives it a number or another name, the other inputs
follow. Descriptions of inner tensors and outputs are made anew by inference, or dropped where it can't tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, ValueInfoProto, shape_inference

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph.shapes import forget, known
from onnxopt.model import Model, Variable

# a length: fixed, or a symbol, or None for one that is left as it is where it is open already, and opened where not
Dim = int | str | None
# symbols that onnx's inference makes up
_MADE_UP = "unk__"


def with_input_shapes(model: Model, shapes: Mapping[str, Sequence[Dim]]) -> Model:
    """A model over the same weights whose inputs have these dims. `model` is left alone.

    Raises UsageError for an input that is not there, has another number of axes, has a default value or is no tensor,
    and where inference finds that the graph can't compute with these dims.
    """
    changed = model.clone().model
    inputs = {tensor.name: tensor for tensor in changed.graph.inputs}
    wanted = {name: _wanted(changed, inputs, name, dims) for name, dims in shapes.items()}
    if all(inputs[name].shape is not None and list(inputs[name].shape or ()) == dims for name, dims in wanted.items()):
        return changed  # nothing changes, so no description is stale
    bound = _bindings(inputs, wanted)
    for tensor in changed.graph.inputs:
        if tensor.name in wanted:
            tensor.shape = wanted[tensor.name]
        elif tensor.shape is not None:
            tensor.shape = [_bound(dim, bound) for dim in tensor.shape]
    _describe_anew(changed, bound)
    trouble = _contradiction(changed)
    if trouble is not None and _contradiction(model) is None:
        stated = ", ".join(f"{name} {shown(dims)}" for name, dims in wanted.items())
        before = ", ".join(f"{tensor.name} {shown(tensor.shape)}" for tensor in model.graph.inputs)
        raise UsageError(
            f"the graph can't compute with {stated}: {trouble}", f"give dims that it fits; the file states {before}"
        )
    return changed.clone().model


def shown(dims: Sequence[Dim] | None) -> str:
    """[1,3,H,?]."""
    return "of unknown rank" if dims is None else f"[{','.join('?' if dim is None else str(dim) for dim in dims)}]"


def _wanted(model: Model, inputs: Mapping[str, Variable], name: str, dims: Sequence[Dim]) -> list[Dim]:
    if name not in inputs:
        if any(constant.name == name for constant in model.graph.initializers):
            raise UsageError(f"{name!r} is a weight of the model, not an input", f"inputs: {', '.join(inputs)}")
        raise UsageError(f"the model has no input {name!r}", did_you_mean(name, inputs))
    tensor = inputs[name]
    if any(tensor is other for other, _, _ in model.graph.defaults):
        raise UsageError(f"input {name!r} has a default value, whose dims are its own", "leave this input out")
    if tensor.dtype is None:
        raise UsageError(f"input {name!r} is no tensor of a known element type", "leave this input out")
    if tensor.shape is None:
        return list(dims)
    if len(tensor.shape) != len(dims):
        raise UsageError(
            f"input {name!r} has {len(tensor.shape)} axes {shown(tensor.shape)}, not {len(dims)}",
            f"give a length for each: {name}:{','.join(map(_example, tensor.shape))}",
        )
    return [
        old if new is None and not isinstance(old, int) else new for old, new in zip(tensor.shape, dims, strict=True)
    ]


def _example(dim: Dim) -> str:
    return "-1" if dim is None else str(dim)


def _bindings(inputs: Mapping[str, Variable], wanted: Mapping[str, Sequence[Dim]]) -> dict[str, Dim]:
    """Symbol -> what it stands for now; one that gets several meanings at once stays as it is elsewhere."""
    meanings: dict[str, set[Dim]] = {}
    for name, dims in wanted.items():
        for old, new in zip(inputs[name].shape or (), dims, strict=False):
            if isinstance(old, str) and old != "?":  # which some exporters write for any length
                meanings.setdefault(old, set()).add(new)
    return {symbol: next(iter(found)) for symbol, found in meanings.items() if len(found) == 1}


def _bound(dim: Dim, bound: Mapping[str, Dim]) -> Dim:
    return bound.get(dim, dim) if isinstance(dim, str) else dim


def _describe_anew(model: Model, bound: Mapping[str, Dim]) -> None:
    facts = known(model)
    given = {id(tensor) for tensor in model.graph.inputs}
    for body in model.bodies():
        if body.function is not None:
            continue
        inner = body.inputs if body.parent is not None else []
        if body.owner is not None and body.owner.op == "Loop":
            inner = inner[2:]  # its counter and its condition, whose dims the runtime wants to know
        made = [*inner, *(tensor for node in body.nodes for tensor in node.outputs if not tensor.is_empty())]
        ends = {id(tensor) for tensor in (*body.outputs, *inner)}
        for tensor in made:
            fact = facts.get(id(tensor))
            inferred = None if fact is None or fact.shape is None else list(fact.shape)
            stated = _still_stated(tensor.shape, bound) if id(tensor) in ends else None
            tensor.shape = _merged(inferred, stated)
            if tensor.info is not None:
                tensor.info = _restated(tensor.info, tensor.shape)
            tensor.settle()
        body.value_infos = [
            (tensor, _restated(info, None if tensor is None else tensor.shape))
            for tensor, info in body.value_infos
            if id(tensor) not in given
        ]
        shapes = {tensor.name: tensor.shape for tensor in body.outputs if isinstance(tensor, Variable)}
        for name, infos in body.output_infos.items():
            if name in shapes and not any(tensor.name == name and id(tensor) in given for tensor in body.outputs):
                body.output_infos[name] = [_restated(info, shapes[name]) for info in infos]


def _still_stated(shape: Sequence[Dim] | None, bound: Mapping[str, Dim]) -> list[Dim] | None:
    """What the file says of an end of a body: symbols with their new meaning; its numbers may be stale."""
    return None if shape is None else [None if isinstance(dim, int) else _bound(dim, bound) for dim in shape]


def _merged(inferred: list[Dim] | None, stated: list[Dim] | None) -> list[Dim] | None:
    """What inference tells, and the file's own symbols where it makes one up."""
    if inferred is None:
        return stated
    known_dims = [None if isinstance(dim, str) and dim.startswith(_MADE_UP) else dim for dim in inferred]
    if stated is None or len(stated) != len(known_dims):
        return known_dims
    return [new if new is not None else old for new, old in zip(known_dims, stated, strict=True)]


def _restated(info: ValueInfoProto, shape: Sequence[Dim] | None) -> ValueInfoProto:
    """A description with other dims; the element type stays, and so does what is no plain tensor."""
    copy = ValueInfoProto()
    copy.CopyFrom(info)
    if copy.type.WhichOneof("value") != "tensor_type":
        return copy
    copy.type.tensor_type.ClearField("shape")
    if shape is not None:
        copy.type.tensor_type.shape.SetInParent()
        for size in shape:
            dim = copy.type.tensor_type.shape.dim.add()
            if isinstance(size, str):
                dim.dim_param = size
            elif size is not None:
                dim.dim_value = size
    return copy


def _contradiction(model: Model) -> str | None:
    """What strict inference objects to, in one line; None where nothing."""
    proto: ModelProto = model.skeleton()[0]
    forget(proto.graph, main=True)
    try:
        shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # noqa: BLE001  inference raises many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        named = [line for line in lines if "op_type" in line]
        return " ".join((named or lines or [type(error).__name__])[0].split())[:300]
    return None
