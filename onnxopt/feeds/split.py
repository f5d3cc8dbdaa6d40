"""Which feeds calibrate, which choose, and which judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.feeds.sample import Feeds

_SHARE = 0.2
_SHARE_WITHOUT_EVALUATE = 0.25


@dataclass(frozen=True, eq=False)
class Split:
    """Feeds in three parts: fit (calibrate), select (accept refits, fall back), evaluate (final comparison).

    note: what is to be said about them, one sentence or none (""). synthetic: fit and select are made up, not data.
    evaluate_synthetic: evaluate is made up too.
    """

    fit: Feeds
    select: Feeds
    evaluate: Feeds
    note: str = ""
    synthetic: bool = False
    evaluate_synthetic: bool = False


def split_feeds(feeds: Feeds, *, seed: int = 0, evaluate: Feeds | None = None) -> Split:
    """Part the feeds by their index in an order drawn by `seed`; every part keeps the order of the source.

    Without `evaluate`: 60/20/20 percent, disjoint from three feeds on. With two, one evaluates and the other serves fit
    and select; a single one serves all three. With `evaluate` given: 75/25 into fit and select. No part is ever empty;
    the note says what is shared.
    """
    order = np.random.default_rng(seed).permutation(len(feeds)).tolist()
    count = len(order)
    if evaluate is not None:
        chosen = _size(count, _SHARE_WITHOUT_EVALUATE) if count > 1 else 0
        fit, select = _parts(feeds, order, count - chosen, chosen)
        return Split(fit, select if chosen else fit, evaluate, "" if chosen else "one feed serves fit and select")
    if count == 1:
        return Split(
            feeds, feeds, feeds, "one feed serves fit, select and evaluate: the figures are those of that feed"
        )
    if count == 2:
        fit, final = _parts(feeds, order, 1, 1)
        return Split(fit, fit, final, "of two feeds one serves fit and select, the other evaluate")
    held = _size(count, _SHARE)
    fit, select, final = _parts(feeds, order, count - 2 * held, held, held)
    return Split(fit, select, final)


def _size(count: int, share: float) -> int:
    return max(1, round(count * share))


def _parts(feeds: Feeds, order: Sequence[int], *sizes: int) -> list[Feeds]:
    ends = np.cumsum(sizes).tolist()
    return [feeds.select(sorted(order[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
