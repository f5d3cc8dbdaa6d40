"""The layers of the house, and the parts of graphsurgeon that must not be used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("onnxopt", "passes") for path in (ROOT / folder).rglob("*.py"))
BANNED = {"import_onnx", "export_onnx", "fold_constants", "cleanup", "toposort"}


def test_imports_keep_to_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def banned_uses(source: str) -> list[str]:
    """Names of banned graphsurgeon functions that a file calls or imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            receiver = ast.unparse(node.func.value)
            if name in BANNED or (name == "copy" and receiver.split(".")[-1] in ("graph", "body", "gs")):
                found.append(f"{receiver}.{name}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnx_graphsurgeon"):
            found += [alias.name for alias in node.names if alias.name in BANNED]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_banned_functions_of_graphsurgeon_are_not_called(path: Path) -> None:
    assert not banned_uses(path.read_text())


def test_the_search_for_banned_functions_finds_them() -> None:
    assert banned_uses("gs.import_onnx(m)") == ["gs.import_onnx"]
    assert banned_uses("model.graph.cleanup().toposort()") == ["model.graph.cleanup().toposort", "model.graph.cleanup"]
    assert banned_uses("from onnx_graphsurgeon import export_onnx") == ["export_onnx"]
    assert banned_uses("body.copy()") == ["body.copy"]
    assert not banned_uses("settings.copy()")


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in (ROOT / "onnxopt").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    for room in rooms - {"passes"}:
        assert (ROOT / "tests" / room).is_dir(), f"no tests/{room}"
