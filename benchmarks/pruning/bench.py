"""One model of the pruning benchmark: ours and the rival's results, and their figures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.bench import Made, told_latency, told_scores
from benchmarks.children import Failed, Limits
from benchmarks.pruning.cost import Cost, cost
from benchmarks.pruning.errors import Errors, Outputs, errors, outputs
from benchmarks.pruning.rival import Rival
from onnxopt.runtime.latency import Latency

_FOREIGN = Path(__file__).with_name("foreign.py")
# Ways of making up for what was removed, the most first, and what they add to a pass list.
RECOVERIES = {"least squares": "", "mean fold": ":refit=false", "raw": ":refit=false:mean_fold=false"}
# Attention heads and width, which onnxruntime's optimizer for transformers wants to be told.
HEADS = {"minilm_l6_ts": (12, 384)}


@dataclass(frozen=True)
class Figures:
    """All that is measured of a result; ratios are over the float model."""

    errors: Errors
    macs: float
    parameters: float
    bytes: float
    latency: Latency
    scores: dict[str, float]

    def told(self) -> str:
        """In one line."""
        return (
            f"{self.errors.told()} | {self.macs:.3f} MACs, {self.parameters:.3f} parameters, {self.bytes:.3f} bytes"
            f" | {told_latency(self.latency)} | {told_scores(self.scores)}"
        )


class Bench(bench.Bench):
    """A model, its task, and what every recipe makes of it."""

    parted = ("parted",)

    def __init__(self, tasks: Any, name: str, path: Path, args: Namespace, folder: Path) -> None:
        super().__init__(tasks, name, path, args, folder)
        self._figures: dict[Path, Figures] = {}

    def _make(self, recipe: str) -> Made:
        return self.make_ours(recipe)

    def ours(self, level: float, recovery: str) -> str:
        """The pass list that removes a share of the MACs."""
        return str(self.args.ours.format(ratio=f"{level:g}")) + RECOVERIES[recovery]

    @cached_property
    def feed(self) -> dict[str, Any]:
        """What MACs are counted on: the first feed of the task."""
        return next(iter(self.evaluation)).inputs

    @cached_property
    def cost(self) -> Cost:
        """Of the float model."""
        return cost(self.path, self.feed)

    @cached_property
    def outputs(self) -> Outputs:
        """Of the float model on the evaluation feeds."""
        return self._outputs(self.path)

    def _outputs(self, path: Path) -> Outputs:
        return outputs(path, (sample.inputs for sample in self.evaluation))

    def errors(self, path: Path) -> Errors:
        """Of a result's outputs on the evaluation feeds."""
        return errors(self.outputs, self._outputs(path))

    def figures(self, path: Path) -> Figures:
        """All figures of a result."""
        if path not in self._figures:
            after = cost(path, self.feed)
            self._figures[path] = Figures(
                self.errors(path),
                after.macs / self.cost.macs,
                after.parameters / self.cost.parameters,
                path.stat().st_size / self.path.stat().st_size,
                self.latency(path),
                self.scores(path),
            )
        return self._figures[path]

    @cached_property
    def rival(self) -> Rival:
        """The rival on this model. Raises Failed where no interpreter has it."""
        return make_rival(
            self.args,
            self.path,
            self.calibration,
            self.folder / f"{self.name}.rival",
            lambda path: cost(path, self.feed).macs,
            self.errors,
            HEADS.get(self.name, (0, 0)),
        )

    def target(self, level: float) -> int:
        """The MACs that the rival has to come to: those of ours, or where there are none, those asked for."""
        try:
            return cost(self.make(self.ours(level, "least squares")).path, self.feed).macs
        except Failed:
            return round(self.cost.macs * (1 - level))

    def close(self) -> None:
        """End the rival's process if there is one."""
        if "rival" in self.__dict__:
            self.rival.server.stop()


def make_rival(
    args: Namespace,
    path: Path,
    feeds: Path,
    folder: Path,
    cost_of: Callable[[Path], int],
    errors_of: Callable[[Path], Errors],
    heads: tuple[int, int] = (0, 0),
) -> Rival:
    """The rival on a model and the feeds of a folder. Raises Failed where no interpreter has it."""
    if args.onnxsim is None:
        raise Failed("left out: --onnxsim names no interpreter")
    folder.mkdir(parents=True, exist_ok=True)
    command = [args.onnxsim, str(_FOREIGN), str(path), str(feeds), str(folder), *map(str, heads)]
    limits = Limits(args.timeout, args.memory * 1e9)
    return Rival(
        command, folder, limits, cost_of, errors_of, f"{args.samples} samples, {args.feeds} feeds", args.methods
    )
