"""The child's half of the worker: load one model, run the samples of a folder, write the outputs beside them.

Started as `python -m onnxopt.runtime.serve FOLDER`; the folder holds request.json and in_00000.npz, ...; the child
writes out_00000.npz, ... and, last, response.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from onnxopt.errors import OnnxoptError
from onnxopt.runtime.session import Session
from onnxopt.runtime.storage import load_values, save_values


def main(folder: Path) -> None:
    """Answer the request in `folder`; errors go into the response, not out of the process."""
    request = json.loads((folder / "request.json").read_text())
    _limit_memory(request["memory"])
    try:
        response: dict[str, Any] = _run(folder, request)
    except OnnxoptError as error:
        response = {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
        if "bad_alloc" in error.cause or "allocate" in error.cause:
            response = {"error": "MemoryError"}
    except MemoryError:
        response = {"error": "MemoryError"}
    _write(folder / "response.json", response)


def _run(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    session = Session(Path(request["path"]), optimize=request["optimize"], threads=request["threads"])
    for index in range(request["count"]):
        outputs = session.run(load_values(folder / f"in_{index:05d}.npz"))
        save_values(folder / f"out_{index:05d}.npz", outputs)
    return {"count": request["count"]}


def _limit_memory(limit: int | None) -> None:
    if limit is None or os.name != "posix":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
