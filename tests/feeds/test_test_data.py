from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxopt.errors import FeedError
from onnxopt.feeds import Feeds
from onnxopt.feeds.test_data import DataSets, data_sets
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, X, indices, row


def write_set(folder: Path, *tensors: Any) -> Path:
    folder.mkdir(parents=True)
    for index, tensor in enumerate(tensors):
        proto = numpy_helper.from_array(tensor) if isinstance(tensor, np.ndarray) else tensor
        (folder / f"input_{index}.pb").write_bytes(proto.SerializeToString())
    (folder / "output_0.pb").write_bytes(b"ignored")
    return folder


def test_sets_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_set(tmp_path / f"test_data_set_{number}", row(number, 0, 0), np.zeros((1, 2), np.int64))
    (tmp_path / "other").mkdir()
    feeds = Feeds(DataSets(data_sets(tmp_path), [X, IDS]), [X, IDS])
    assert indices(feeds) == [0, 2, 10]
    assert list(feeds[0].inputs) == ["x", "ids"]


def test_a_set_itself_and_eleven_inputs_in_numeric_order(tmp_path: Path) -> None:
    ports = [Port(f"p{index}", np.dtype(np.int64), (None,)) for index in range(11)]
    folder = write_set(tmp_path / "mine", *(np.array([index]) for index in range(11)))
    sample = Feeds(DataSets(data_sets(folder), ports), ports)[0]
    assert [int(value[0]) for value in sample.inputs.values()] == list(range(11))


def test_sequences_optionals_and_strings(tmp_path: Path) -> None:
    sequence = numpy_helper.from_list([row(1, 2, 3), row(4, 5, 6)], "s")
    optional = numpy_helper.from_optional(row(7, 8, 9), "o")
    strings = numpy_helper.from_array(np.array([["é", "b"]], object), "t")
    ports = [
        Port("s", np.dtype(np.float32), None, "sequence"),
        Port("o", np.dtype(np.float32), ("N", 3), "optional", required=False),
        Port("t", np.dtype(object), ("N", 2)),
    ]
    folder = write_set(tmp_path / "mine", sequence, optional, strings)
    inputs = Feeds(DataSets([folder], ports), ports)[0].inputs
    assert [part[0, 0] for part in inputs["s"]] == [1, 4]
    assert inputs["o"][0, 0] == 7
    assert inputs["t"].tolist() == [["é", "b"]]


def test_too_many_inputs_no_inputs_and_garbage(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "mine", row(1, 2, 3), row(1, 2, 3))
    with pytest.raises(FeedError, match=r"input_1\.pb: the model has only 1 inputs"):
        DataSets([folder], [X]).read(0)
    with pytest.raises(FeedError, match=r"holds no input_\*\.pb"):
        DataSets([write_set(tmp_path / "none")], [X]).read(0)
    (folder / "input_0.pb").write_bytes(b"\xff\xff garbage")
    with pytest.raises(FeedError, match=r"input_0\.pb: it can't be read as a tensor"):
        DataSets([folder], [X, X]).read(0)


def test_tensors_may_not_point_to_other_files(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(row(1, 2, 3))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(FeedError, match="another file"):
        DataSets([write_set(tmp_path / "mine", tensor)], [X]).read(0)
