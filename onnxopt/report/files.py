"""Reports as files, their format told by the suffix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from onnxopt.errors import UsageError
from onnxopt.report.record import Report

FORMATS: dict[str, Callable[[Report], str]] = {".json": Report.to_json, ".txt": Report.to_text}


def check_paths(paths: Iterable[Path]) -> None:
    """Raise UsageError for a suffix without a format or a missing folder, before any work is done."""
    for path in paths:
        if path.suffix not in FORMATS:
            raise UsageError(
                f"a report can't be written as {path.suffix or 'a file without suffix'}: {path}",
                f"end its name in one of: {', '.join(FORMATS)}",
            )
        if not path.parent.is_dir():
            raise UsageError(f"can't write {path}: the folder {path.parent} does not exist", "create it first")
        if path.is_dir():
            raise UsageError(f"can't write {path}: it is a folder", "give the name of a file")


def write(report: Report, path: Path) -> None:
    """Write the report, replacing an older one. Raises UsageError when the place can't be written."""
    try:
        path.write_text(FORMATS[path.suffix](report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}", "choose another place for the report") from error
