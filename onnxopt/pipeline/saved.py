"""Statistics from files, for the passes whose graph they were gathered on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from onnxopt.calibration import Requests, Statistics
from onnxopt.calibration.storage import SavedStatistics
from onnxopt.errors import UsageError
from onnxopt.feeds import Split, redrawn_feeds
from onnxopt.model import Model
from onnxopt.numerics.histogram import Histogram
from onnxopt.report.quantities import samples
from onnxopt.runtime import Array


@dataclass(frozen=True)
class Calibration:
    """What was gathered. gathered_for: the pass that asked. seconds: of the run over the feeds alone."""

    saved: SavedStatistics
    gathered_for: str
    seconds: float


# files of statistics, or what onnxopt.calibrate gave; None: none
OneOfStatistics: TypeAlias = str | Path | Calibration | SavedStatistics
StatisticsLike: TypeAlias = OneOfStatistics | Sequence[OneOfStatistics] | None
_IN_MEMORY = "the statistics"


class StatisticsError(UsageError):
    """Statistics were given that don't serve the passes. No run goes on without the pass then: the input is wrong."""


class SavedFiles:
    """Statistics gathered before. Raises UsageError for files that hold none, or those of a part of the feeds."""

    def __init__(self, files: StatisticsLike = None) -> None:
        if isinstance(files, (str, Path, Calibration, SavedStatistics)):
            files = [files]
        self._files = [_open(item) for item in files or ()]
        self._used: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._files)

    def check(self, model: Model) -> None:
        """Raise UsageError where one of them was gathered on another model."""
        if not self._files:
            return
        digest = model.content_digest()
        for name, saved in self._files:
            if saved.provenance.model_digest != digest:
                raise UsageError(
                    f"{name}: it was gathered on another model, or another state of {saved.provenance.model[:100]}",
                    "give the statistics of this very model, or gather them with onnxopt calibrate",
                )

    def like_measured(self, split: Split, seed: int) -> Split:
        """Made-up feeds with inputs drawn from the histograms that the files hold of them; real feeds as they are.

        The note says where statistics come from.
        """
        if not self._files:
            return split
        return self._told(self._redrawn(split, seed))

    def _told(self, split: Split) -> Split:
        told = [
            f"statistics of {samples(saved.samples)}{'' if name == _IN_MEMORY else f' from {name}'}"
            for name, saved in self._files
        ]
        return replace(split, note="; ".join(filter(None, (split.note, *told))))

    def _redrawn(self, split: Split, seed: int) -> Split:
        names = [port.name for port in split.fit.ports]
        measured = [saved.histograms(names) for _, saved in self._files]
        filled = [{name: item for name, item in held.items() if item.count} for held in measured]
        found = [held for held in filled if held]
        if not split.synthetic or not found:
            return split
        draws = {name: partial(_draw, histogram) for name, histogram in found[0].items()}
        fit = redrawn_feeds(split.fit, draws, seed=seed)
        select = redrawn_feeds(split.select, draws, seed=seed + 1)
        note = f"{split.note}, their values drawn from the statistics"
        if not split.evaluate_synthetic:
            return replace(split, fit=fit, select=select, note=note)
        evaluate = redrawn_feeds(split.evaluate, draws, seed=seed + 2)
        return replace(split, fit=fit, select=select, evaluate=evaluate, note=note)

    def covers(self, model: Model, requests: Requests) -> bool:
        """Whether one of the files was gathered on this graph and holds all of it."""
        return any(not saved.lacks(model, requests) for _, saved in self._fitting(model))

    def find(self, model: Model, requests: Requests, source: str) -> Statistics | None:
        """What was gathered on the graph that pass `source` is about to see; None where no file is given.

        Raises UsageError where none of the files is of this graph, or it lacks something that the pass asks for.
        """
        if not self._files:
            return None
        fitting = self._fitting(model)
        if not fitting:
            listed = "; ".join(f"{name} is of {saved.provenance.graph}" for name, saved in self._files)
            raise StatisticsError(
                f"pass {source!r}: no statistics are of the graph that it gets ({listed})",
                "gather them with the same passes, and with --stats what earlier ones use: "
                "onnxopt calibrate MODEL --passes LIST --data PATH --stats GIVEN -o FILE",
            )
        for name, saved in fitting:
            if not saved.lacks(model, requests):
                self._used.add(name)
                return saved.bind(model)
        name, saved = fitting[0]
        raise StatisticsError(
            f"pass {source!r}: {name} lacks {', '.join(saved.lacks(model, requests))}, which it asks for",
            "gather them with the same options: onnxopt calibrate MODEL --passes LIST --data PATH -o FILE",
        )

    def _fitting(self, model: Model) -> list[tuple[str, SavedStatistics]]:
        """Those that were gathered on this graph."""
        digest = model.content_digest() if self._files else ""
        return [(name, saved) for name, saved in self._files if saved.provenance.graph_digest == digest]

    @property
    def idle(self) -> list[str]:
        """Those that no pass asked for."""
        return [name for name, _ in self._files if name not in self._used]


def _draw(histogram: Histogram, rng: np.random.Generator, count: int) -> Array:
    """Values of bins drawn by their counts, evenly within each."""
    bins = rng.choice(histogram.counts.size, count, p=histogram.counts / histogram.count)
    return np.asarray(histogram.centres()[bins] + (rng.random(count) - 0.5) * histogram.width)


def _open(item: OneOfStatistics) -> tuple[str, SavedStatistics]:
    held = item.saved if isinstance(item, Calibration) else item
    saved = held if isinstance(held, SavedStatistics) else SavedStatistics.load(Path(held))
    name = _IN_MEMORY if isinstance(held, SavedStatistics) else str(held)
    if saved.provenance.shard is not None:
        part, count = saved.provenance.shard
        raise UsageError(
            f"{name}: it holds part {part}/{count} of a calibration",
            f"merge all {count} parts first: onnxopt merge PART ... -o FILE",
        )
    return name, saved
