"""One model of the quantization benchmark, with the recipes of other tools."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import bench
from benchmarks.bench import Made
from benchmarks.children import Failed
from benchmarks.quantization.recipes import HISTOGRAMS, NNCF_PEERS, ORT_PEERS

_FOREIGN = Path(__file__).with_name("foreign.py")


class Bench(bench.Bench):
    """A model, its task, and what every recipe makes of it."""

    def wall_feeds(self, count: int) -> Path:
        """A folder with `count` calibration samples, again from the start where the task has fewer."""
        feeds = list(itertools.islice(self.task.calib_feeds(), count))
        return self.write_feeds("wall", itertools.islice(itertools.cycle(feeds), count))

    def _make(self, recipe: str) -> Made:
        peer = recipe in (*ORT_PEERS, *NNCF_PEERS)
        if not peer and recipe not in ("onnxsim", "ready"):
            return self.make_ours(recipe)
        out = self.place(recipe)
        ready = self.make("ready") if peer else None
        source = self.path if ready is None else ready.path
        samples = min(self.args.samples, self.args.histogram_samples) if recipe in HISTOGRAMS else self.args.samples
        made = self.run_recipe(self._command(recipe, [str(source), str(self.calibration), str(out), str(samples)]), out)
        return made if ready is None else replace(made, seconds=made.seconds + ready.seconds)

    def _command(self, recipe: str, words: list[str]) -> list[str]:
        interpreter = {"onnxsim": self.args.onnxsim, **dict.fromkeys(NNCF_PEERS, self.args.nncf)}
        if recipe not in interpreter:
            return [sys.executable, "-m", "benchmarks.quantization.recipes", recipe, *words]
        if interpreter[recipe] is None:
            option = "--onnxsim" if recipe == "onnxsim" else "--nncf"
            raise Failed(f"left out: {option} names no interpreter")
        return [interpreter[recipe], str(_FOREIGN), recipe, *words]
