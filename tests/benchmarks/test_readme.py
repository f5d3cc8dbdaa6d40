"""The benchmarks' README names commands that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_command_is_there_and_every_module_is_named() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"python -m ([\w.]+)", text)) - {"venv"}
    assert named
    for module in named:
        assert importlib.util.find_spec(module) is not None, module
    asking = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "parse_args(" in path.read_text()}
    folders = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py")}
    assert {f"benchmarks.{name}" for name in asking | folders} <= named
