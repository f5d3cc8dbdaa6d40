"""What must hold of a model after every pass, values aside: its signature, and onnx's checker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, TensorShapeProto, ValueInfoProto, helper

from onnxopt.errors import PassError
from onnxopt.model import Model


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs as the file states them: (name, type in words, type as bytes), in order."""

    inputs: tuple[tuple[str, str, bytes], ...]
    outputs: tuple[tuple[str, str, bytes], ...]


def signature(model: Model) -> Signature:
    """The signature of a model: names, order, element types, fixed and symbolic dims of inputs and outputs."""
    proto, _ = model.skeleton()
    return _signature(model, proto)


def _signature(model: Model, proto: ModelProto) -> Signature:
    # before IR version 4 weights are listed as inputs too; they are none of the caller's business
    callable_inputs = {tensor.name for tensor in model.graph.inputs}
    return Signature(
        tuple(_entry(info) for info in proto.graph.input if info.name in callable_inputs),
        tuple(_entry(info) for info in proto.graph.output),
    )


def _entry(info: ValueInfoProto) -> tuple[str, str, bytes]:
    return info.name, _type_text(info.type), info.type.SerializeToString()


def _type_text(kind: Any) -> str:
    field = kind.WhichOneof("value")
    if field != "tensor_type":
        return str(field or "unknown type").removesuffix("_type")
    dtype = TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()
    if not kind.tensor_type.HasField("shape"):
        return str(dtype)
    return f"{dtype}[{','.join(_dim(dim) for dim in kind.tensor_type.shape.dim)}]"


def _dim(dim: TensorShapeProto.Dimension) -> str:
    return str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"


def difference(before: Signature, after: Signature) -> str | None:
    """The first difference in words, None where there is none."""
    for kind, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        if len(old) != len(new):
            return f"the number of {kind}s went from {len(old)} to {len(new)}"
        for (name, text, raw), (other, other_text, other_raw) in zip(old, new, strict=True):
            if name != other:
                return f"{kind} {name!r} became {other!r}"
            if raw != other_raw:
                return f"{kind} {name!r} changed from {text} to {other_text}"
    return None


def checker_complaint(model: Model) -> str | None:
    """What onnx's checker has to say against the model, in one line, or None."""
    proto, _ = model.skeleton()
    try:
        onnx.checker.check_model(_weightless(proto))
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())[:300]
    return None


def _weightless(proto: ModelProto) -> ModelProto:
    """The skeleton with its missing initializers turned into inputs: as cheap to check as it is small."""
    listed = {info.name for info in proto.graph.input}
    inline = [tensor for tensor in proto.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in listed:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in inline]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def check_structure(model: Model, wanted: Signature, checker: bool = True) -> None:
    """Raise PassError when the signature differs from `wanted`, or, with `checker`, when onnx's checker complains."""
    proto, _ = model.skeleton()
    changed = difference(wanted, _signature(model, proto))
    if changed is not None:
        raise PassError(
            f"it changed the model's signature: {changed}", "a pass must keep inputs and outputs as they are"
        )
    complaint = checker_complaint(model) if checker else None
    if complaint is not None:
        raise PassError(f"it left an invalid model: {complaint}", "a pass must leave what onnx.checker accepts")
