"""A candidate held against a reference: the comparison and the budgets of a run, without a run."""

from __future__ import annotations

import time
from pathlib import Path

from onnxopt.errors import NothingCompared, PassError
from onnxopt.feeds import Split
from onnxopt.model import Model
from onnxopt.pipeline.facts import facts, feed_facts, versions
from onnxopt.pipeline.final import Demands, Findings, Observed, Pair, decide, observe
from onnxopt.pipeline.footprint import FootprintMeter, with_footprint
from onnxopt.pipeline.proof import prove
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.pipeline.stages import narrowest_float, random_outputs
from onnxopt.report import Report, Verdict
from onnxopt.runtime import Session
from onnxopt.target import resolve


def check(
    candidate: Model,
    reference: Model,
    split: Split,
    demands: Demands,
    settings: Settings,
    *,
    paths: tuple[Path | None, Path | None] = (None, None),
    progress: Progress = silent,
) -> Report:
    """Compare on the evaluation feeds in optimized sessions, hold the quality floor or the budgets, and report.

    paths: the files of candidate and reference. A candidate with other inputs, or that fails to run, fails the check.
    Raises NothingCompared without real inputs, ModelError for a model onnxruntime can't load.
    """
    started = time.perf_counter()
    if split.evaluate_synthetic:
        raise NothingCompared("there are no real inputs to compare on", "give them with --data")
    of_candidate, of_reference = facts(candidate, paths[0]), facts(reference, paths[1])
    quantization = footprint = None
    with FootprintMeter(reference, paths[1], settings, demands.budgets) as meter:
        meter.add(candidate, paths[0])
        observed = _observed(candidate, reference, split, demands, settings, meter, progress)
        if isinstance(observed, str):
            findings = Findings(problems=(observed,))
        else:
            progress("loading both models", 0, 0)
            found = meter.measure((of_reference.file_bytes, of_candidate.file_bytes))
            findings = decide(observed, found, demands, settings)
            of_reference, of_candidate, footprint = with_footprint(of_reference, of_candidate, found.figures())
    if findings.comparison is not None:
        quantization = prove(
            reference,
            candidate,
            split.evaluate,
            memory=footprint.memory if footprint is not None else None,
            threads=settings.threads,
            saturates=resolve().saturates,
            progress=progress,
        )
    problems = findings.problems
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Report(
        command="check",
        versions=versions(),
        reference=of_reference,
        candidate=of_candidate,
        verdict=Verdict.FAILED if problems else Verdict.PASSED,
        reason=problems[0] + more if problems else "",
        exit_code=1 if problems else 0,
        seed=settings.seed,
        threads=settings.threads,
        feeds=feed_facts(split, whole=True),
        comparison=findings.comparison,
        metrics=findings.metrics,
        latency=findings.latency,
        footprint=footprint,
        quantization=quantization,
        budgets=findings.budgets,
        warnings=tuple(findings.warnings),
        seconds=time.perf_counter() - started,
    )


def _observed(
    candidate: Model,
    reference: Model,
    split: Split,
    demands: Demands,
    settings: Settings,
    meter: FootprintMeter,
    progress: Progress,
) -> Observed | str:
    """Both models run and compared, or why that can't be; their sessions are gone when this returns."""
    pair = Pair(*(Session(model, threads=settings.threads) for model in (reference, candidate)))
    problem = _other_inputs(pair)
    if problem is not None:
        return problem
    try:
        return observe(
            pair,
            split.evaluate,
            demands,
            settings,
            rule="lossy",
            compute_dtype=narrowest_float(reference),
            random=random_outputs(reference, split.evaluate),
            settle=meter.settle,
            progress=progress,
        )
    except PassError as error:
        return error.cause


def _other_inputs(pair: Pair) -> str | None:
    """In words, how the candidate's inputs differ from the reference's; None where both take the same."""
    wanted = {port.name: port for port in pair.reference.inputs if port.required}
    found = {port.name: port for port in pair.candidate.inputs if port.required}
    for name in wanted:
        if name not in found:
            return f"the candidate has no input {name!r}"
    for name, port in found.items():
        if name not in wanted:
            return f"the candidate wants another input: {port}"
        if port.dtype != wanted[name].dtype:
            return f"the candidate takes {port}, the reference {wanted[name]}"
    return None
