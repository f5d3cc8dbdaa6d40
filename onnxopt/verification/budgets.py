"""Limits on what was measured: parsed from what the user writes, held against what a run found.

| budget         | forms                                          | passes when                                     |
|----------------|------------------------------------------------|-------------------------------------------------|
| max_drop       | top1=0.5pt, top1=1%, nll=0.02, or with no name | the metric is worse by at most that             |
| min_sqnr       | 20dB, 20, output=20dB                          | the lowest SQNR of float outputs is at least it |
| min_agreement  | 0.99, 99%, output=0.99                         | the share of equal answers is at least it       |
| max_abs        | 1e-3, output=1e-3                              | max|d| is at most it                            |
| max_relative   | 1e-3, 0.1%, output=1e-3                        | max|d| / max|y| of float outputs is at most it  |
| max_size       | 5MB, 512KiB, 1000B, 0.35x, 35%, -65%           | file bytes, or their share of the reference's   |
| max_compressed | the same                                       | bytes as in a zip archive, or their share       |
| max_memory     | the same                                       | bytes of the loaded model, or their share       |
| max_latency    | 1.05x, 105%, +5%, 3ms                          | median ratio to the reference, or median ms     |
| max_load       | the same                                       | the same of the time that loading takes         |

A drop is positive when the candidate is worse, whichever way the metric points. "pt" is a point: 0.01 of a metric
between 0 and 1. "%" is relative to the reference's figure; of bytes and times it is the change where it has a sign:
-65% is 35%, +5% is 105%. A plain number is absolute, in the metric's own unit. Without a name every measured metric
(every output) is held to the limit. Times and memory are judged by the median; the reason says when the 95 % interval,
or the noise, reaches to the other side of the limit. The agreement of a discrete output is its share of equal elements,
that of a float output its share of equal argmax. Equal to the limit passes. What was not measured fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.runtime.latency import MIN_BLOCKS, Latency
from onnxopt.runtime.loads import Memory
from onnxopt.verification.compare import Comparison, OutputComparison
from onnxopt.verification.metrics import BUILTINS, MetricChange, check_names

_BYTES = {
    "MB": 1e6,
    "x": 1.0,
    "%": 0.01,
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
_TIMES = {"x": 1.0, "%": 0.01, "ms": 1.0, "s": 1e3}
# Unit -> factor to the base unit. "" is the plain number; the first of each kind is named in messages.
_UNITS: dict[str, dict[str, float]] = {
    "max_drop": {"pt": 0.01, "%": 0.01, "": 1.0},
    "min_sqnr": {"dB": 1.0, "": 1.0},
    "min_agreement": {"%": 0.01, "": 1.0},
    "max_abs": {"": 1.0},
    "max_relative": {"%": 0.01, "": 1.0},
    "max_size": _BYTES,
    "max_compressed": _BYTES,
    "max_memory": _BYTES,
    "max_latency": _TIMES,
    "max_load": _TIMES,
}
# a percentage with a sign: how much more or less than the reference
CHANGE = "±%"
_RATIOS = ("x", "%", CHANGE)
_EXAMPLES = {
    "max_drop": "top1=0.5pt",
    "min_sqnr": "20dB",
    "min_agreement": "0.99",
    "max_abs": "1e-3",
    "max_relative": "1e-3",
    "max_size": "5MB or 0.35x",
    "max_compressed": "5MB or 0.35x",
    "max_memory": "50MB or 0.5x",
    "max_latency": "1.05x",
    "max_load": "1.05x",
}
BUDGETS = tuple(_UNITS)
_NAMED = ("max_drop", "min_sqnr", "min_agreement", "max_abs", "max_relative")
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")
# A share written as a plain number from here on was most likely meant in points.
_MUCH = 0.2
# Two figures this close are equal: 0.875 - 0.87 is 0.0050000000000000044.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """One limit. kind: a name of BUDGETS. target: the metric or output it is for, "" for all. text: as written.

    limit: in base units (metric units, dB, shares, bytes, milliseconds, or a ratio); unit: "pt", "%", "x", "MB", ...,
    or CHANGE for a percentage with a sign.
    """

    kind: str
    target: str
    limit: float
    unit: str
    text: str

    @property
    def name(self) -> str:
        """max_drop, or max_drop[top1] when it is for one metric or output."""
        return f"{self.kind}[{self.target}]" if self.target else self.kind


@dataclass(frozen=True)
class Verdict:
    """A budget held against a figure. measured: None when nothing was measured (it failed then). limit: in its unit.

    unit: of measured and limit: "" (metric unit or share), "%" (a share of the reference), "dB", "x", "B" or "ms".
    """

    name: str
    measured: float | None
    limit: float
    passed: bool
    reason: str
    unit: str = ""
    budget: str = ""


@dataclass(frozen=True)
class Measured:
    """What a run measured, as far as it did. sizes, compressed: bytes of (reference, candidate).

    load: of loading, where `latency` is of a run. unmeasured: why one of the kinds of budgets has no figure.
    """

    comparison: Comparison | None = None
    metrics: Mapping[str, MetricChange] | None = None
    sizes: tuple[int, int] | None = None
    latency: Latency | None = None
    compressed: tuple[int, int] | None = None
    memory: Memory | None = None
    load: Latency | None = None
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def parse(kind: str, value: Any) -> list[Budget]:
    """Budgets of one kind from text ("top1=0.5pt"), a number, a mapping name -> limit, or a list of these.

    Raises UsageError for an unknown kind, metric or unit, and for a limit that can't be read or can't fail.
    """
    if kind not in _UNITS:
        raise UsageError(f"unknown budget {kind!r}", did_you_mean(kind, BUDGETS))
    if isinstance(value, Mapping):
        return [_parse(kind, f"{name}={limit}") for name, limit in value.items()]
    if isinstance(value, (list, tuple)):
        return [budget for item in value for budget in parse(kind, item)]
    if isinstance(value, str):
        return [_parse(kind, part.strip()) for part in value.split(",")]
    return [_parse(kind, str(value))]


def parse_all(values: Mapping[str, Any]) -> list[Budget]:
    """Budgets from kind -> value (see parse); None is skipped."""
    return [budget for kind, value in values.items() if value is not None for budget in parse(kind, value)]


def check_outputs(budgets: Iterable[Budget], outputs: Sequence[str]) -> None:
    """Raise UsageError for a budget on an output that is none of `outputs`, the original's."""
    for budget in budgets:
        name = budget.target.partition("@")[2] if budget.kind == "max_drop" else budget.target
        if ".py:" not in budget.target and name and name not in outputs:
            raise UsageError(
                f"{budget.kind} {budget.text!r}: the model has no output {name!r}", did_you_mean(name, outputs)
            )


