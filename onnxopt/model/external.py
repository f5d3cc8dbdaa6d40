"""Values that lie in files beside the model: contained in its folder, read by position, mapped only on demand."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnx import TensorProto

from onnxopt.errors import ModelError

# read at a time: large enough that calls cost nothing, small enough that a few fit anywhere
CHUNK = 4 << 20
# An exporter that writes a file for every tensor must not use up the process's descriptors; what is beyond is opened
# for each read.
_KEPT_OPEN = 256
_KNOWN_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_LEAVE_ALONE = "don't change or move the data file while the model is in use; load the model again"


class SharedFile:
    """A file opened once for all the tensors that lie in it, so that replacing or deleting its name harms none."""

    def __init__(self, path: Path, keep_open: bool = True) -> None:
        self.path = path
        self._descriptor = _open(path)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise ModelError(f"{path} is no regular file", "put the model's data into a plain file beside it")
        self.size = status.st_size
        self._identity = (status.st_dev, status.st_ino)
        self._lock = threading.Lock()
        self._map: weakref.ref[mmap.mmap] | None = None
        if not keep_open:
            os.close(self._descriptor)
            self._descriptor = -1
            return
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises ModelError when the file has become shorter."""
        with self._opened() as descriptor:
            parts = []
            while length:
                part = self._read_at(descriptor, offset, length)
                if not part:
                    raise self._changed("became shorter")
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_at(self, descriptor: int, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(descriptor, length, offset)
        with self._lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, length)

    def map(self, end: int) -> mmap.mmap:
        """The whole file as a read-only map, shared while anybody holds it. Checked to reach to `end` (bytes)."""
        with self._opened() as descriptor:
            # a map that reaches past the end of its file ends the process when it is touched
            if os.fstat(descriptor).st_size < end:
                raise self._changed("became shorter")
            known = self._map() if self._map is not None else None
            if known is None:
                known = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
                self._map = weakref.ref(known)
            return known

    def is_in_place(self) -> bool:
        """Whether its path still leads to the file that was loaded, in the size it had."""
        try:
            status = self.path.lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino, status.st_size) == (*self._identity, self.size)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the file as it was when the model was loaded."""
        if self._descriptor >= 0:
            yield self._descriptor
            return
        descriptor = _open(self.path)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != self._identity:
                raise self._changed("was replaced by another file")
            yield descriptor
        finally:
            os.close(descriptor)

    def _changed(self, how: str) -> ModelError:
        return ModelError(f"{self.path} {how} since the model was loaded", _LEAVE_ALONE)


def _open(path: Path) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}", "check the file and its permissions") from error


class FileSlice:
    """Bytes of a file, `length` of them from `offset` on, that are read when they are asked for."""

    __slots__ = ("file", "length", "offset")

    def __init__(self, file: SharedFile, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length

    def __len__(self) -> int:
        return self.length

    def __bytes__(self) -> bytes:
        return self.read(0, self.length)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, counted from the start of the slice. Raises ModelError: see `chunks`."""
        return self.file.read(self.offset + start, length)

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The bytes, `size` at a time, none of them kept. Raises ModelError when the file became shorter."""
        for start in range(0, self.length, size):
            yield self.read(start, min(size, self.length - start))

    def place(self, folder: Path) -> tuple[str, int, int] | None:
        """(location below the folder, offset, length) while the file is there as it was loaded, else None."""
        if not self.file.is_in_place():
            return None
        try:
            location = self.file.path.resolve().relative_to(folder.resolve())
        except (OSError, ValueError):
            return None
        return location.as_posix(), self.offset, self.length

    def view(self) -> memoryview:
        """The bytes as a read-only map of the file. Raises ModelError when the file became shorter."""
        if not self.length:
            return memoryview(b"")
        end = self.offset + self.length
        return memoryview(self.file.map(end))[self.offset : end]


class ExternalData:
    """Finds values that lie beside the model, and only those inside the model's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, SharedFile] = {}

    def read(self, proto: TensorProto) -> FileSlice:
        """Where the bytes of a TensorProto with data_location EXTERNAL are; nothing is read yet.

        Raises ModelError when the location leaves the folder, goes through a link, or lies past the end of the file.
        """
        entries = {entry.key: entry.value for entry in proto.external_data}
        unknown = sorted(set(entries) - _KNOWN_KEYS)
        if unknown:
            raise self._unsafe(proto, f"has the unknown external data key {unknown[0]!r}")
        path = self._contained(proto, entries.get("location", ""))
        offset = self._number(proto, entries, "offset")
        length = self._number(proto, entries, "length")
        file = self._open(path)
        offset = offset or 0
        length = max(file.size - offset, 0) if length is None else length
        if offset + length > file.size:
            raise self._unsafe(proto, f"reaches past the end of {path.name} ({offset + length} of {file.size} bytes)")
        return FileSlice(file, offset, length)

    def _number(self, proto: TensorProto, entries: dict[str, Any], key: str) -> int | None:
        text = entries.get(key)
        if text is None:
            return None
        if not (text.isascii() and text.removeprefix("-").isdigit()):
            raise self._unsafe(proto, f"has {text[:40]!r} as its {key}, which is no number")
        if text.startswith("-") or len(text) > 19:
            raise self._unsafe(proto, f"has {text[:40]} as its {key}, which can't be")
        return int(text)

    def _contained(self, proto: TensorProto, location: str) -> Path:
        parts = Path(location).parts
        if not parts or Path(location).is_absolute() or ".." in parts or "\\" in location or ":" in location:
            raise self._unsafe(proto, f"points to {location!r}, outside the model's folder")
        path = self.folder
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise self._unsafe(proto, f"points to {location!r}, which goes through a symbolic link")
        if not path.is_file():
            raise ModelError(
                f"tensor {proto.name!r} keeps its values in {path}, which does not exist",
                "put the model's external data file beside it, under the name it was exported with",
            )
        if path.stat().st_nlink > 1:
            raise self._unsafe(proto, f"points to {location!r}, a file with several hard links")
        return path

    def _open(self, path: Path) -> SharedFile:
        if path not in self._files:
            file = SharedFile(path, keep_open=len(self._files) < _KEPT_OPEN)
            self._files[path] = file
        return self._files[path]

    def _unsafe(self, proto: TensorProto, what: str) -> ModelError:
        return ModelError(
            f"tensor {proto.name!r} {what}",
            "don't trust this file; if it is yours, save it again with its external data beside it",
        )
