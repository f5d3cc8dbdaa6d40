from __future__ import annotations

import datetime
import decimal
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from onnxopt.errors import FeedError, LimitError
from onnxopt.feeds import Feeds, open_feeds, parquet
from onnxopt.feeds.parquet import ParquetFiles, _to_array
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, X, indices

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int64, np.uint8, np.uint64, np.bool_]
ANY = Port("x", None, None)


def write(path: Path, columns: dict[str, Any], group: int | None = None) -> Path:
    """A file of the columns, each a pyarrow array, in row groups of `group` rows."""
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def rows_of_x(first: int, count: int) -> Any:
    return pa.array([[float(index), 1.0, 2.0] for index in range(first, first + count)], pa.list_(pa.float32()))


def nested(values: Any, form: str) -> Any:
    """The array as a column of nested lists, one row for each index of its first axis."""
    cells = pa.array(values.ravel())
    for size in values.shape[:0:-1]:
        if form == "fixed":
            cells = pa.FixedSizeListArray.from_arrays(cells, size)
            continue
        ends = np.arange(0, len(cells) + 1, size)
        kind = pa.LargeListArray if form == "large" else pa.ListArray
        cells = kind.from_arrays(pa.array(ends, pa.int64() if form == "large" else pa.int32()), cells)
    return cells


def read(path: Path, port: Port = ANY, index: int = 0) -> Any:
    return ParquetFiles([path], [port], None).read(index).values[port.name]


def test_every_row_is_a_sample(tmp_path: Path) -> None:
    ids = pa.array([[1, 2], [3], [], [4]], pa.list_(pa.int64()))
    note = pa.array(["a", "b", "c", "d"])
    path = write(
        tmp_path / "t.parquet", {"note": note, "x": rows_of_x(0, 4), "ids": ids, "labels": pa.array([7, 8, 9, 1])}
    )
    feeds = Feeds(ParquetFiles([path], [X, IDS], None), [X, IDS])
    assert indices(feeds) == indices(feeds) == [0, 1, 2, 3]
    assert [sample.inputs["ids"].tolist() for sample in feeds] == [[[1, 2]], [[3]], [[]], [[4]]]
    assert [sample.labels.tolist() for sample in feeds if sample.labels is not None] == [[7], [8], [9], [1]]
    assert feeds[2].source == f"{path}[2]"


@given(
    values=st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=4, max_side=3))
    ),
    form=st.sampled_from(["small", "large", "fixed"]),
)
def test_cells_keep_type_shape_and_bits(values: Any, form: str) -> None:
    cells = nested(values, form)
    for index in range(len(values)):
        found = _to_array(cells.slice(index, 1), "t")
        assert (found.dtype, found.shape) == (values.dtype, (1, *values.shape[1:]))
        np.testing.assert_array_equal(found[0], values[index])


@pytest.mark.parametrize(("value", "shape"), [([], (1, 0, 0)), ([[], []], (1, 2, 0))])
def test_a_list_without_elements_has_length_zero_below_too(value: Any, shape: tuple[int, ...]) -> None:
    found = _to_array(pa.array([value], pa.list_(pa.list_(pa.float32()))), "t")
    assert found.shape == shape
    assert found.dtype == np.float32


def test_lists_of_fixed_size_tensors_and_dictionaries(tmp_path: Path) -> None:
    fixed = pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.int32(), 3))
    path = write(tmp_path / "fixed.parquet", {"x": fixed})
    np.testing.assert_array_equal(read(path, index=1), np.array([[4, 5, 6]], np.int32), strict=True)
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    path = write(tmp_path / "tensor.parquet", {"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)})
    np.testing.assert_array_equal(read(path, index=1), values[1:], strict=True)
    path = write(tmp_path / "words.parquet", {"x": pa.array(["b", "a", "b"]).dictionary_encode()})
    assert read(path, index=2).tolist() == ["b"]


def test_strings_feed_a_string_input(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"s": pa.array([["é", ""], ["bc", "d"]])})
    port = Port("s", np.dtype(object), ("N", 2))
    assert [sample.inputs["s"].tolist() for sample in Feeds(ParquetFiles([path], [port], None), [port])] == [
        [["é", ""]],
        [["bc", "d"]],
    ]


def test_no_value_is_cast(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"x": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float64()))})
    with pytest.raises(FeedError, match=r"t\.parquet\[0\]: input 'x': expected float32, got float64"):
        open_feeds([path], [X])


