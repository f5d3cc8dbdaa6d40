"""What was measured, as figures of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnxopt.report import (
    BudgetFigures,
    ComparisonFigures,
    LatencyFigures,
    LoadFigures,
    MemoryFigures,
    MetricFigures,
    OutputFigures,
)
from onnxopt.report.quantities import milliseconds, size
from onnxopt.runtime.latency import Latency
from onnxopt.runtime.loads import Memory
from onnxopt.verification import CHANGE, Budget, Comparison, Failure, MetricChange, Verdict


def comparison_figures(
    comparison: Comparison, against: str, rule: str, failures: list[Failure] | None = None
) -> ComparisonFigures:
    """A comparison for the report; `failures` puts its reason beside each output that fails."""
    reasons = {failure.output: failure.reason for failure in failures or []}
    outputs = tuple(
        OutputFigures(
            name=output.name,
            dtype=output.dtype,
            elements=output.elements,
            differing=output.differing,
            max_abs=output.max_abs if output.kind != "discrete" else None,
            max_rel=output.relative if output.kind != "discrete" else None,
            sqnr_db=output.sqnr_db,
            cosine=output.cosine,
            agreement=output.agreement,
            argmax_agreement=output.argmax_agreement,
            problem=reasons.get(output.name),
        )
        for output in comparison.outputs.values()
    )
    return ComparisonFigures(against, rule, comparison.feeds, outputs)


def latency_figures(latency: Latency, threads: int) -> LatencyFigures:
    """A timing for the report."""
    return LatencyFigures(
        ratio=latency.ratio,
        low=latency.low,
        high=latency.high,
        pairs=latency.pairs,
        reference_ms=latency.reference_ms,
        candidate_ms=latency.candidate_ms,
        threads=threads,
    )


def load_figures(load: Latency) -> LoadFigures:
    """A timing of loading, for the report."""
    return LoadFigures(load.ratio, load.low, load.high, load.pairs, load.reference_ms, load.candidate_ms)


def memory_figures(memory: Memory) -> MemoryFigures:
    """Memory of the loaded models, for the report."""
    return MemoryFigures(memory.reference, memory.candidate, memory.noise, memory.loads)


def metric_figures(changes: Mapping[str, MetricChange], samples: int) -> tuple[MetricFigures, ...]:
    """Metrics for the report."""
    return tuple(
        MetricFigures(
            name=name,
            reference=change.reference,
            candidate=change.candidate,
            drop=change.drop,
            higher_is_better=change.higher_is_better,
            share=change.share,
            samples=samples,
        )
        for name, change in changes.items()
    )


def budget_figures(verdicts: Sequence[Verdict], budgets: Sequence[Budget]) -> tuple[BudgetFigures, ...]:
    """Verdicts for the report: the limit as the user wrote it, the measured figure in the same unit."""
    units = {budget.text: budget.unit for budget in budgets}
    return tuple(
        BudgetFigures(
            name=verdict.name,
            limit=_limit(verdict),
            measured=_measured(verdict, units.get(verdict.budget, "")),
            passed=verdict.passed,
            detail=verdict.reason,
        )
        for verdict in verdicts
    )


def _limit(verdict: Verdict) -> str:
    written = verdict.budget.rpartition("=")[2]
    return f"{'>=' if verdict.name.startswith('min_') else '<='} {written}"


def _measured(verdict: Verdict, written: str) -> str:
    value = verdict.measured
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return f"{value} {verdict.unit}".strip()
    if verdict.unit == "B":
        return size(round(value))
    if verdict.unit == "ms":
        return milliseconds(value)
    if written == CHANGE:
        return f"{(value - 1) * 100:+.4g}%"
    if written in ("pt", "%"):
        return f"{value * 100:.4g}{written}"
    return f"{value:.4g}{verdict.unit}"
