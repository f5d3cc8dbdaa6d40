"""How much faster one session is than another, measured side by side.

Method. Both sessions live in one process and take turns on the same sample in the order A B B A, so that a slow drift
of the machine's speed (frequency, temperature, neighbours) hits both alike and cancels within a block. Each block
gives one ratio, (B + B) / (A + A). The result is the median of the ratios, with a 95 % confidence interval from their
order statistics: of n independent blocks, [r(k), r(n+1-k)] covers the median with probability
1 - 2 P(Binomial(n, 1/2) < k) (David and Nagaraja, Order Statistics, 3rd ed., section 7.1); k is the largest that still
reaches 95 %. No distribution is assumed. Below six blocks the interval is [min, max] and covers less than 95 %.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.errors import NothingCompared
from onnxopt.runtime.session import Session

MIN_BLOCKS = 6
MAX_SAMPLES = 32
_COVERAGE = 0.95


@dataclass(frozen=True)
class Latency:
    """The candidate's time over the reference's: median ratio, its 95 % interval [low, high], number of A B B A blocks.

    reference_ms, candidate_ms: median milliseconds of one run.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    reference_ms: float
    candidate_ms: float


def measure(
    a: Session,
    b: Session,
    feeds: Iterable[Any],
    *,
    seconds: float = 5.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time session b (candidate) against session a (reference) on up to 32 of the feeds, in an order drawn by `seed`.

    feeds: Samples, or mappings name -> array. Warms both up on each sample first, then runs A B B A blocks until
    `seconds` have passed, but at least six. Raises NothingCompared without feeds, PassError when a run fails.
    """
    samples = [getattr(feed, "inputs", feed) for feed, _ in zip(feeds, range(MAX_SAMPLES), strict=False)]
    if not samples:
        raise NothingCompared("no feed to time the models on", "give at least one feed with --data")
    order = np.random.default_rng(seed).permutation(len(samples))
    _warm_up(a, b, samples, seconds, clock)
    times_a: list[float] = []
    times_b: list[float] = []
    ratios: list[float] = []
    end = clock() + seconds
    while len(ratios) < MIN_BLOCKS or clock() < end:
        sample = samples[order[len(ratios) % len(samples)]]
        first_a, first_b, second_b, second_a = (_time(session, sample, clock) for session in (a, b, b, a))
        times_a += [first_a, second_a]
        times_b += [first_b, second_b]
        ratios.append((first_b + second_b) / max(first_a + second_a, 1e-12))
    low, high = median_interval(ratios)
    return Latency(
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        pairs=len(ratios),
        reference_ms=statistics.median(times_a) * 1e3,
        candidate_ms=statistics.median(times_b) * 1e3,
    )


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median of independent values, from their order statistics."""
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return ordered[rank - 1], ordered[len(ordered) - rank]


def _rank(count: int) -> int:
    """Largest k >= 1 with 1 - 2 P(Binomial(count, 1/2) < k) >= 0.95; 1 where none reaches it."""
    below = 0.0
    for rank in range(1, count // 2 + 1):
        # P(X = rank - 1) through logarithms: the coefficients themselves overflow from 1,030 values on.
        log_choose = math.lgamma(count + 1) - math.lgamma(rank) - math.lgamma(count - rank + 2)
        below += math.exp(log_choose - count * math.log(2))
        if 1 - 2 * below < _COVERAGE:
            return max(rank - 1, 1)
    return max(count // 2, 1)


def _warm_up(
    a: Session, b: Session, samples: list[Mapping[str, Any]], seconds: float, clock: Callable[[], float]
) -> None:
    """Run each sample on both, at least twice in all, for at most a fifth of the budget beyond that."""
    end = clock() + seconds / 5
    for index, sample in enumerate(samples * 2):
        if index >= 2 and clock() >= end:
            return
        a.run(sample)
        b.run(sample)


def _time(session: Session, sample: Mapping[str, Any], clock: Callable[[], float]) -> float:
    start = clock()
    session.run(sample)
    return clock() - start