def metric_names(budgets: Iterable[Budget]) -> list[str]:
    """The metrics that have to be measured for the budgets."""
    return list(dict.fromkeys(budget.target for budget in budgets if budget.kind == "max_drop" and budget.target))


def _parse(kind: str, text: str) -> Budget:
    target, equals, limit = text.rpartition("=")
    target = target.strip()
    if equals and kind not in _NAMED:
        raise UsageError(f"{kind} {text!r}: it takes no name", f"write {kind}={_EXAMPLES[kind]}")
    found = _NUMBER.fullmatch(limit.strip())
    if found is None:
        raise UsageError(f"{kind} {text!r}: no number can be read", f"write it like {_EXAMPLES[kind]}")
    unit = found.group(2)
    if unit not in _UNITS[kind]:
        known = [name for name in _UNITS[kind] if name]
        remedy = did_you_mean(unit, known) if unit else f"give a unit, like {_EXAMPLES[kind]}"
        how = f"in {unit!r}" if unit else "as a plain number"
        raise UsageError(f"{kind} {text!r}: it can't be given {how}", remedy)
    number = float(found.group(1)) * _UNITS[kind][unit]
    if unit == "%" and kind not in _NAMED and found.group(1)[0] in "+-":
        number, unit = 1 + number, CHANGE
    budget = Budget(kind, target, number, unit, text)
    _check(budget)
    return budget


def _check(budget: Budget) -> None:
    if not math.isfinite(budget.limit):
        raise UsageError(
            f"{budget.kind} {budget.text!r}: the limit is not finite", f"write it like {_EXAMPLES[budget.kind]}"
        )
    if budget.limit < 0 and budget.unit == CHANGE:
        raise UsageError(f"{budget.kind} {budget.text!r}: nothing shrinks by more than 100 %", "write it like -60%")
    if budget.limit < 0 and budget.kind != "min_sqnr":
        raise UsageError(f"{budget.kind} {budget.text!r}: the limit is negative", "give a limit of 0 or more")
    if budget.kind == "min_agreement" and budget.limit > 1:
        raise UsageError(f"{budget.kind} {budget.text!r}: a share can't exceed 1", "write 0.99 or 99%")
    if budget.kind == "max_drop" and budget.target:
        _check_metric(budget)


