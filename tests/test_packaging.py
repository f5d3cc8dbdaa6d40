"""What is installed: every package, the passes under their name, nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    found = {"onnxopt", "onnxopt.passes"}
    for init in (ROOT / "onnxopt").rglob("*.py"):
        folder = init.parent.relative_to(ROOT)
        if "passes" not in folder.parts:
            found.add(".".join(folder.parts))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_passes_are_a_top_level_folder_under_a_relative_link(project: dict[str, Any]) -> None:
    link = ROOT / "onnxopt" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"
    assert project["tool"]["setuptools"]["package-dir"] == {"onnxopt.passes": "passes"}


def test_every_pass_file_is_registered_and_loads(project: dict[str, Any]) -> None:
    entries: dict[str, str] = project["project"]["entry-points"]["onnxopt.passes"]
    lists: dict[str, str] = project["project"]["entry-points"]["onnxopt.pass_lists"]
    modules = {value.split(":")[0] for value in (*entries.values(), *lists.values())}
    files = {f"onnxopt.passes.{path.stem}" for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"}
    assert modules == files
    for name, value in entries.items():
        module, member = value.split(":")
        assert getattr(importlib.import_module(module), member).name == name


def test_importing_the_package_is_cheap() -> None:
    heavy = "{'numpy', 'onnx', 'onnxruntime', 'rich', 'onnx_graphsurgeon'}"
    code = f"import sys, onnxopt, onnxopt.cli; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
