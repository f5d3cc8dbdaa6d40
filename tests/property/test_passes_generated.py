"""Passes on generated models: none crashes, outputs stay what they were, and a second run changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto

from onnxopt.errors import PassError
from onnxopt.model import Model, load
from onnxopt.passbase import Effect, Pass
from tests.conformance.__main__ import PASSES, make
from tests.helpers import apply, assert_close, assert_equal, session
from tests.property.protos import FEATURES, RUNNABLE, Maker, models

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FEEDS = {"x": np.linspace(-1.5, 2, 8, dtype=np.float32).reshape(2, 4), "flag": np.array(True)}
PIPELINES = [*((make(text),) for text in PASSES), tuple(make(text) for text in PASSES)]


def outputs(source: ModelProto) -> dict[str, Any]:
    runner = session(source)
    feeds = {port.name: FEEDS[port.name] for port in runner.get_inputs()}
    names = list(dict.fromkeys(port.name for port in runner.get_outputs()))
    return dict(zip(names, runner.run(names, feeds), strict=True))


def expected(source: ModelProto) -> dict[str, Any] | None:
    """The outputs; None where the runtime does not load the model or gives something else each time."""
    try:
        once, twice = outputs(source), outputs(source)
        assert_equal(once, twice)
    except Exception:  # noqa: BLE001  whatever the reason, there is nothing to judge by
        return None
    return once


def rewritten(target: Model, passes: tuple[Pass, ...]) -> bool:
    """Run the passes; False where one refuses."""
    try:
        results = [apply(each, target) for each in passes]
    except PassError:
        return False
    assert all(skip.reason for result in results for skip in result.skipped)
    return True


def assert_unharmed(source: ModelProto) -> None:
    before = source.SerializeToString(deterministic=True)
    wanted = expected(source)
    for passes in PIPELINES:
        target = load(source)
        untouched = target.digest()
        if not rewritten(target, passes):
            continue
        written, digest = target.to_proto(), target.digest()
        assert [info.name for info in written.graph.output] == [info.name for info in source.graph.output]
        assert written.metadata_props == source.metadata_props
        if len(passes) == 1:
            assert rewritten(target, passes)
            assert target.digest() == digest, f"a second run of {passes[0]} changes something"
        if wanted is not None and digest != untouched:
            exact = all(each.effect is Effect.EXACT for each in passes)
            (assert_equal if exact else assert_close)(wanted, outputs(written))
    assert source.SerializeToString(deterministic=True) == before


@settings(QUIET, max_examples=70)
@given(source=models(RUNNABLE))
def test_passes_keep_what_generated_models_compute(source: ModelProto) -> None:
    assert_unharmed(source)


@settings(QUIET, max_examples=25)
@given(source=models(FEATURES))
def test_passes_survive_what_no_runtime_loads(source: ModelProto) -> None:
    assert_unharmed(source)


@pytest.mark.slow
@settings(QUIET, max_examples=2000, derandomize=False)
@given(source=models(RUNNABLE))
def test_passes_on_thousands_of_generated_models(source: ModelProto) -> None:
    assert_unharmed(source)


def test_most_generated_models_are_judged_by_the_runtime() -> None:
    judged = sum(expected(Maker(seed, RUNNABLE[seed % 3 :: 3]).model()) is not None for seed in range(60))
    assert judged >= 30