def _check_metric(budget: Budget) -> None:
    check_names([budget.target])
    builtin = BUILTINS.get(budget.target.partition("@")[0])
    if builtin is None:
        return
    if budget.unit == "pt" and not builtin.share:
        raise UsageError(
            f"max_drop {budget.text!r}: points are for metrics between 0 and 1",
            f"write a plain number ({budget.target}=0.02) or a percentage of the reference ({budget.target}=1%)",
        )
    if builtin.share and not budget.unit and _MUCH <= budget.limit < 1:
        raise UsageError(
            f"max_drop {budget.text!r}: a plain number is a share, so this means {budget.limit * 100:g} points",
            f"write {budget.target}={budget.limit:g}pt for {budget.limit:g} points, or {budget.limit * 100:g}pt",
        )
    if builtin.share and budget.unit != "%" and budget.limit >= 1:
        raise UsageError(
            f"max_drop {budget.text!r}: {budget.target} lies between 0 and 1, so this limit can't fail",
            f"write {budget.target}=0.5pt for half a point",
        )


def judge(budgets: Sequence[Budget], measured: Measured) -> list[Verdict]:
    """Each budget against what was measured; one verdict a budget, and one a metric for a max_drop without a name."""
    verdicts = []
    for budget in budgets:
        if budget.kind == "max_drop":
            verdicts += _judge_drop(budget, measured.metrics or {})
        elif budget.kind in _JUDGES:
            verdicts.append(_JUDGES[budget.kind](budget, measured))
        else:
            verdicts.append(_judge_outputs(budget, measured.comparison))
    return verdicts


def _judge_drop(budget: Budget, metrics: Mapping[str, MetricChange]) -> list[Verdict]:
    if not budget.target:
        if not metrics:
            return [_unmeasured(budget, "no metric was measured; give labels and --metric")]
        named = [Budget(budget.kind, name, budget.limit, budget.unit, budget.text) for name in metrics]
        return [verdict for each in named for verdict in _judge_drop(each, metrics)]
    change = metrics.get(budget.target) or _by_function(budget.target, metrics)
    if change is None:
        return [_unmeasured(budget, f"metric {budget.target!r} was not measured")]
    figures = f"{change.reference:.6g} became {change.candidate:.6g}"
    if budget.unit == "pt" and not change.share:
        return [_unmeasured(budget, f"points are for metrics between 0 and 1, but {figures}")]
    if budget.unit != "%":
        passed = at_most(change.drop, budget.limit, change.reference, change.candidate)
        return [_verdict(budget, change.drop, passed, figures)]
    if change.reference == 0:
        passed = change.drop <= 0
        return [_verdict(budget, 0.0 if passed else math.inf, passed, f"{figures}; a share of 0 is not defined", "%")]
    share = change.drop / abs(change.reference)
    return [_verdict(budget, share, at_most(share, budget.limit, 1.0), figures, "%")]


def _by_function(target: str, metrics: Mapping[str, MetricChange]) -> MetricChange | None:
    """file.py:function is measured under the function's name."""
    return metrics.get(target.rpartition(":")[2]) if ".py:" in target else None


def _judge_bytes(budget: Budget, sizes: tuple[int, int] | None, why: str) -> Verdict:
    if sizes is None:
        return _unmeasured(budget, why)
    reference, candidate = sizes
    ratio = budget.unit in _RATIOS
    figure = (candidate / reference if reference else math.inf) if ratio else float(candidate)
    passed = at_most(figure, budget.limit)
    return _verdict(budget, figure, passed, f"{reference} B became {candidate} B", "x" if ratio else "B")


def _judge_memory(budget: Budget, memory: Memory | None, why: str) -> Verdict:
    if memory is None:
        return _unmeasured(budget, why)
    verdict = _judge_bytes(budget, (memory.reference, memory.candidate), why)
    limit = budget.limit * memory.reference if budget.unit in _RATIOS else budget.limit
    if abs(memory.candidate - limit) > memory.noise:
        return verdict
    return replace(verdict, reason=f"{verdict.reason}, within {memory.noise} B of noise of the limit")


