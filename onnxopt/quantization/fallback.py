"""Leaving layers float, those that cost the outputs most first, until what is asked of the outputs holds.

How much a layer costs is measured: the model runs with nothing quantized but that layer, on a few feeds. The fewest
worst layers that suffice are found by doubling and halving, each candidate judged as it would be deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onnxopt.model import Model, Variable
from onnxopt.passbase import Context

# (output, name, dB at the outputs with that layer alone quantized)
_Ranked = tuple[Variable, str, float]
# Feeds that each layer is tried on: its rank is wanted, not its figure.
RANK_FEEDS = 4


class FallbackSettings(Protocol):
    """What `choose` asks of the settings of a pass."""

    @property
    def fallback(self) -> bool:
        """Whether layers may be left float at all."""
        ...

    @property
    def aim(self) -> float:
        """DB that outputs must reach; 0 for none."""
        ...


class Trials(Protocol):
    """Makes candidates of one model."""

    @property
    def context(self) -> Context:
        """That of the pass."""
        ...

    @property
    def settings(self) -> FallbackSettings:
        """Those of the pass."""
        ...

    @property
    def layers(self) -> list[tuple[Variable, str]]:
        """(output, name) of the layers that would be quantized."""
        ...

    def made(self, choice: Choice) -> Model:
        """The quantized model with what was chosen to stay float."""
        ...

    def alone(self, output: Variable) -> Model:
        """The model with nothing quantized but one layer."""
        ...


@dataclass(frozen=True)
class Choice:
    """What stays float. floats: outputs of layers -> why. storage: whether float weights may be stored in fewer bits.

    told: what is to be said of it.
    """

    floats: Mapping[Variable, str] = field(default_factory=dict)
    storage: bool = True
    told: tuple[str, ...] = ()


def choose(trials: Trials) -> Choice:
    """The fewest layers to leave float; where that is not enough, with weights stored as floats too."""
    context, settings = trials.context, trials.settings
    wanted = settings.aim > 0 or (settings.fallback and context.holds is not None)
    if not wanted or context.statistics is None or context.compare is None or _holds(trials, Choice()):
        return Choice()
    ranked = _ranked(trials)
    for storage in (True, False):
        count = _fewest(trials, ranked, storage)
        if count is not None:
            return Choice(_reasons(ranked[:count]), storage, (_told(ranked[:count], storage),))
    asked = "what is asked of the outputs fails with all layers and weights float too"
    return Choice(told=(f"{asked}: they stay quantized",))


def _fewest(trials: Trials, ranked: Sequence[_Ranked], storage: bool) -> int | None:
    """How many of the worst layers have to stay float; None where all are not enough. By doubling, then halving."""
    tried: dict[int, bool] = {}

    def holds(count: int) -> bool:
        if count not in tried:
            tried[count] = _holds(trials, Choice(_reasons(ranked[:count]), storage))
        return tried[count]

    counts = [0, *_doubling(len(ranked))] if not storage else _doubling(len(ranked))
    enough = next((count for count in counts if holds(count)), None)
    if not enough:
        return enough
    low = max((count for count, held in tried.items() if not held), default=0)
    while enough - low > 1:
        middle = (low + enough) // 2
        enough, low = (middle, low) if holds(middle) else (enough, middle)
    return enough


def _told(floats: Sequence[_Ranked], storage: bool) -> str:
    names = ", ".join(name for _, name, _ in floats)
    if storage:
        return f"left float so that the outputs hold what is asked, worst first: {names}"
    more = f", and layers, worst first: {names}" if floats else ""
    return f"weights are stored as floats so that the outputs hold what is asked{more}"


def _holds(trials: Trials, choice: Choice) -> bool:
    model, context = trials.made(choice), trials.context
    if trials.settings.aim > 0 and context.compare is not None and context.compare(model) < trials.settings.aim:
        return False
    return context.holds is None or not trials.settings.fallback or context.holds(model)


def _ranked(trials: Trials) -> list[_Ranked]:
    """(output, name, dB at the outputs with that layer alone quantized), lowest first."""
    context, layers = trials.context, trials.layers
    assert context.compare is not None
    found = []
    for done, (output, name) in enumerate(layers):
        context.progress(done, len(layers))
        found.append((output, name, context.compare(trials.alone(output), RANK_FEEDS)))
    return sorted(found, key=lambda entry: entry[2])


def _doubling(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return [*counts, most] if counts[-1] < most else counts[: 1 if most else 0]


def _reasons(layers: Sequence[_Ranked]) -> dict[Variable, str]:
    return {output: f"8 bits in it cost the outputs much ({score:.1f} dB by it alone)" for output, _, score in layers}
