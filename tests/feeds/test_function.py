from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.errors import FeedError, LimitError
from onnxopt.feeds import Feeds
from onnxopt.feeds.function import Items, Spooled, call_function, from_items, split_reference
from tests.feeds.ports import X, indices, row

SCRIPT = """
import numpy as np
from neighbour import WIDTH

def feeds():
    x = np.zeros((1, WIDTH), np.float32)
    for index in range(4):
        x[0, 0] = index
        yield {"x": x, "labels": np.array([index])}

def listed():
    return [{"x": np.zeros((1, 3), np.float32)}]

def failing():
    yield {"x": np.zeros((1, 3), np.float32)}
    raise KeyError("the lost key")

def broken():
    raise RuntimeError("no data today")

def number():
    return 3

def words():
    return ["a", "b"]
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    path = tmp_path / "gen.py"
    path.write_text(SCRIPT)
    return path


def from_function(path: Path, name: str) -> Items | Spooled:
    return from_items(call_function(path, name), f"{path}:{name}")


def test_generators_are_walked_once_and_kept(script: Path) -> None:
    feeds = Feeds(from_function(script, "feeds"), [X])
    assert indices(feeds) == indices(feeds) == [0, 1, 2, 3]
    assert [int(sample.labels[0]) for sample in feeds if sample.labels is not None] == [0, 1, 2, 3]
    assert feeds[1].source == f"{script}:feeds[1]"
    assert str(script.parent) not in sys.path


def test_generators_move_to_disk() -> None:
    def items() -> Iterator[dict[str, Any]]:
        for index in range(6):
            yield {"x": row(index, 0, 0)}

    spooled = Spooled(items(), "gen", memory=30)
    assert spooled._spool._folder is not None
    assert indices(Feeds(spooled, [X])) == list(range(6))


def test_endless_generators_end_at_a_limit() -> None:
    def items() -> Iterator[dict[str, Any]]:
        while True:
            yield {"x": np.zeros((1, 300), np.float32)}

    with pytest.raises(LimitError):
        Spooled(items(), "gen", memory=10_000, disk=10_000)


def test_lists_are_used_as_they_are(script: Path) -> None:
    assert isinstance(from_function(script, "listed"), Items)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("failing", r"gen\.py:failing\[1\]: it failed: KeyError: 'the lost key'"),
        ("broken", r"gen\.py:broken: it failed: RuntimeError: no data today"),
        ("number", r"gen\.py:number: expected feeds one after the other, got int"),
        ("feedz", r"gen\.py: it has no function 'feedz'"),
    ],
)
def test_failures_name_file_and_function(script: Path, name: str, cause: str) -> None:
    with pytest.raises(FeedError, match=cause):
        from_function(script, name)


def test_items_must_be_dicts(script: Path) -> None:
    with pytest.raises(FeedError, match=r"words\[0\]: expected a dict"):
        from_function(script, "words").read(0)


def test_files_that_fail_when_loaded_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(FeedError, match=r"bad\.py: it fails when loaded: ModuleNotFoundError"):
        from_function(tmp_path / "bad.py", "f")
    with pytest.raises(FeedError, match=r"absent\.py: no such file"):
        from_function(tmp_path / "absent.py", "f")


def test_references_are_told_from_paths() -> None:
    assert split_reference("a/b.py:f") == (Path("a/b.py"), "f")
    assert split_reference("C:\\data\\b.py:f") == (Path("C:\\data\\b.py"), "f")
    assert split_reference("C:\\data") is None
    assert split_reference("data.npz") is None


class Reader:
    """As onnxruntime's CalibrationDataReader: a length that fails, and an iterator that get_next goes before."""

    def __init__(self, count: int = 4, end: Any = None) -> None:
        self._x = np.zeros((1, 3), np.float32)
        self._count = count
        self._end = end
        self._next = 0

    def get_next(self) -> Any:
        self._next += 1
        if self._next > self._count:
            return self._end
        self._x[0, 0] = self._next - 1
        return {"x": self._x, "labels": np.array([self._next])}

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("end", [None, {}])
def test_readers_are_walked_once_to_their_end_and_kept(end: Any) -> None:
    feeds = Feeds(from_items(Reader(4, end), "feeds"), [X])
    assert indices(feeds) == indices(feeds) == [0, 1, 2, 3]
    assert feeds[2].source == "feeds[2]"
    assert feeds[2].labels is not None
    assert len(from_items(Reader(0, end), "feeds")) == 0


def test_readers_of_onnxruntime_are_read() -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")

    class Mine(calibrate.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self._items = iter([{"x": row(index, 0, 0)} for index in range(3)])

        def get_next(self) -> Any:
            return next(self._items, None)

    assert indices(Feeds(from_items(Mine(), "feeds"), [X])) == [0, 1, 2]


def test_readers_that_fail_name_the_index() -> None:
    class Failing(Reader):
        def get_next(self) -> Any:
            if self._next == 2:
                raise OSError("the disk is gone")
            return super().get_next()

    with pytest.raises(FeedError, match=r"feeds\[2\]: it failed: OSError: the disk is gone"):
        from_items(Failing(), "feeds")


def test_readers_give_dicts() -> None:
    class Wrong(Reader):
        def get_next(self) -> Any:
            return np.zeros(3)

    with pytest.raises(FeedError, match=r"feeds\[0\]: expected a dict of input name -> array, got ndarray"):
        from_items(Wrong(), "feeds")


def test_a_mapping_alone_is_no_source_of_feeds() -> None:
    with pytest.raises(FeedError, match="got dict"):
        from_items({"x": row(1, 2, 3)}, "feeds")
