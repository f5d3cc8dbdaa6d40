"""Reading model files, and the tensors of their protos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from onnxopt.errors import ModelError, UsageError

# protobuf refuses messages of 2 GiB and more; some room is left for what is not weights
INLINE_LIMIT = (1 << 31) - (64 << 20)


def read_proto(path: Path) -> ModelProto:
    """Parse a model file. Raises UsageError for a missing path, ModelError for anything that is no ONNX model."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a model file", "give the path of the .onnx file within it")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"no such file: {path}", _nearby(path)) from error
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}", "check the path and its permissions") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(raw)
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX model, or it is cut short ({len(raw)} bytes)",
            "check that the download or the export finished, and that the file is .onnx and not a checkpoint",
        ) from error
    if not proto.HasField("graph") or not (proto.opset_import or proto.ir_version):
        raise ModelError(
            f"{path} holds no ONNX graph",
            "give a model file written by an exporter (torch.onnx, tf2onnx, paddle2onnx, ...)",
        )
    return proto


def _nearby(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either; check the path"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix == path.suffix]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def tensors_of(proto: Any) -> Iterator[TensorProto]:
    """Every TensorProto of a model, graph or function: initializers, attributes, all bodies."""
    graph = proto.graph if isinstance(proto, ModelProto) else proto
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from tensors_of(body)
    if isinstance(proto, ModelProto):
        for function in proto.functions:
            yield from tensors_of(function)
