"""Child processes with a limit on time and memory."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.1


class Failed(Exception):
    """Why a recipe made nothing, in one line."""


@dataclass(frozen=True)
class Limits:
    """seconds: of one process; memory: resident bytes that it may take, held only where /proc tells them."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class Finished:
    """What a child told: the object on the last line of its output; wall seconds with start; peak resident bytes."""

    told: dict[str, object]
    seconds: float
    peak: int


def run_child(command: Sequence[str], limits: Limits) -> Finished:
    """Run `command` in the root of the checkout. Raises Failed where it fails or goes beyond a limit."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        try:
            peak = _watch(child, started, limits)
        finally:
            child.kill()
            code = child.wait()
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        if code:
            raise Failed(_reason(code, errors.read()))
        return Finished(_told(out.read()), seconds, peak)


def _watch(child: subprocess.Popen[bytes], started: float, limits: Limits) -> int:
    """Wait for the end; the highest peak that was seen. Raises Failed beyond a limit."""
    peak = 0
    while True:
        peak = max(peak, resident_peak(child.pid))
        if peak > limits.memory:
            raise Failed(f"left out: takes more than {limits.memory / 1e9:.1f} GB")
        if time.perf_counter() - started > limits.seconds:
            raise Failed(f"left out: takes more than {limits.seconds:.0f} s")
        try:
            child.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak


def resident_peak(process: int) -> int:
    """VmHWM in bytes, 0 where it is not told."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _reason(code: int, errors: str) -> str:
    """The last line of a traceback that says something, or the signal."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if code < 0:
        return f"failed: ended by signal {-code}"
    return f"failed: {lines[-1][:160]}" if lines else f"failed: exit code {code}"


def _told(out: str) -> dict[str, object]:
    """The JSON object on the last line, if there is one."""
    last = out.strip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
