"""Reading and writing model files: contained external data, atomic output."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from onnxopt.errors import ModelError, UsageError
from onnxopt.model.tensor_data import TensorData

# protobuf refuses messages of 2 GiB and more; some room is left for what is not weights
INLINE_LIMIT = (1 << 31) - (64 << 20)
# values below this many bytes stay in the model file when the others go to a sidecar
SIDECAR_THRESHOLD = 1024
_ALIGNMENT = 4096


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


class Sidecar:
    """Collects tensors for a file of values beside the model and names it by its content."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.temporary = folder / f".{stem}.{os.getpid()}.data.tmp"
        self._file = self.temporary.open("wb")
        self._hash = hashlib.sha256()
        self._entries: list[TensorProto] = []
        self._known: dict[int, tuple[int, int]] = {}

    def write(self, data: TensorData, name: str | None, _main: bool) -> TensorProto:
        """The tensor as a reference into the sidecar; small and string tensors inline."""
        if data.nbytes < SIDECAR_THRESHOLD or data.dtype.kind == "O":
            return data.to_proto(name)
        if data.uid not in self._known:
            padding = -self._file.tell() % _ALIGNMENT
            for chunk in (bytes(padding), data.raw_bytes()):
                self._file.write(chunk)
                self._hash.update(chunk)
            length = len(data.raw_bytes())
            self._known[data.uid] = (self._file.tell() - length, length)
        proto = data.to_reference("", name)
        for key, value in zip(("offset", "length"), self._known[data.uid], strict=True):
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        return proto

    def finish(self, protos: Iterator[TensorProto]) -> Path:
        """Flush to disk, name the file by its content and put that name into the references. Returns the path."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self.folder / f"{self.stem}.{self._hash.hexdigest()[:16]}.onnxdata"
        for proto in protos:
            if proto.data_location == TensorProto.EXTERNAL:
                proto.external_data[0].value = path.name
        self.temporary.replace(path)
        return path

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)


def write_atomically(path: Path, raw: bytes, verify: Callable[[Path], None] | None = None) -> None:
    """Write a file so that `path` holds either its old content or all of the new.

    The bytes go to a temporary file beside the target, are flushed to disk and read back; `verify(temporary)` may still
    refuse; only then is the file renamed. Raises UsageError when the place can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if hashlib.sha256(temporary.read_bytes()).digest() != hashlib.sha256(raw).digest():
            raise UsageError(f"{temporary} does not read back as written", "check the disk; the old file is untouched")
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"can't write {path}: {error.strerror}", "choose another place with -o, or free space and permissions there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
