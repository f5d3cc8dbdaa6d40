"""The bounds that results are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LATENCY = 1.02
BYTES = 0.35
DROP = 0.005
BESIDE_FASTEST = 1.05
# On these the fastest peer is to be met.
FAST = frozenset(
    {"efficientnet_lite0_dynamo", "efficientnet_lite0_ts", "minilm_l6_ts", "nudenet_320n", "open_nsfw"}
    | {"ppocrv4_det", "ppocrv4_rec"}
)
# More of single models: a figure, and the largest drop of it from float.
KEPT = {"minilm_l6_ts": {"wordsim": 0.005, "cosine": 0.01}}
FASTER = {"minilm_l6_ts": 1 / 1.5}
# fp16: bytes to two digits, and SQNR of the worst output; int4: bytes, and cosine of the task
HALF, HALF_DB = 0.5, 50.0
FOUR_BITS = {"minilm_l6_ts": (0.2, 0.97)}


@dataclass(frozen=True)
class Figures:
    """What one recipe reached: figures of the task, primary first; bytes and latency over the float model's."""

    recipe: str
    scores: Mapping[str, float]
    size: float
    latency: float


@dataclass(frozen=True)
class Stored:
    """What a pass reached that only stores weights. sqnr_db: None without float outputs."""

    recipe: str
    scores: Mapping[str, float]
    size: float
    sqnr_db: float | None
    cast_chains: int


def drop(before: float, after: float, higher_is_better: bool) -> float:
    """How much worse `after` is, in the metric's own units; negative where it is better."""
    return before - after if higher_is_better else after - before


def allowed_drop(before: float, peer_drop: float | None) -> float:
    """0.5 points, or 0.5 % of `before` for a metric above 1, or half of the drop of a peer, whichever is most."""
    own = DROP * max(1.0, abs(before))
    return own if peer_drop is None else max(own, peer_drop / 2)


def best_peer(peers: list[Figures], primary: str, higher_is_better: bool) -> Figures | None:
    """The most accurate of those not slower than float (up to what timing can tell)."""
    sign = 1 if higher_is_better else -1
    return max(
        (peer for peer in peers if peer.latency <= LATENCY), key=lambda peer: sign * peer.scores[primary], default=None
    )


def verdicts(
    name: str, result: Figures, before: Mapping[str, float], peers: list[Figures], higher_is_better: bool
) -> Iterator[str]:
    """Each bound with the figure and yes or no; the fastest peer is timed apart (`beside_fastest`)."""
    limit = FASTER.get(name, LATENCY)
    yield f"latency {result.latency:.2f}x, bound {limit:.2f}: {_told(result.latency <= limit)}"
    yield f"bytes {result.size:.3f}, bound {BYTES}: {_told(result.size <= BYTES)}"
    primary = next(iter(before))
    peer = best_peer(peers, primary, higher_is_better)
    worse = None if peer is None else drop(before[primary], peer.scores[primary], higher_is_better)
    beside = "no measured peer is as fast as float" if peer is None else f"{peer.recipe} drops {worse:.4f}"
    lost = drop(before[primary], result.scores[primary], higher_is_better)
    allowed = allowed_drop(before[primary], worse)
    yield f"{primary} drops {lost:.4f}, bound {allowed:.4f} ({beside}): {_told(lost <= allowed + 1e-9)}"
    for key, most in KEPT.get(name, {}).items():
        lost = before[key] - result.scores[key]
        yield f"{key} drops {lost:.4f}, bound {most}: {_told(lost <= most)}"


def storage_verdicts(name: str, stored: Stored) -> Iterator[str]:
    """Bounds of passes that only store weights, where there are any."""
    if stored.recipe.startswith("fp16"):
        yield f"bytes {stored.size:.3f}, bound {HALF}: {_told(round(stored.size, 2) <= HALF)}"
        yield f"SQNR, bound {HALF_DB:.0f} dB: {_told(stored.sqnr_db is not None and stored.sqnr_db >= HALF_DB)}"
        yield f"no Cast behind a Cast: {_told(stored.cast_chains == 0)}"
    if stored.recipe.startswith("int4") and name in FOUR_BITS:
        size, cosine = FOUR_BITS[name]
        yield f"bytes {stored.size:.3f}, bound {size}: {_told(stored.size <= size)}"
        yield f"cosine {stored.scores['cosine']:.4f}, bound {cosine}: {_told(stored.scores['cosine'] >= cosine)}"


def beside_fastest(name: str, peer: str, ratio: float, low: float, high: float) -> str:
    """Our latency over the fastest peer's, and whether that is asked for and met."""
    told = f"bound {BESIDE_FASTEST}: {_told(ratio <= BESIDE_FASTEST)}" if name in FAST else "no bound"
    return f"latency over {peer}, the fastest peer: {ratio:.2f}x [{low:.2f}, {high:.2f}], {told}"


def _told(holds: bool) -> str:
    return "yes" if holds else "NO"
