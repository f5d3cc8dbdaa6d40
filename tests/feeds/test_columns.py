from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxopt.errors import FeedError
from onnxopt.feeds.columns import Columns
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, X, row

WEIGHTS = Port("w", np.dtype(np.float32), (3,), required=False)


def columns(names: list[str], ports: list[Port], pictures: tuple[str, ...] = ()) -> Columns:
    return Columns("t.parquet", names, pictures, ports, None)


def red() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "png")
    return file.getvalue()


def test_columns_feed_the_inputs_of_their_names_and_others_are_left_out() -> None:
    found = columns(["date", "ids", "x", "labels", "label"], [X, IDS, WEIGHTS])
    assert found.used == ["x", "ids", "labels"]
    record = found.record({"x": 1, "ids": 2, "labels": 3}, "t.parquet[0]")
    assert (record.values, record.source) == ({"x": 1, "ids": 2, "labels": 3}, "t.parquet[0]")
    assert columns(["x", "w"], [X, WEIGHTS]).used == ["x", "w"]


def test_label_stands_in_for_labels_unless_it_is_an_input() -> None:
    record = columns(["x", "label"], [X]).record({"x": 1, "label": 3}, "t")
    assert record.values == {"x": 1, "labels": 3}
    label = Port("label", np.dtype(np.int64), (None,))
    assert columns(["x", "label"], [X, label]).record({"x": 1, "label": 3}, "t").values == {"x": 1, "label": 3}
    labels = Port("labels", np.dtype(np.int64), (None,))
    assert columns(["x", "labels"], [X, labels]).used == ["x", "labels"]


@pytest.mark.parametrize(
    ("names", "ports", "cause", "remedy"),
    [
        (["idx", "x"], [X, IDS], r"no column for ids: int64\[N,T\]; its columns are 'idx', 'x'", "did you mean 'idx'"),
        ([], [X], "no column for x", "none is known"),
        (["a"], [WEIGHTS], "no column for w", "known: a"),
        (["x", "x"], [X], "several columns are named 'x'", "name of its own"),
        (["label"], [X, Port("labels", None, None)], "no column for x: .*, labels", "known: label"),
    ],
)
def test_inputs_without_a_column_are_named(names: list[str], ports: list[Port], cause: str, remedy: str) -> None:
    with pytest.raises(FeedError, match=rf"t\.parquet: {cause}") as caught:
        columns(names, ports)
    assert remedy in caught.value.remedy


def test_the_only_pictures_feed_the_only_input_of_rank_4() -> None:
    found = columns(["png", "label"], [PICTURE], ("png",))
    assert found.used == ["png", "label"]
    for cell in (red(), {"bytes": red(), "path": "a.png"}, Image.new("RGB", (6, 4), "red")):
        values = found.record({"png": cell, "label": 3}, "t").values
        assert values["image"].shape == (1, 3, 4, 6)
        assert values["image"][0, :, 0, 0].tolist() == [1, 0, 0]


def test_pictures_of_the_inputs_name_come_first_and_masks_are_no_labels() -> None:
    assert columns(["image", "labels"], [PICTURE], ("image", "labels")).used == ["image"]
    with pytest.raises(FeedError, match="the columns 'a', 'b' hold pictures, and none is named 'image'"):
        columns(["b", "a"], [PICTURE], ("b", "a"))


def test_pictures_feed_no_other_models() -> None:
    with pytest.raises(FeedError, match=r"no column for ids"):
        columns(["x", "png"], [X, IDS], ("png",))
    with pytest.raises(FeedError, match="pictures serve models with one input of rank 4"):
        columns(["x"], [X], ("x",))
    assert columns(["x", "png"], [X], ("png",)).used == ["x"]


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        (None, "holds null"),
        ({"bytes": None, "path": None}, "holds null"),
        ({"bytes": None, "path": "/etc/passwd"}, "names another file"),
        ({"path": "http://somewhere/a.png"}, "names another file"),
        (b"no picture", "can't be read as a picture"),
    ],
)
def test_cells_without_a_picture_are_named(cell: Any, cause: str) -> None:
    with pytest.raises(FeedError, match=rf"t\[4\]: column 'png'.* {cause}"):
        columns(["png"], [PICTURE], ("png",)).record({"png": cell}, "t[4]")


def test_values_pass_as_they_are() -> None:
    value = row(1, 2, 3)
    assert columns(["x"], [X]).record({"x": value}, "t").values["x"] is value
