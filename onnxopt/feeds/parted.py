"""Folders whose feeds are parted by name: fit, select and evaluate, each a file or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxopt.errors import FeedError

PARTS = ("fit", "select", "evaluate")
_SUFFIXES = ("", ".npz", ".parquet")


def parts_of(item: Any) -> dict[str, Path]:
    """Part -> path for a folder that holds any part, else nothing."""
    if not isinstance(item, (str, Path)) or not Path(item).is_dir():
        return {}
    folder = Path(item)
    places = {name: [folder / f"{name}{suffix}" for suffix in _SUFFIXES] for name in PARTS}
    found = {name: [path for path in paths if path.exists()] for name, paths in places.items()}
    doubled = next((paths for paths in found.values() if len(paths) > 1), None)
    if doubled is not None:
        first, second = (f"{path.name}{'' if path.suffix else '/'}" for path in doubled[:2])
        raise FeedError(f"{folder}: it holds both {first} and {second}", "leave one of the two")
    return {name: paths[0] for name, paths in found.items() if paths}


def part_by_part(data: Sequence[Any]) -> dict[str, list[Path]]:
    """Part -> its paths in all folders, where `data` are parted folders; nothing where none is.

    Raises FeedError for a folder without fit or evaluate, and for parted folders beside other data.
    """
    found = [(item, parts_of(item)) for item in data]
    parted = [(item, parts) for item, parts in found if parts]
    for folder, parts in parted:
        _need(folder, parts, "fit", "evaluate")
    plain = next((item for item, parts in found if not parts), None)
    if parted and plain is not None:
        shown = plain if isinstance(plain, (str, Path)) else "the other data"
        raise FeedError(
            f"{parted[0][0]} is parted already into fit, select and evaluate, {shown} is not",
            "give parted folders alone, or name single files of them",
        )
    return {name: [parts[name] for _, parts in parted if name in parts] for name in PARTS} if parted else {}


def to_fit(data: Sequence[Any]) -> list[Any]:
    """The data with the fit part in place of each parted folder. Raises FeedError for a folder without it."""
    return _with_part(data, "fit")


def to_judge(data: Sequence[Any]) -> list[Any]:
    """The data with the evaluate part in place of each parted folder. Raises FeedError for a folder without it."""
    return _with_part(data, "evaluate")


def _with_part(data: Sequence[Any], name: str) -> list[Any]:
    chosen = []
    for item in data:
        parts = parts_of(item)
        if parts:
            _need(item, parts, name)
        chosen.append(parts[name] if parts else item)
    return chosen


def _need(folder: Any, parts: dict[str, Path], *names: str) -> None:
    for name in names:
        if name not in parts:
            held = " and ".join(path.name for path in parts.values())
            raise FeedError(
                f"{folder}: it holds {held}, but no {name} part",
                f"add {name}.npz, or name the files one by one: {Path(folder) / next(iter(parts.values())).name}",
            )
