"""The child's half of a probe: look at a stranger's model, load it and run it, one request a line.

Started as `python -m onnxopt.runtime.guest FOLDER`; requests come on stdin and answers go to stdout, one JSON object a
line; inputs lie in the folder. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from onnx import ModelProto

from onnxopt.errors import OnnxoptError
from onnxopt.graph.sizes import largest_computed
from onnxopt.model import Limits
from onnxopt.runtime.session import Session
from onnxopt.runtime.storage import load_values

# what onnxruntime says where it got no memory
_NO_MEMORY = ("bad_alloc", "bfc_arena", "llocate memory", "llocation failed")


class Guest:
    """Holds the model between requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session: Session | None = None
        self.request: dict[str, Any] = {}
        self.memory: int | None = None

    def open(self, request: dict[str, Any]) -> None:
        """Limit memory, judge the sizes that shapes tell, and load the model as it stands."""
        self.request = request
        _limit(request["memory"])
        proto = ModelProto.FromString((self.folder / "skeleton").read_bytes())
        largest = largest_computed(proto, Limits(**request["limits"]), request["held"])
        del proto
        # an operator holds its inputs and its output, and the runtime may copy one of them
        self.memory = None if request["memory"] is None else request["memory"] + 3 * largest
        _limit(self.memory)
        self.session = self._load(optimize=False)

    def run(self, request: dict[str, Any]) -> None:
        """Run it as it stands on the inputs that lie in the folder."""
        assert self.session is not None
        self.session.run(self._inputs(request))

    def prove(self, request: dict[str, Any]) -> None:
        """Run it as it stands, and as onnxruntime optimizes it."""
        inputs = self._inputs(request)
        assert self.session is not None
        self.session.run(inputs)
        self.session = None
        self.session = self._load(optimize=True)
        self.session.run(inputs)

    def _inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        _limit(None if self.memory is None else self.memory + request["sample"])
        return load_values(self.folder / "in.npz")

    def _load(self, *, optimize: bool) -> Session:
        return Session(
            Path(self.request["path"]), optimize=optimize, threads=self.request["threads"], name=self.request["name"]
        )


def answer(guest: Guest, request: dict[str, Any]) -> dict[str, Any]:
    """What came of one request: nothing, or the error."""
    try:
        getattr(guest, request["do"])(request)
    except MemoryError:
        return {"error": "MemoryError"}
    except OnnxoptError as error:
        if any(words in f"{error.cause} {error.__cause__}" for words in _NO_MEMORY):
            return {"error": "MemoryError"}
        return {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
    return {}


def main(folder: Path) -> None:
    """Answer until stdin ends. Nothing but answers reaches stdout, whatever native code prints."""
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        guest = Guest(folder)
        while True:
            out.write(json.dumps(answer(guest, json.loads(requests.get()))) + "\n")
            out.flush()


def _listen(requests: queue.Queue[str]) -> None:
    """Hand on each line; when there are no more the parent is gone, and nobody else would end an endless run."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _limit(nbytes: int | None) -> None:
    """Limit the memory this process may write to, where the platform can."""
    if nbytes is None or sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
