"""The last word: result against original on evaluation feeds, in the setting it will run in, and the budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from onnxopt.errors import FeedError, NothingCompared, UsageError, did_you_mean
from onnxopt.feeds import Feeds
from onnxopt.model import Model
from onnxopt.pipeline.figures import budget_figures, comparison_figures, latency_figures, metric_figures
from onnxopt.pipeline.footprint import Footprint
from onnxopt.pipeline.settings import Progress, Settings, silent
from onnxopt.pipeline.stages import hard, record_original, without
from onnxopt.report import BudgetFigures, ComparisonFigures, LatencyFigures, MetricFigures
from onnxopt.runtime import Session
from onnxopt.runtime.latency import Latency, measure
from onnxopt.verification import (
    Budget,
    Comparison,
    Failure,
    MetricChange,
    RecordedOutputs,
    check_outputs,
    compare,
    default_names,
    evaluate,
    holds,
    judge,
    metric_names,
    warnings,
)
from onnxopt.verification.tolerances import SQNR_FLOOR_DB

# budgets that say what the user means by good enough, in place of the quality floor
_QUALITY = ("max_drop", "min_sqnr", "min_agreement", "max_abs", "max_relative")
# above this ratio, with all of the 95 % interval, the report warns
_SLOWER = 1.02
RULES = {"exact": "every bit equal", "rounding": "rounding tolerance", "lossy": f"quality floor {SQNR_FLOOR_DB:g} dB"}


@dataclass(frozen=True)
class Demands:
    """What the user wants to know and to hold. metrics: names to measure besides those that budgets need."""

    budgets: tuple[Budget, ...] = ()
    metrics: tuple[str, ...] = ()

    @property
    def quality(self) -> bool:
        """Whether a budget on outputs or metrics stands in place of the quality floor."""
        return bool(self.quality_budgets)

    @property
    def quality_budgets(self) -> tuple[Budget, ...]:
        """The budgets on outputs and metrics."""
        return tuple(budget for budget in self.budgets if budget.kind in _QUALITY)

    @property
    def wanted_metrics(self) -> list[str]:
        """Every metric to measure, once."""
        return list(dict.fromkeys((*self.metrics, *metric_names(self.budgets))))

    def check_outputs(self, model: Model) -> None:
        """Refuse budgets and metrics on outputs that the original lacks. Raises UsageError."""
        names = [output.name for output in model.graph.outputs]
        check_outputs(self.budgets, names)
        for metric in self.metrics:
            output = metric.partition("@")[2] if ".py:" not in metric else ""
            if output and output not in names:
                raise UsageError(f"metric {metric!r}: the model has no output {output!r}", did_you_mean(output, names))

    def check(self, settings: Settings) -> None:
        """Refuse budgets that can't be measured in these settings. Raises UsageError."""
        kinds = {budget.kind for budget in self.budgets}
        for kind in ("max_latency", "max_load"):
            if kind in kinds and settings.latency_seconds == 0:
                raise UsageError(f"{kind} is given, but timing is off", "leave out --latency-seconds 0")
        for kind in ("max_memory", "max_load"):
            if kind in kinds and not settings.verify:
                raise UsageError(f"{kind} is given, but the result is not run", "leave out --no-verify")
        if self.quality and not settings.verify:
            raise UsageError("a budget on quality is given, but nothing is compared", "leave out --no-verify")


