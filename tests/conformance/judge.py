"""Is a rewritten model still the model?

Two runtimes decide, each against the model as it was: onnxruntime without optimization, and onnx's reference evaluator
where it reproduces the test's own outputs. Inputs, outputs and metadata are held against the original's, too.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxopt.errors import PassError
from onnxopt.model import load
from onnxopt.passbase import Effect, Pass
from tests.conformance.corpus import Case
from tests.conformance.signature import lost_metadata, other_signature
from tests.helpers import apply, assert_close, assert_equal, reference, run

Outputs = dict[str, Any]


class Verdict(enum.Enum):
    """What became of a case. The last five are faults."""

    SAME = "same"
    UNTOUCHED = "untouched"
    REFUSED = "refused"  # the pass said why it can't
    UNJUDGED = "unjudged"  # no runtime can run the original, or it gives something else each time
    WRONG = "wrong"
    CRASHED = "crashed"
    UNLOADABLE = "unloadable"
    SIGNATURE = "signature"  # inputs or outputs dropped, renamed, reordered or described differently
    METADATA = "metadata"  # metadata, docs, names or versions lost

    @property
    def is_fault(self) -> bool:
        return list(Verdict).index(self) >= list(Verdict).index(Verdict.WRONG)


@dataclass
class Tally:
    """How many rewritten models each runtime has run."""

    runs: dict[str, int] = field(default_factory=lambda: {"onnxruntime": 0, "reference evaluator": 0})


_EXPECTED: dict[tuple[str, str], Outputs | None] = {}


def expected(case: Case) -> Outputs | None:
    """The original's outputs from onnxruntime; None where it does not run or is not deterministic. Once a case."""
    return _remembered("onnxruntime", case, _outputs_twice)


def expected_of_reference(case: Case) -> Outputs | None:
    """The original's outputs from onnx's evaluator. Computed once a case.

    None where it does not reproduce the test's own, or onnxruntime means something else by the model: what is folded
    is computed by onnxruntime.
    """
    return _remembered("reference", case, _reproduced)


def _remembered(judge: str, case: Case, compute: Callable[[Case], Outputs | None]) -> Outputs | None:
    key = (judge, case.name)
    if key not in _EXPECTED:
        try:
            _EXPECTED[key] = compute(case)
        except Exception:  # noqa: BLE001  whatever the reason, there is nothing to judge by
            _EXPECTED[key] = None
    return _EXPECTED[key]


def _outputs_twice(case: Case) -> Outputs | None:
    if case.inputs is None:
        return None
    once, twice = run(case.model, case.inputs), run(case.model, case.inputs)
    assert_equal(once, twice)
    return once


def _reproduced(case: Case) -> Outputs | None:
    if case.inputs is None or case.golden is None:
        return None
    found = _evaluate(case.model, case.inputs)
    for outputs in (found, expected(case) or found):
        for value, golden in zip(outputs.values(), case.golden, strict=True):
            _assert_like(value, golden)
    return found


def _evaluate(model: ModelProto, inputs: dict[str, Any]) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about casts that overflow as the tests want them to
        return reference(model, inputs)


def _assert_like(found: Any, wanted: Any) -> None:
    """The tolerance of onnx's own backend tests, 1e-3 of each element, or 1e-5 of the largest where sums cancel."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            _assert_like(one, other)
        return
    if wanted is None:
        assert found is None
        return
    one, other = np.asarray(found), np.asarray(wanted)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    if one.dtype.kind in "OUS":
        assert one.tolist() == other.tolist()
        return
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    one, other = one.astype(wide), other.astype(wide)
    largest = np.max(np.abs(other[np.isfinite(other)]), initial=0.0)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7 + 1e-5 * largest)


def judge(case: Case, passes: Sequence[Pass], tally: Tally | None = None) -> tuple[Verdict, str]:
    """Run the passes on a case; the verdict and, for faults, what happened."""
    raw = case.model.SerializeToString(deterministic=True)
    model = load(case.model)
    before = model.digest()
    try:
        for each in passes:
            apply(each, model)
        proto = model.to_proto()
    except PassError as error:
        return Verdict.REFUSED, str(error)
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return Verdict.CRASHED, f"{type(error).__name__}: {error}"
    if case.model.SerializeToString(deterministic=True) != raw:
        return Verdict.WRONG, "the given ModelProto was changed"
    if model.digest() == before:
        same = proto.SerializeToString(deterministic=True) == raw
        return (Verdict.UNTOUCHED, "") if same else (Verdict.WRONG, "the bytes differ though nothing was changed")
    difference = other_signature(case.model, proto)
    if difference:
        return Verdict.SIGNATURE, difference
    lost = lost_metadata(case.model, proto)
    if lost:
        return Verdict.METADATA, lost
    return _outputs(proto, case, max((each.effect for each in passes), key=list(Effect).index), tally or Tally())


def _outputs(proto: ModelProto, case: Case, effect: Effect, tally: Tally) -> tuple[Verdict, str]:
    """The verdict of both runtimes, the first fault if there is one."""
    judged = False
    wanted = expected(case)
    if wanted is not None:
        judged = True
        tally.runs["onnxruntime"] += 1
        exact = effect is Effect.EXACT or any(isinstance(value, list) for value in wanted.values())
        fault = _fault(lambda: run(proto, case.inputs or {}), wanted, assert_equal if exact else assert_close)
        if fault is not None:
            return fault
    wanted = expected_of_reference(case)
    if wanted is not None:
        judged = True
        tally.runs["reference evaluator"] += 1
        fault = _fault(lambda: _evaluate(proto, case.inputs or {}), wanted, _assert_all_like)
        if fault is not None:
            return fault[0], f"reference evaluator: {fault[1]}"
    return (Verdict.SAME, "") if judged else (Verdict.UNJUDGED, "")


def _assert_all_like(wanted: Outputs, found: Outputs) -> None:
    assert list(wanted) == list(found)
    for name, value in wanted.items():
        _assert_like(found[name], value)


def _fault(
    compute: Callable[[], Outputs], wanted: Outputs, compare: Callable[[Outputs, Outputs], None]
) -> tuple[Verdict, str] | None:
    try:
        found = compute()
    except Exception as error:  # noqa: BLE001  the runtimes' exceptions share no base
        return Verdict.UNLOADABLE, str(error).split("\n")[0]
    try:
        compare(wanted, found)
    except (AssertionError, TypeError, ValueError) as error:
        return Verdict.WRONG, str(error).strip().split("\n")[0]
    return None
