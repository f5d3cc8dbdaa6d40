"""Models with frozen evaluation tasks in a folder outside the project.

DIR holds `tasks.py` (load(name) with calib_feeds(), feeds(), run(model)) and model files in DIR/models or --models.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--zoo DIR, --models DIR (repeatable) and model names."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to run; default all that are found")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR", help="folder with tasks.py and models/")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="more model folders")


def interpreter(text: str) -> str:
    """A path from here, since children start elsewhere; the link of a virtual environment is not followed."""
    path = Path(text)
    return str(path.absolute()) if path.exists() else text


def load_tasks(zoo: Path, models: list[Path]) -> Any:
    """The module DIR/tasks.py, told where models lie."""
    os.environ["ZOO_MODELS"] = os.pathsep.join(map(str, models))
    spec = importlib.util.spec_from_file_location("zoo_tasks", zoo / "tasks.py")
    if spec is None or spec.loader is None or not (zoo / "tasks.py").is_file():
        sys.exit(f"no tasks.py in {zoo}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo_tasks"] = module
    spec.loader.exec_module(module)
    return module


def found_models(tasks: Any, names: list[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of the named models, or of all whose file is there."""
    for name in names or tasks.names():
        try:
            yield name, tasks.find_model(name)
        except FileNotFoundError:
            print(f"{name}: not found, left out", file=sys.stderr)
