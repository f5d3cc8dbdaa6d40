"""Which files feeds are read from, so that nothing is written over them or among them."""

from __future__ import annotations

from pathlib import Path

from onnxopt.feeds import arrays, images, parquet, polygraphy
from onnxopt.feeds.function import split_reference
from onnxopt.feeds.parted import parts_of

# a file with such a name in a folder of feeds is one of them, or part of one
SUFFIXES = (*arrays.SUFFIXES, *images.SUFFIXES, parquet.SUFFIX, polygraphy.SUFFIX, ".arrow", ".pb")


def reads(named: str | Path, file: Path) -> bool:
    """Whether what is named as feeds is read from `file`, or would be once that is there."""
    reference = split_reference(str(named))
    place = Path(named) if reference is None else reference[0]
    if not str(named):
        return False
    if not place.is_dir():
        return place.exists() and file.exists() and file.samefile(place)
    parts = parts_of(place)
    if parts:
        return any(reads(part, file) for part in parts.values())
    if file.suffix.lower() not in SUFFIXES:
        return False
    folder, around = place.resolve(), file.parent.resolve()
    return around == folder or (file.exists() and folder in around.parents)
