from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import pytest

from onnxopt.model import load
from onnxopt.pipeline.facts import facts, sidecars
from tests.pipeline.builders import CLASSES, HIDDEN, SIZE, classifier


def test_facts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(classifier(), path)
    raw = path.read_bytes()
    found = facts(load(path), path)
    assert found.path == str(path)
    assert found.file_bytes == len(raw)
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    assert found.compressed_bytes is None
    assert found.parameters == SIZE * HIDDEN + HIDDEN * CLASSES
    assert (found.nodes, found.opset, found.ir_version) == (4, 17, 8)


def test_sidecars_count(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(classifier(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert sidecars(path) == [tmp_path / "weights.bin"]
    weights = (tmp_path / "weights.bin").stat().st_size
    assert weights >= 4 * (SIZE * HIDDEN + HIDDEN * CLASSES)
    assert facts(load(path), path).file_bytes == path.stat().st_size + weights


def test_facts_of_a_model_in_memory_are_those_of_the_file_it_makes(tmp_path: Path) -> None:
    model = load(classifier())
    here = facts(model)
    path = model.save(tmp_path / "net.onnx")
    there = facts(load(path), path)
    assert (here.file_bytes, here.sha256) == (there.file_bytes, there.sha256)


@pytest.mark.parametrize("name", ["net.json", "net.pbtxt", "net.textproto", "net.txt"])
def test_a_model_is_binary_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(classifier().SerializeToString())
    assert sidecars(path) == []
    assert facts(load(path), path).nodes == 4
