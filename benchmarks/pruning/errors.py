"""How far the outputs of a pruned model are from those of the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.runtime import Session


@dataclass(frozen=True)
class Errors:
    """sqrt(sum (y - y0)^2 / sum y0^2) over all feeds: over all float outputs, of the worst, and of the first."""

    total: float
    worst: float
    primary: float

    def told(self) -> str:
        """In one line; the worst and the first only where they say more."""
        if self.total == self.worst == self.primary:
            return f"error {self.total:.4f}"
        return f"error {self.total:.4f} (first output {self.primary:.4f}, worst {self.worst:.4f})"


Outputs = list[dict[str, Any]]


def outputs(path: Path, feeds: Iterable[Mapping[str, Any]]) -> Outputs:
    """All outputs on each feed."""
    session = Session(path)
    return [session.run(dict(feed)) for feed in feeds]


def errors(reference: Outputs, found: Outputs) -> Errors:
    """The float outputs of a candidate beside those of the reference; inf where a shape differs or a value is NaN."""
    wrong: dict[str, float] = {}
    power: dict[str, float] = {}
    for before, after in zip(reference, found, strict=True):
        for name, values in before.items():
            if not np.issubdtype(values.dtype, np.floating):
                continue
            power[name] = power.get(name, 0.0) + float(np.square(values, dtype=np.float64).sum())
            wrong[name] = wrong.get(name, 0.0) + _squared(values, after[name])
    if not power:
        raise ValueError("no float output to compare")
    each = {name: _root(wrong[name], power[name]) for name in power}
    return Errors(_root(sum(wrong.values()), sum(power.values())), max(each.values()), next(iter(each.values())))


def _squared(one: Any, other: Any) -> float:
    if one.shape != other.shape:
        return math.inf
    found = float(np.square(one.astype(np.float64) - other).sum())
    return math.inf if math.isnan(found) else found


def _root(wrong: float, power: float) -> float:
    if wrong == 0:
        return 0.0
    return math.sqrt(wrong / power) if power else math.inf
