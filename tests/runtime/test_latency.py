from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from onnxopt.errors import NothingCompared
from onnxopt.runtime import Session
from onnxopt.runtime.latency import measure, median_interval
from tests.runtime.builders import build_bytes


class FakeSession:
    """Advances a shared clock by a fixed time at each run, and notes who ran."""

    def __init__(self, name: str, cost: float, clock: list[float], log: list[str]) -> None:
        self.name, self.cost, self.clock, self.log = name, cost, clock, log

    def run(self, inputs: Any) -> None:
        del inputs
        # The machine slows down steadily: interleaving must cancel that.
        self.clock[0] += self.cost * (1 + self.clock[0] / 100)
        self.log.append(self.name)


def fakes(cost_a: float, cost_b: float) -> tuple[Any, Any, list[float], list[str]]:
    clock, log = [0.0], list[str]()
    return FakeSession("a", cost_a, clock, log), FakeSession("b", cost_b, clock, log), clock, log


def test_order_is_a_b_b_a_and_drift_cancels() -> None:
    a, b, clock, log = fakes(0.010, 0.020)
    latency = measure(a, b, [{}], seconds=2.0, clock=lambda: clock[0])
    assert latency.ratio == pytest.approx(2.0, rel=1e-3)
    assert latency.low <= latency.ratio <= latency.high
    timed = "".join(log)[-4 * latency.pairs :]
    assert timed == "abba" * latency.pairs


def test_times_are_milliseconds_and_at_least_six_blocks_run() -> None:
    a, b, clock, _ = fakes(0.010, 0.005)
    latency = measure(a, b, [{}], seconds=0.0, clock=lambda: clock[0])
    assert latency.pairs == 6
    assert latency.reference_ms == pytest.approx(10, rel=0.02)
    assert latency.candidate_ms == pytest.approx(5, rel=0.02)


def test_an_infinite_source_of_feeds_is_not_drained() -> None:
    a, b, clock, _ = fakes(0.01, 0.01)
    assert measure(a, b, ({} for _ in count()), seconds=0.1, clock=lambda: clock[0]).ratio == pytest.approx(1, rel=1e-3)


def test_without_feeds_nothing_is_compared() -> None:
    a, b, _, _ = fakes(1, 1)
    with pytest.raises(NothingCompared):
        measure(a, b, [])


def test_real_sessions_are_timed() -> None:
    small = Session(build_bytes("f (float[64,64] x) => (float[64,64] y) { y = MatMul(x, x) }"))
    body = "\n".join(f"t{i + 1} = MatMul(t{i}, x)" for i in range(40))
    large = Session(build_bytes(f"f (float[64,64] x) => (float[64,64] y) {{ t0 = Abs(x)\n {body}\n y = Neg(t40) }}"))
    feeds = [{"x": np.zeros((64, 64), np.float32)}]
    latency = measure(small, large, feeds, seconds=0.3)
    assert latency.low > 3
    assert latency.candidate_ms > latency.reference_ms > 0


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (100, 40), (2000, 956)])
def test_interval_ranks_are_those_of_the_binomial_tables(size: int, rank: int) -> None:
    assert median_interval([float(value) for value in range(1, size + 1)]) == (rank, size + 1 - rank)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(list(rng.exponential(size=15)))
        hits += low <= np.log(2) <= high
    assert 0.95 <= hits / 2000 < 0.985
