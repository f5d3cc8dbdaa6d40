"""One run from original to verdict: passes, final comparison, budgets, report, and only then the file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnxopt.errors import ModelError, NothingCompared, OnnxoptError, PassError
from onnxopt.feeds import Split
from onnxopt.model import Model
from onnxopt.passbase import Effect
from onnxopt.pipeline import output as files
from onnxopt.pipeline.facts import facts, feed_facts, file_bytes, versions
from onnxopt.pipeline.failure import failed
from onnxopt.pipeline.final import Demands, Findings, Observed, Pair, decide, observe
from onnxopt.pipeline.footprint import UNNAMED, Footprint, FootprintMeter, with_footprint
from onnxopt.pipeline.grammar import Step, canonical
from onnxopt.pipeline.order import wasteful
from onnxopt.pipeline.passes import Runner
from onnxopt.pipeline.prepare import quantized_nodes, with_prepared
from onnxopt.pipeline.proof import prove
from onnxopt.pipeline.result import Result, VerdictError
from onnxopt.pipeline.saved import SavedFiles
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.pipeline.stages import Stages
from onnxopt.report import (
    FootprintFigures,
    MemoryFigures,
    ModelFacts,
    PassRecord,
    QuantizationFigures,
    Report,
    Status,
    Verdict,
    write,
)
from onnxopt.runtime import Session
from onnxopt.target import Target

# the saved file is proven on this many feeds
SAVED_FEEDS = 2
_LOOSEN = "loosen the budget or choose milder passes; --keep-failed writes the result under another name"
_MADE_UP = "the inputs are made up and may mislead: give real ones with --data"


@dataclass
class Run:
    """One run of a pipeline. Everything is opened and checked already; `execute` does the work.

    reference: the original, never changed. source: its file, None for a model that came as a proto. changes: what was
    changed of that file before the passes, in words; the reference is the result. saved: statistics gathered before.
    """

    reference: Model
    source: Path | None
    steps: Sequence[Step]
    split: Split
    target: Target
    demands: Demands
    settings: Settings
    changes: Sequence[str] = ()
    output: Path | None = None
    reports: Sequence[Path] = ()
    saved: SavedFiles = field(default_factory=SavedFiles)
    progress: Progress = silent
    started: float = field(default_factory=time.perf_counter)

    def execute(self) -> Result:
        """Run the passes and judge the result; write it where it passes.

        Raises VerdictError where a budget or the quality floor fails (with keep_failed the result is returned instead),
        PassError where a pass fails and on_error is "stop", NothingCompared, ModelError. The reports are written even
        then.
        """
        original = facts(self.reference, self._file)
        if self.source is not None:
            original = replace(original, path=str(self.source))
        records: list[PassRecord] = []
        try:
            result = self._work(original, records)
        except OnnxoptError as error:
            report = self._report(original, records, Verdict.ERROR, "", error.exit_code)
            with contextlib.suppress(OnnxoptError):
                self._write_reports(failed(report, error))
            raise
        self._write_reports(result.report)
        if result.report.verdict is Verdict.FAILED and not self.settings.keep_failed:
            raise VerdictError(
                f"the result was refused: {result.report.reason}",
                _LOOSEN if not self.split.synthetic else _MADE_UP,
                result,
            )
        return result

    def _work(self, original: ModelFacts, records: list[PassRecord]) -> Result:
        """Everything but the report; `records` takes in what the passes did, whatever comes of it."""
        if self.settings.require_data and self._made_up:
            raise NothingCompared("there are no real inputs to compare on", "give them with --data")
        model = self.reference.clone().model
        stages = self._stages()
        given = (self.split, self.settings, self.target, stages, self.progress)
        runner = Runner(model, self.reference, *given, records, self.saved, self.demands.quality_budgets)
        with FootprintMeter(self.reference, self._file, self.settings, self.demands.budgets) as meter:
            runner.run(with_prepared(self.steps))
            findings, footprint = self._conclude(model, original, records, stages, meter)
        return self._finish(model, original, records, stages, findings, footprint)

    @property
    def _file(self) -> Path | None:
        """The file that holds what the reference holds."""
        return None if self.changes else self.source

    @property
    def _made_up(self) -> bool:
        """Whether what calibrates or what judges is no data."""
        return self.split.evaluate_synthetic or (self.split.synthetic and not self.saved)

    def _stages(self) -> Stages | None:
        if not self.settings.verify:
            return None
        self.progress("running the original", 0, 0)
        return Stages(self.reference, self.split.select, floor=not self.demands.quality, synthetic=self.split.synthetic)

    def _conclude(
        self,
        model: Model,
        original: ModelFacts,
        records: Sequence[PassRecord],
        stages: Stages | None,
        meter: FootprintMeter,
    ) -> tuple[Findings, FootprintFigures | None]:
        changed = _changed(records)
        if not changed and not self.demands.budgets and not self.demands.metrics:
            return Findings(), None
        weighed = changed or meter.asked
        if weighed:
            name = self.output.name if self.output is not None else UNNAMED
            meter.add(model, name=name, loads=stages is not None)
        observed = self._observe(model, records, stages, meter) if stages is not None else None
        sizes = (original.file_bytes, file_bytes(model))
        if weighed:
            self.progress("loading both models", 0, 0)
        footprint = meter.measure(sizes) if weighed else Footprint(sizes)
        findings = decide(observed, footprint, self.demands, self.settings)
        return findings, footprint.figures() if weighed else None

    def _observe(self, model: Model, records: Sequence[PassRecord], stages: Stages, meter: FootprintMeter) -> Observed:
        """Both models run and compared; their sessions are gone when this returns."""
        threads = self.settings.threads
        rule = self._rule(records)
        # its session packs the weights once more: it is gone before the two that are compared come
        noise = stages.noise if rule == "rounding" else None
        return observe(
            Pair(Session(self.reference, threads=threads), self._deployed(model)),
            self.split.evaluate,
            self.demands,
            self.settings,
            rule=rule,
            compute_dtype=stages.compute_dtype,
            random=stages.random,
            noise=noise,
            settle=meter.settle,
            progress=self.progress,
        )

    def _deployed(self, model: Model) -> Session:
        """The result as the runtime optimizes it. Raises PassError where it can't: the original was no worse."""
        try:
            return Session(model, threads=self.settings.threads)
        except ModelError as error:
            raise PassError(
                f"the passes left a model that can't be loaded optimized: {error}",
                "leave the node out with the pass's exclude=, or leave out the pass",
            ) from error

    def _rule(self, records: Sequence[PassRecord]) -> str:
        """What the outputs of the optimized sessions are held to.

        The runtime's own fusions re-associate, so an exact pass is held to rounding here. In an original that is
        quantized already the last bit of a float may flip a quantization step: there only the floor can be held.
        """
        lossy = any(record.effect == Effect.LOSSY.value for record in records if record.status is Status.CHANGED)
        return "lossy" if lossy or quantized_nodes(self.reference) else "rounding"

    def _finish(
        self,
        model: Model,
        original: ModelFacts,
        records: Sequence[PassRecord],
        stages: Stages | None,
        findings: Findings,
        footprint: FootprintFigures | None,
    ) -> Result:
        verdict, reason = self._verdict(records, findings)
        refused = verdict is Verdict.FAILED
        memory = footprint.memory if footprint is not None else None
        quantization = self._prove(model, memory) if stages is not None and _changed(records) else None
        path = self.output
        if refused and path is not None:
            path = files.failed_path(path) if self.settings.keep_failed else None
        if self.settings.dry_run:
            path = None
        if path is not None:
            self.progress("writing", 0, 0)
            self._save(model, path, stages)
        before, after, footprint = with_footprint(original, facts(model, path), footprint)
        report = replace(
            self._report(before, records, verdict, reason, 1 if refused else 0),
            candidate=after,
            comparison=findings.comparison,
            metrics=findings.metrics,
            latency=findings.latency,
            footprint=footprint,
            quantization=quantization,
            budgets=findings.budgets,
            warnings=self._warnings(records, stages, findings),
        )
        return Result(model, report, path)

    def _prove(self, model: Model, memory: MemoryFigures | None) -> QuantizationFigures | None:
        return prove(
            self.reference,
            model,
            self.split.select,
            memory=memory,
            threads=self.settings.threads,
            saturates=self.target.saturates,
            progress=self.progress,
        )

    def _save(self, model: Model, path: Path, stages: Stages | None) -> None:
        samples = list(self.split.evaluate.take(SAVED_FEEDS)) if stages is not None else []
        files.save(
            model,
            path,
            samples,
            threads=self.settings.threads,
            timeout=self.settings.timeout,
            skip=stages.random if stages is not None else frozenset(),
            external_data=self.settings.external_data,
        )

    def _verdict(self, records: Sequence[PassRecord], findings: Findings) -> tuple[Verdict, str]:
        if findings.problems:
            more = f" (and {len(findings.problems) - 1} more)" if len(findings.problems) > 1 else ""
            return Verdict.FAILED, findings.problems[0] + more
        if not _changed(records):
            left_out = [record.name for record in records if record.status is Status.FAILED]
            if left_out:
                return Verdict.UNCHANGED, f"{', '.join(left_out)} failed and was left out"
            return Verdict.UNCHANGED, "no pass found anything to do" if self.steps else "there are no passes"
        if not self.settings.verify:
            return Verdict.NOT_VERIFIED, "nothing was compared (--no-verify)"
        if self._made_up:
            return Verdict.SYNTHETIC, "real ones (--data) say more"
        return Verdict.PASSED, ""

    def _warnings(self, records: Sequence[PassRecord], stages: Stages | None, findings: Findings) -> tuple[str, ...]:
        told = list(stages.warnings) if stages is not None else ["nothing was compared: the result is unproven"]
        if _one_feed(self.split):
            told.append("one feed calibrates, chooses and judges: the figures hold for that feed alone")
        told += [f"no pass asked for {name}" for name in self.saved.idle]
        told += wasteful(records)
        told += [f"left out: {record.error.cause}" for record in records if record.error is not None]
        return tuple(told + findings.warnings)

    def _report(
        self, original: ModelFacts, records: Sequence[PassRecord], verdict: Verdict, reason: str, exit_code: int
    ) -> Report:
        return Report(
            command="optimize",
            versions=versions(),
            reference=original,
            reference_changes=tuple(self.changes),
            candidate=None,
            verdict=verdict,
            reason=reason,
            exit_code=exit_code,
            passes_text=canonical(self.steps),
            target=self.target.name,
            seed=self.settings.seed,
            threads=self.settings.threads,
            passes=tuple(records),
            feeds=feed_facts(self.split),
            seconds=time.perf_counter() - self.started,
        )

    def _write_reports(self, report: Report) -> None:
        for path in self.reports:
            write(report, path)


def _one_feed(split: Split) -> bool:
    """Whether one and the same feed is all there is."""
    alone = len(split.fit) == len(split.evaluate) == 1
    return alone and split.fit.fingerprint == split.evaluate.fingerprint


def _changed(records: Sequence[PassRecord]) -> bool:
    return any(record.status is Status.CHANGED for record in records)
