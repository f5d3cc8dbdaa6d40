"""Leaving layers float, those that cost the outputs most first, until what is asked of the outputs holds.

How much a layer costs is measured: the model runs with nothing quantized but that layer, on a few feeds. The fewest
worst layers that suffice are found by doubling and halving, each candidate judged as it would be deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from onnxopt.model import Model, Variable
from onnxopt.passbase import Context

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

    def made(self, floats: Mapping[Variable, str]) -> Model:
        """The quantized model with these layers float; output -> reason."""
        ...

    def alone(self, output: Variable) -> Model:
        """The model with nothing quantized but one layer."""
        ...


def choose(trials: Trials) -> tuple[dict[Variable, str], list[str]]:
    """(outputs of the layers that stay float -> why, what is to be said of it)."""
    context, settings = trials.context, trials.settings
    wanted = settings.aim > 0 or (settings.fallback and context.holds is not None)
    if not wanted or context.statistics is None or context.compare is None:
        return {}, []
    if _holds(trials, {}):
        return {}, []
    ranked = _ranked(trials)
    tried: dict[int, bool] = {}

    def holds(count: int) -> bool:
        if count not in tried:
            tried[count] = _holds(trials, _reasons(ranked[:count]))
        return tried[count]

    enough = next((count for count in _doubling(len(ranked)) if holds(count)), None)
    if enough is None:
        return {}, [f"what is asked of the outputs fails with all {len(ranked)} layers float too: they stay quantized"]
    low = max((count for count, held in tried.items() if not held), default=0)
    while enough - low > 1:
        middle = (low + enough) // 2
        enough, low = (middle, low) if holds(middle) else (enough, middle)
    names = ", ".join(name for _, name, _ in ranked[:enough])
    return _reasons(ranked[:enough]), [f"left float so that the outputs hold what is asked, worst first: {names}"]


def _holds(trials: Trials, floats: Mapping[Variable, str]) -> bool:
    model, context = trials.made(floats), trials.context
    if trials.settings.aim > 0 and context.compare is not None and context.compare(model) < trials.settings.aim:
        return False
    return context.holds is None or not trials.settings.fallback or context.holds(model)


def _ranked(trials: Trials) -> list[tuple[Variable, str, float]]:
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


def _reasons(layers: Sequence[tuple[Variable, str, float]]) -> dict[Variable, str]:
    return {output: f"8 bits in it cost the outputs much ({score:.1f} dB by it alone)" for output, _, score in layers}
