from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.errors import FeedError
from onnxopt.feeds import Feeds
from onnxopt.feeds.arrays import ArrayFile, ArrayFolder, read_labels
from tests.feeds.ports import IDS, RATE, X, indices, save_rows


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_file_holds_a_sample_a_row(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "data.npz"
    x = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    save(path, x=x, sr=np.array(8000), labels=np.arange(4))
    feeds = Feeds(ArrayFile(path, [X, RATE]), [X, RATE])
    assert len(feeds) == 4
    sample = feeds[2]
    np.testing.assert_array_equal(sample.inputs["x"], x[2:3])
    assert sample.inputs["sr"].shape == ()
    assert sample.labels is not None
    assert sample.labels.tolist() == [2]
    assert sample.source == f"{path}[2]"


def test_uncompressed_files_are_mapped_not_read(tmp_path: Path) -> None:
    source = ArrayFile(save_rows(tmp_path / "data.npz", 5), [X])
    assert isinstance(source._arrays["x"], np.memmap)
    assert not isinstance(source.read(0).values["x"], np.memmap)


def test_a_header_that_promises_too_much_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (9, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(12))
        archive.writestr("secret.npy", bytes(200))
    with pytest.raises(FeedError, match="can't be read"):
        ArrayFile(path, [X])


def test_arrays_must_agree_on_the_number_of_samples(tmp_path: Path) -> None:
    path = save_rows(tmp_path / "data.npz", 5, ids=np.zeros((4, 2), np.int64))
    with pytest.raises(FeedError, match=r"data\.npz.*'x' has 5, 'ids' has 4"):
        ArrayFile(path, [X, IDS])


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="holds no sample"):
        ArrayFile(save_rows(tmp_path / "data.npz", 0), [X])
    np.savez(tmp_path / "nothing.npz")
    with pytest.raises(FeedError, match=r"nothing\.npz: it holds no sample"):
        ArrayFile(tmp_path / "nothing.npz", [X])


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        np.savez(tmp_path / f"{name}.npz", x=np.full((2, 3), ord(name), np.float32))
    np.save(tmp_path / "d.npy", np.full((1, 3), ord("d"), np.float32))
    feeds = Feeds(ArrayFolder(list(tmp_path.iterdir()), [X]), [X])
    assert indices(feeds) == [ord(name) for name in "abcd"]
    assert feeds[0].inputs["x"].shape == (2, 3)
    assert feeds[3].source == str(tmp_path / "d.npy")


def test_npy_is_for_models_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros((4, 3), np.float32))
    assert len(ArrayFile(tmp_path / "d.npy", [X])) == 4
    with pytest.raises(FeedError, match=r"d\.npy.*this one has 2: x, ids"):
        ArrayFile(tmp_path / "d.npy", [X, IDS])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"garbage" * 20])
def test_corrupt_files_are_named(tmp_path: Path, content: bytes) -> None:
    for name in ("bad.npz", "bad.npy"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FeedError, match=rf"{name}: it can't be read"):
            ArrayFolder([path], [X]).read(0)


def test_a_truncated_archive_and_a_flipped_byte_are_noticed(tmp_path: Path) -> None:
    path = save_rows(tmp_path / "data.npz", 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(FeedError, match="can't be read"):
        ArrayFile(path, [X])
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(FeedError, match="can't be read"):
        ArrayFolder([path], [X]).read(0)


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(FeedError, match="can't be read") as caught:
        ArrayFile(tmp_path / "objects.npz", [X])
    assert "str dtype" in caught.value.remedy


def test_labels_of_each_format(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", np.array([1, 2]))
    np.savez(tmp_path / "l.npz", anything=np.array([1, 2]))
    np.savez(tmp_path / "two.npz", other=np.zeros(1), labels=np.array([1, 2]))
    (tmp_path / "l.csv").write_text("label\n1\n2\n\n")
    for name in ("l.npy", "l.npz", "two.npz", "l.csv"):
        labels = read_labels(tmp_path / name)
        assert isinstance(labels, np.ndarray)
        assert labels.tolist() == [1, 2]
        assert labels.dtype.kind == "i"
    (tmp_path / "named.csv").write_text("file,label\na.png,0.5\nb,1\n")
    named = read_labels(tmp_path / "named.csv")
    assert isinstance(named, dict)
    assert {name: float(label) for name, label in named.items()} == {"a.png": 0.5, "b": 1.0}


@pytest.mark.parametrize(
    ("text", "cause"),
    [("", "no table"), ("1,2,3\n", "no table"), ("1\n2,3\n", "no table"), ("1\ncat\n", "label 'cat' is no number")],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(FeedError, match=cause):
        read_labels(tmp_path / "l.csv")


def test_label_files_must_exist_and_be_known(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="no such file"):
        read_labels(tmp_path / "absent.npy")
    (tmp_path / "l.txt").write_text("1")
    with pytest.raises(FeedError, match=r"from a \.txt file"):
        read_labels(tmp_path / "l.txt")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(FeedError, match="none is named 'labels'"):
        read_labels(tmp_path / "two.npz")
