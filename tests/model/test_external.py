"""Slices of files: read by position, nothing kept, and told when the file changed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxopt.errors import ModelError
from onnxopt.model import external, load
from onnxopt.model.external import ExternalData, FileSlice, SharedFile

CONTENT = bytes(range(256)) * 40


def slice_of(folder: Path, offset: int = 100, length: int = 5000) -> FileSlice:
    path = folder / "weights.bin"
    path.write_bytes(CONTENT)
    return FileSlice(SharedFile(path), offset, length)


def reference(**entries: str) -> TensorProto:
    proto = TensorProto(name="w", data_type=TensorProto.UINT8, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        proto.external_data.add(key=key, value=value)
    return proto


def test_every_way_of_reading_gives_the_same_bytes(tmp_path: Path) -> None:
    piece = slice_of(tmp_path)
    expected = CONTENT[100:5100]
    assert len(piece) == 5000
    assert bytes(piece) == expected
    assert piece.read(7, 20) == expected[7:27]
    assert bytes(piece.view()) == expected
    chunks = list(piece.chunks(999))
    assert [len(chunk) for chunk in chunks] == [999] * 5 + [5]
    assert b"".join(chunks) == expected


def test_an_empty_slice_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.bin").touch()
    piece = FileSlice(SharedFile(tmp_path / "empty.bin"), 0, 0)
    assert (bytes(piece), list(piece.chunks()), bytes(piece.view())) == (b"", [], b"")


def test_views_share_one_map_that_ends_with_them(tmp_path: Path) -> None:
    piece = slice_of(tmp_path)
    one, other = piece.view(), FileSlice(piece.file, 0, 10).view()
    assert one.obj is other.obj
    assert one.readonly
    assert piece.file._map is not None
    del one, other
    gc.collect()
    assert piece.file._map() is None


@pytest.mark.parametrize("keep_open", [True, False])
def test_a_file_that_became_shorter_is_told(tmp_path: Path, keep_open: bool) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    piece = FileSlice(SharedFile(path, keep_open), 100, 5000)
    os.truncate(path, 3000)
    assert piece.read(0, 100) == CONTENT[100:200]
    for read in (lambda: bytes(piece), lambda: list(piece.chunks(700)), piece.view):
        with pytest.raises(ModelError, match="became shorter since"):
            read()


def test_a_file_that_is_open_outlives_its_name(tmp_path: Path) -> None:
    piece = slice_of(tmp_path)
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").write_bytes(b"another")
    assert bytes(piece) == CONTENT[100:5100]


def test_a_file_opened_for_each_read_must_be_the_same(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    piece = FileSlice(SharedFile(path, keep_open=False), 0, 10)
    assert bytes(piece) == CONTENT[:10]
    (tmp_path / "other").write_bytes(CONTENT)
    (tmp_path / "other").replace(path)
    with pytest.raises(ModelError, match="was replaced"):
        bytes(piece)


def test_many_files_use_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_KEPT_OPEN", 3)
    data = ExternalData(tmp_path)
    pieces = []
    for number in range(10):
        (tmp_path / f"w{number}").write_bytes(bytes([number]) * 8)
        pieces.append(data.read(reference(location=f"w{number}")))
    assert sum(piece.file._descriptor >= 0 for piece in pieces) == 3
    assert [bytes(piece) for piece in pieces] == [bytes([number]) * 8 for number in range(10)]


def test_descriptors_are_closed_with_the_last_slice(tmp_path: Path) -> None:
    piece = slice_of(tmp_path)
    descriptor = piece.file._descriptor
    os.fstat(descriptor)
    del piece
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def test_offset_and_length_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    data = ExternalData(tmp_path)
    assert bytes(data.read(reference(location="w"))) == CONTENT
    assert bytes(data.read(reference(location="w", offset="10000"))) == CONTENT[10000:]
    assert bytes(data.read(reference(location="w", offset=str(len(CONTENT))))) == b""
    assert bytes(data.read(reference(location="w", offset="0", length="0"))) == b""


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": "-1"}, "offset"),
        ({"length": "-1"}, "length"),
        ({"offset": "-8", "length": "8"}, "offset"),
        ({"offset": "8", "length": "-8"}, "length"),
        ({"offset": "9" * 5000}, "offset"),
        ({"length": "1e3"}, "no number"),
        ({"offset": "²"}, "no number"),
        ({"offset": ""}, "no number"),
        ({"offset": "10241"}, "past the end"),
        ({"offset": "10240", "length": "1"}, "past the end"),
        ({"offset": "9223372036854775807", "length": "9223372036854775807"}, "past the end"),
    ],
)
def test_ranges_that_can_not_be_are_refused(tmp_path: Path, entries: dict[str, str], reason: str) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    with pytest.raises(ModelError, match=reason) as caught:
        ExternalData(tmp_path).read(reference(location="w", **entries))
    assert len(caught.value.cause) < 200


def test_an_array_over_a_file_is_kept_only_by_its_users(tmp_path: Path) -> None:
    weights = np.arange(4096, dtype=np.float32)
    path = big_model(tmp_path, weights.tobytes(), 4096)
    data = load(path).graph.initializers[0].data
    array = data.array()
    assert np.array_equal(array, weights)
    assert not array.flags.writeable
    assert data.array() is array
    del array
    gc.collect()
    assert data._array is None
    assert data._mapped is not None
    assert data._mapped() is None


def big_model(folder: Path, raw: bytes | None, elements: int) -> Path:
    """y = x + w, w in weights.bin: the bytes given, else a hole."""
    with (folder / "weights.bin").open("wb") as file:
        if raw is None:
            file.truncate(4 * elements)
        else:
            file.write(raw)
    text = f"g (float[{elements}] x) => (float[{elements}] y) {{ y = Add(x, w) }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    tensor = reference(location="weights.bin")
    tensor.data_type = TensorProto.FLOAT
    tensor.dims.append(elements)
    model.graph.initializer.append(tensor)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


FLAT = """
import resource, sys
from onnxopt.model import load
from onnxopt.passbase import Context
from onnxopt.passes.dedup import Dedup
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
model = load(sys.argv[1])
model.graph.initializers[0].data.digest()
Dedup().run(model, Context(evaluate=lambda proto, inputs: []))
model.save(sys.argv[2], external_data="always")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
def test_hashing_and_saving_keep_memory_flat(tmp_path: Path) -> None:
    path = big_model(tmp_path, None, 50 << 20)
    output = tmp_path / "out.onnx"
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", FLAT, str(path), str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 60 << 10
    (sidecar,) = tmp_path.glob("out.*.onnxdata")
    assert sidecar.stat().st_size == 200 << 20
