"""What loading a model takes: memory and time of two models, measured side by side in a process of its own.

Method. The process imports the runtime, loads a model of one node, and then forks for every load, so that each starts
from the same state: a runtime that runs, and no model. The models take turns in the order A B B A, and the ratio of
their times is found as that of latencies is (see `onnxopt.runtime.latency`). Where loading is quick, one load of each
goes before and is not counted: it wakes the machine up. The files are in the system's cache: they were written or read
just before.

Memory is what a fork holds more of after the load than before: anonymous pages, and those of files in the model's
folder, which the runtime maps. Pages of libraries are left out: what is read of them depends on the operators, but any
process shares them. The figure is the median over the loads. Its noise is the widest range of them, or what a model of
one node takes, if that is more: differences below it say nothing of the models.

Started as `python -m onnxopt.runtime.loads FOLDER`, the process waits for its request on stdin, so that it can be
started ahead of time, and answers in response.json. Where the system has no /proc, nothing forks, and memory is left
out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from onnx import TensorProto, helper

from onnxopt.errors import LimitError, PassError
from onnxopt.runtime import worker
from onnxopt.runtime.latency import Latency, median_interval
from onnxopt.runtime.session import Session

DEFAULT_TIMEOUT = 600.0
# seconds after which no further A B B A block begins
DEFAULT_SECONDS = 0.3
MAX_BLOCKS = 100
# a first block that takes longer than this stays the only one
_LONG = 1.0
# one load of each that takes no longer than this together is worth to be left uncounted
_QUICK = 0.25
_PAGES = Path("/proc/self/smaps_rollup")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \d+ *(.*)")
_LEFT_OUT = "the figure is left out; nothing else depends on it"
# bytes that the load took (None: not told) and its seconds
_Load: TypeAlias = tuple[int | None, float]


@dataclass(frozen=True)
class Memory:
    """Bytes that each loaded model takes, medians over `loads` loads. noise: differences up to it say nothing."""

    reference: int
    candidate: int
    noise: int
    loads: int


@dataclass(frozen=True)
class Loads:
    """What loading takes. memory: None where the system does not tell."""

    memory: Memory | None
    time: Latency


class LoadMeter:
    """A process that waits to load two models; it is gone when the block ends.

    threads: of the sessions. timeout: seconds from the request on.
    """

    def __init__(self, *, threads: int = 1, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._threads, self._timeout = threads, timeout
        self._held = contextlib.ExitStack()
        self._folder = Path(
            self._held.enter_context(tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True))
        )
        command = [sys.executable, "-P", "-m", "onnxopt.runtime.loads", str(self._folder)]
        self._child = worker.start(command, self._folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def __enter__(self) -> LoadMeter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._child.poll() is None:
            worker.kill(self._child)
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
        self._held.close()

    def wait_until_ready(self) -> None:
        """Return when the process has nothing more to do before a request; from then on it takes no processor time."""
        end = time.monotonic() + self._timeout
        while not (self._folder / "ready").exists() and self._child.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def measure(self, reference: Path, candidate: Path, *, seconds: float = DEFAULT_SECONDS) -> Loads:
        """Load both files in turn until `seconds` have passed, and at least four times each. It can be asked once.

        With seconds=0 there is one block of loads, and its times mean little. Raises PassError where a model can't be
        loaded or crashes the process, LimitError where that takes too long.
        """
        request = {
            "paths": [str(path.resolve()) for path in (reference, candidate)],
            "threads": self._threads,
            "seconds": seconds,
        }
        try:
            self._child.communicate(json.dumps(request).encode(), timeout=self._timeout)
        except subprocess.TimeoutExpired:
            raise LimitError(f"the models did not load within {self._timeout:g} s", _LEFT_OUT) from None
        return _figures(self._answer())

    def _answer(self) -> dict[str, Any]:
        file = self._folder / "response.json"
        if self._child.returncode == 0 and file.is_file():
            answer: dict[str, Any] = json.loads(file.read_text())
            if "error" not in answer:
                return answer
            raise PassError(answer["error"], _LEFT_OUT)
        code = self._child.returncode
        how = f"was ended by signal {worker.signal_name(-code)}" if code < 0 else f"ended with status {code}"
        raise PassError(f"the process that loaded the models {how}{worker.last_line(self._folder)}", _LEFT_OUT)


def _figures(answer: dict[str, Any]) -> Loads:
    """answer: "loads", blocks of four (bytes, seconds) in the order A B B A; "first", of A and B; "nothing"."""
    blocks: list[list[_Load]] = answer["loads"]
    a, b = ([load for block in blocks for load in (block[at], block[3 - at])] for at in (0, 1))
    ratios = [(block[1][1] + block[2][1]) / max(block[0][1] + block[3][1], 1e-12) for block in blocks]
    low, high = median_interval(ratios)
    medians = [statistics.median(seconds for _, seconds in loads) * 1e3 for loads in (a, b)]
    timed = Latency(statistics.median(ratios), low, high, len(ratios), medians[0], medians[1])
    taken = [[size for size, _ in loads if size is not None] for loads in (a, b)]
    if answer["nothing"] is None or not all(taken):
        return Loads(None, timed)
    noise = max(answer["nothing"], *(max(sizes) - min(sizes) for sizes in taken))
    one, two = (int(statistics.median(sizes)) for sizes in taken)
    return Loads(Memory(one, two, noise, len(taken[0])), timed)


def main(folder: Path) -> None:
    """Wait for a request, and answer it in `folder`."""
    nothing = _model_of_one_node()
    Session(nothing)
    (folder / "ready").touch()
    words = sys.stdin.readline()
    if not words:
        return
    request = json.loads(words)
    try:
        answer: dict[str, Any] = _measured(request, nothing)
    except PassError as error:
        answer = {"error": error.cause}
    (folder / "response.json").write_text(json.dumps(answer))


def _measured(request: dict[str, Any], nothing: bytes) -> dict[str, Any]:
    threads, seconds = request["threads"], request["seconds"]
    a, b = map(Path, request["paths"])

    def loaded(*paths: Path) -> list[_Load]:
        return [_load_apart(path, threads, nothing) for path in paths]

    start = time.perf_counter()
    first = loaded(a, b)
    quick = seconds and time.perf_counter() - start < _QUICK
    blocks = [loaded(a, b, b, a) if quick else [*first, *loaded(b, a)]]
    while _goes_on(len(blocks), time.perf_counter() - start, seconds):
        blocks.append(loaded(a, b, b, a))
    return {"loads": blocks, "nothing": _load_apart(nothing, threads, nothing)[0]}


def _goes_on(blocks: int, passed: float, seconds: float) -> bool:
    if seconds == 0 or blocks >= MAX_BLOCKS:
        return False
    return passed < seconds or (blocks < 2 and passed < _LONG)


def _load_apart(model: Path | bytes, threads: int, nothing: bytes) -> _Load:
    """Load in a fork, or here where there is none to be had. Raises PassError where that fails."""
    if not _PAGES.exists():
        start = time.perf_counter()
        session = Session(model, threads=threads)
        passed = time.perf_counter() - start
        del session
        return None, passed
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer_and_leave(writing, model, threads, nothing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    name = "a model of one node" if isinstance(model, bytes) else model.name
    if code < 0:
        raise PassError(f"{name}: the process that loaded it was ended by signal {worker.signal_name(-code)}", "")
    answer: dict[str, Any] = (
        json.loads(said) if said else {"error": f"{name}: the process that loaded it ended with status {code}"}
    )
    if "error" in answer:
        raise PassError(answer["error"], "")
    return answer["bytes"], answer["seconds"]


def _answer_and_leave(writing: int, model: Path | bytes, threads: int, nothing: bytes) -> None:
    """The fork's life. It never returns into the code of the process that it is a copy of."""
    try:
        answer = _load(model, threads, nothing)
    except BaseException as error:  # noqa: BLE001  whatever it is, it is told and ends here
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    try:
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
    finally:
        os._exit(0)


