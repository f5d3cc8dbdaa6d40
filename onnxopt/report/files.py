"""Reports as files, their format told by the suffix."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from onnxopt.errors import UsageError
from onnxopt.model.saving import write_atomically
from onnxopt.report.record import Report

FORMATS: dict[str, Callable[[Report], str]] = {".json": Report.to_json, ".txt": Report.to_text}
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def obstacle(path: Path) -> str | None:
    """What stands at `path` that no file may be renamed onto, in words; None where the place is free or a file's.

    Renaming onto a device, a pipe or a socket would replace it by a file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else None
    except OSError as error:
        return f"no place for a file ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return next((kind for test, kind in _KINDS if test(mode)), "a device")


def check_paths(paths: Iterable[Path], *, force: bool = False, taken: Iterable[Path] = ()) -> None:
    """Raise UsageError, before any work is done, for a place where a report can't or must not be written.

    taken: the files that the run reads or writes; no report replaces them. force: replace other existing files.
    """
    others = list(taken)
    for path in paths:
        _check_place(path, FORMATS)
        if any(_same(path, other) for other in others):
            raise UsageError(f"can't write the report to {path}: the run uses that file", "give another name")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already", "add --force to replace it, or give the report another name")
        others.append(path)


def check_page(path: Path, *, force: bool = False, taken: Iterable[Path] = ()) -> None:
    """Raise UsageError for a place where an .html page can't or must not be written; see `check_paths`."""
    _check_place(path, (".html",))
    if any(_same(path, other) for other in taken):
        raise UsageError(f"can't write the page to {path}: the run uses that file", "give another name")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", "add --force to replace it, or give the page another name")


def write_page(text: str, path: Path) -> None:
    """Write a page whole or not at all. Raises UsageError when the place can't be written."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _check_place(path: Path, suffixes: Iterable[str]) -> None:
    if path.suffix not in suffixes:
        raise UsageError(
            f"a report can't be written as {path.suffix or 'a file without suffix'}: {path}",
            f"end its name in one of: {', '.join(suffixes)}",
        )
    if not path.parent.is_dir():
        raise UsageError(f"can't write {path}: the folder {path.parent} does not exist", "create it first")
    found = obstacle(path)
    if found is not None:
        raise UsageError(f"can't write {path}: it is {found}", "give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"can't write {path}: the folder is read-only", "choose another place for the report")


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def write(report: Report, path: Path) -> None:
    """Write the report whole or not at all, replacing an older one. Raises UsageError when the place can't be written.

    Bytes of file names that are no UTF-8 are written as escapes, which JSON reads back.
    """
    write_atomically(path, FORMATS[path.suffix](report).encode("utf-8", "backslashreplace"))
