"""How much memory a loaded model takes, measured in a process of its own.

Started as `python -m onnxopt.runtime.memory FOLDER`, the child loads what request.json names and answers in
response.json. What the runtime takes once in every process is taken before, by a model of one node.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from onnxopt.runtime import worker
from onnxopt.runtime.session import Session

DEFAULT_TIMEOUT = 120.0
_STATUS = Path("/proc/self/statm")


def loaded_bytes(path: Path, *, threads: int = 1, timeout: float = DEFAULT_TIMEOUT) -> int | None:
    """Bytes by which the resident memory of a fresh process grows as onnxruntime loads and optimizes the file.

    None where the platform does not tell (it takes /proc), or the process did not end well in `timeout` seconds.
    """
    if not _STATUS.exists():
        return None
    with tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps({"path": str(path.resolve()), "threads": threads}))
        command = [sys.executable, "-P", "-m", "onnxopt.runtime.memory", str(folder)]
        child = worker.start(command, folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                worker.kill(child)
        response = folder / "response.json"
        return int(json.loads(response.read_text())["bytes"]) if child.returncode == 0 and response.exists() else None


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    request = json.loads((folder / "request.json").read_text())
    _warm_up(request["threads"])
    before = _resident()
    session = Session(Path(request["path"]), threads=request["threads"])
    after = _resident()
    del session
    (folder / "response.json").write_text(json.dumps({"bytes": max(0, after - before)}))


def _warm_up(threads: int) -> None:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "warm_up", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Session(proto.SerializeToString(), threads=threads)


def _resident() -> int:
    """Resident bytes of this process, without what the allocator holds in reserve."""
    with contextlib.suppress(OSError, AttributeError):  # malloc_trim is glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
