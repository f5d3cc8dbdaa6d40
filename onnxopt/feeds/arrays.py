"""Feeds in numpy's files: a folder with one file a feed, or one file whose first axis counts the samples."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import FeedError
from onnxopt.feeds.sample import LABELS, Record
from onnxopt.runtime.ports import Array, Port

SUFFIXES = (".npz", ".npy")
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayFolder:
    """One .npz (input name -> whole array) or .npy (models with one input) file a feed, sorted by name."""

    def __init__(self, files: Sequence[Path], ports: Sequence[Port]) -> None:
        self._files = sorted(files)
        self._ports = tuple(ports)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of the file at `index`."""
        return str(self._files[index])

    def read(self, index: int) -> Record:
        """The feed in the file at `index`."""
        return Record(read_arrays(self._files[index], self._ports), self.name(index))


class ArrayFile:
    """One .npz or .npy file whose first axis counts the samples: sample i is array[i:i+1] of every array.

    Arrays without axes are given to every sample. Files written by np.savez and np.save are mapped, not read; those of
    np.savez_compressed are decompressed into memory once.
    """

    def __init__(self, path: Path, ports: Sequence[Port]) -> None:
        self._path = path
        self._arrays = read_arrays(path, ports, mapped=True)
        self._count = _samples(path, self._arrays)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """The path of the file and the index."""
        return f"{self._path}[{index}]"

    def read(self, index: int) -> Record:
        """The sample at `index`, with a first axis of length 1."""
        values = {
            name: np.array(array[index : index + 1] if array.ndim else array) for name, array in self._arrays.items()
        }
        return Record(values, self.name(index))


def _samples(path: Path, arrays: Mapping[str, Array]) -> int:
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise FeedError(
            f"{path}: its arrays disagree on the number of samples along axis 0: {listed}",
            "give all arrays one entry a sample, or save one .npz file a feed in a folder",
        )
    count = next(iter(lengths.values()), 1)
    if not arrays or count == 0:
        raise FeedError(f"{path}: it holds no sample", "save at least one sample")
    return count


def read_arrays(path: Path, ports: Sequence[Port], *, mapped: bool = False) -> dict[str, Array]:
    """Name -> array of an .npz file; a .npy file is the only input of the model. Raises FeedError naming the file."""
    try:
        if path.suffix == ".npy":
            return {_only_input(path, ports): _read_npy(path, mapped)}
        return _read_npz(path, mapped)
    except _UNREADABLE as error:
        pickled = "allow_pickle" in str(error)
        raise FeedError(
            f"{path}: it can't be read: {' '.join(str(error).split())[:200] or type(error).__name__}",
            "save strings with a str dtype, not as Python objects" if pickled else "write it again with np.savez",
        ) from error


def _read_npy(path: Path, mapped: bool) -> Array:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is no .npy file")
    array: Array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    return array


def _read_npz(path: Path, mapped: bool) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz file")
    with np.load(path, allow_pickle=False) as file, zipfile.ZipFile(path) as archive:
        arrays = {}
        for name in file.files:
            view = _map(path, archive, f"{name}.npy") if mapped else None
            arrays[name] = file[name] if view is None else view
        return arrays


def _map(path: Path, archive: zipfile.ZipFile, member: str) -> Array | None:
    """The array of an uncompressed member as a memory map of the archive, or None where it can't be mapped.

    The member's data starts after its local header: 30 bytes, name and extra field (APPNOTE.TXT 6.3.10, section 4.3.7).
    """
    info = archive.NameToInfo.get(member)
    if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        start = info.header_offset + 30 + name_length + extra_length
        file.seek(start)
        version = np.lib.format.read_magic(file)
        readers: Mapping[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            return None
        shape, fortran, dtype = readers[version](file)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if dtype.hasobject or size == 0 or file.tell() + size != start + info.file_size:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _only_input(path: Path, ports: Sequence[Port]) -> str:
    required = [port.name for port in ports if port.required]
    if len(required) != 1:
        raise FeedError(
            f"{path}: a .npy file serves models with one input, this one has {len(required)}: {', '.join(required)}",
            "save .npz files with one array an input: np.savez(path, name=array, ...)",
        )
    return required[0]


def read_labels(path: Path) -> dict[str, Array] | Array:
    """Labels from a .npy, .npz or .csv file: one array entry a feed, or feed file name -> label.

    .npz: its only array, or the one named "labels". .csv: one column, or two (feed file name, label); a first line that
    ends in no number is taken for a heading. Raises FeedError naming the file.
    """
    if not path.is_file():
        raise FeedError(f"{path}: no such file", "check the path of the labels")
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix not in SUFFIXES:
        raise FeedError(
            f"{path}: labels can't be read from a {path.suffix or 'nameless'} file", "use .npy, .npz or .csv"
        )
    arrays = read_arrays(path, [Port(LABELS, None, None)])
    if LABELS not in arrays and len(arrays) != 1:
        raise FeedError(
            f"{path}: it holds {len(arrays)} arrays and none is named 'labels'", "name one of them 'labels'"
        )
    return arrays.get(LABELS, next(iter(arrays.values())))


def _read_csv(path: Path) -> dict[str, Array] | Array:
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FeedError(f"{path}: it can't be read: {error}", "save it as UTF-8 text, one label a line") from error
    if rows and not _is_number(rows[0][-1]):
        rows = rows[1:]
    widths = {len(row) for row in rows}
    if not rows or widths - {1, 2} or len(widths) != 1:
        raise FeedError(
            f"{path}: it is no table of one or two columns", "write one label, or file name and label, a line"
        )
    bad = next((row[-1] for row in rows if not _is_number(row[-1])), None)
    if bad is not None:
        raise FeedError(f"{path}: label {bad!r} is no number", "use class numbers or values")
    labels = np.array([_number(row[-1]) for row in rows])
    if widths == {1}:
        return labels
    return {row[0]: label for row, label in zip(rows, labels, strict=True)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
