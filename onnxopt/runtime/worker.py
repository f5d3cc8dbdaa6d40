"""Run a saved model in a child process: a crash, a hang or a shortage of memory there can't take this process along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxopt.errors import LimitError, ModelError, OnnxoptError, PassError, UsageError
from onnxopt.runtime.storage import load_values, save_values

DEFAULT_TIMEOUT = 300.0
_MORE_MEMORY = "free memory, allow more, or use smaller feeds"
_ERRORS: dict[str, type[OnnxoptError]] = {
    kind.__name__: kind for kind in (ModelError, PassError, UsageError, LimitError)
}


def run_saved(
    path: Path | str,
    samples: Iterable[Mapping[str, Any]],
    timeout: float = DEFAULT_TIMEOUT,
    *,
    optimize: bool = True,
    threads: int = 1,
    memory: int | None = None,
) -> list[dict[str, Any]]:
    """The outputs of the saved model, one dict per sample, computed in a fresh interpreter.

    samples: mappings name -> value; none at all only tests that the model loads. timeout: seconds for everything
    together. memory: bytes of address space the child may take (POSIX only). Raises ModelError when onnxruntime refuses
    the model, PassError when a run fails or the process crashes, LimitError when time or memory runs out. The child is
    gone when this returns or raises, on Ctrl-C too.
    """
    path = Path(path).resolve()
    with tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        count = 0
        for count, sample in enumerate(samples, start=1):
            save_values(folder / f"in_{count - 1:05d}.npz", sample)
        request = {"path": str(path), "optimize": optimize, "threads": threads, "memory": memory, "count": count}
        (folder / "request.json").write_text(json.dumps(request))
        code = _wait(_command(folder), folder, path, timeout)
        _raise_for(code, folder, path)
        return [load_values(folder / f"out_{index:05d}.npz") for index in range(count)]


def _command(folder: Path) -> list[str]:
    """-P: nothing that lies in the current folder is imported by accident."""
    return [sys.executable, "-P", "-m", "onnxopt.runtime.serve", str(folder)]


def start(command: list[str], folder: Path, *, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """A child in a process group of its own that finds this package; its stderr goes into a file of the folder."""
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with (folder / "stderr.txt").open("wb") as stderr:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _wait(command: list[str], folder: Path, path: Path, timeout: float) -> int:
    """The exit status of the command. Kills its group unless it ended."""
    child = start(command, folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        return child.wait(timeout)
    except subprocess.TimeoutExpired:
        raise LimitError(
            f"{path}: the run did not end within {timeout:g} s and was stopped",
            "use fewer or smaller feeds, or look for an endless Loop in the model",
        ) from None
    finally:
        if child.poll() is None:
            kill(child)


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child with its group, and wait until it is gone."""
    if os.name == "posix":
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def _raise_for(code: int, folder: Path, path: Path) -> None:
    """Raise what the exit status and the response of the child call for."""
    response_file = folder / "response.json"
    response = json.loads(response_file.read_text()) if response_file.is_file() else {}
    if code == 0 and "count" in response:
        return
    error = response.get("error")
    if error == "MemoryError" or said_bad_alloc(folder):
        raise LimitError(f"{path}: memory ran out while it was loaded and run", _MORE_MEMORY)
    if code == -signal.SIGKILL:
        raise LimitError(f"{path}: its process was killed, most likely because memory ran out", _MORE_MEMORY)
    if error in _ERRORS:
        raise _ERRORS[error](response["cause"], response["remedy"])
    how = f"was ended by signal {signal_name(-code)}" if code < 0 else f"ended with status {code}"
    said = last_line(folder)
    raise PassError(
        f"{path}: the process that ran it {how}{said}",
        "the model crashes onnxruntime: leave out the last pass, try another onnxruntime, and report it",
    )


def signal_name(number: int) -> str:
    """SIGSEGV for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _stderr(folder: Path) -> str:
    file = folder / "stderr.txt"
    return file.read_text(errors="replace") if file.is_file() else ""


def said_bad_alloc(folder: Path) -> bool:
    """Whether the child told on stderr that it got no memory."""
    text = _stderr(folder)
    return "bad_alloc" in text or "MemoryError" in text


def last_line(folder: Path) -> str:
    """What the child told last on stderr, behind a colon; empty where it told nothing."""
    lines = [line.strip() for line in _stderr(folder).splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""
