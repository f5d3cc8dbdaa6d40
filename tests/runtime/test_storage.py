from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.errors import LimitError
from onnxopt.runtime.storage import Spool, load_values, nbytes, save_values

VALUES: dict[str, Any] = {
    "float": np.array([[1.5, np.nan]], np.float32),
    "scalar": np.array(3, np.int64),
    "bfloat16": np.array([1, -2.5]).astype(ml_dtypes.bfloat16),
    "int4": np.array([[-8, 7]]).astype(ml_dtypes.int4),
    "strings": np.array([["a\0", ""], ["é", "b"]], object),
    "empty": np.zeros((0, 3), np.float16),
    "none": None,
    "a/b:0 file": [np.zeros(2, np.uint8), [np.ones(1)]],
    "maps": [{1: 0.25, 2: 0.5}, {"x": 1.0}],
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and str(a.tolist()) == str(b.tolist())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_every_kind_of_value_survives(tmp_path: Path) -> None:
    save_values(tmp_path / "v.npz", VALUES)
    restored = load_values(tmp_path / "v.npz")
    assert list(restored) == list(VALUES)
    for name, value in VALUES.items():
        assert same(value, restored[name]), name
    assert restored["strings"].tolist() == [["a\0", ""], ["é", "b"]]


def test_spool_moves_to_disk_and_back() -> None:
    spool = Spool(memory=1000)
    for index in range(5):
        spool.append({"x": np.full(100, index, np.float32)})
    folder = spool._folder
    assert folder is not None
    assert len(list(folder.iterdir())) == 3
    for _ in range(2):
        assert [int(item["x"][0]) for item in spool] == [0, 1, 2, 3, 4]
    del spool
    assert not folder.exists()


def test_a_closed_spool_is_empty_and_leaves_nothing() -> None:
    spool = Spool(memory=0)
    spool.append({"x": np.zeros(3)})
    folder = spool._folder
    assert folder is not None
    spool.close()
    assert (len(spool), folder.exists()) == (0, False)


def test_spooled_arrays_are_read_only_and_copied_on_demand() -> None:
    array = np.zeros(3)
    spool = Spool()
    spool.append({"x": array}, copy=True)
    array[:] = 1
    assert spool[0]["x"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        spool[0]["x"][0] = 5
    assert array.flags.writeable


def test_spool_has_a_limit() -> None:
    spool = Spool(memory=0, disk=1000)
    with pytest.raises(LimitError, match="kept on disk"):
        spool.append({"x": np.zeros(1000)})


def test_nbytes_counts_nested_values() -> None:
    assert nbytes({"a": [np.zeros(10, np.float32), np.zeros(2, np.float64)]}) == 56
