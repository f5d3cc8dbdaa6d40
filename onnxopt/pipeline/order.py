"""Orders of passes that waste what one of them does. Data; nothing is refused for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxopt.report import PassRecord, Status

_STORED = ("int4", "int8_weights", "fp8", "fp16", "bf16")
_INTEGER = ("int8", "int8_dynamic", "fixed")
_PRUNING = ("prune", "prune_weights", "lowrank")
_FUSING = ("fold_constants", "fuse_bn", "fuse_hard_swish", "fuse_pad", "equalize", "smooth")


@dataclass(frozen=True)
class Waste:
    """Passes of which one should not run before another.

    early: names of those that changed something too soon. late: names of those that come after. why: what is lost, of
    {early} and {late}. remedy: where what belongs. kinds: only where the early one made changes of such a kind.
    """

    early: tuple[str, ...]
    late: tuple[str, ...]
    why: str
    remedy: str
    kinds: tuple[str, ...] = ()


WASTES = (
    Waste(
        ("dedup",),
        _PRUNING,
        "weights that several nodes share keep {late} from treating each by itself",
        "put {early} last",
    ),
    Waste(
        ("dedup",),
        (*_STORED, *_INTEGER, "share"),
        "a weight that {early} has computed from another one is one of its own to {late}, or left alone",
        "put {early} last",
        kinds=("transposed", "scaled", "approximated"),
    ),
    Waste(
        _STORED,
        (*_FUSING, *_PRUNING),
        "weights that {early} stores in another form are left alone by {late}, or stored anew",
        "put {early} behind {late}",
    ),
    Waste(
        ("share",),
        (*_PRUNING, "equalize", "smooth"),
        "weights that {late} changes have more values than the palettes of {early} hold",
        "put {early} behind {late}",
    ),
    Waste(
        _INTEGER,
        _PRUNING,
        "{late} leaves quantized weights alone, and scales were chosen for channels that it would remove",
        "put {late} before {early}",
    ),
)


def wasteful(records: Sequence[PassRecord]) -> list[str]:
    """A sentence for each pair of passes whose order wastes what one of them does; records: in the order they ran.

    A pass that changed nothing wastes nothing, and one that was inserted counts where it changed something.
    """
    told: dict[str, None] = {}
    for at, early in enumerate(records):
        if early.status is not Status.CHANGED:
            continue
        for late in records[at + 1 :]:
            if late.status in (Status.CHANGED, Status.UNCHANGED) and _counts(late):
                told.update((_told(waste, early, late), None) for waste in _between(early, late))
    return list(told)


def _counts(late: PassRecord) -> bool:
    return late.inserted_for is None or late.status is Status.CHANGED


def _between(early: PassRecord, late: PassRecord) -> list[Waste]:
    kinds = {change.kind for change in early.changes}
    found = [waste for waste in WASTES if early.name in waste.early and late.name in waste.late]
    return [waste for waste in found if not waste.kinds or kinds & set(waste.kinds)]


def _told(waste: Waste, early: PassRecord, late: PassRecord) -> str:
    names = {"early": early.name, "late": late.name}
    return f"{early.name} before {late.name}: {waste.why.format(**names)}; {waste.remedy.format(**names)}"