def test_the_last_row_group_is_kept_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetFiles(
        [write(tmp_path / "t.parquet", {"x": rows_of_x(0, 7), "y": rows_of_x(0, 7)}, group=3)], [X], None
    )
    groups: list[int] = []
    read_group = source._read

    def counted(group: int) -> Any:
        groups.append(group)
        return read_group(group)

    monkeypatch.setattr(source, "_read", counted)
    found = [int(source.read(index).values["x"][0, 0]) for index in (0, 2, 1, 6, 3, 5)]
    assert found == [0, 2, 1, 6, 3, 5]
    assert groups == [0, 2, 1]
    assert source._kept is not None
    assert source._kept[1].num_rows == 3
    assert source._kept[1].column_names == ["x"]


def test_samples_do_not_keep_their_row_group(tmp_path: Path) -> None:
    value = read(write(tmp_path / "t.parquet", {"x": rows_of_x(0, 3)}))
    assert value.flags.writeable
    assert value.base is None or value.base.nbytes == value.nbytes


def test_a_folder_is_one_source_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", {"x": rows_of_x(5, 2)})
    write(tmp_path / "a.parquet", {"x": rows_of_x(0, 5)}, group=2)
    write(tmp_path / "c.parquet", {"x": rows_of_x(0, 0)})
    (tmp_path / "README.md").write_text("")
    split = open_feeds([tmp_path], [X], whole=True)
    assert indices(split.evaluate) == list(range(7))
    assert split.evaluate[5].source == f"{tmp_path / 'b.parquet'}[0]"
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 3), np.float32))
    with pytest.raises(FeedError, match=r"it holds \.npz files and \.parquet files"):
        open_feeds([tmp_path], [X])


def test_parts_may_be_parquet_files(tmp_path: Path) -> None:
    for first, part in ((0, "fit"), (5, "evaluate")):
        write(tmp_path / f"{part}.parquet", {"x": rows_of_x(first, 2)})
    split = open_feeds([tmp_path], [X])
    assert (indices(split.fit), indices(split.evaluate)) == ([0, 1], [5, 6])


def test_files_of_one_folder_need_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": rows_of_x(0, 1)})
    write(tmp_path / "b.parquet", {"y": rows_of_x(0, 1)})
    feeds = open_feeds([tmp_path], [X], whole=True).evaluate
    with pytest.raises(FeedError, match=r"b\.parquet: no column 'x', which .*a\.parquet has"):
        list(feeds)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("wrapped", [False, True])
def test_encoded_pictures_are_preprocessed(tmp_path: Path, wrapped: bool) -> None:
    cells = [{"bytes": png(), "path": "a.png"}] if wrapped else [png()]
    path = write(tmp_path / "t.parquet", {"img": pa.array(cells), "label": pa.array([3])})
    sample = open_feeds([path], [PICTURE], preprocessing="mean=0.5,std=0.5").fit[0]
    assert sample.inputs["image"].shape == (1, 3, 4, 6)
    assert sample.inputs["image"][0, :, 0, 0].tolist() == [1, -1, -1]
    assert sample.labels is not None
    assert sample.labels.tolist() == [3]


def test_pictures_that_lie_elsewhere_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "a.png")}], kind)
    with pytest.raises(FeedError, match=r"t\.parquet\[0\]: column 'image' names another file"):
        open_feeds([write(tmp_path / "t.parquet", {"image": cells})], [PICTURE])


