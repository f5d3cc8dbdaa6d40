"""Feeds in tables: a row is a sample, a column an input."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from onnxopt.errors import FeedError, did_you_mean
from onnxopt.feeds.images import Images, Preprocessing, takes_pictures
from onnxopt.feeds.sample import LABELS, Record
from onnxopt.runtime.ports import Port

# Tables for classification call the one label of a row so.
_LABEL = "label"


class Columns:
    """Which columns of a table feed which inputs.

    A column feeds the input of its name. A model with one input, of rank 4, that no column is named after takes the
    only column of pictures. `labels`, or without it `label`, holds labels. Once every required input has its column,
    the others are left out.

    table: the table in messages. names: its columns. pictures: those of them that hold encoded pictures. Raises
    FeedError for a required input without a column, and where pictures don't fit the model (see Preprocessing).
    """

    def __init__(
        self,
        table: str,
        names: Sequence[str],
        pictures: Collection[str],
        ports: Sequence[Port],
        images: Images | None,
    ) -> None:
        self._column_of = _inputs(table, names, pictures, ports)
        pictured = {name for name, column in self._column_of.items() if column in pictures}
        self._preprocessing = Preprocessing(ports, images) if pictured else None
        self.pictures = frozenset(self._column_of[name] for name in pictured)
        labels = _labels(names, pictures, ports)
        if labels is not None:
            self._column_of[LABELS] = labels
        self.used = list(dict.fromkeys(self._column_of.values()))

    def record(self, cells: Mapping[str, Any], source: str) -> Record:
        """A row as a feed. cells: used column -> array with a first axis of 1, or picture (see Preprocessing.array)."""
        values = {
            name: self._value(cells[column], column, f"{source}: column {column!r}")
            for name, column in self._column_of.items()
        }
        return Record(values, source)

    def _value(self, cell: Any, column: str, where: str) -> Any:
        if self._preprocessing is None or column not in self.pictures:
            return cell
        return self._preprocessing.array(_content(cell, where), where)


def _inputs(table: str, names: Sequence[str], pictures: Collection[str], ports: Sequence[Port]) -> dict[str, str]:
    """Input -> column."""
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise FeedError(f"{table}: several columns are named {doubled!r}", "give every column a name of its own")
    found = {port.name: port.name for port in ports if port.name in names}
    missing = [port for port in ports if port.required and port.name not in found]
    if missing and pictures and takes_pictures(ports):
        return {**found, missing[0].name: _only(table, pictures, missing[0])}
    if missing or not found:
        wanted = missing or list(ports)
        close = did_you_mean(wanted[0].name, names) if wanted else "the model has none"
        raise FeedError(
            f"{table}: no column for {', '.join(map(str, wanted))}; its columns are {', '.join(map(repr, names))}",
            f"name the columns like the inputs; {close}",
        )
    return found


def _only(table: str, pictures: Collection[str], port: Port) -> str:
    if len(pictures) > 1:
        listed = ", ".join(map(repr, sorted(pictures)))
        raise FeedError(
            f"{table}: the columns {listed} hold pictures, and none is named {port.name!r} like the input",
            f"name the one to use {port.name!r}",
        )
    return next(iter(pictures))


def _labels(names: Sequence[str], pictures: Collection[str], ports: Sequence[Port]) -> str | None:
    """The column with labels; masks and other pictures are none."""
    inputs = {port.name for port in ports}
    if LABELS in inputs:
        return None
    return next((name for name in (LABELS, _LABEL) if name in names and name not in {*inputs, *pictures}), None)


def _content(cell: Any, where: str) -> Any:
    """The picture of a cell, which may be wrapped as {"bytes": ..., "path": ...}."""
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if content is None and isinstance(cell, Mapping) and cell.get("path"):
        # A table may come from a stranger: it decides about its own values, not about which files are read.
        raise FeedError(f"{where} names another file instead of holding the picture", "store the pictures in the table")
    if content is None:
        raise null_error(where)
    return content


def null_error(where: str) -> FeedError:
    """For a cell without a value, or with a null in it."""
    return FeedError(f"{where} holds null", "fill in the missing values, or leave out the rows that lack them")


def ragged_error(where: str) -> FeedError:
    """For nested lists of unequal lengths."""
    return FeedError(f"{where} is no array: its inner lists differ in length", "pad the lists to one length")


def type_error(where: str, kind: object) -> FeedError:
    """For a type of values that no input takes. kind: the type in the table's own words."""
    text = " ".join(str(kind).split())
    return FeedError(
        f"{where} is of type {text[:80]}, which can't feed a model", "store numbers, bools, strings or lists of them"
    )
