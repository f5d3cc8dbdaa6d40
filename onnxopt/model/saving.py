"""Writing model files: whole or not at all, values streamed to a file beside the model where they are large.

The order of a save: the sidecar under a temporary name, flushed to disk, renamed to a name made of its content; the
model likewise, and its renaming is what makes the new state valid; only then is a sidecar deleted that only the
replaced model used. A process killed anywhere in between leaves the old model whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto

from onnxopt.errors import LimitError, UsageError
from onnxopt.model import files
from onnxopt.model.exporter import WriteTensor, inline
from onnxopt.model.external import CHUNK
from onnxopt.model.tensor_data import TensorData

PLACES = ("auto", "always", "never")
# values below this many bytes stay in the model file when the others go to a sidecar
SIDECAR_THRESHOLD = 1024
_ALIGNMENT = 4096
# chunks that may wait for the hash while others are written
_WAITING = 8
# a model that has a sidecar is small itself; larger ones are not read only to look for one to delete
_LOOK_INTO = 1 << 30

Verify = Callable[[Path], None]


def save(
    path: Path, export: Callable[[WriteTensor], ModelProto], nbytes: int, verify: Verify | None, external_data: str
) -> None:
    """Write what `export` makes to `path`. nbytes: of all values; external_data: see `Model.save`, which explains."""
    if external_data not in PLACES:
        raise UsageError(f"external_data: {external_data!r} is no choice", f"use one of: {', '.join(PLACES)}")
    if external_data == "never" and nbytes > files.INLINE_LIMIT:
        raise _too_large(path, nbytes)
    if external_data == "never" or (external_data == "auto" and nbytes <= files.INLINE_LIMIT):
        stale = own_sidecars(path)
        write_atomically(path, _serialized(export(inline), path, nbytes), verify)
        _remove(stale)
        return
    stale = own_sidecars(path)
    sidecar = Sidecar(path)
    try:
        proto = export(sidecar.write)
        written = sidecar.finish(files.tensors_of(proto))
        write_atomically(path, _serialized(proto, path, nbytes), verify)
    except BaseException as error:
        sidecar.abandon()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    _remove(stale - {written})


def own_sidecars(path: Path) -> set[Path]:
    """The sidecars that a save to `path` made and the model there refers to."""
    ours = re.compile(re.escape(path.stem) + r"\.[0-9a-f]{16}\.onnxdata")
    try:
        found = {entry.name: entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)}
        if not found or path.stat().st_size > _LOOK_INTO:
            return set()
        proto = ModelProto()
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError):
        return set()
    entries = (entry for tensor in files.tensors_of(proto) for entry in tensor.external_data)
    return {found[entry.value] for entry in entries if entry.key == "location" and entry.value in found}


class Sidecar:
    """Collects tensors for a file of values beside the model `path` and names it by its content."""

    def __init__(self, path: Path) -> None:
        self.model_path = path
        self.path: Path | None = None
        self.temporary = _temporary(path, ".data")
        self._existed = False
        self._size = 0
        self._known: dict[int, tuple[int, int]] = {}
        try:
            self._file = self.temporary.open("wb")
        except OSError as error:
            raise _unwritable(path, error) from error
        self._hash = _Hash()

    def write(self, data: TensorData, name: str | None, _main: bool) -> TensorProto:
        """The tensor as a reference into the sidecar; small and string tensors inline."""
        if data.nbytes < SIDECAR_THRESHOLD or data.dtype.kind == "O":
            return data.to_proto(name)
        if data.uid not in self._known:
            self._append(bytes(-self._size % _ALIGNMENT))
            start = self._size
            for chunk in data.chunks(CHUNK):
                self._append(chunk)
            self._known[data.uid] = (start, self._size - start)
        proto = data.to_reference("", name)
        for key, value in zip(("offset", "length"), self._known[data.uid], strict=True):
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        return proto

    def _append(self, chunk: Any) -> None:
        if not len(chunk):
            return
        self._hash.update(chunk)
        self._file.write(chunk)
        self._size += len(chunk)

    def finish(self, protos: Iterator[TensorProto]) -> Path | None:
        """Flush to disk, name the file by its content and put that name into the references.

        Returns its path, None when no tensor was large enough to be in it.
        """
        digest = self._hash.finish()
        if not self._known:
            self.abandon()
            return None
        _flush(self._file)
        self._file.close()
        path = self.model_path.with_name(f"{self.model_path.stem}.{digest[:16]}.onnxdata")
        for proto in protos:
            if proto.data_location == TensorProto.EXTERNAL:
                proto.external_data[0].value = path.name
        self._existed = path.exists()
        self.temporary.replace(path)
        self.path = path
        _flush_folder(path.parent)
        return path

    def abandon(self) -> None:
        """Remove what was written, unless a model refers to it."""
        self._hash.finish()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        # an interrupt may come when the model has its name already
        if self.path is not None and not self._existed and self.path not in own_sidecars(self.model_path):
            _remove({self.path})


class _Hash:
    """A hash computed in a thread of its own: hashlib lets others run meanwhile, and so does writing to a file."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[Any] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name="onnxopt sidecar hash", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._hash.update(chunk)

    def update(self, chunk: Any) -> None:
        """Add bytes, which must not be changed afterwards."""
        self._queue.put(chunk)

    def finish(self) -> str:
        """The hash in hexadecimal."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        return self._hash.hexdigest()


def write_atomically(path: Path, raw: bytes, verify: Verify | None = None) -> None:
    """Write a file so that `path` holds either its old content or all of the new.

    The bytes go to a temporary file beside the target, are flushed to disk and read back; `verify(temporary)` may still
    refuse; only then is the file renamed. Raises UsageError when the place can't be written.
    """
    temporary = _temporary(path, "")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            _flush(file)
        if not _reads_back(temporary, raw):
            raise UsageError(f"{temporary} does not read back as written", "check the disk; the old file is untouched")
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reads_back(path: Path, raw: bytes) -> bool:
    view = memoryview(raw)
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if chunk != view[done : done + len(chunk)]:
                return False
            done += len(chunk)
    return done == len(raw)


def _serialized(proto: ModelProto, path: Path, nbytes: int) -> bytes:
    try:
        raw: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise _too_large(path, nbytes) from error
    return raw


def _temporary(path: Path, kind: str) -> Path:
    """A name beside the target; it stands in no file, so that process and thread may be part of it."""
    return path.with_name(f".{path.name}{kind}.{os.getpid()}.{threading.get_ident()}.tmp")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Put renamings on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(paths: set[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _too_large(path: Path, nbytes: int) -> LimitError:
    return LimitError(
        f"can't write {path} as one file: it holds {nbytes / 1e9:.1f} GB of values, and a file takes at most 2 GB",
        "--external-data auto puts them into a file beside it",
    )


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"can't write {path}: {error.strerror or error}",
        "choose another place with -o, or free space and permissions there",
    )
