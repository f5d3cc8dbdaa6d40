"""Feeds in Parquet files: every row a sample, every column an input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import FeedError, LimitError
from onnxopt.feeds.columns import Columns, null_error, ragged_error, type_error
from onnxopt.feeds.images import Images
from onnxopt.feeds.sample import Record
from onnxopt.runtime.ports import Array, Port

SUFFIX = ".parquet"
# A footer may claim any number of rows, and each takes memory before the first is read.
_MOST_ROWS = 10_000_000


class ParquetFiles:
    """The rows of one or more files, sorted by name, as feeds. See Columns for which column feeds what.

    A cell becomes an array of the column's element type, with a first axis of 1 before the axes of its nested lists.
    Row groups are read when a row of theirs is, and the last one is kept.
    """

    def __init__(self, files: Sequence[Path], ports: Sequence[Port], images: Images | None) -> None:
        self._files = sorted(files)
        # Of every row group: the file, its number there, and the row of the file it starts with.
        self._groups: list[tuple[Path, int, int]] = []
        self._ends: list[int] = []
        for path in self._files:
            self._add(path)
        if len(self) == 0:
            raise FeedError(
                f"{self._files[0].parent if files[1:] else self._files[0]}: it holds no row", "write at least one row"
            )
        self._columns = _columns(self._files[0], ports, images)
        self._kept: tuple[int, Any] | None = None

    def _add(self, path: Path) -> None:
        with _opened(path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        start = 0
        for number, size in enumerate(sizes):
            if len(self) + size > _MOST_ROWS:
                raise LimitError(f"{path}: more than {_MOST_ROWS} rows", "give fewer rows or files")
            self._groups.append((path, number, start))
            self._ends.append(len(self) + size)
            start += size

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        """The path of the file and the index of the row in it."""
        group, row = self._find(index)
        path, _, start = self._groups[group]
        return f"{path}[{start + row}]"

    def read(self, index: int) -> Record:
        """The row at `index` of the files taken together."""
        group, row = self._find(index)
        table, source = self._group(group), self.name(index)
        cells = {}
        for column in self._columns.used:
            where = f"{source}: column {column!r}"
            with _guarded(where):
                cell = table.column(column).slice(row, 1).combine_chunks()
                picture = column in self._columns.pictures
                cells[column] = cell[0].as_py() if picture else _to_array(cell, where)
        return self._columns.record(cells, source)

    def _find(self, index: int) -> tuple[int, int]:
        """(row group, row in it)."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (self._ends[group - 1] if group else 0)

    def _group(self, group: int) -> Any:
        """The used columns of a row group as a table."""
        if self._kept is None or self._kept[0] != group:
            self._kept = None
            self._kept = group, self._read(group)
        return self._kept[1]

    def _read(self, group: int) -> Any:
        path, number, _ = self._groups[group]
        with _opened(path) as file:
            names = file.schema_arrow.names
            lacking = next((column for column in self._columns.used if names.count(column) != 1), None)
            if lacking is not None:
                raise FeedError(
                    f"{path}: no column {lacking!r}, which {self._files[0]} has", "give all files the same columns"
                )
            table = file.read_row_group(number, columns=self._columns.used, use_threads=False)
        if table.num_rows != self._ends[group] - (self._ends[group - 1] if group else 0):
            raise FeedError(f"{path}: row group {number} has another number of rows than it says", "write it again")
        return table


def _columns(path: Path, ports: Sequence[Port], images: Images | None) -> Columns:
    with _opened(path) as file:
        schema = file.schema_arrow
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    return Columns(str(path), schema.names, pictures, ports, images)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, open. Raises FeedError naming the path for what pyarrow raises meanwhile."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise FeedError(f"{path}: Parquet files need pyarrow", "pip install onnxopt[parquet]") from None
    with _guarded(str(path)), parquet.ParquetFile(path) as file:
        yield file


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, MemoryError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise FeedError(
            f"{where}: it can't be read: {why}", "write the file again, a large one in smaller row groups"
        ) from error


def _holds_pictures(kind: Any) -> bool:
    """True for encoded pictures: binary, or as Hugging Face writes them, a struct with a binary field `bytes`."""
    from pyarrow import types

    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return any(field.name == "bytes" and _holds_pictures(field.type) for field in fields)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _to_array(cell: Any, where: str) -> Array:
    """The value of an arrow array with one element, as an array of shape [1, ...], one axis more a level of lists."""
    import pyarrow

    tensor = isinstance(cell, pyarrow.FixedShapeTensorArray)
    # pyarrow makes zeros of nulls in a tensor, so those go on to the check for nulls.
    if tensor and not cell.null_count and not cell.storage.flatten().null_count:
        return np.array(cell.to_numpy_ndarray())
    dims = [1]
    values = _storage(cell, where)
    while _is_list(values.type):
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) > 1:
            raise ragged_error(where)
        dims.append(lengths[0] if lengths else 0)
        values = _storage(values.flatten(), where)
    return _leaves(values, where).reshape(dims)


def _storage(values: Any, where: str) -> Any:
    """The values without the wrapping of extension and dictionary types. Raises FeedError for a null."""
    import pyarrow

    if isinstance(values, pyarrow.ExtensionArray):
        values = values.storage
    if isinstance(values, pyarrow.DictionaryArray):
        values = values.dictionary_decode()
    if values.null_count:
        raise null_error(where)
    return values


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _leaves(values: Any, where: str) -> Array:
    """A copy, so that a sample that is kept doesn't keep its row group."""
    from pyarrow import types

    kind = values.type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return np.array(values.to_numpy(zero_copy_only=False))
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise type_error(where, kind)
    array: Array = np.empty(len(values), object)
    array[:] = values.to_pylist()
    return array
