from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from onnxopt.errors import FeedError
from onnxopt.feeds import Feeds, open_feeds
from onnxopt.feeds.hugging_face import DatasetRows, is_dataset, is_saved, load_saved
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, X, indices

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.uint64, np.bool_]
ANY = Port("x", None, None)


@dataclass(frozen=True)
class Value:
    dtype: str


@dataclass(frozen=True)
class List:
    feature: Any


class Table:
    """The part of a datasets.Dataset that is used."""

    def __init__(self, features: dict[str, Any], rows: list[Any]) -> None:
        self.features = features
        self.column_names = list(features)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


FLOATS = List(Value("float32"))


def table(feature: Any, *values: Any) -> Table:
    return Table({"x": feature}, [{"x": value} for value in values])


def read(feature: Any, value: Any) -> Any:
    return DatasetRows(table(feature, value), "feeds", (ANY,), None).read(0).values["x"]


def test_every_row_is_a_sample() -> None:
    rows = [{"x": [float(index), 1.0, 2.0], "ids": [index], "note": None, "label": index} for index in range(5)]
    features = {"x": FLOATS, "ids": [Value("int64")], "note": Value("string"), "label": Value("int64")}
    feeds = open_feeds([Table(features, rows)], [X, IDS], whole=True).evaluate
    assert indices(feeds) == [0, 1, 2, 3, 4]
    assert feeds[3].source == "feeds[3]"
    assert feeds[3].inputs["ids"].tolist() == [[3]]
    assert feeds[3].labels is not None
    assert feeds[3].labels.tolist() == [3]


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3))))
def test_cells_get_the_declared_type(value: Any) -> None:
    feature: Any = Value(value.dtype.name)
    for _ in range(value.ndim):
        feature = List(feature)
    found = read(feature, value.tolist())
    assert (found.dtype, found.shape) == (value.dtype, (1, *value.shape))
    np.testing.assert_array_equal(found[0], value)


def test_arrays_and_strings_are_taken() -> None:
    assert read(Value("float32"), np.ones((2, 3), np.float32)).shape == (1, 2, 3)
    assert read(FLOATS, np.ones(3, np.float64)).dtype == np.float64
    assert read(List(Value("string")), ["a", "bc"]).tolist() == [["a", "bc"]]
    assert read(Value("string"), "abc").tolist() == ["abc"]


@pytest.mark.parametrize(
    ("feature", "value", "cause"),
    [
        (FLOATS, [1.0, None], "holds null"),
        (FLOATS, None, "holds null"),
        (List(FLOATS), [[1.0], [None]], "holds null"),
        (List(FLOATS), [[1.0], None], "holds null"),
        (List(Value("bool")), [True, None], "holds null"),
        (List(FLOATS), [[1.0, 2.0], [3.0]], "is no array: its inner lists differ"),
        (List(List(Value("string"))), [["a", "b"], ["c"]], "is no array: its inner lists differ"),
        (Value("timestamp[s]"), 3, r"is of type timestamp\[s\]"),
        (Value("decimal128(5, 2)"), 3, r"is of type decimal128\(5, 2\)"),
        (Value("date32"), 3, "is of type date32"),
        ({"a": Value("int64")}, {"a": 3}, "is of type {'a': Value"),
        (Value("int8"), 300, "is no array"),
        (None, object(), "is of type object"),
    ],
)
def test_cells_that_are_no_array_name_row_and_column(feature: Any, value: Any, cause: str) -> None:
    with pytest.raises(FeedError, match=rf"feeds\[0\]: column 'x' {cause}"):
        read(feature, value)


@pytest.mark.parametrize("wrapped", [False, True])
def test_pictures_are_preprocessed(wrapped: bool, tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 9), "red")
    picture.save(tmp_path / "a.png")
    cell: Any = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None} if wrapped else picture
    feature = {"bytes": Value("binary"), "path": Value("string")} if wrapped else Value("PIL.Image.Image")
    data = Table({"img": feature, "label": Value("int64")}, [{"img": cell, "label": 1}])
    sample = open_feeds([data], [PICTURE], preprocessing="scale=1").fit[0]
    assert sample.inputs["image"].shape == (1, 3, 4, 6)
    assert sample.inputs["image"][0, :, 0, 0].tolist() == [255, 0, 0]


