"""Inputs of models for the tests of feeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.feeds import Feeds
from onnxopt.runtime import Port

X = Port("x", np.dtype(np.float32), ("N", 3))
IDS = Port("ids", np.dtype(np.int64), ("N", "T"))
RATE = Port("sr", np.dtype(np.int64), ())
PICTURE = Port("image", np.dtype(np.float32), ("N", 3, 4, 6))


def row(*values: float) -> Any:
    return np.array([values], np.float32)


def save_rows(path: Path, count: int, **more: Any) -> Path:
    """An .npz with `count` samples of X whose first value is the index of the sample."""
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    x[:, 0] = np.arange(count)
    np.savez(path, x=x, **more)
    return path


def indices(feeds: Feeds) -> list[int]:
    return [int(sample.inputs["x"][0, 0]) for sample in feeds]
