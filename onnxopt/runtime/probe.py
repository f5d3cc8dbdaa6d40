"""The first meeting of onnxruntime with a model that came from outside, in a process that may be killed."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnxopt.errors import LimitError, ModelError, OnnxoptError, PassError, UsageError
from onnxopt.model import Limits, Model
from onnxopt.runtime import worker
from onnxopt.runtime.storage import nbytes, save_values

# weights are read, packed for the kernels and folded: this many copies of them may be held at once
_COPIES = 5
# virtual memory of one thread
_STACK = 16 << 20
# of a sample, since intermediate values are larger than inputs
_SAMPLE_COPIES = 64
_WEIGHT_BYTES_PER_SECOND = 20e6
_SAMPLE_BYTES_PER_SECOND = 1e6
_TRUST = "don't trust this model; if it is yours, free memory, use smaller inputs, or repeat with --limits off"
_ERRORS: dict[str, type[OnnxoptError]] = {
    kind.__name__: kind for kind in (LimitError, ModelError, PassError, UsageError)
}


class Probe:
    """A process that loads and runs one model under limits of memory and time; use it as a context manager.

    path: its file, which must hold what `model` holds; None for a model that has none. Larger weights and inputs are
    given more memory and time. With `limits` off nothing is started and every method returns at once.
    The process is gone after the `with` block, on Ctrl-C too.
    """

    def __init__(self, model: Model, path: Path | None, limits: Limits, *, threads: int = 1) -> None:
        self.name = str(path) if path is not None else "the model"
        self.limits = limits
        self.threads = threads
        self._model, self._path = model, path
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._allowed = self._left = 0.0
        self._after = contextlib.ExitStack()

    @property
    def skipped(self) -> bool:
        """Whether limits are off."""
        return self.limits.seconds is None

    def __enter__(self) -> Probe:
        """Start, judge sizes, and load the model. Raises as `run` does, ModelError where onnxruntime refuses it."""
        if self.skipped or self.limits.seconds is None:
            return self
        folder = tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True)
        self._folder = Path(self._after.enter_context(folder))
        try:
            held = self._model.nbytes()
            self._allow(self.limits.seconds + held / _WEIGHT_BYTES_PER_SECOND)
            (self._folder / "skeleton").write_bytes(self._model.skeleton()[0].SerializeToString())
            path = self._path.absolute() if self._path is not None else self._model.save(self._folder / "model.onnx")
            self._start()
            memory = self.limits.memory_bytes
            self._ask(
                do="open",
                path=str(path),
                name=self.name,
                threads=self.threads,
                limits=asdict(self.limits),
                held=held,
                memory=None if memory is None else memory + _COPIES * held + _STACK * self.threads,
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Run the model as it stands.

        Raises PassError when onnxruntime refuses the inputs or fails, LimitError when memory or time runs out,
        ModelError when the process crashes.
        """
        self._with_inputs("run", inputs)

    def prove(self, inputs: Mapping[str, Any]) -> None:
        """Run the model as it stands, and as onnxruntime optimizes it. Raises as `run` does."""
        self._with_inputs("prove", inputs)

    def close(self) -> None:
        """End the process and remove what was written."""
        if self._child is not None and self._child.poll() is None:
            worker.kill(self._child)
        if self._child is not None:
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    stream.close()
            self._child = None
        self._after.close()

    def _with_inputs(self, do: str, inputs: Mapping[str, Any]) -> None:
        if self.skipped:
            return
        save_values(self._folder / "in.npz", inputs)
        taken = sum(nbytes(value) for value in inputs.values())
        self._allow(taken / _SAMPLE_BYTES_PER_SECOND)
        self._ask(do=do, sample=_SAMPLE_COPIES * taken)

    def _allow(self, seconds: float) -> None:
        self._allowed += seconds
        self._left += seconds

    @staticmethod
    def _command(folder: Path) -> list[str]:
        """-P: nothing that lies in the current folder is imported by accident."""
        return [sys.executable, "-P", "-m", "onnxopt.runtime.guest", str(folder)]

    def _start(self) -> None:
        command = self._command(self._folder)
        self._child = worker.start(command, self._folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=_listen, args=(self._child, self._answers), daemon=True).start()

    def _ask(self, **request: Any) -> None:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        started = time.monotonic()
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = self._answers.get(timeout=max(self._left, 0.1))
        except BrokenPipeError:
            line = b""
        except queue.Empty:
            raise LimitError(
                f"{self.name}: onnxruntime did not load and run it within the {self._allowed:.0f} s that the limits "
                f"{self.limits.name!r} allow",
                "don't trust this model; if it is yours, use smaller inputs, or repeat with --limits off",
            ) from None
        self._left -= time.monotonic() - started
        if not line:
            self._raise_crash(child)
        self._raise_for(json.loads(line))

    def _raise_for(self, answer: dict[str, Any]) -> None:
        error = answer.get("error")
        if error is None:
            return
        if error == "MemoryError":
            self._raise_memory()
        cause = answer["cause"]
        raise _ERRORS.get(error, ModelError)(cause if self.name in cause else f"{self.name}: {cause}", answer["remedy"])

    def _raise_memory(self) -> None:
        raise LimitError(
            f"{self.name}: onnxruntime needs more memory for it than the limits {self.limits.name!r} allow", _TRUST
        )

    def _raise_crash(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if code == -signal.SIGKILL or worker.said_bad_alloc(self._folder):
            self._raise_memory()
        how = f"by signal {worker.signal_name(-code)}" if code < 0 else f"with status {code}"
        raise ModelError(
            f"{self.name}: it ended the process that first loaded and ran it {how}{worker.last_line(self._folder)}",
            "don't trust this model; if it is yours, try another onnxruntime and report the crash there",
        )


def _listen(child: subprocess.Popen[bytes], answers: queue.Queue[bytes]) -> None:
    """Put each line of the child into the queue, and an empty one when it ends."""
    assert child.stdout is not None
    try:
        for line in child.stdout:
            answers.put(line)
    except ValueError:  # closed by the other thread
        return
    answers.put(b"")