def test_of_a_transform_the_values_count() -> None:
    class Transformed(Table):
        format: ClassVar[Any] = {"type": "custom"}

        def __getitem__(self, index: int) -> Any:
            return {"x": np.full(3, self._rows[index]["raw"], np.float32)}

    data = Transformed({"raw": Value("int64")}, [{"raw": number} for number in range(3)])
    assert indices(open_feeds([data], [X], whole=True).evaluate) == [0, 1, 2]


def test_broken_data_sets_are_named() -> None:
    class Failing(Table):
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("no such shard")

    with pytest.raises(FeedError, match=r"feeds\[0\]: reading it failed: RuntimeError: no such shard"):
        open_feeds([Failing({"x": FLOATS}, [1])], [X])
    with pytest.raises(FeedError, match=r"feeds\[0\]: expected a row, got int"):
        open_feeds([Table({"x": FLOATS}, [1])], [X])
    with pytest.raises(FeedError, match=r"feeds\[0\]: no column 'x'"):
        open_feeds([Table({"x": FLOATS}, [{}])], [X])
    with pytest.raises(FeedError, match="feeds: it holds no row"):
        open_feeds([table(FLOATS)], [X])
    with pytest.raises(FeedError, match=r"feeds: no column for x: .*; its columns are 'y'"):
        open_feeds([Table({"y": FLOATS}, [{}])], [X])


def test_functions_of_a_file_may_return_one(tmp_path: Path) -> None:
    (tmp_path / "gen.py").write_text(
        "from tests.feeds.test_hugging_face import FLOATS, table\n"
        "def data():\n    return table(FLOATS, [0.0, 1.0, 2.0], [1.0, 1.0, 2.0])\n"
    )
    feeds = open_feeds([f"{tmp_path / 'gen.py'}:data"], [X], whole=True).evaluate
    assert indices(feeds) == [0, 1]
    assert feeds[1].source == f"{tmp_path / 'gen.py'}:data[1]"


def test_a_data_set_is_told_by_what_it_has() -> None:
    assert is_dataset(table(FLOATS), "feeds")
    others: list[Any] = [[], {}, iter("a"), np.zeros(3), Value("int64")]
    assert not any(is_dataset(other, "feeds") for other in others)


def test_splits_are_named() -> None:
    class Splits(dict[str, Table]):
        column_names: ClassVar[Any] = {"train": ["x"], "test": ["x"]}

    with pytest.raises(FeedError, match="divided into splits") as caught:
        open_feeds([Splits(train=table(FLOATS), test=table(FLOATS))], [X])  # type: ignore[list-item]
    assert caught.value.remedy == "give one of them: data['train'] or data['test']"


def saved_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    return folder


def test_saved_folders_are_told_by_their_files(tmp_path: Path) -> None:
    assert is_saved(saved_folder(tmp_path / "saved"))
    assert not is_saved(tmp_path)
    for split in ("train", "test"):
        saved_folder(tmp_path / "all" / split)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(FeedError, match="all: the data set is divided into splits") as caught:
        open_feeds([tmp_path / "all"], [X])
    assert caught.value.remedy == f"give one of them: {tmp_path / 'all' / 'test'} or {tmp_path / 'all' / 'train'}"


def test_without_datasets_the_remedy_is_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FeedError, match="saved data sets need datasets") as caught:
        open_feeds([saved_folder(tmp_path / "saved")], [X])
    assert caught.value.remedy == "pip install onnxopt[datasets]"


