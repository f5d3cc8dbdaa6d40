"""Passes by name: the entry-point group `onnxopt.passes`, or a class in a file.

Names in the entry-point group `onnxopt.pass_lists` stand for several passes.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.passbase.base import Pass

GROUP = "onnxopt.passes"
LISTS = "onnxopt.pass_lists"


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, the first of each; read once, for that takes a while."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, entry)
    return found


def names() -> list[str]:
    """Names of all installed passes, sorted."""
    return sorted(_installed(GROUP))


def pass_lists() -> list[str]:
    """Names that stand for several passes, sorted."""
    return sorted(_installed(LISTS))


def pass_list(name: str) -> tuple[str, ...] | None:
    """The passes that a name stands for, each as in a pass list; None where it is no such name."""
    entry = _installed(LISTS).get(name)
    return None if entry is None else tuple(entry.load())


def lookup(name: str) -> type[Pass]:
    """The pass class of a name, or of `path/to/file.py:Class`.

    Raises UsageError for an unknown name (with the closest known one), a missing file or a class that is no pass.
    """
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    entry = _installed(GROUP).get(name)
    if entry is None:
        raise UsageError(f"unknown pass {name!r}", did_you_mean(name, [*names(), *pass_lists()]))
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"pass {name!r} ({entry.value}) is no Pass class", "fix the package that provides it")
    return found


def _from_file(path: str, member: str) -> type[Pass]:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no such pass file: {path}", "check the path; the form is FILE.py:CLASS")
    name = f"onnxopt_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} can't be imported: {type(error).__name__}: {error}", "fix the file") from error
    found = getattr(module, member, None)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        known = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Pass)]
        raise UsageError(f"{path} has no pass {member!r}", did_you_mean(member, [k for k in known if k != "Pass"]))
    return found
