"""From what the user names as inputs to feeds for a run or a check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from onnxopt.errors import FeedError
from onnxopt.feeds import Data, Feeds, Images, Split, open_feeds
from onnxopt.feeds.parted import to_fit
from onnxopt.model import Model
from onnxopt.runtime import Session

# one source of feeds, several, feeds parted already, or None: what lies beside the model, else synthetic inputs
FeedsLike: TypeAlias = Data | Sequence[Data] | Split | None

RunOnce: TypeAlias = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class Inputs:
    """Where inputs come from. samples: at most so many of each part, drawn by the seed."""

    feeds: FeedsLike = None
    evaluate: FeedsLike = None
    labels: str | Path | None = None
    evaluate_labels: str | Path | None = None
    images: Images | str | None = None
    samples: int | None = None
    seed: int = 0

    def open(self, model: Model, path: Path | None, run: RunOnce | None = None) -> Split:
        """Feeds in three parts: to calibrate, to choose, to judge. Raises what `open_feeds` does.

        run: runs the model on inputs that were made up for it; by default in a session of this process.
        """
        if isinstance(self.feeds, Split):
            return self._limited(self.feeds)
        return self._open(model, path, run, whole=False)

    def open_whole(self, model: Model, path: Path | None, run: RunOnce | None = None) -> Split:
        """Feeds of which none is kept for calibration: all that are named evaluate, of a parted folder that part."""
        if isinstance(self.feeds, Split):
            return self._limited(self.feeds)
        return self._open(model, path, run, whole=True)

    def open_fit(self, model: Model, path: Path | None, run: RunOnce | None = None) -> Split:
        """Feeds of which all calibrate, of a parted folder its fit part; `samples` of them, drawn by the seed."""
        if isinstance(self.feeds, Split):
            fit = self.feeds.fit
        else:
            fitting = replace(self, feeds=to_fit(_sources(self.feeds)) or None, evaluate=None, samples=None)
            opened = fitting._open(model, path, run, whole=True)
            if opened.synthetic or opened.evaluate_synthetic:
                return opened
            fit = opened.evaluate
        if self.samples is not None:
            fit = fit.draw(self.samples, self.seed)
        return Split(fit, fit, fit)

    def _open(self, model: Model, path: Path | None, run: RunOnce | None, *, whole: bool) -> Split:
        session = Session(model, optimize=False)
        split = open_feeds(
            _sources(self.feeds),
            session.inputs,
            evaluate=_sources(self.evaluate),
            labels=self.labels,
            evaluate_labels=self.evaluate_labels,
            model_path=path,
            preprocessing=self.images,
            seed=self.seed,
            whole=whole,
            probe=run or session.run,
        )
        return self._limited(split)

    def _limited(self, split: Split) -> Split:
        if self.samples is None:
            return split
        parts = [part.draw(self.samples, self.seed) for part in (split.fit, split.select, split.evaluate)]
        return replace(split, fit=parts[0], select=parts[1], evaluate=parts[2])


def _sources(feeds: FeedsLike) -> list[Data]:
    """What was named, as a list of sources. A sequence of mappings is one source."""
    if feeds is None:
        return []
    if isinstance(feeds, Split):
        return [feeds.evaluate]
    if isinstance(feeds, (str, Path, Feeds)) or not isinstance(feeds, Sequence):
        return [feeds]
    items = cast(Sequence[Any], feeds)
    if not items:
        raise FeedError(
            "no feed: the list of feeds is empty", "give at least one; None takes what lies beside the model"
        )
    if all(isinstance(item, Mapping) for item in items):
        return [items]
    return list(items)
