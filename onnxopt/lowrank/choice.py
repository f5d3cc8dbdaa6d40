"""How far each layer is split: what that costs the outputs of the model, and the cheapest splits first.

What a form leaves wrong at its layer is predicted from moments. What that does to the model is measured: with one layer
alone replaced by what its factors stand for, the outputs are compared with the original's on feeds that nothing was
fitted to, at two ranks. In between, and beyond, the measured error follows the predicted one. Errors of different
layers are taken to add up. The splits are then taken greedily: always the step that costs the outputs least for what it
saves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onnxopt.lowrank.forms import Form, Work
from onnxopt.lowrank.layers import Layer

# shares of the way from the gentlest form to the harshest at which a layer is tried
TRIED = (0.25, 0.75)
# a layer is not tried further once noise is this share of the outputs
HOPELESS = 0.5


@dataclass
class Curve:
    """One layer: its forms, the gentlest first, each of which saves more and leaves more wrong than the one before.

    points: (index of a form, squared error over the variance of the model's outputs), ascending.
    """

    layer: Layer
    whole: Work
    forms: list[Form]
    points: list[tuple[int, float]] = field(default_factory=list)

    def error(self, at: int) -> float:
        """Squared error at the outputs of the model with form `at`; of -1, the whole layer, 0."""
        if at < 0:
            return 0.0
        own = self.forms[at].error
        if not self.points:
            return own
        ratios = [error / max(self.forms[index].error, 1e-12) for index, error in self.points]
        place = bisect_left([index for index, _ in self.points], at)
        if place == 0 or place == len(ratios) or self.points[place][0] == at:
            return own * ratios[min(place, len(ratios) - 1)]
        low, high = self.points[place - 1][0], self.points[place][0]
        part = (at - low) / (high - low)
        return own * (ratios[place - 1] * (1 - part) + ratios[place] * part)

    def saved(self, at: int, unit: str) -> float:
        """What form `at` saves of a unit."""
        return 0.0 if at < 0 else self.whole.of(unit) - self.forms[at].work.of(unit)

    def measure(self, error: Callable[[int], float]) -> None:
        """Measure with a few forms; stops where the outputs are lost."""
        last = len(self.forms) - 1
        for at in sorted({round(share * last) for share in TRIED}):
            self.points.append((at, error(at)))
            if self.points[-1][1] > HOPELESS:
                break


def frontier(forms: Sequence[Form], whole: Work, unit: str) -> list[Form]:
    """Those forms that no other saves as much as at less error, the gentlest first."""
    kept: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.work.of(unit), form.error)):  # what saves most first
        if form.work.of(unit) < whole.of(unit) and (not kept or form.error < kept[-1].error):
            kept.append(form)
    return kept[::-1]


@dataclass(frozen=True)
class Step:
    """After it curve `curve` is at form `form`; saved, error: of all curves together."""

    curve: int
    form: int
    saved: float
    error: float


def path(curves: Sequence[Curve], unit: str, wanted: float) -> list[Step]:
    """Steps, the cheapest for what it saves first, until `wanted` is saved or nothing more can go."""
    at = [-1] * len(curves)
    steps: list[Step] = []
    saved = error = 0.0
    while saved < wanted:
        best: tuple[float, int, int] | None = None
        for index, curve in enumerate(curves):
            for form in range(at[index] + 1, len(curve.forms)):
                gain = curve.saved(form, unit) - curve.saved(at[index], unit)
                price = max(curve.error(form) - curve.error(at[index]), 1e-15) / gain
                if best is None or price < best[0]:
                    best = price, index, form
        if best is None:
            break
        _, index, form = best
        # the last step goes no further than asked
        enough = [
            each
            for each in range(at[index] + 1, form)
            if saved + curves[index].saved(each, unit) - curves[index].saved(at[index], unit) >= wanted
        ]
        form = enough[0] if enough else form
        saved += curves[index].saved(form, unit) - curves[index].saved(at[index], unit)
        error += curves[index].error(form) - curves[index].error(at[index])
        at[index] = form
        steps.append(Step(index, form, saved, error))
    return steps


def chosen(steps: Sequence[Step]) -> dict[int, int]:
    """Curve -> form after these steps."""
    return {step.curve: step.form for step in steps}