@pytest.mark.parametrize(
    ("cells", "cause"),
    [
        (pa.array([[1.0, None]]), "holds null"),
        (pa.array([None], pa.float32()), "holds null"),
        (pa.array([None], pa.list_(pa.float32())), "holds null"),
        (pa.array([[[1.0], None]]), "holds null"),
        (pa.array([["a", None]]), "holds null"),
        (pa.array([None], pa.null()), "holds null"),
        (pa.array([[[1.0, 2.0], [3.0]]]), "is no array: its inner lists differ in length"),
        (pa.array([decimal.Decimal("1.5")]), r"is of type decimal128\(2, 1\)"),
        (pa.array([datetime.date(2020, 1, 1)]), r"is of type date32\[day\]"),
        (pa.array([datetime.datetime(2020, 1, 1)]), "is of type timestamp"),
        (pa.array([datetime.timedelta(1)]), "is of type duration"),
        (pa.array([[{"a": 1}]]), "is of type struct<a: int64>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "is of type map<string, int64"),
        (pa.array([[b"a"]]), "is of type binary"),
    ],
)
def test_cells_that_are_no_array_name_file_row_and_column(tmp_path: Path, cells: Any, cause: str) -> None:
    path = write(tmp_path / "t.parquet", {"x": cells})
    with pytest.raises(FeedError, match=rf"t\.parquet\[0\]: column 'x' {cause}"):
        read(path)


def test_nulls_inside_a_tensor_are_seen() -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), (2,))
    cells = pa.ExtensionArray.from_storage(kind, pa.array([[1.0, None]], pa.list_(pa.float32(), 2)))
    with pytest.raises(FeedError, match="t holds null"):
        _to_array(cells, "t")


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    broken = pa.array([b"\xff\xfe"]).view(pa.string())
    with pytest.raises(FeedError, match=r"t\.parquet\[0\]: column 'x': it can't be read"):
        read(write(tmp_path / "t.parquet", {"x": broken}))


def test_what_no_input_needs_may_be_of_any_type(tmp_path: Path) -> None:
    dates = pa.array([datetime.date(2020, 1, 1), None])
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 2), "date": dates})
    assert len(list(Feeds(ParquetFiles([path], [X], None), [X]))) == 2


def test_inputs_without_a_column_are_named_with_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 1), "idx": pa.array([1])})
    with pytest.raises(FeedError, match=r"t\.parquet: no column for ids: .*; its columns are 'x', 'idx'") as caught:
        open_feeds([path], [X, IDS])
    assert "did you mean 'idx'?" in caught.value.remedy


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 0)})
    with pytest.raises(FeedError, match=r"t\.parquet: it holds no row"):
        open_feeds([path], [X])
    with pytest.raises(FeedError, match=rf"{tmp_path.name}: it holds no row"):
        ParquetFiles([path, write(tmp_path / "u.parquet", {"x": rows_of_x(0, 0)})], [X], None)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"PK\x03\x04 an archive", b"{}"])
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(FeedError, match=r"t\.parquet: it can't be read"):
        open_feeds([tmp_path / "t.parquet"], [X])


@given(cut=st.integers(0, 400))
def test_truncated_files_are_named(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "t.parquet", {"x": rows_of_x(0, 50)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FeedError, match=r"t\.parquet.*: it can't be read"):
        list(open_feeds([path], [X], whole=True).evaluate)


def test_broken_pages_are_named_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 50)})
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(FeedError, match=r"t\.parquet: it can't be read"):
        open_feeds([path], [X])


def test_claims_of_too_many_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MOST_ROWS", 5)
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 6)}, group=3)
    with pytest.raises(LimitError, match=r"t\.parquet: more than 5 rows"):
        open_feeds([path], [X])


def test_without_pyarrow_the_remedy_is_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", {"x": rows_of_x(0, 1)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FeedError, match=r"t\.parquet: Parquet files need pyarrow") as caught:
        open_feeds([path], [X])
    assert caught.value.remedy == "pip install onnxopt[parquet]"
