"""One model of the benchmark: its task, its calibration feeds on disk, and what recipes made of it."""

from __future__ import annotations

import itertools
import json
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quantization.children import Failed, Limits, run_child
from benchmarks.quantization.recipes import HISTOGRAMS, NNCF_PEERS, ORT_PEERS, feeds_in
from onnxopt.feeds import Feeds
from onnxopt.runtime import Session
from onnxopt.runtime.latency import Latency, measure

TIMED_FEEDS = 8
_FOREIGN = Path(__file__).with_name("foreign.py")


@dataclass(frozen=True)
class Made:
    """What a recipe made. seconds: to make it, without the start of its process; peak: resident bytes."""

    path: Path
    seconds: float
    peak: int
    notes: tuple[str, ...] = ()


class Bench:
    """A model and everything that parts want of it; all is made when first asked for, once."""

    def __init__(self, tasks: Any, name: str, path: Path, args: Namespace, folder: Path) -> None:
        self.name, self.path, self.args, self.folder = name, path, args, folder
        self.task = tasks.load(name)
        self._tasks = tasks
        self._made: dict[str, Made | Failed] = {}

    @cached_property
    def calibration(self) -> Path:
        """A folder with one .npz a calibration sample."""
        return self._write("calib", itertools.islice(self.task.calib_feeds(), self.args.samples))

    @cached_property
    def evaluation(self) -> Feeds:
        """The first --feeds samples that the task is judged on."""
        folder = self._write("eval", itertools.islice(self.task.feeds(), self.args.feeds))
        return feeds_in(folder, self.path)

    def wall_feeds(self, count: int) -> Path:
        """A folder with `count` calibration samples, again from the start where the task has fewer."""
        feeds = list(itertools.islice(self.task.calib_feeds(), count))
        return self._write("wall", itertools.islice(itertools.cycle(feeds), count))

    @cached_property
    def timed(self) -> list[dict[str, Any]]:
        """The feeds that are timed."""
        return list(itertools.islice(self.task.feeds(), TIMED_FEEDS))

    @cached_property
    def reference(self) -> list[list[Any]]:
        """Outputs of the float model on all feeds of the task."""
        outputs: list[list[Any]] = self.task.infer(self._tasks.session(self.path))
        return outputs

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

    def _make(self, recipe: str) -> Made:
        file = re.sub(r"[^\w.=-]+", "_", recipe)
        out = self.folder / f"{self.name}.{file}.onnx"
        out.unlink(missing_ok=True)
        peer = recipe in (*ORT_PEERS, *NNCF_PEERS)
        ready = self.make("ready") if peer else None
        source = self.path if ready is None else ready.path
        samples = min(self.args.samples, self.args.histogram_samples) if recipe in HISTOGRAMS else self.args.samples
        finished = run_child(
            self._command(recipe, [str(source), str(self.calibration), str(out), str(samples)]),
            Limits(self.args.timeout, self.args.memory * 1e9),
        )
        if not out.is_file():
            raise Failed("failed: made no file")
        told = finished.told.get("seconds")
        seconds = told if isinstance(told, float) else finished.seconds
        notes = finished.told.get("notes")
        return Made(
            out,
            seconds + (0.0 if ready is None else ready.seconds),
            finished.peak,
            tuple(map(str, notes)) if isinstance(notes, list) else (),
        )

    def _command(self, recipe: str, words: list[str]) -> list[str]:
        interpreter = {"onnxsim": self.args.onnxsim, **dict.fromkeys(NNCF_PEERS, self.args.nncf)}
        if recipe not in interpreter:
            return [sys.executable, "-m", "benchmarks.quantization.recipes", recipe, *words, self.args.target]
        if interpreter[recipe] is None:
            option = "--onnxsim" if recipe == "onnxsim" else "--nncf"
            raise Failed(f"left out: {option} names no interpreter")
        return [interpreter[recipe], str(_FOREIGN), recipe, *words]

    def _write(self, kind: str, feeds: Any) -> Path:
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