@dataclass(frozen=True)
class Findings:
    """What the comparison found, for the report. problems: why the run fails, empty where it passes."""

    comparison: ComparisonFigures | None = None
    metrics: tuple[MetricFigures, ...] = ()
    latency: LatencyFigures | None = None
    budgets: tuple[BudgetFigures, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """The two models of the final comparison, as they will run."""

    reference: Session
    candidate: Session


@dataclass(frozen=True)
class Observed:
    """What running both models told. failures: of the rule; held: the rule in words."""

    comparison: Comparison
    metrics: dict[str, MetricChange]
    latency: Latency | None
    failures: list[Failure]
    held: str
    warnings: list[str]
    samples: int


def _at_once() -> None:
    """Nothing runs beside the comparison."""


def observe(
    pair: Pair,
    feeds: Feeds,
    demands: Demands,
    settings: Settings,
    *,
    rule: str,
    compute_dtype: str | None = None,
    random: frozenset[str] = frozenset(),
    noise: Mapping[str, float] | None = None,
    settle: Callable[[], None] = _at_once,
    progress: Progress = silent,
) -> Observed:
    """Compare on all feeds, measure metrics and latency, and hold the outputs to the rule.

    rule: "rounding" or "lossy", what the outputs are held to. random: outputs that are not compared. noise: what the
    runtime's own reordering costs each output of the original. settle: called before anything is timed; it returns when
    the machine is quiet. Raises NothingCompared when no output is left, FeedError when labels don't fit.
    """
    reference = record_original(pair.reference, feeds, _told(progress, "running the original"))
    candidate = RecordedOutputs(pair.candidate, feeds, progress=_told(progress, "running the result"))
    comparison = without(compare(reference, candidate), random)
    if not comparison.outputs and not comparison.missing:
        raise NothingCompared(
            "no output could be compared: all are random from run to run",
            "optimize accepts a result unproven with --no-verify",
        )
    _check_anything_compared(comparison)
    metrics = _metrics(demands, reference, candidate)
    settle()
    latency = _latency(pair, feeds, settings, progress)
    failures = holds(comparison, rule, compute_dtype=compute_dtype, noise=noise)
    told = [*_unanswered(comparison), *warnings(comparison)]
    if demands.quality:
        kept = hard(failures)
        told += [f"{failure.reason}; the budgets given decide" for failure in failures if failure not in kept]
        failures = kept
    if latency is not None and latency.low > _SLOWER:
        told.append(f"it is slower: it takes {latency.ratio:.2f} times as long as the original")
    held = "budgets given" if demands.quality and rule == "lossy" else RULES[rule]
    return Observed(comparison, metrics, latency, failures, held, told, len(feeds))


def decide(observed: Observed | None, footprint: Footprint, demands: Demands, settings: Settings) -> Findings:
    """The budgets, held against all that was measured. observed: None where nothing was compared."""
    measured = footprint.measured()
    if observed is not None:
        measured = replace(measured, comparison=observed.comparison, metrics=observed.metrics, latency=observed.latency)
    figures = budget_figures(judge(demands.budgets, measured), demands.budgets)
    broken = tuple(
        f"{budget.name} is {budget.measured}, allowed is {budget.limit}" for budget in figures if not budget.passed
    )
    if observed is None:
        return Findings(budgets=figures, problems=broken)
    latency = observed.latency
    return Findings(
        comparison=comparison_figures(observed.comparison, "the original", observed.held, observed.failures),
        metrics=metric_figures(observed.metrics, observed.samples),
        latency=latency_figures(latency, settings.threads) if latency is not None else None,
        budgets=figures,
        problems=(*(failure.reason for failure in observed.failures), *broken),
        warnings=observed.warnings,
    )


def _check_anything_compared(comparison: Comparison) -> None:
    """Raise NothingCompared where not one finite number or discrete element of the original stood to be compared."""
    outputs = comparison.outputs.values()
    compared = sum(output.elements - output.nonfinite_reference for output in outputs)
    differ = comparison.missing or any(output.shape_mismatches or output.dtype_mismatch for output in outputs)
    if compared == 0 and not differ:
        raise NothingCompared(
            "not one number was compared: the original's outputs are empty, NaN or infinite on all feeds",
            "give feeds that the original answers with numbers",
        )


def _unanswered(comparison: Comparison) -> list[str]:
    """Where the original itself gives nothing to hold a result against, one sentence an output."""
    told = []
    for output in comparison.outputs.values():
        if output.elements == 0:
            told.append(f"output {output.name!r} is empty on all feeds: nothing of it was compared")
        elif output.nonfinite_reference:
            share = f"{output.nonfinite_reference} of {output.elements} elements"
            told.append(f"output {output.name!r} of the original: {share} are NaN or infinite; only their places count")
    return told


def _metrics(demands: Demands, reference: RecordedOutputs, candidate: RecordedOutputs) -> dict[str, MetricChange]:
    wanted = demands.wanted_metrics
    if wanted:
        return evaluate(wanted, reference, candidate)
    try:
        return evaluate(default_names(reference), reference, candidate)
    except FeedError:
        # nobody asked for it: labels that fit no metric are no reason to fail
        return {}


def _latency(pair: Pair, feeds: Feeds, settings: Settings, progress: Progress) -> Latency | None:
    if settings.latency_seconds == 0:
        return None
    progress("timing both models", 0, 0)
    return measure(pair.reference, pair.candidate, feeds, seconds=settings.latency_seconds, seed=settings.seed)


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
