"""Run passes one after the other: gather statistics, rewrite, prove, or roll back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto
from threadpoolctl import threadpool_limits

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.encoding import Opened, parameters
from onnxopt.errors import LimitError, OnnxoptError, PassError, UsageError
from onnxopt.feeds import Split
from onnxopt.model import Model, Snapshot
from onnxopt.passbase import Context, Effect, PassResult
from onnxopt.pipeline.grammar import Step
from onnxopt.pipeline.prepare import check_order, quantized_nodes, still_wanted
from onnxopt.pipeline.saved import SavedFiles, StatisticsError
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.pipeline.stages import Stages
from onnxopt.report import ComparisonFigures, ErrorFacts, PassRecord, Status
from onnxopt.runtime import Session
from onnxopt.target import Target
from onnxopt.verification import Budget, Measured, RecordedOutputs, compare, judge, metric_names
from onnxopt.verification import evaluate as evaluate_metrics

# Passes choose between candidates on this many feeds.
CHOICE_FEEDS = 64


@dataclass(frozen=True)
class _Start:
    """Where the passes inserted for one pass began: the model, how many records there were, the stage before."""

    snapshot: Snapshot
    records: int
    mark: RecordedOutputs | None


@dataclass
class Runner:
    """Runs the passes of one pipeline over one model. `records` grows by one with every pass, failed ones included.

    model: rewritten in place. reference: the original, left alone. stages: None where nothing is verified. saved:
    statistics gathered before. budgets: those on quality, which passes may ask about.
    """

    model: Model
    reference: Model
    split: Split
    settings: Settings
    target: Target
    stages: Stages | None
    progress: Progress = silent
    records: list[PassRecord] = field(default_factory=list)
    saved: SavedFiles = field(default_factory=SavedFiles)
    budgets: tuple[Budget, ...] = ()
    _left: Snapshot | None = field(default=None, init=False)
    _records: dict[int | None, RecordedOutputs] = field(default_factory=dict, init=False)
    _other: tuple[Model, int, RecordedOutputs] | None = field(default=None, init=False)

    def run(self, steps: Sequence[Step]) -> None:
        """Run all steps. A pass that fails is rolled back; then its error is raised, or with on_error="skip" noted."""
        quantized_before = quantized_nodes(self.reference)
        start: _Start | None = None
        for number, step in enumerate(steps):
            self.progress(f"pass {step.source}", number, len(steps))
            if step.inserted_for is not None and start is None:
                start = self._start()
            try:
                self._run_one(step, quantized_before)
            except OnnxoptError as error:
                if self.settings.on_error != "skip" or isinstance(error, StatisticsError):
                    raise
            if step.inserted_for is not None:
                continue
            idle = start is not None and self.records[-1].status is not Status.CHANGED
            if start is None or not idle or self._undo(start, steps[number + 1 :]):
                start = None

    def step(self, step: Step) -> None:
        """Run one step. Raises its error where it fails; the model is rolled back then."""
        self._run_one(step, quantized_nodes(self.reference))

    def _start(self) -> _Start:
        mark = self.stages.mark() if self.stages is not None else None
        return _Start(self.model.snapshot(), len(self.records), mark)

    def _undo(self, start: _Start, later: Sequence[Step]) -> bool:
        """Take back the passes that prepared for one that then did nothing.

        False where a later one wants them too, which may then do nothing either.
        """
        prepared = self.records[start.records : -1]
        changed = [record for record in prepared if record.status is Status.CHANGED]
        if not changed:
            return True
        if still_wanted(later, {record.name for record in changed}):
            return False
        self.model.restore(start.snapshot)
        self._left = None
        if self.stages is not None and start.mark is not None:
            self.stages.rewind(start.mark)
        counts = (self.model.node_count(), parameters(self.model))
        for at in range(start.records, len(self.records)):
            record = self.records[at]
            if record.status is Status.CHANGED:
                record = replace(record, status=Status.UNDONE, changes=(), notes=(), comparison=None)
            self.records[at] = replace(
                record,
                nodes_before=counts[0],
                nodes_after=counts[0],
                parameters_before=counts[1],
                parameters_after=counts[1],
            )
        return True

    def _run_one(self, step: Step, quantized_before: int) -> None:
        # sums of matrix products depend on how many threads share them, and rounding may depend on a sum's last bit
        with threadpool_limits(self.settings.threads, "blas"):
            self._run_limited(step, quantized_before)

    def _run_limited(self, step: Step, quantized_before: int) -> None:
        # what the last pass left is what this one finds
        before = self._left if self._left is not None else self.model.snapshot()
        self._left = None
        counts = (self.model.node_count(), parameters(self.model))
        started = time.perf_counter()
        result, comparison = PassResult(), None
        seconds = 0.0
        try:
            check_order(step, self.model, quantized_before)
            opened = Opened(self.model, evaluate, shared=step.pass_.effect is Effect.LOSSY)
            result = self._rewrite(step)
            result = replace(result, notes=(*result.notes, *opened.close()))
            seconds = time.perf_counter() - started
            after = self.model.snapshot()
            modified = _digest(after) != _digest(before)
            if modified and self.stages is not None:
                comparison = self.stages.prove(self.model, step)
        except (Exception, SystemExit) as error:
            self.model.restore(before)
            told = _told(step, error)
            seconds = seconds or time.perf_counter() - started
            verify_seconds = time.perf_counter() - started - seconds
            failed = _record(step, Status.FAILED, result, counts, self.model, (seconds, verify_seconds), None)
            self.records.append(_with_error(failed, told))
            raise told from error
        self._left = after
        verify_seconds = time.perf_counter() - started - seconds
        status = Status.CHANGED if modified else Status.UNCHANGED
        times = (seconds, verify_seconds)
        self.records.append(_record(step, status, result, counts, self.model, times, comparison))

    def _rewrite(self, step: Step) -> PassResult:
        context = Context(
            reference=self.reference,
            statistics=self._statistics(step),
            compare=None if self.split.synthetic else self._compare,
            holds=self._holds if self.budgets and not self.split.synthetic else None,
            measure=None if self.split.synthetic else self._measure,
            target=self.target,
            seed=self.settings.seed,
            evaluate=evaluate,
            progress=lambda done, total: self.progress(f"pass {step.source}", done, total),
            shapes=self._shapes(),
        )
        result = step.pass_.run(self.model, context)
        if not isinstance(result, PassResult):
            raise PassError(
                f"its run returned {type(result).__name__}, not a PassResult", "return PassResult(changes, skipped)"
            )
        self.model.normalize()
        return result

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of the first feed."""
        for sample in self.split.fit:
            return {name: value.shape for name, value in sample.inputs.items() if hasattr(value, "shape")}
        return {}

    def _statistics(self, step: Step) -> Statistics | None:
        requests = step.pass_.for_target(self.target).needs(self.model)
        if requests is None:
            return None
        found = self.saved.find(self.model, requests, step.source) if requests else None
        if found is not None or self.split.synthetic:
            return found
        what = f"statistics for {step.source}"
        return collect(
            self.model,
            requests,
            self.split.fit,
            threads=self.settings.threads,
            batch=self.settings.batch,
            progress=lambda done, total: self.progress(what, done, total),
        )

    def _measure(self, model: Model, requests: Requests) -> Statistics:
        model.normalize()
        return collect(model, requests, self.split.fit, threads=self.settings.threads, batch=self.settings.batch)

    def _compare(self, model: Model, most: int | None = None, reference: Model | None = None) -> float:
        feeds = CHOICE_FEEDS if most is None else min(most, CHOICE_FEEDS)
        recorded = self._recorded(feeds) if reference is None else self._recorded_of(reference, feeds)
        model.normalize()
        return compare(recorded, Session(model, threads=self.settings.threads)).quality

    def _recorded_of(self, reference: Model, most: int) -> RecordedOutputs:
        """What another model gives; the last one is kept."""
        if self._other is None or self._other[0] is not reference or self._other[1] != most:
            session = Session(reference, threads=self.settings.threads)
            self._other = reference, most, RecordedOutputs(session, self.split.select.take(most))
        return self._other[2]

    def _holds(self, model: Model) -> bool:
        """Whether the budgets on quality hold on the feeds that choose; where they can't be judged, they do."""
        reference = self._recorded(None)
        model.normalize()
        candidate = RecordedOutputs(Session(model, threads=self.settings.threads), self.split.select)
        try:
            metrics = evaluate_metrics(metric_names(self.budgets), reference, candidate)
            verdicts = judge(self.budgets, Measured(compare(reference, candidate), metrics))
        except OnnxoptError:
            return True
        return all(verdict.passed for verdict in verdicts)

    def _recorded(self, most: int | None) -> RecordedOutputs:
        """What the original gives on the feeds that choose, all or the first ones, as it is deployed."""
        if most not in self._records:
            session = Session(self.reference, threads=self.settings.threads)
            feeds = self.split.select if most is None else self.split.select.take(most)
            self._records[most] = RecordedOutputs(session, feeds)
        return self._records[most]


