"""A share to ask for so that a tool removes what it should: its own argument says something else than MACs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.children import Failed

# A result counts as equal within TOLERANCE; the search stops where it is within GOOD.
TOLERANCE = 0.015
GOOD = 0.005
MOST = 0.95
_STEPS = 8
# Interpolation stays this far from both ends, as a share of what lies between.
_MARGIN = 0.1


@dataclass(frozen=True)
class Hit:
    """A share to ask for and the MACs that it leaves."""

    share: float
    macs: int


def share_for(macs_at: Callable[[float], int], before: int, target: int, seen: Mapping[float, int]) -> Hit:
    """Search the share, of which MACs are taken to fall, that leaves `target`; the nearest of all that were seen.

    before: MACs of the model that is pruned; seen: share -> MACs, known already. Raises Failed where no share comes
    within TOLERANCE.
    """
    least = macs_at(MOST)
    if least >= before:
        raise Failed("removes nothing")
    if least > target * (1 + TOLERANCE):
        raise Failed(f"removes at most {1 - least / before:.1%} of the MACs")
    hits = [Hit(0.0, before), *(Hit(share, macs) for share, macs in seen.items()), Hit(MOST, least)]
    for step in range(_STEPS):
        best = min(hits, key=lambda hit: abs(hit.macs - target))
        if abs(best.macs - target) <= GOOD * target:
            return best
        low = max((hit for hit in hits if hit.macs > target), key=lambda hit: hit.share)
        high = min((hit for hit in hits if hit.macs <= target and hit.share > low.share), key=lambda hit: hit.share)
        share = _between(low, high, target if step % 2 == 0 else None)
        hits.append(Hit(share, macs_at(share)))
    best = min(hits, key=lambda hit: abs(hit.macs - target))
    if abs(best.macs - target) > TOLERANCE * target:
        raise Failed(f"comes no nearer than {best.macs / target - 1:+.1%} of the MACs")
    return best


def _between(low: Hit, high: Hit, target: int | None) -> float:
    """Where a line through both meets the target; the middle without one."""
    part = 0.5 if target is None else (low.macs - target) / (low.macs - high.macs)
    return low.share + min(max(part, _MARGIN), 1 - _MARGIN) * (high.share - low.share)
