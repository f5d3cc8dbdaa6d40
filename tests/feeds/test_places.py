from __future__ import annotations

from pathlib import Path

import pytest

from onnxopt.feeds.places import reads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of feeds, and one beside it that is parted."""
    for name in ("feeds/a.npz", "feeds/test_data_set_0/input_0.pb", "parted/fit.npz", "parted/evaluate/a.npz", "f.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "file", "expected"),
    [
        ("feeds/a.npz", "feeds/a.npz", True),
        ("feeds/a.npz", "feeds/b.npz", False),
        ("f.py:feeds", "f.py", True),
        ("feeds", "feeds/a.npz", True),
        ("feeds", "feeds/new.npz", True),
        ("feeds", "feeds/model.onnx", False),
        ("feeds", "feeds/test_data_set_0/input_0.pb", True),
        ("feeds", "feeds/test_data_set_0/new.npz", False),
        ("feeds", "parted/fit.npz", False),
        ("parted", "parted/fit.npz", True),
        ("parted", "parted/stats.npz", False),
        ("parted", "parted/evaluate/new.npz", True),
        ("gone", "gone", False),
    ],
)
def test_what_is_read(folder: Path, named: str, file: str, expected: bool) -> None:
    assert reads(str(folder / named), folder / file) is expected


def test_links_are_followed(folder: Path) -> None:
    (folder / "link.npz").symlink_to(folder / "feeds" / "a.npz")
    (folder / "linked").symlink_to(folder / "feeds")
    assert reads(folder / "link.npz", folder / "feeds" / "a.npz")
    assert reads(folder / "linked", folder / "feeds" / "new.npz")
