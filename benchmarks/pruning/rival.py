"""onnxsim's structured pruning at given MACs: all its methods and recoveries, the best by output error.

What it came to is kept in the folder NAME.rival of --keep, so that later runs with the same samples and feeds only read
it.
"""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.children import ROOT, Failed, Limits, resident_peak
from benchmarks.pruning.errors import Errors
from benchmarks.pruning.search import share_for

_FOREIGN = Path(__file__).with_name("foreign.py")
METHODS = ("l2", "l1", "l2-global", "l1-global", "wanda", "wanda-l1", "wanda-global", "blocks")
RECOVERIES = ("ridge", "ridge-weak", "ridge+bias")
# Preparation -> what is added to each method there; each lets the rival find all that those before it do.
PREPARATIONS = {"plain": ("",), "simplified": ("",), "fused": ("", "+heads")}
# Candidates without recovery that are recovered: the nearest to the float model, the first of them in all ways.
RECOVERED = 2
# A level that was searched stands for another one this near.
SAME_LEVEL = 0.01
# A preparation must compute what the float model does.
LARGEST_ERROR = 1e-3
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Candidate:
    """One model of the rival. seconds: of its functions alone; recovery: "" where there was none."""

    preparation: str
    method: str
    share: float
    recovery: str
    path: Path
    macs: int
    errors: Errors
    seconds: float

    def told(self) -> str:
        """How it was made."""
        recovery = f", {self.recovery}" if self.recovery else ""
        return f"{self.method} {self.share:.3f} on {self.preparation}{recovery}"


