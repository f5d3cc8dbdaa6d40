"""Is a rewritten model still the model? onnxruntime without optimization decides, against the model as it was."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import onnx

from onnxopt.errors import PassError
from onnxopt.model import load
from onnxopt.passbase import Effect, Pass
from tests.conformance.corpus import Case
from tests.helpers import apply, assert_close, assert_equal, run


class Verdict(enum.Enum):
    """What became of a case. Only the last three are faults."""

    SAME = "same"
    UNTOUCHED = "untouched"
    REFUSED = "refused"  # the pass said why it can't
    UNJUDGED = "unjudged"  # the runtime can't run the original, or it gives something else each time
    WRONG = "wrong"
    CRASHED = "crashed"
    UNLOADABLE = "unloadable"

    @property
    def is_fault(self) -> bool:
        return self in (Verdict.WRONG, Verdict.CRASHED, Verdict.UNLOADABLE)


_EXPECTED: dict[str, dict[str, Any] | None] = {}


def expected(case: Case) -> dict[str, Any] | None:
    """The original's outputs; None where it does not run or is not deterministic. Computed once a case."""
    if case.name not in _EXPECTED:
        _EXPECTED[case.name] = _outputs_twice(case)
    return _EXPECTED[case.name]


def _outputs_twice(case: Case) -> dict[str, Any] | None:
    if case.inputs is None:
        return None
    try:
        once, twice = run(case.model, case.inputs), run(case.model, case.inputs)
        assert_equal(once, twice)
    except Exception:  # noqa: BLE001  whatever the reason, there is nothing to judge by
        return None
    return once


def judge(case: Case, passes: Sequence[Pass]) -> tuple[Verdict, str]:
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
        return Verdict.UNTOUCHED, ""
    if list(proto.graph.output) != list(case.model.graph.output):
        return Verdict.WRONG, "the outputs are described differently"
    wanted = expected(case)
    if wanted is None:
        return Verdict.UNJUDGED, ""
    return _compare(proto, case, wanted, max((each.effect for each in passes), key=list(Effect).index))


def _compare(proto: onnx.ModelProto, case: Case, wanted: dict[str, Any], effect: Effect) -> tuple[Verdict, str]:
    assert case.inputs is not None
    try:
        found = run(proto, case.inputs)
    except Exception as error:  # noqa: BLE001  the runtime's exceptions share no base
        return Verdict.UNLOADABLE, str(error).split("\n")[0]
    try:
        if effect is Effect.EXACT or any(isinstance(value, list) for value in wanted.values()):
            assert_equal(wanted, found)
        else:
            assert_close(wanted, found)
    except (AssertionError, TypeError, ValueError) as error:
        return Verdict.WRONG, str(error).split("\n")[0]
    return Verdict.SAME, ""
