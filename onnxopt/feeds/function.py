"""Feeds from Python: a function of a file, any iterable of mappings name -> array, or a reader with `get_next`."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxopt.errors import FeedError, OnnxoptError, did_you_mean
from onnxopt.feeds.sample import Record
from onnxopt.runtime.storage import DEFAULT_DISK, Spool

# A one-shot source is kept in memory up to this many bytes and then on disk.
SPOOL_MEMORY = 64 << 20
_numbers = itertools.count()


def split_reference(text: str) -> tuple[Path, str] | None:
    """("file.py", "function") of "file.py:function", or None for anything else."""
    path, colon, name = text.rpartition(":")
    return (Path(path), name) if colon and path.endswith(".py") else None


def load_function(path: Path, name: str, kind: type[OnnxoptError] = FeedError) -> Callable[..., Any]:
    """The function `name` of the Python file. Raises `kind` for a missing file or name and for a file that fails.

    The file's folder is on sys.path while it is loaded, so that it may import its neighbours.
    """
    if not path.is_file():
        raise kind(f"{path}: no such file", "check the path before the colon of file.py:function")
    spec = importlib.util.spec_from_file_location(f"onnxopt_user_{next(_numbers)}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise kind(f"{path}: it can't be loaded as Python", "name a .py file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise kind(f"{path}: it fails when loaded: {describe(error)}", "correct the file") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise kind(f"{path}: it has no function {name!r}", did_you_mean(name, names))
    return function  # type: ignore[no-any-return]


def describe(error: BaseException) -> str:
    """The error of a user's code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Items:
    """Feeds that a sequence of mappings holds."""

    def __init__(self, items: Sequence[Mapping[str, Any]], name: str) -> None:
        self._items = items
        self._name = name

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """The name of the source and the index."""
        return f"{self._name}[{index}]"

    def read(self, index: int) -> Record:
        """The mapping at `index`."""
        source = self.name(index)
        try:
            item = self._items[index]
        except (Exception, SystemExit) as error:
            raise FeedError(f"{source}: reading it failed: {describe(error)}", "correct the source of feeds") from error
        return Record(_mapping(item, source), source)


class Spooled:
    """Feeds of an iterable that may not be walked twice: walked once, at once, and kept."""

    def __init__(
        self, items: Iterable[Any], name: str, *, memory: int = SPOOL_MEMORY, disk: int = DEFAULT_DISK
    ) -> None:
        self._name = name
        self._spool = Spool(memory, disk)
        for index, item in enumerate(_guarded(iter(items), name)):
            self._spool.append(_mapping(item, f"{name}[{index}]"), copy=True)

    def __len__(self) -> int:
        return len(self._spool)

    def name(self, index: int) -> str:
        """The name of the source and the index."""
        return f"{self._name}[{index}]"

    def read(self, index: int) -> Record:
        """The mapping that came at position `index`."""
        return Record(self._spool[index], self.name(index))


def call_function(path: Path, name: str) -> Any:
    """What a function or class of a Python file, called without arguments, returns."""
    function = load_function(path, name)
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise FeedError(f"{path}:{name}: it failed: {describe(error)}", "correct the function") from error


def from_items(items: Any, name: str) -> Items | Spooled:
    """A source for a sequence of mappings, used as it is, or any other iterable of them, walked once and spooled.

    A callable `get_next`, as onnxruntime's CalibrationDataReader has, comes before all else: its readers may have a
    length that fails and an iterator that can't be started again.
    """
    if callable(getattr(items, "get_next", None)):
        return Spooled(_walk(items), name)
    indexed = isinstance(items, Sequence) or (hasattr(items, "__len__") and hasattr(items, "__getitem__"))
    if isinstance(items, Mapping) or not (indexed or isinstance(items, Iterable)):
        raise FeedError(
            f"{name}: expected feeds one after the other, got {type(items).__name__}",
            "yield or list one dict (input name -> array) a feed",
        )
    return Items(items, name) if indexed else Spooled(items, name)


def _walk(reader: Any) -> Iterator[Any]:
    """What get_next gives, to the first None or, as onnxruntime's calibration takes it too, empty dict."""
    while True:
        item = reader.get_next()
        if item is None or (isinstance(item, Mapping) and not item):
            return
        yield item


def _guarded(items: Iterator[Any], name: str) -> Iterator[Any]:
    """The items; an exception of the user's code becomes a FeedError that says after which item."""
    for index in itertools.count():
        try:
            item = next(items)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            raise FeedError(f"{name}[{index}]: it failed: {describe(error)}", "correct the function") from error
        yield item


def _mapping(item: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise FeedError(
            f"{source}: expected a dict of input name -> array, got {type(item).__name__}",
            "yield one dict a feed",
        )
    return item