@pytest.fixture(scope="module")
def datasets() -> Any:
    """The real library, where it is installed."""
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def real(datasets: Any, count: int = 4) -> Any:
    features = datasets.Features(
        x=datasets.Sequence(datasets.Value("float32")),
        grid=datasets.Array2D((2, 3), "int16"),
        name=datasets.Value("string"),
        label=datasets.ClassLabel(names=["a", "b"]),
    )
    rows = {
        "x": [[float(index), 1.0, 2.0] for index in range(count)],
        "grid": [np.full((2, 3), index).tolist() for index in range(count)],
        "name": [f"n{index}" for index in range(count)],
        "label": [index % 2 for index in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("form", [None, "numpy", "arrow"])
def test_real_data_sets_are_read_whatever_their_format(datasets: Any, form: str | None) -> None:
    ports = [X, Port("grid", np.dtype(np.int16), (1, 2, 3)), Port("name", np.dtype(object), (None,))]
    sample = open_feeds([real(datasets).with_format(form)], ports, whole=True).evaluate[3]
    assert sample.inputs["x"].tolist() == [[3, 1, 2]]
    assert sample.inputs["grid"].dtype == np.int16
    assert sample.inputs["name"].tolist() == ["n3"]
    assert sample.labels is not None
    assert sample.labels.tolist() == [1]


def test_real_transforms_count(datasets: Any) -> None:
    def double(batch: Any) -> Any:
        return {"x": [np.float32(2) * np.array(value, np.float32) for value in batch["x"]]}

    data = real(datasets).remove_columns("label").with_transform(double)
    assert indices(open_feeds([data], [X], whole=True).evaluate) == [0, 2, 4, 6]


def test_columns_that_feed_nothing_are_not_decoded(datasets: Any) -> None:
    data = real(datasets, 1).add_column("img", [{"bytes": b"no picture", "path": None}])
    data = data.cast_column("img", datasets.Image())
    assert indices(open_feeds([data], [X]).fit) == [0]


def test_real_selections_and_splits(datasets: Any) -> None:
    assert indices(open_feeds([real(datasets).select([2, 0])], [X], whole=True).evaluate) == [2, 0]
    with pytest.raises(FeedError, match="divided into splits"):
        open_feeds([datasets.DatasetDict(train=real(datasets))], [X])


def test_saved_data_sets_are_read(datasets: Any, tmp_path: Path) -> None:
    real(datasets, 5).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    feeds = open_feeds([tmp_path / "saved"], [X], whole=True).evaluate
    assert indices(feeds) == [0, 1, 2, 3, 4]
    assert feeds[4].source == f"{tmp_path / 'saved'}[4]"
    parts = datasets.DatasetDict(fit=real(datasets), evaluate=real(datasets, 2))
    parts.save_to_disk(str(tmp_path / "parts"))
    split = open_feeds([tmp_path / "parts"], [X])
    assert (len(split.fit), len(split.evaluate)) == (4, 2)


def test_saved_pictures_are_read_and_never_followed(datasets: Any, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"img": [str(tmp_path / "a.png")]}).cast_column("img", datasets.Image())
    assert open_feeds([data], [PICTURE]).fit[0].inputs["image"].shape == (1, 3, 4, 6)
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert open_feeds([tmp_path / "saved"], [PICTURE]).fit[0].inputs["image"][0, 0, 0, 0] == 1
    loaded = load_saved(tmp_path / "saved")
    assert loaded.features["img"].decode is False
    row = loaded[0]["img"]
    linked = Table({"img": Value("binary")}, [{"img": {**row, "bytes": None, "path": str(tmp_path / "b.png")}}])
    with pytest.raises(FeedError, match="names another file"):
        open_feeds([linked], [PICTURE])


def test_saved_folders_that_are_broken_are_named(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(FeedError, match=r"saved: it can't be read"):
        open_feeds([saved_folder(tmp_path / "saved")], [X])
    real(datasets).save_to_disk(str(tmp_path / "cut"))
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FeedError, match=r"cut: it can't be read"):
        open_feeds([tmp_path / "cut"], [X])


def test_feeds_of_a_data_set_are_checked_against_the_model(datasets: Any) -> None:
    port = Port("x", np.dtype(np.float64), ("N", 3))
    feeds = Feeds(DatasetRows(real(datasets), "feeds", (port,), None), [port])
    with pytest.raises(FeedError, match=r"feeds\[0\]: input 'x': expected float64, got float32"):
        feeds[0]
