"""What a wheel holds is what the checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_in_the_wheel() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "onnxopt").rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders} | {"onnxopt.passes"}
    assert listed == found
    for package in listed - {"onnxopt.passes"}:
        assert list(ROOT.joinpath(*package.split(".")).glob("*.py")), package


def test_the_symlink_leads_to_the_folder_that_is_packaged() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"onnxopt.passes": "passes"}
    assert (ROOT / "onnxopt" / "passes").resolve() == ROOT / "passes"


def test_every_pass_has_an_entry_point() -> None:
    entries = PROJECT["project"]["entry-points"]["onnxopt.passes"]
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert {target.split(":")[0].rpartition(".")[2] for target in entries.values()} == files
