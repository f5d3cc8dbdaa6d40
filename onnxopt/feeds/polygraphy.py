"""Feeds that Polygraphy saved as JSON: a list of feeds, or one feed, each an object input name -> array.

An array is {"array": TEXT, "polygraphy_class": "ndarray"}, where TEXT is a whole .npy file in base64; older releases
mark it {"__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"}. Arrays that another run put out are wrapped
once more, as the `values` of a LazyArray (polygraphy/json/serde.py, polygraphy/comparator/struct.py).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import FeedError, LimitError
from onnxopt.feeds.function import SPOOL_MEMORY
from onnxopt.feeds.sample import Record
from onnxopt.runtime.ports import Array
from onnxopt.runtime.storage import Spool

SUFFIX = ".json"
# A file is parsed as a whole, which takes a few times its size in memory.
_MOST_BYTES = 2 << 30
_CLASS = "polygraphy_class"
_OLD_PREFIX = "__polygraphy_encoded_"
_OLD_VALUE = "polygraphy_serialized_json_type"
_WRAPPERS = ("LazyArray", "LazyNumpyArray")
_SAVE_AGAIN = "save the inputs with polygraphy run --save-inputs, or polygraphy.json.save_json([{name: array}, ...])"


class PolygraphyFiles:
    """The feeds of one or more files, sorted by name: decoded once, at once, and kept as those of a generator are."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._spool = Spool(SPOOL_MEMORY)
        self._names: list[str] = []
        for path in sorted(files):
            for index, feed in enumerate(_feeds(path)):
                name = f"{path}[{index}]"
                self._spool.append(_decoded(feed, name))
                self._names.append(name)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path of the file and the index in it."""
        return self._names[index]

    def read(self, index: int) -> Record:
        """The feed at `index` of the files taken together."""
        return Record(self._spool[index], self.name(index))


def _feeds(path: Path) -> list[Any]:
    """The feeds of a file, still encoded. Raises FeedError for what is no JSON or holds no feed."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise LimitError(
                f"{path}: more than {_MOST_BYTES >> 20} MiB of JSON",
                "save into a folder, one file a feed: polygraphy run --save-inputs FOLDER",
            )
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, MemoryError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise FeedError(f"{path}: it can't be read as JSON: {why}", _SAVE_AGAIN) from error
    except RecursionError as error:
        raise FeedError(f"{path}: its values are nested too deeply for feeds", _SAVE_AGAIN) from error
    feeds = content if isinstance(content, list) else [content]
    if not feeds:
        raise FeedError(f"{path}: it holds no feed", _SAVE_AGAIN)
    return feeds


def _decoded(feed: Any, source: str) -> dict[str, Any]:
    """Input name -> array."""
    marker = _marker(feed)
    if not isinstance(feed, dict) or marker is not None:
        found = marker or type(feed).__name__
        raise FeedError(f"{source}: expected an object input name -> array, got {found}", _SAVE_AGAIN)
    return {name: _array(value, f"{source}: input {name!r}") for name, value in feed.items()}


def _marker(value: Any) -> str | None:
    """The class that Polygraphy marks an encoded object with, or None for anything else."""
    if not isinstance(value, dict):
        return None
    old = (key.removeprefix(_OLD_PREFIX) for key, item in value.items() if item == _OLD_VALUE)
    return str(value[_CLASS]) if isinstance(value.get(_CLASS), str) else next(old, None)


def _array(value: Any, where: str) -> Array:
    marker = _marker(value)
    if marker in _WRAPPERS:
        value = value.get("values")
        marker = _marker(value)
    if marker == "Tensor":
        raise FeedError(
            f"{where}: it is a pickled torch tensor, which is not read", "save numpy arrays: tensor.numpy()"
        )
    text = value.get("array") if isinstance(value, dict) else None
    if marker != "ndarray" or not isinstance(text, str):
        raise FeedError(f"{where}: expected an array, got {marker or type(value).__name__}", _SAVE_AGAIN)
    try:
        content = io.BytesIO(base64.b64decode(text, validate=True))
        array: Array = np.lib.format.read_array(content, allow_pickle=False)
    except binascii.Error as error:
        raise FeedError(f"{where}: its text is no base64: {error}", _SAVE_AGAIN) from error
    except Exception as error:
        pickled = "allow_pickle" in str(error)
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise FeedError(
            f"{where}: it holds no .npy data that can be read: {why}",
            "save strings with a str dtype, not as Python objects" if pickled else _SAVE_AGAIN,
        ) from error
    return array