def _judge_time(budget: Budget, time: Latency | None, why: str) -> Verdict:
    if time is None:
        return _unmeasured(budget, why)
    if budget.unit not in _RATIOS:
        passed = at_most(time.candidate_ms, budget.limit)
        return _verdict(budget, time.candidate_ms, passed, f"reference {time.reference_ms:.4g} ms", "ms")
    passed = at_most(time.ratio, budget.limit)
    what = "95 % interval" if time.pairs >= MIN_BLOCKS else "range"
    reason = f"{what} {time.low:.3f}x to {time.high:.3f}x of {time.pairs} rounds"
    if time.low <= budget.limit < time.high:
        reason += ", which holds the limit: measure longer to be sure"
    return _verdict(budget, time.ratio, passed, reason, "x")


def _why(budget: Budget, measured: Measured, otherwise: str) -> str:
    return measured.unmeasured.get(budget.kind, otherwise)


_JUDGES: dict[str, Callable[[Budget, Measured], Verdict]] = {
    "max_size": lambda budget, measured: _judge_bytes(
        budget, measured.sizes, _why(budget, measured, "no size was measured")
    ),
    "max_compressed": lambda budget, measured: _judge_bytes(
        budget, measured.compressed, _why(budget, measured, "nothing was compressed")
    ),
    "max_memory": lambda budget, measured: _judge_memory(
        budget, measured.memory, _why(budget, measured, "no memory was measured")
    ),
    "max_latency": lambda budget, measured: _judge_time(
        budget, measured.latency, _why(budget, measured, "no latency was measured")
    ),
    "max_load": lambda budget, measured: _judge_time(
        budget, measured.load, _why(budget, measured, "no loading was timed")
    ),
}


def _judge_outputs(budget: Budget, comparison: Comparison | None) -> Verdict:
    if comparison is None or comparison.feeds == 0:
        return _unmeasured(budget, "no output was compared")
    if budget.target and budget.target not in comparison.outputs:
        hint = did_you_mean(budget.target, comparison.outputs)
        return _unmeasured(budget, f"there is no output {budget.target!r} to compare; {hint}")
    outputs = [comparison.outputs[budget.target]] if budget.target else list(comparison.outputs.values())
    figures = [(figure, output.name) for output in outputs if (figure := _FIGURES[budget.kind](output)) is not None]
    if not figures:
        return _unmeasured(budget, f"no output has a figure for {budget.kind}")
    lower_is_worse = budget.kind.startswith("min_")
    nan = next((item for item in figures if math.isnan(item[0])), None)
    figure, name = nan or (min(figures) if lower_is_worse else max(figures))
    passed = at_most(budget.limit, figure) if lower_is_worse else at_most(figure, budget.limit)
    return _verdict(budget, figure, passed, f"output {name!r}", "dB" if budget.kind == "min_sqnr" else "")


_FIGURES: dict[str, Callable[[OutputComparison], float | None]] = {
    "min_sqnr": lambda output: output.sqnr_db,
    "min_agreement": lambda output: _agreement(output),
    "max_abs": lambda output: output.max_abs,
    "max_relative": lambda output: None if output.kind == "discrete" else output.relative,
}


def _agreement(output: OutputComparison) -> float | None:
    """Equal answers; none of a tensor whose shape or NaN differ can count as agreeing."""
    share = output.agreement if output.agreement is not None else output.argmax_agreement
    return 0.0 if share is None and output.shape_mismatches else share


def at_most(figure: float, limit: float, *scales: float) -> bool:
    """figure <= limit, equal up to a billionth of the largest of the numbers; False for NaN."""
    if figure <= limit:
        return True
    scale = max((abs(number) for number in (figure, limit, *scales) if math.isfinite(number)), default=0.0)
    return figure - limit <= _ROUNDING * scale


def _verdict(budget: Budget, measured: float, passed: bool, reason: str, unit: str = "") -> Verdict:
    return Verdict(budget.name, measured, budget.limit, passed, reason, unit, budget.text)


def _unmeasured(budget: Budget, reason: str) -> Verdict:
    return Verdict(budget.name, None, budget.limit, False, f"not measured: {reason}", "", budget.text)
