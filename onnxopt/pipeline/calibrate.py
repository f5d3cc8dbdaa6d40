"""The statistics that the passes of a pipeline ask for, gathered apart from the run that uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.sampling import ELEMENTS
from onnxopt.calibration.storage import Provenance, SavedStatistics
from onnxopt.encoding import Opened
from onnxopt.errors import FeedError, NothingCompared, UsageError
from onnxopt.feeds import Feeds, Sample, Split, batch_trouble
from onnxopt.model import Model
from onnxopt.passbase import Effect
from onnxopt.pipeline.grammar import Step
from onnxopt.pipeline.passes import Runner, evaluate
from onnxopt.pipeline.prepare import with_prepared
from onnxopt.pipeline.saved import Calibration, SavedFiles
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.target import Target


@dataclass
class CalibrationRun:
    """Runs the passes, unproven, up to the first whose statistics are not given, and gathers these.

    model: the original, never changed. elements: see `collect`. shard: (index, count): only the samples of this part.
    """

    model: Model
    name: str
    steps: Sequence[Step]
    split: Split
    target: Target
    settings: Settings
    saved: SavedFiles = field(default_factory=SavedFiles)
    elements: int | None = ELEMENTS
    shard: tuple[int, int] | None = None
    progress: Progress = silent

    def execute(self) -> Calibration:
        """Gather. Raises NothingCompared without real inputs, UsageError where no pass asks, FeedError."""
        if self.split.synthetic:
            raise NothingCompared("there are no real inputs to calibrate with", "give them with --data")
        feeds = self._feeds()
        work = self.model.clone().model
        step, requests, before = self._advance(work)
        what = f"statistics for {step.source}"
        watched = _Watched(feeds)
        started = time.perf_counter()
        statistics = collect(
            work,
            requests,
            watched,
            threads=self.settings.threads,
            batch=self.settings.batch,
            elements=self.elements,
            progress=lambda done, total: self.progress(what, done, total),
        )
        seconds = time.perf_counter() - started
        return Calibration(self._saved(work, requests, statistics, watched, before), step.source, seconds)

    def _feeds(self) -> Feeds:
        feeds = self.split.fit
        trouble = batch_trouble(feeds.ports) if self.settings.batch > 1 else None
        if trouble is not None:
            raise UsageError(f"feeds can't be joined into batches: {trouble[0]}", trouble[1])
        if self.shard is None:
            return feeds
        part = feeds.shard(*self.shard)
        if len(part) == 0:
            raise FeedError(
                f"part {self.shard[0]}/{self.shard[1]} holds none of the {len(feeds)} feeds",
                "make fewer parts, or give more feeds",
            )
        return part

    def _advance(self, work: Model) -> tuple[Step, Requests, list[str]]:
        """Run passes until one asks for what is not given: that step, what it asks for, the passes before it."""
        runner = Runner(work, self.model, self.split, self.settings, self.target, None, self.progress, saved=self.saved)
        before: list[str] = []
        asked, idle = False, ""
        for step in with_prepared(self.steps):
            opened = Opened(work, evaluate, shared=step.pass_.effect is Effect.LOSSY)
            requests = step.pass_.for_target(self.target).needs(work)
            if requests is not None and not requests:
                idle = step.source
            if requests:
                asked = True
                if not self.saved.covers(work, requests):
                    return step, requests, before
            opened.close()
            runner.step(step)
            before.append(step.source)
        listed = ", ".join(step.source for step in self.steps)
        if asked:
            raise UsageError(
                f"the files hold all statistics that are asked for: {listed}",
                "use them with onnxopt MODEL --stats, or leave out --stats to gather anew",
            )
        if idle:
            raise UsageError(
                f"pass {idle!r} needs no statistics of this model", "run it without: onnxopt MODEL --passes LIST"
            )
        raise UsageError(f"none of the passes asks for statistics: {listed}", "list one that does: --passes int8")

    def _saved(
        self, work: Model, requests: Requests, statistics: Statistics, watched: _Watched, before: Sequence[str]
    ) -> SavedStatistics:
        provenance = Provenance(
            model=self.name,
            model_digest=self.model.content_digest(),
            graph_digest=work.content_digest(),
            graph=f"the graph behind {', '.join(before)}" if before else "the model as it is",
            elements=self.elements,
            feeds=watched.digest,
            shard=self.shard,
        )
        return SavedStatistics.of(work, requests, statistics, provenance)


class _Watched:
    """Feeds that add up the digests of their samples as they are walked."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self.digest = 0

    def __len__(self) -> int:
        return len(self._feeds)

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._feeds:
            self.digest = (self.digest + sample.digest()) % (1 << 128)
            yield sample
