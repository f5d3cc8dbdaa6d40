"""Feeds in data sets of Hugging Face: every row a sample, every column an input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import FeedError
from onnxopt.feeds.columns import Columns, null_error, ragged_error, type_error
from onnxopt.feeds.function import describe
from onnxopt.feeds.images import Images
from onnxopt.feeds.sample import Record
from onnxopt.runtime.ports import Array, Port

_NUMBERS = (
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_TEXTS = ("string", "large_string")
_ENCODED = ("binary", "large_binary", "PIL.Image.Image")


class DatasetRows:
    """The rows of a datasets.Dataset as feeds. See Columns for which column feeds what.

    A cell becomes an array of the element type that the data set's features declare, with a first axis of 1 before the
    axes of its nested lists. A format (numpy, torch, ...) is set aside; of a transform the columns and types that it
    gives count. name: the data set in messages.
    """

    def __init__(self, dataset: Any, name: str, ports: tuple[Port, ...], images: Images | None) -> None:
        self._name = name
        self._features: Mapping[str, Any] = dataset.features
        self._dataset = dataset
        if len(dataset) == 0:
            raise FeedError(f"{name}: it holds no row", "give a data set with rows")
        columns = list(dataset.column_names)
        if self._transformed():
            columns, self._features = list(self._row(0)), {}
        pictures = [column for column in columns if _holds_pictures(self._features.get(column))]
        self._columns = Columns(name, columns, pictures, ports, images)
        self._dataset = self._bare()

    def _transformed(self) -> bool:
        return (getattr(self._dataset, "format", None) or {}).get("type") == "custom"

    def _bare(self) -> Any:
        """The data set without a format, and without the columns that are left out: decoding them is for nothing."""
        if self._transformed():
            return self._dataset
        dataset = self._dataset
        if hasattr(dataset, "with_format"):
            dataset = dataset.with_format(None)
        if hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns(self._columns.used)
        return dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """The name of the data set and the index."""
        return f"{self._name}[{index}]"

    def read(self, index: int) -> Record:
        """The row at `index`."""
        source, row = self.name(index), self._row(index)
        cells = {}
        for column in self._columns.used:
            if column not in row:
                raise FeedError(f"{source}: no column {column!r}", "give every row the same columns")
            picture = column in self._columns.pictures
            where = f"{source}: column {column!r}"
            cells[column] = row[column] if picture else _to_array(row[column], self._features.get(column), where)
        return self._columns.record(cells, source)

    def _row(self, index: int) -> Mapping[str, Any]:
        source = self.name(index)
        try:
            row = self._dataset[index]
        except Exception as error:
            raise FeedError(f"{source}: reading it failed: {describe(error)}", "correct the data set") from error
        if not isinstance(row, Mapping):
            raise FeedError(f"{source}: expected a row, got {type(row).__name__}", "give a datasets.Dataset")
        return row


def is_dataset(items: Any, name: str) -> bool:
    """True for a datasets.Dataset. Raises FeedError, naming it `name`, for a datasets.DatasetDict."""
    names = getattr(items, "column_names", None)
    if isinstance(items, Mapping) and isinstance(names, Mapping):
        listed = " or ".join(f"data[{split!r}]" for split in items)
        raise FeedError(
            f"{name}: the data set is divided into splits", f"give one of them: {listed or 'there is none'}"
        )
    indexed = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    return indexed and isinstance(names, list) and isinstance(getattr(items, "features", None), Mapping)


def is_saved(folder: Path) -> bool:
    """True for a folder that Dataset.save_to_disk wrote. Raises FeedError for one of DatasetDict.save_to_disk."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/dataset_info.json"))
        listed = " or ".join(map(str, splits))
        raise FeedError(
            f"{folder}: the data set is divided into splits", f"give one of them: {listed or 'none is there'}"
        )
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def load_saved(folder: Path) -> Any:
    """The datasets.Dataset in a folder that Dataset.save_to_disk wrote."""
    try:
        import datasets
    except ImportError:
        raise FeedError(f"{folder}: saved data sets need datasets", "pip install onnxopt[datasets]") from None
    try:
        dataset = datasets.load_from_disk(str(folder))
        for name, feature in dataset.features.items():
            # The library would follow a path or an address that stands in place of a picture.
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
    except Exception as error:
        raise FeedError(
            f"{folder}: it can't be read: {describe(error)}", "write it again with Dataset.save_to_disk"
        ) from error
    return dataset


def _holds_pictures(feature: Any) -> bool:
    """True for Image, binary, and a struct with a binary field `bytes`."""
    if isinstance(feature, Mapping):
        return _holds_pictures(feature.get("bytes"))
    return getattr(feature, "dtype", None) in _ENCODED


def _dtype(feature: Any, where: str) -> np.dtype[Any] | None:
    """The element type of a feature below its lists; None where nothing is declared."""
    if feature is None:
        return None
    leaf = feature
    while isinstance(leaf, list) or hasattr(leaf, "feature"):
        leaf = leaf[0] if isinstance(leaf, list) else leaf.feature
    name = getattr(leaf, "dtype", None)
    if name not in (*_NUMBERS, *_TEXTS):
        raise type_error(where, name if isinstance(name, str) else leaf)
    dtype: np.dtype[Any] = np.dtype(object if name in _TEXTS else name)
    return dtype


def _to_array(value: Any, feature: Any, where: str) -> Array:
    dtype = _dtype(feature, where)
    if _holds_null(value):
        raise null_error(where)
    try:
        # Python's numbers have no element type; what has one, an array or a tensor, keeps it.
        array: Array = np.array(value, None if hasattr(value, "dtype") else dtype)
    except (ValueError, TypeError, OverflowError) as error:
        if "inhomogeneous" in str(error) or "sequence" in str(error):
            raise ragged_error(where) from error
        raise FeedError(f"{where} is no array: {describe(error)}", "store numbers of the declared type") from error
    except Exception as error:
        raise FeedError(f"{where} is no array: {describe(error)}", "give arrays, or tensors on the CPU") from error
    if array.dtype.kind == "O":
        _check_texts(array, where)
    return array[None]


def _holds_null(value: Any) -> bool:
    if not isinstance(value, list):
        return value is None
    return any(_holds_null(item) for item in value)


def _check_texts(array: Array, where: str) -> None:
    other = next((item for item in array.flat if not isinstance(item, str)), None)
    if isinstance(other, list):
        raise ragged_error(where)
    if other is not None:
        raise type_error(where, type(other).__name__)
