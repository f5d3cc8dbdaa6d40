"""Another simplifier, run under an interpreter that has it; imports nothing of this project.

    PYTHON foreign.py TOOL SOURCE OUT

TOOL: onnxslim, onnxsim, onnxscript or onnxoptimizer. Prints as JSON the seconds of the call itself, reading the file
included, imports and writing not.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import onnx


def _onnxslim(source: str) -> Any:
    return importlib.import_module("onnxslim").slim(source)


def _onnxsim(source: str) -> Any:
    found = importlib.import_module("onnxsim").simplify(onnx.load(source))
    return found[0] if isinstance(found, tuple) else found


def _onnxscript(source: str) -> Any:
    return importlib.import_module("onnxscript.optimizer").optimize(onnx.load(source))


def _onnxoptimizer(source: str) -> Any:
    tool = importlib.import_module("onnxoptimizer")
    return tool.optimize(onnx.load(source), tool.get_fuse_and_elimination_passes(), fixed_point=True)


TOOLS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "onnxslim": ("onnxslim", _onnxslim),
    "onnxsim": ("onnxsim", _onnxsim),
    "onnxscript": ("onnxscript.optimizer", _onnxscript),
    "onnxoptimizer": ("onnxoptimizer", _onnxoptimizer),
}


def main() -> None:
    """The command."""
    tool, source, out = sys.argv[1:4]
    module, simplify = TOOLS[tool]
    importlib.import_module(module)
    started = time.perf_counter()
    model = simplify(source)
    seconds = time.perf_counter() - started
    onnx.save(model, out)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
