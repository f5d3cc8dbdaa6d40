"""Values of runs, kept in .npz files without pickle, and a spool that moves to disk when memory runs short.

A value is what onnxruntime takes and gives: an array (also of strings or of a type numpy lacks), a list of values
(sequence, or a sequence of maps), a mapping from keys to values (map), a plain number or string, or None.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from onnxopt.errors import LimitError
from onnxopt.runtime.ports import Array, is_extension

_MANIFEST = "manifest"
DEFAULT_MEMORY = 1 << 30
DEFAULT_DISK = 16 << 30


def save_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write name -> value into an uncompressed .npz file of plain arrays and a JSON manifest."""
    arrays: dict[str, Any] = {}
    tree = {name: _describe(value, arrays) for name, value in values.items()}
    arrays[_MANIFEST] = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_values(path: Path) -> dict[str, Any]:
    """Read what save_values wrote; arrays keep their dtype, shape and bits."""
    with np.load(path, allow_pickle=False) as file:
        tree = json.loads(file[_MANIFEST].tobytes())
        return {name: _restore(node, file) for name, node in tree.items()}


def nbytes(value: Any) -> int:
    """Approximate bytes the value takes in memory."""
    if isinstance(value, Mapping):
        return sum(nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(nbytes(item) for item in value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return sum(64 + len(str(item)) for item in value.flat)
    return int(getattr(value, "nbytes", 64))


def _describe(value: Any, arrays: dict[str, Any]) -> Any:
    """A JSON description of the value; its arrays are added to `arrays`."""
    if value is None:
        return {"kind": "none"}
    if isinstance(value, Mapping):
        return {"kind": "map", "items": [[_plain(key), _describe(item, arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"kind": "list", "items": [_describe(item, arrays) for item in value]}
    if not isinstance(value, np.ndarray):
        return {"kind": "plain", "value": _plain(value)}
    if value.dtype.kind in "OUST":
        return {"kind": "strings", "shape": value.shape, "items": [_text(item) for item in value.flat]}
    key = f"a{len(arrays)}"
    extension = is_extension(value.dtype)
    arrays[key] = value.view(np.uint16 if value.dtype.itemsize == 2 else np.uint8) if extension else value
    return {"kind": "array", "key": key, "dtype": value.dtype.name if extension else None}


def _restore(node: Any, file: Any) -> Any:
    if node["kind"] == "none":
        return None
    if node["kind"] == "map":
        return {key: _restore(item, file) for key, item in node["items"]}
    if node["kind"] == "list":
        return [_restore(item, file) for item in node["items"]]
    if node["kind"] == "plain":
        return node["value"]
    if node["kind"] == "strings":
        strings: Array = np.empty(len(node["items"]), object)
        strings[:] = node["items"]
        return strings.reshape(node["shape"])
    array = file[node["key"]]
    return array if node["dtype"] is None else array.view(getattr(ml_dtypes, node["dtype"]))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _text(item: Any) -> str:
    return item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item)


class Spool:
    """Appended values, read back by index: in memory up to `memory` bytes, then in a temporary folder.

    Arrays come back read-only. `disk` bytes is the most it writes before it raises LimitError. The folder goes when
    the spool is closed or garbage collected.
    """

    def __init__(self, memory: int = DEFAULT_MEMORY, disk: int = DEFAULT_DISK) -> None:
        self._memory_left = memory
        self._disk = disk
        self._disk_left = disk
        self._items: list[dict[str, Any] | Path] = []
        self._folder: Path | None = None
        self._remove: Callable[[], object] = lambda: None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._items[index]
        return dict(item) if isinstance(item, dict) else _read_only(load_values(item))

    def append(self, values: Mapping[str, Any], *, copy: bool = False) -> None:
        """Keep the values. copy: their owner may overwrite them later, so keep copies of those that stay in memory."""
        size = nbytes(values)
        if size <= self._memory_left:
            self._memory_left -= size
            self._items.append(_read_only(_copy(dict(values)) if copy else dict(values)))
            return
        if size > self._disk_left:
            raise LimitError(
                f"more than {self._disk >> 20} MiB of samples or outputs would be kept on disk",
                "use fewer or smaller feeds",
            )
        self._disk_left -= size
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="onnxopt-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._items):08d}.npz"
        save_values(path, values)
        self._items.append(path)

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self._items.clear()
        self._remove()
        self._folder = None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def _read_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_only(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_only(item) for item in value]
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    return value
