"""Deduplication by other tools, under an interpreter that has them; imports nothing of this project.

    PYTHON dedup_foreign.py TOOL SOURCE OUT

loads SOURCE, removes duplicates, saves OUT, and prints as JSON the seconds of each step and the peak of resident bytes.
Tools that only do all they can at once are told to do as little else as they allow.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

Steps = tuple[Callable[[str], Any], Callable[[Any], Any], Callable[[Any, str], None]]


def _onnx_ir(name: str, limit: int) -> Steps:
    import onnx_ir
    from onnx_ir.passes import common

    def run(model: Any) -> Any:
        return getattr(common, name)(size_limit=limit)(model).model

    return onnx_ir.load, run, onnx_ir.save


def _onnxoptimizer() -> Steps:
    import onnxoptimizer

    return onnx.load, lambda model: onnxoptimizer.optimize(model, ["eliminate_duplicate_initializer"]), onnx.save


def _onnxslim() -> Steps:
    os.environ["ONNXSLIM_THRESHOLD"] = str(1 << 40)  # elements; by default no weight from 1,000 on is looked at
    import onnxslim

    return onnx.load, onnxslim.slim, onnx.save


def _onnxsim() -> Steps:
    import onnxsim

    return onnx.load, lambda model: onnxsim.simplify(model, skip_constant_folding=True)[0], onnx.save


TOOLS: dict[str, Callable[[], Steps]] = {
    "onnx-ir hashed": lambda: _onnx_ir("DeduplicateHashedInitializersPass", 1 << 40),
    "onnx-ir": lambda: _onnx_ir("DeduplicateInitializersPass", 1 << 40),
    "onnxoptimizer": _onnxoptimizer,
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
}


def _peak() -> int:
    """Of this process alone: what getrusage tells begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def main() -> int:
    tool, source, out = sys.argv[1:]
    load, run, save = TOOLS[tool]()
    times = [time.perf_counter()]
    model = load(source)
    times.append(time.perf_counter())
    model = run(model)
    times.append(time.perf_counter())
    save(model, out)
    times.append(time.perf_counter())
    took = [after - before for before, after in itertools.pairwise(times)]
    print(json.dumps({"load": took[0], "run": took[1], "save": took[2], "peak": _peak()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
