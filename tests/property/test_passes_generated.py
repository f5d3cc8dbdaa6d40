"""Passes on generated models: none crashes, outputs stay what they were, and a second run changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
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

ROOT = Path(__file__).parents[2]
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


def assert_seeds_unharmed(first: int, last: int) -> None:
    """Models by seed, the seed printed before and after onnxruntime has seen the model as it was made."""
    for seed in range(first, last):
        random = Random(seed)
        share = random.choice((0.1, 0.3, 0.6, 0.9))
        source = Maker(seed, [feature for feature in RUNNABLE if random.random() < share]).model()
        print(f"original {seed}", flush=True)  # noqa: T201  read by the parent process
        expected(source)
        print(f"passes {seed}", flush=True)  # noqa: T201
        assert_unharmed(source)


@pytest.mark.slow
def test_passes_on_thousands_of_generated_models() -> None:
    """In a process of their own: onnxruntime has ended one while it loaded a model that no pass had touched."""
    seed, last = 0, 2000
    while seed < last:
        call = f"from tests.property.test_passes_generated import assert_seeds_unharmed as f; f({seed}, {last})"
        done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        stage, at = done.stdout.splitlines()[-1].split()
        assert (done.returncode < 0, stage) == (True, "original"), f"seed {at}: {done.stderr[-2000:]}"
        seed = int(at) + 1


def test_most_generated_models_are_judged_by_the_runtime() -> None:
    judged = sum(expected(Maker(seed, RUNNABLE[seed % 3 :: 3]).model()) is not None for seed in range(60))
    assert judged >= 30
