"""Reading and writing files: external data stays inside the folder, saving is all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from onnxopt.errors import ModelError, UsageError
from onnxopt.model import files, load
from tests.helpers import assert_equal, proto, random_feeds, run, with_weights

WEIGHTS = np.arange(512, dtype=np.float32).reshape(2, 256)


def simple() -> ModelProto:
    return with_weights(proto("g (float[2,256] x) => (float[2,256] y) { y = Add(x, w) }"), w=WEIGHTS)


def external(folder: Path, **entries: str) -> Path:
    """A model file whose only weight lies in weights.bin."""
    source = simple()
    tensor = source.graph.initializer[0]
    (folder / "weights.bin").write_bytes(b"\0" * 64 + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": "64", "length": "2048", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(source.SerializeToString())
    return path


def test_external_data_is_mapped_and_written_inline(tmp_path: Path) -> None:
    target = load(external(tmp_path))
    assert np.array_equal(target.graph.initializers[0].values, WEIGHTS)
    assert target.to_proto() == simple()
    saved = target.save(tmp_path / "out.onnx")
    assert onnx.load(saved) == simple()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "../weights.bin"}, "outside"),
        ({"location": "/etc/passwd"}, "outside"),
        ({"location": "a/../../weights.bin"}, "outside"),
        ({"location": ""}, "outside"),
        ({"location": "..\\weights.bin"}, "outside"),
        ({"location": "gone.bin"}, "does not exist"),
        ({"location": "link.bin"}, "symbolic link"),
        ({"location": "hard.bin"}, "hard links"),
        ({"offset": "100"}, "past the end"),
        ({"offset": "-8"}, "offset"),
        ({"length": "-1"}, "length"),
        ({"length": "99999"}, "99999 bytes where"),
        ({"offset": "many"}, "no number"),
        ({"command": "rm"}, "unknown external data key"),
    ],
)
def test_external_data_cannot_reach_out(tmp_path: Path, entries: dict[str, str], reason: str) -> None:
    path = external(tmp_path, **entries)
    (tmp_path / "link.bin").symlink_to(tmp_path / "weights.bin")
    if entries.get("location") == "hard.bin":
        os.link(tmp_path / "weights.bin", tmp_path / "hard.bin")
    with pytest.raises(ModelError) as caught:
        load(path).graph.initializers[0].values  # noqa: B018  reading is the point
    assert reason in caught.value.cause
    assert "'w'" in caught.value.cause


def test_too_few_bytes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="1024 bytes where"):
        load(external(tmp_path, length="1024")).graph.initializers[0].values  # noqa: B018


def test_external_data_without_a_folder_is_refused(tmp_path: Path) -> None:
    source = ModelProto()
    source.ParseFromString(external(tmp_path).read_bytes())
    with pytest.raises(ModelError, match="no folder"):
        load(source)


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a model at all, but text", b"\xff" * 50])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "model.onnx" in caught.value.cause


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(simple().SerializeToString()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        load(path)


def test_a_missing_file_has_a_near_one_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "modle.onnx")
    assert "model.onnx" in caught.value.remedy
    with pytest.raises(UsageError, match="folder"):
        load(tmp_path)


def test_saving_replaces_the_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def refuse(written: Path) -> None:
        assert onnx.load(written) == simple()
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError):
        load(simple()).save(path, refuse)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    load(simple()).save(path)
    assert onnx.load(path) == simple()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_saving_over_the_model_that_is_mapped(tmp_path: Path) -> None:
    path = external(tmp_path)
    load(path).save(path)
    assert onnx.load(path) == simple()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(simple()).save(tmp_path / "no" / "model.onnx")


def test_large_models_get_a_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    source = with_weights(simple(), v=np.ones(2, np.float32))
    target = load(source)
    with pytest.raises(ModelError, match="GB"):
        target.to_proto()
    path = target.save(tmp_path / "model.onnx")
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0].startswith("model.")
    assert names[0].endswith(".onnxdata")
    assert path.stat().st_size < 1000
    feeds = random_feeds(source)
    monkeypatch.undo()
    assert_equal(run(source, feeds), run(onnx.load(path), feeds))
    assert load(path).to_proto() == source
    first = path.read_bytes()
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    load(source).save(path)
    assert path.read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 2
