from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxopt.errors import FeedError, LimitError
from onnxopt.feeds import Feeds, open_feeds, polygraphy
from onnxopt.feeds.polygraphy import PolygraphyFiles, _decoded
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, X, indices, row

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_]
# The array [[1, 2, 3]] of float32 as polygraphy 0.53 writes it.
WRITTEN = (
    "k05VTVBZAQB2AHsnZGVzY3InOiAnPGY0JywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDEsIDMpLCB9ICAgICAgICAgICAgICAgICAg"
    "ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAoAAIA/AAAAQAAAQEA="
)


def npy(array: Any, *, pickled: bool = False) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return base64.b64encode(file.getvalue()).decode()


def encoded(array: Any) -> dict[str, Any]:
    return {"array": npy(array), "polygraphy_class": "ndarray"}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=4))
    return path


def test_a_list_of_feeds_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "inputs.json", [{"x": encoded(row(index, 0, 0))} for index in range(3)])
    feeds = Feeds(PolygraphyFiles([path]), [X])
    assert indices(feeds) == indices(feeds) == [0, 1, 2]
    assert feeds[1].source == f"{path}[1]"


def test_what_polygraphy_wrote_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "inputs.json", [{"x": {"array": WRITTEN, "polygraphy_class": "ndarray"}}])
    np.testing.assert_array_equal(PolygraphyFiles([path]).read(0).values["x"], row(1, 2, 3), strict=True)


@given(array=st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0))))
def test_arrays_keep_type_shape_and_bits(array: Any) -> None:
    found = _decoded({"x": encoded(array)}, "inputs.json[0]")["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    "value",
    [
        {"array": WRITTEN, "__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"},
        {"values": {"array": WRITTEN, "polygraphy_class": "ndarray"}, "polygraphy_class": "LazyArray"},
        {"values": {"array": WRITTEN, "polygraphy_class": "ndarray"}, "polygraphy_class": "LazyNumpyArray"},
    ],
    ids=["old marker", "output", "old output"],
)
def test_other_marks_are_understood(value: Any) -> None:
    assert _decoded({"x": value}, "f")["x"].tolist() == [[1, 2, 3]]


def test_strings_and_bfloat16_are_read(tmp_path: Path) -> None:
    half = np.array([[1.5]]).astype(ml_dtypes.bfloat16)
    ports = [Port("s", np.dtype(object), (None,)), Port("h", half.dtype, (None, 1))]
    path = save(tmp_path / "inputs.json", [{"s": encoded(np.array(["é", "bc"])), "h": encoded(half)}])
    inputs = Feeds(PolygraphyFiles([path]), ports)[0].inputs
    assert inputs["s"].tolist() == ["é", "bc"]
    assert inputs["h"].dtype == half.dtype
    assert float(inputs["h"][0, 0]) == 1.5


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        save(tmp_path / f"{index:010d}.json", {"x": encoded(row(index, 0, 0))})
    feeds = open_feeds([tmp_path], [X], whole=True).evaluate
    assert indices(feeds) == [0, 1, 2]
    assert feeds[1].source == f"{tmp_path / '0000000001.json'}[0]"


def test_beside_other_feeds_a_json_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text("{}")
    np.savez(tmp_path / "a.npz", x=row(7, 0, 0))
    assert indices(open_feeds([tmp_path], [X]).fit) == [7]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "can't be read as JSON"),
        (b'[{"x": ', "can't be read as JSON"),
        (b"\xff\xfe\x00", "can't be read as JSON"),
        (b"\x93NUMPY", "can't be read as JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"x":' * 200_000, "nested too deeply"),
        (b"[]", "it holds no feed"),
        (b"[1" + b"0" * 5000 + b"]", "can't be read as JSON"),
    ],
)
def test_files_that_are_no_feeds_are_named(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "inputs.json").write_bytes(content)
    with pytest.raises(FeedError, match=rf"inputs\.json: .*{cause}"):
        PolygraphyFiles([tmp_path / "inputs.json"])


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ([[1.0, 2.0]], "expected an array, got list"),
        (3, "expected an array, got int"),
        ({"a": 1}, "expected an array, got dict"),
        ({"array": 5, "polygraphy_class": "ndarray"}, "expected an array, got ndarray"),
        ({"array": WRITTEN, "polygraphy_class": "Shape"}, "expected an array, got Shape"),
        ({"values": None, "polygraphy_class": "LazyArray"}, "expected an array, got NoneType"),
        ({"tensor": WRITTEN, "polygraphy_class": "Tensor"}, "a pickled torch tensor"),
        ({"array": "k05VTV!", "polygraphy_class": "ndarray"}, "its text is no base64"),
        ({"array": "é", "polygraphy_class": "ndarray"}, "no .npy data"),
        ({"array": "AAAA", "polygraphy_class": "ndarray"}, "no .npy data"),
        ({"array": WRITTEN[:-8], "polygraphy_class": "ndarray"}, "no .npy data"),
    ],
)
def test_values_that_are_no_arrays_name_file_index_and_tensor(tmp_path: Path, value: Any, cause: str) -> None:
    path = save(tmp_path / "inputs.json", [{"x": encoded(row(1, 2, 3))}, {"x": value}])
    with pytest.raises(FeedError, match=rf"inputs\.json\[1\]: input 'x': .*{cause}"):
        PolygraphyFiles([path])


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    text = npy(np.array([Trap()], object), pickled=True)
    path = save(tmp_path / "inputs.json", [{"x": {"array": text, "polygraphy_class": "ndarray"}}])
    with pytest.raises(FeedError, match=r"inputs\.json\[0\]: input 'x'") as caught:
        PolygraphyFiles([path])
    assert "str dtype" in caught.value.remedy


@pytest.mark.parametrize(
    ("feed", "found"),
    [(3, "int"), ([], "list"), (None, "NoneType"), ({"lst": [], "polygraphy_class": "RunResults"}, "RunResults")],
)
def test_feeds_are_objects_of_arrays(tmp_path: Path, feed: Any, found: str) -> None:
    with pytest.raises(FeedError, match=rf"inputs\.json\[0\]: expected an object .* got {found}"):
        PolygraphyFiles([save(tmp_path / "inputs.json", [feed])])


def test_files_beyond_all_measure_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygraphy, "_MOST_BYTES", 10)
    with pytest.raises(LimitError, match=r"inputs\.json: more than") as caught:
        PolygraphyFiles([save(tmp_path / "inputs.json", [{"x": encoded(row(1, 2, 3))}])])
    assert "--save-inputs FOLDER" in caught.value.remedy


def test_names_and_types_are_held_against_the_model(tmp_path: Path) -> None:
    path = save(tmp_path / "inputs.json", [{"x": encoded(row(1, 2, 3)), "idx": encoded(np.zeros((1, 2), np.int64))}])
    with pytest.raises(FeedError, match=r"inputs\.json\[0\]: the model has no input 'idx'"):
        open_feeds([path], [X, IDS])