@dataclass
class Level:
    """What the rival came to at some MACs; left_out: why the rest came to nothing, by what was tried."""

    target: int
    candidates: list[Candidate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def best(self, recovered: bool) -> Candidate:
        """The nearest to the float model. Raises Failed with what the rival said where there is none."""
        found = [candidate for candidate in self.candidates if bool(candidate.recovery) == recovered]
        if not found:
            reasons = sorted(set(self.left_out.values()), key=list(self.left_out.values()).count, reverse=True)
            raise Failed("; ".join(reasons[:3]) or "nothing to recover")
        return min(found, key=lambda candidate: candidate.errors.total)


class Server:
    """The rival's process: started when first asked, and again after a request that went beyond a limit."""

    def __init__(self, command: list[str], limits: Limits) -> None:
        self.command, self.limits = command, limits
        self.greeting: dict[str, Any] = {}
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises Failed with the rival's own message."""
        self.start()
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")
        self._child.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise Failed(f"failed: {answer['error']}")
        return answer

    def start(self) -> None:
        """Start the process unless it runs. Raises Failed where it does not come up."""
        if self._child is None:
            pipe = subprocess.PIPE
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
            self._child = subprocess.Popen(self.command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._errors)
            self.greeting = self._answer()

    def stop(self) -> None:
        """End the process."""
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdout is not None
        started = time.perf_counter()
        while not select.select([child.stdout], [], [], _POLL_SECONDS)[0]:
            reason = ""
            if resident_peak(child.pid) > self.limits.memory:
                reason = f"left out: takes more than {self.limits.memory / 1e9:.1f} GB"
            elif time.perf_counter() - started > self.limits.seconds:
                reason = f"left out: takes more than {self.limits.seconds:.0f} s"
            if reason:
                self.stop()
                raise Failed(reason)
        line = child.stdout.readline()
        if not line:
            code = child.wait()
            self._errors.seek(0)
            said = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
            self.stop()
            raise Failed(f"failed: ended with {code}: {said[-1][:160] if said else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Rival:
    """The rival on one model.

    command: of its process; cost, errors: of a model's file. Of a level that was searched before with the same `key`,
    the results are read.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        limits: Limits,
        cost: Callable[[Path], int],
        errors: Callable[[Path], Errors],
        key: str,
        methods: Sequence[str] = METHODS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._methods = tuple(method for method in METHODS if method in methods)
        key = f"{key}, {' '.join(self._methods)}"
        self.folder, self._cost, self._errors, self._key = folder, cost, errors, key
        self.server = Server(command, limits)
        self._levels = self._read()
        self._seen: dict[tuple[str, str, float], int] = {}
        self._usable: dict[str, tuple[Path, int]] | None = None
        self._unusable: dict[str, str] = {}

    def level(self, target: int) -> Level:
        """All that comes within tolerance of `target` MACs, with errors."""
        for level in self._levels:
            if abs(level.target - target) <= SAME_LEVEL * target:
                return level
        level = self._searched(target)
        self._levels.append(level)
        self._write()
        return level

    def _searched(self, target: int) -> Level:
        level = Level(target)
        usable = self._prepared()
        level.left_out |= self._unusable
        for preparation, (path, macs) in usable.items():
            for method in [base + more for more in PREPARATIONS[preparation] for base in self._methods]:
                with _noted(level, f"{method} on {preparation}"):
                    level.candidates.append(self._pruned(preparation, path, macs, method, target))
        nearest = sorted(level.candidates, key=lambda candidate: candidate.errors.total)[:RECOVERED]
        for number, candidate in enumerate(nearest):
            for recovery in RECOVERIES if number == 0 else RECOVERIES[:1]:
                with _noted(level, f"{candidate.told()}, {recovery}"):
                    level.candidates.append(self._recovered(candidate, recovery, usable[candidate.preparation][0]))
        self._forget(level)
        return level

    def _prepared(self) -> dict[str, tuple[Path, int]]:
        """Preparation -> its model and MACs, where it agrees with the float model."""
        if self._usable is not None:
            return self._usable
        self._usable = {}
        self.server.start()
        for name, told in self.server.greeting["prepared"].items():
            if not Path(told).is_file():
                self._unusable[f"preparation {name}"] = told
                continue
            try:
                error = self._errors(Path(told)).total
            except Exception as problem:  # noqa: BLE001  what the rival wrote may fail in any way
                self._unusable[f"preparation {name}"] = f"failed: {' '.join(str(problem).split())[:160]}"
                continue
            if error > LARGEST_ERROR:
                self._unusable[f"preparation {name}"] = f"its preparation {name} is {error:.2g} off the float model"
            else:
                self._usable[name] = (Path(told), self._cost(Path(told)))
        best = [name for name in PREPARATIONS if name in self._usable][-1:]
        self._usable = {name: self._usable[name] for name in best}
        return self._usable

    def _pruned(self, preparation: str, path: Path, macs: int, method: str, target: int) -> Candidate:
        out = self.folder / f"{preparation}.{method}.onnx"
        asked: tuple[float, float] = (-1.0, 0.0)

        def make(share: float) -> float:
            request = {"prune": method, "from": str(path), "sparsity": share, "out": str(out)}
            return float(self.server.ask(request)["seconds"])

        def macs_at(share: float) -> int:
            nonlocal asked
            if (preparation, method, share) not in self._seen:
                asked = (share, make(share))
                self._seen[preparation, method, share] = self._cost(out)
            return self._seen[preparation, method, share]

        seen = {share: found for (*of, share), found in self._seen.items() if of == [preparation, method]}
        hit = share_for(macs_at, macs, target, seen)
        seconds = asked[1] if asked[0] == hit.share else make(hit.share)
        kept = out.with_suffix(f".{hit.share:.5f}.onnx")
        out.replace(kept)
        return Candidate(preparation, method, hit.share, "", kept, hit.macs, self._errors(kept), seconds)

    def _recovered(self, candidate: Candidate, recovery: str, original: Path) -> Candidate:
        out = candidate.path.with_suffix(f".{recovery}.onnx")
        request = {"recover": recovery, "original": str(original), "from": str(candidate.path), "out": str(out)}
        seconds = candidate.seconds + float(self.server.ask(request)["seconds"])
        found = self._errors(out)
        of = (candidate.preparation, candidate.method, candidate.share)
        return Candidate(*of, recovery, out, self._cost(out), found, seconds)

    def _forget(self, level: Level) -> None:
        """Remove the files of all but the best."""
        kept = set()
        for recovered in (False, True):
            try:
                kept.add(level.best(recovered).path)
            except Failed:
                continue
        for candidate in level.candidates:
            if candidate.path not in kept:
                candidate.path.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.folder / "results.json"

    def _read(self) -> list[Level]:
        if not self._file.is_file():
            return []
        stored = json.loads(self._file.read_text())
        if stored["key"] != self._key:
            return []
        return [
            Level(
                level["target"],
                [_candidate(self.folder, **candidate) for candidate in level["candidates"]],
                level["left_out"],
            )
            for level in stored["levels"]
        ]

    def _write(self) -> None:
        levels = [
            {
                "target": level.target,
                "candidates": [{**asdict(found), "path": found.path.name} for found in level.candidates],
                "left_out": level.left_out,
            }
            for level in self._levels
        ]
        self._file.write_text(json.dumps({"key": self._key, "levels": levels}, indent=1))


def _candidate(folder: Path, path: str, errors: dict[str, float], **known: Any) -> Candidate:
    return Candidate(path=folder / path, errors=Errors(**errors), **known)


@contextmanager
def _noted(level: Level, what: str) -> Iterator[None]:
    """A failure is a line of the level, and the rest goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  models of the rival may fail in any way, here or in its process
        text = " ".join(str(error).split())[:200]
        level.left_out[what] = text if isinstance(error, Failed) else f"failed: {text}"