def _load(model: Path | bytes, threads: int, nothing: bytes) -> dict[str, Any]:
    warm = Session(nothing, threads=threads)
    folder = model.parent if isinstance(model, Path) else None
    _resident(folder)  # and what looking takes by itself
    before = _resident(folder)
    start = time.perf_counter()
    session = Session(model, threads=threads)
    passed = time.perf_counter() - start
    after = _resident(folder)
    del session, warm
    return {"bytes": None if before is None or after is None else max(0, after - before), "seconds": passed}


def _model_of_one_node() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "warm_up", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(proto.SerializeToString())


def _resident(folder: Path | None) -> int | None:
    """Resident bytes of this process that are its own, or pages of files in `folder`; None where it can't be read.

    What the allocator holds in reserve is given back first. Pages are counted by the kernel one by one: the counters in
    /proc/self/statm are off by megabytes where there are many processors.
    """
    with contextlib.suppress(OSError, AttributeError):  # malloc_trim is glibc's
        ctypes.CDLL(None).malloc_trim(0)
    try:
        found = re.search(r"^Anonymous: +(\d+) kB", _PAGES.read_text(), re.MULTILINE)
        return None if found is None else int(found.group(1)) * 1024 + _mapped(folder)
    except OSError:
        return None


def _mapped(folder: Path | None) -> int:
    """Resident bytes of files in the folder that are mapped, but for those pages that were written to."""
    inside = f"{folder}{os.sep}"
    if folder is None or inside not in (_PAGES.parent / "maps").read_text(errors="replace"):
        return 0
    total, counted = 0, False
    for line in (_PAGES.parent / "smaps").read_text(errors="replace").splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None:
            counted = mapping.group(1).startswith(inside)
        elif counted and line.startswith(("Rss:", "Anonymous:")):
            total += int(line.split()[1]) * (1024 if line.startswith("Rss:") else -1024)
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
