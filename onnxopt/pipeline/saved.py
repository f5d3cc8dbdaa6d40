"""Statistics from files, for the passes whose graph they were gathered on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from onnxopt.calibration import Requests, Statistics
from onnxopt.calibration.storage import SavedStatistics
from onnxopt.errors import UsageError
from onnxopt.model import Model

# files of statistics, or what onnxopt.calibrate gave; None: none
StatisticsLike: TypeAlias = str | Path | SavedStatistics | Sequence[str | Path | SavedStatistics] | None


class SavedFiles:
    """Statistics gathered before. Raises UsageError for files that hold none, or those of a part of the feeds."""

    def __init__(self, files: StatisticsLike = None) -> None:
        listed = [] if files is None else [files] if isinstance(files, (str, Path, SavedStatistics)) else list(files)
        self._files = [_open(item) for item in listed]

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
                    f"{name}: it was gathered on another model, {saved.provenance.model}",
                    "give the statistics of this model, or gather them with onnxopt calibrate",
                )

    def covers(self, model: Model, requests: Requests) -> bool:
        """Whether one of the files was gathered on this graph and holds all of it."""
        if not self._files:
            return False
        digest = model.content_digest()
        fitting = [saved for _, saved in self._files if saved.provenance.graph_digest == digest]
        return any(not saved.lacks(model, requests) for saved in fitting)

    def find(self, model: Model, requests: Requests, source: str) -> Statistics | None:
        """What was gathered on the graph that pass `source` is about to see; None where no file is given.

        Raises UsageError where none of the files is of this graph, or it lacks something that the pass asks for.
        """
        if not self._files:
            return None
        digest = model.content_digest()
        fitting = [(name, saved) for name, saved in self._files if saved.provenance.graph_digest == digest]
        if not fitting:
            listed = "; ".join(f"{name} is of {saved.provenance.graph}" for name, saved in self._files)
            raise UsageError(
                f"no statistics are of the graph that pass {source!r} gets ({listed})",
                "gather them with the same passes: onnxopt calibrate MODEL --passes LIST --data PATH -o FILE",
            )
        for _, saved in fitting:
            if not saved.lacks(model, requests):
                return saved.bind(model)
        name, saved = fitting[0]
        raise UsageError(
            f"{name}: it lacks {', '.join(saved.lacks(model, requests))} that pass {source!r} asks for",
            "gather them with the same options: onnxopt calibrate MODEL --passes LIST --data PATH -o FILE",
        )


def _open(item: str | Path | SavedStatistics) -> tuple[str, SavedStatistics]:
    saved = item if isinstance(item, SavedStatistics) else SavedStatistics.load(Path(item))
    name = "the statistics" if isinstance(item, SavedStatistics) else str(item)
    if saved.provenance.shard is not None:
        part, count = saved.provenance.shard
        raise UsageError(
            f"{name}: it holds part {part}/{count} of a calibration",
            f"merge all {count} parts first: onnxopt merge PART ... -o FILE",
        )
    return name, saved
