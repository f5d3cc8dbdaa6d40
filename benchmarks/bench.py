"""One model of a benchmark: its task, its feeds on disk, and what recipes made of it."""

from __future__ import annotations

import itertools
import json
import re
import sys
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import Failed, Finished, Limits, run_child
from benchmarks.ours import feeds_in
from onnxopt.errors import OnnxoptError
from onnxopt.feeds import Feeds
from onnxopt.runtime import Session
from onnxopt.runtime.latency import Latency, measure

TIMED_FEEDS = 8


@dataclass(frozen=True)
class Made:
    """What a recipe made. seconds: to make it, without the start of its process; peak: resident bytes."""

    path: Path
    seconds: float
    peak: int
    notes: tuple[str, ...] = ()


class Bench(ABC):
    """A model and everything that parts want of it; all is made when first asked for, once.

    args: what `tasks.add_arguments` and `add_arguments` ask for, and what the benchmark adds. parted: ("parted",) where
    other samples choose than those that calibrate.
    """

    parted: tuple[str, ...] = ()

    def __init__(self, tasks: Any, name: str, path: Path, args: Namespace, folder: Path) -> None:
        self.name, self.path, self.args, self.folder = name, path, args, folder
        self.task = tasks.load(name)
        self._tasks = tasks
        self._made: dict[str, Made | Failed] = {}

    @cached_property
    def calibration(self) -> Path:
        """A folder with one .npz a calibration sample."""
        return self.write_feeds("calib", itertools.islice(self.task.calib_feeds(), self.args.samples))

    @cached_property
    def evaluation(self) -> Feeds:
        """The first --feeds samples that the task is judged on."""
        folder = self.write_feeds("eval", itertools.islice(self.task.feeds(), self.args.feeds))
        return feeds_in(folder, self.path)

    @cached_property
    def timed(self) -> list[dict[str, Any]]:
        """The feeds that are timed."""
        return list(itertools.islice(self.task.feeds(), TIMED_FEEDS))

    @cached_property
    def reference(self) -> list[list[Any]]:
        """Outputs of the float model on all feeds of the task."""
        outputs: list[list[Any]] = self.task.infer(self._tasks.session(self.path))
        return outputs

    @property
    def limits(self) -> Limits:
        """What the process of one recipe may take."""
        return Limits(self.args.timeout, self.args.memory * 1e9)

    def scores(self, path: Path) -> dict[str, float]:
        """All figures that the task gives, the primary one first; what the run took is left out."""
        found: dict[str, float] = self.task.run(path, reference=self.reference)
        return {key: value for key, value in found.items() if key != "seconds"}

    def latency(self, candidate: Path, reference: Path | None = None) -> Latency:
        """Time of `candidate` over that of `reference`, by default the float model, interleaved."""
        against = Session(self.path if reference is None else reference)
        return measure(against, Session(candidate), self.timed, seconds=self.args.seconds)

    def make(self, recipe: str) -> Made:
        """What a recipe makes: a peer's name, or a pass list. Raises Failed, each time the same."""
        if recipe not in self._made:
            try:
                self._made[recipe] = self._make(recipe)
            except Failed as error:
                self._made[recipe] = error
        found = self._made[recipe]
        if isinstance(found, Failed):
            raise found
        return found

    @abstractmethod
    def _make(self, recipe: str) -> Made:
        """Make it, without memory of what was made before. Raises Failed."""

    def place(self, recipe: str) -> Path:
        """Where the file of a recipe goes; what lay there is removed."""
        file = re.sub(r"[^\w.=-]+", "_", recipe)
        out = self.folder / f"{self.name}.{file}.onnx"
        out.unlink(missing_ok=True)
        return out

    def make_ours(self, text: str) -> Made:
        """What a pass list makes of the float model. Raises Failed."""
        out = self.place(text)
        words = [
            str(self.path),
            str(self.calibration),
            str(out),
            str(self.args.samples),
            self.args.target,
            *self.parted,
        ]
        return self.run_recipe([sys.executable, "-m", "benchmarks.ours", text, *words], out)

    def run_recipe(self, command: Sequence[str], out: Path) -> Made:
        """What a command makes that tells its seconds and notes on the last line. Raises Failed."""
        finished = run_child(command, self.limits)
        if not out.is_file():
            raise Failed("failed: made no file")
        notes = finished.told.get("notes")
        return Made(
            out,
            _seconds(finished),
            finished.peak,
            tuple(map(str, notes)) if isinstance(notes, list) else (),
        )

    def write_feeds(self, kind: str, feeds: Iterable[dict[str, Any]]) -> Path:
        """A folder of this model with one .npz a feed."""
        folder = self.folder / f"{self.name}.{kind}"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.npz"):
            old.unlink()
        for number, feed in enumerate(feeds):
            np.savez(folder / f"{number:05d}.npz", **feed)
        return folder

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to --log, one JSON object a line."""
        if self.args.log is not None:
            with self.args.log.open("a") as stream:
                stream.write(json.dumps({"model": self.name, **record}) + "\n")


def _seconds(finished: Finished) -> float:
    """What the child measured itself, or what it took with its start."""
    told = finished.told.get("seconds")
    return told if isinstance(told, float) else finished.seconds


def told_scores(scores: dict[str, float]) -> str:
    """Figures of a task, in order."""
    return " ".join(f"{key} {value:.4f}" for key, value in scores.items() if key != "metadata_lost" or value)


def told_latency(found: Latency) -> str:
    """A ratio and its interval."""
    return f"{found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def told_error(error: Exception) -> str:
    """An error in one line."""
    text = error.cause if isinstance(error, OnnxoptError) else str(error)
    kind = "" if type(error).__name__ == "Failed" else f"{type(error).__name__}: "
    return kind + " ".join(text.split())[:160]
