from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt.errors import PassError, UsageError
from onnxopt.feeds import Sample
from onnxopt.model import load
from onnxopt.pipeline import output
from onnxopt.pipeline.output import check_output, equal, failed_path, save
from onnxopt.runtime.worker import run_saved
from tests.pipeline.builders import classifier, feeds

NAN = np.array([np.nan], np.float32)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (np.ones(2), np.ones(2), True),
        (np.ones(2), np.ones(2, np.float32), False),
        (np.ones(2), np.ones((2, 1)), False),
        (np.array([0.0]), np.array([-0.0]), False),
        (NAN, NAN.copy(), True),
        (np.array(["a"], object), np.array(["a"], object), True),
        (np.array(["a"], object), np.array(["b"], object), False),
        ([np.ones(1)], [np.ones(1)], True),
        ([np.ones(1)], [np.ones(1), np.ones(1)], False),
        ({"a": 1.0}, {"a": 1.0}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        (None, None, True),
        (float("nan"), float("nan"), True),
        (1.0, 2.0, False),
    ],
)
def test_equal(one: Any, other: Any, same: bool) -> None:
    assert equal(one, other) is same


def samples() -> list[Sample]:
    return [Sample({"x": row[None]}, None, f"row {at}") for at, row in enumerate(feeds(classifier())["x"][:2])]


def write(folder: Path, **settings: Any) -> Path:
    path = folder / "out.onnx"
    save(load(classifier()), path, samples(), **{"threads": 1, "timeout": 60.0, "skip": frozenset(), **settings})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_saved_file_is_run_before_it_takes_its_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert onnx.load(path) == classifier()
    assert names(tmp_path) == ["out.onnx"]


def test_a_file_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_saved

    def wrong(*arguments: Any, **settings: Any) -> list[dict[str, Any]]:
        found = real(*arguments, **settings)
        found[1]["logits"] = np.nextafter(found[1]["logits"], np.float32(9e9))
        return found

    monkeypatch.setattr(output, "run_saved", wrong)
    with pytest.raises(PassError, match=r"output 'logits' of the saved file differs .* for row 1"):
        write(tmp_path)
    assert names(tmp_path) == []
    assert write(tmp_path, skip=frozenset({"logits"})).exists()


def test_an_old_file_survives_a_refused_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "run_saved", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out.onnx"]


def test_places_that_are_refused_before_any_work(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    onnx.save(classifier(), source)
    (tmp_path / "link.onnx").symlink_to(source)
    (tmp_path / "other.onnx").touch()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "loose.onnx").symlink_to(tmp_path / "gone.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused = {
        "folder.onnx": "it is a folder",
        "gone/out.onnx": "does not exist",
        "net.onnx/out.onnx": "is a file",
        "net.onnx": "is the input itself",
        "link.onnx": "is the input itself",
        "other.onnx": "exists already",
    }
    for name, cause in refused.items():
        with pytest.raises(UsageError, match=cause):
            check_output(tmp_path / name, source, force=False)
    never = {
        "net.onnx": "is the input itself",
        "link.onnx": "is the input itself",
        "folder.onnx": "it is a folder",
        "loose.onnx": "a link that leads nowhere",
        "pipe.onnx": "a named pipe",
    }
    for name, cause in never.items():
        for force in (False, True):
            with pytest.raises(UsageError, match=cause):
                check_output(tmp_path / name, source, force=force)
    assert (tmp_path / "pipe.onnx").is_fifo()
    check_output(tmp_path / "other.onnx", source, force=True)
    check_output(tmp_path / "new.onnx", source, force=False)


def test_external_data_of_the_input_is_part_of_the_input(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    onnx.save(classifier(), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UsageError, match="is the input itself"):
        check_output(tmp_path / "weights.bin", source, force=True)


def test_the_name_of_a_failed_result() -> None:
    assert failed_path(Path("a/net.onnxopt.onnx")) == Path("a/net.onnxopt.failed.onnx")
    assert failed_path(Path("net.q8")) == Path("net.q8.failed.onnx")
    assert failed_path(Path("net.q4")) == Path("net.q4.failed.onnx")
    assert failed_path(Path("net")) == Path("net.failed.onnx")
