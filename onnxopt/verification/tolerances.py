"""When a comparison keeps a promise: the one table of tolerances and floors.

| effect   | float outputs                                         | discrete outputs                         |
|----------|-------------------------------------------------------|------------------------------------------|
| exact    | every bit equal (any NaN equals any NaN)              | equal                                    |
| rounding | max|d| <= ROUNDING[dtype] * max|y| per output, or    | equal                                    |
|          | 4 times the runtime's own reordering of that output   |                                          |
| lossy    | SQNR >= 3 dB, warning below 10 dB; where shapes       | at least half of the elements equal      |
|          | differ: at least half of the elements close           |                                          |

Under every effect these fail: a missing, added, renamed, reordered or re-typed output, and NaN or infinity in other
places than the reference has them. Shapes that differ fail unless the effect is lossy. Equal to the limit passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

from onnxopt.errors import NothingCompared
from onnxopt.verification.compare import Comparison, OutputComparison

# max|d| / max|y| that re-association may cost. onnxruntime's own reordering of well-conditioned models stays below
# 4e-7 for float32; on some trained ones it reaches 1e-4, which `reordering` measures and `holds` allows for. Narrow
# types are computed in float32 and rounded once an operator: a few steps of their epsilon (float16 9.8e-4, bfloat16
# 7.8e-3, float8 one step).
ROUNDING = MappingProxyType(
    {
        "float64": 1e-13,
        "float32": 1e-5,
        "float16": 4e-3,
        "bfloat16": 3.2e-2,
        "float8_e4m3fn": 0.125,
        "float8_e4m3fnuz": 0.125,
        "float8_e5m2": 0.25,
        "float8_e5m2fnuz": 0.25,
    }
)
# A rounding pass may reorder sums a few times as much as the runtime does, but never lose two digits.
REORDERING_FACTOR = 4.0
REORDERING_CEILING = 1e-2
SQNR_FLOOR_DB = 3.0
SQNR_WARNING_DB = 10.0
AGREEMENT_FLOOR = 0.5
# Fewer feeds say little about how much an output varies between them.
_FEEDS_TO_JUDGE = 4
EFFECTS = ("exact", "rounding", "lossy")


@dataclass(frozen=True)
class Failure:
    """A promise that was not kept. output: its name, "" for all of them. rule: exact, rounding, lossy or signature.

    reason: one sentence with the figures. measured, limit: where the rule is a limit.
    """

    output: str
    rule: str
    reason: str
    measured: float | None = None
    limit: float | None = None


def reordering(comparison: Comparison) -> dict[str, float]:
    """max|d| / max|y| per float output between two runs of one model that differ only in how the runtime orders sums.

    Give it the comparison of the unoptimized with the optimized session of the same model on the same feeds.
    """
    return {
        name: output.relative
        for name, output in comparison.outputs.items()
        if output.kind == "float" and math.isfinite(output.relative) and not output.shape_mismatches
    }


def holds(
    comparison: Comparison,
    effect: str,
    *,
    compute_dtype: str | None = None,
    noise: Mapping[str, float] | None = None,
) -> list[Failure]:
    """What the comparison breaks of the promise `effect` ("exact", "rounding" or "lossy"); nothing when it holds.

    noise: per output what `reordering` measured of the original; a rounding pass may cost REORDERING_FACTOR times that
    where it is more than the table allows, up to REORDERING_CEILING.

    compute_dtype: the narrowest float type the model computes in, when that is narrower than its outputs (a float16
    model with float32 outputs); it sets the rounding tolerance. Raises NothingCompared when no feed or no output was
    compared.
    """
    if effect not in EFFECTS:
        raise ValueError(f"effect {effect!r} is none of {', '.join(EFFECTS)}")
    failures = _signature(comparison)
    if comparison.feeds == 0 or (not comparison.outputs and not failures):
        raise NothingCompared("no output was compared", "give at least one feed with --data")
    rules: dict[str, Callable[[OutputComparison], Failure | None]] = {
        "exact": _exact,
        "rounding": lambda output: _rounding(output, compute_dtype, (noise or {}).get(output.name, 0.0)),
        "lossy": _lossy,
    }
    for output in comparison.outputs.values():
        failure = _type(output) or rules[effect](output)
        if failure is not None:
            failures.append(failure)
    return failures


def warnings(comparison: Comparison) -> list[str]:
    """What a lossy result should be told about though it passes, one sentence an output."""
    found = []
    for output in comparison.outputs.values():
        if output.sqnr_db is not None and SQNR_FLOOR_DB <= output.sqnr_db < SQNR_WARNING_DB:
            found.append(f"output {output.name!r}: SQNR is only {output.sqnr_db:.1f} dB (below {SQNR_WARNING_DB:g} dB)")
        elif comparison.feeds >= _FEEDS_TO_JUDGE and _over_feeds(output) < SQNR_FLOOR_DB <= _number(output):
            found.append(
                f"output {output.name!r}: it hardly follows its inputs: its error is as large as the differences "
                f"between feeds ({output.sqnr_over_feeds_db:.1f} dB)"
            )
    return found


def rounding_tolerance(dtype: str, compute_dtype: str | None = None) -> float:
    """max|d| / max|y| allowed for an output of `dtype` of a model that computes in `compute_dtype`."""
    return max(ROUNDING.get(name, ROUNDING["float32"]) for name in filter(None, (dtype, compute_dtype)))


def _over_feeds(output: OutputComparison) -> float:
    return math.inf if output.sqnr_over_feeds_db is None else output.sqnr_over_feeds_db


def _number(output: OutputComparison) -> float:
    return -math.inf if output.sqnr_db is None else output.sqnr_db


def _signature(comparison: Comparison) -> list[Failure]:
    if comparison.missing and len(comparison.missing) == len(comparison.added):
        pairs = zip(comparison.missing, comparison.added, strict=True)
        return [Failure(old, "signature", f"output {old!r} is gone, {new!r} is in its place") for old, new in pairs]
    failures = [Failure(name, "signature", f"output {name!r} is missing") for name in comparison.missing]
    failures += [Failure(name, "signature", f"output {name!r} was added") for name in comparison.added]
    if comparison.reordered:
        failures.append(Failure("", "signature", "the outputs are in another order"))
    return failures


def _type(output: OutputComparison) -> Failure | None:
    if not output.dtype_mismatch:
        return None
    reason = f"output {output.name!r} is {output.candidate_dtype}, was {output.dtype}"
    return Failure(output.name, "signature", reason)


def _exact(output: OutputComparison) -> Failure | None:
    if output.bit_equal:
        return None
    zeros = " (only in the sign of zero)" if output.max_abs == 0 and not output.shape_mismatches else ""
    return Failure(output.name, "exact", f"{_census(output)}{zeros}{_first(output)}", float(output.differing), 0.0)


def _rounding(output: OutputComparison, compute_dtype: str | None, noise: float) -> Failure | None:
    if output.shape_mismatches or output.nonfinite_mismatches:
        return _broken(output, "rounding")
    if output.agreement is not None and output.agreement < 1:
        return Failure(output.name, "rounding", f"{_census(output)}{_first(output)}", output.agreement, 1.0)
    if output.kind == "discrete":
        return None
    limit = rounding_tolerance(output.dtype, compute_dtype)
    limit = max(limit, min(REORDERING_FACTOR * noise, REORDERING_CEILING))
    if output.max_abs <= limit * output.max_reference or output.max_abs <= _tiny(output.dtype):
        return None
    reason = f"output {output.name!r}: max|d| is {output.relative:.3g} of max|y|, allowed is {limit:g}{_first(output)}"
    return Failure(output.name, "rounding", reason, output.relative, limit)


def _tiny(dtype: str) -> float:
    """The smallest normal number: kernels may flush what is below it to zero."""
    return float(ml_dtypes.finfo(np.dtype(getattr(ml_dtypes, dtype, dtype))).tiny) if dtype in ROUNDING else 0.0


def _lossy(output: OutputComparison) -> Failure | None:
    if output.nonfinite_mismatches:
        return _broken(output, "lossy")
    shares = [("equal", output.agreement)]
    # SQNR is undefined where shapes depend on the data; then enough elements have to be close.
    if output.shape_mismatches and output.close is not None:
        shares.append(("close", output.close))
    elif output.sqnr_db is not None and not output.sqnr_db >= SQNR_FLOOR_DB:
        reason = f"output {output.name!r}: SQNR is {output.sqnr_db:.1f} dB, the floor is {SQNR_FLOOR_DB:g} dB"
        return Failure(output.name, "lossy", f"{reason}{_first(output)}", output.sqnr_db, SQNR_FLOOR_DB)
    for word, share in shares:
        if share is not None and share < AGREEMENT_FLOOR:
            reason = (
                f"output {output.name!r}: {share:.1%} of its elements are {word}, the floor is {AGREEMENT_FLOOR:.0%}"
            )
            return Failure(output.name, "lossy", f"{reason}{_first(output)}", share, AGREEMENT_FLOOR)
    return None


def _broken(output: OutputComparison, rule: str) -> Failure:
    if output.nonfinite_mismatches:
        what = f"{output.nonfinite_mismatches} of {output.elements} elements are NaN or infinite on one side only"
        return Failure(output.name, rule, f"output {output.name!r}: {what}{_first(output)}")
    what = f"{output.shape_mismatches} tensors have another shape"
    return Failure(output.name, rule, f"output {output.name!r}: {what}{_first(output)}")


def _census(output: OutputComparison) -> str:
    return f"output {output.name!r}: {output.differing} of {output.elements} elements differ"


def _first(output: OutputComparison) -> str:
    if not output.worst:
        return ""
    worst = output.worst[0]
    index = "".join(f"[{part}]" for part in worst.index)
    return f"; worst at {worst.source}{index}: {_text(worst.reference)} became {_text(worst.candidate)}"


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