def evaluate(proto: ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Values of a small model's outputs from onnxruntime, unoptimized, one thread."""
    session = Session(proto.SerializeToString(), optimize=False, threads=1, name="a part of the model")
    return list(session.run(inputs).values())


def _digest(snapshot: Snapshot) -> bytes:
    return hashlib.sha256(snapshot.skeleton).digest()


def _told(step: Step, error: Exception | SystemExit) -> OnnxoptError:
    """The error with the pass named in front. Usage and limits keep their exit codes, the rest is PassError."""
    name = f"pass {step.source!r}"
    if isinstance(error, OnnxoptError):
        kind = type(error) if isinstance(error, (UsageError, LimitError)) else PassError
        cause = error.cause if error.cause.startswith(name) else f"{name}: {error.cause}"
        return kind(cause, error.remedy)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return LimitError(f"{name}: memory ran out", "free memory, use fewer feeds, or a smaller model")
    return PassError(
        f"{name} failed: {type(error).__name__}: {text}",
        "the model was rolled back; leave the pass out, go on without it by --on-error skip, or see -vv",
    )


def _with_error(record: PassRecord, error: OnnxoptError) -> PassRecord:
    return replace(record, error=ErrorFacts(error.cause, error.remedy), changes=(), notes=())


def _record(
    step: Step,
    status: Status,
    result: PassResult,
    counts: tuple[int, int],
    model: Model,
    times: tuple[float, float],
    comparison: ComparisonFigures | None,
) -> PassRecord:
    return PassRecord(
        name=step.pass_.name or step.source,
        text=str(step),
        effect=step.pass_.effect.value,
        status=status,
        inserted_for=step.inserted_for,
        changes=tuple(result.changes) if status is Status.CHANGED else (),
        skipped=tuple(result.skipped),
        notes=tuple(result.notes),
        nodes_before=counts[0],
        nodes_after=model.node_count(),
        parameters_before=counts[1],
        parameters_after=parameters(model),
        seconds=times[0],
        verify_seconds=times[1],
        comparison=comparison,
    )
