"""What these tests share: a look at the sessions that are made."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from onnxopt.calibration.instrument import Wanted
from onnxopt.calibration.sessions import Probe


@dataclass
class Made:
    """asked: of each session what it reports of each tensor. handed: of each run how many tensors whole, and bytes."""

    asked: list[dict[str, Wanted]] = field(default_factory=list)
    handed: list[tuple[int, int]] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """How often any of them ran."""
        return len(self.handed)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The sessions that are made from here on."""
    seen = Made()
    init, run = Probe.__init__, Probe.run

    def making(self: Probe, model: Any, plan: Any, asks: Sequence[Any], **options: Any) -> None:
        seen.asked.append({ask.tensor.variable.name: ask.wanted for ask in asks})
        init(self, model, plan, asks, **options)

    def running(self: Probe, *args: Any, **options: Any) -> Any:
        report = run(self, *args, **options)
        whole = [value.nbytes for _, reading, value in report.readings if reading.figure == "whole"]
        seen.handed.append((len(whole), sum(whole)))
        return report

    monkeypatch.setattr(Probe, "__init__", making)
    monkeypatch.setattr(Probe, "run", running)
    return seen


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many elements a saving must be of before extremes are left out; none from the start."""
    module = importlib.import_module("onnxopt.calibration.collect")

    def elements(count: int) -> None:
        monkeypatch.setattr(module, "_MANY", count)

    elements(0)
    return elements
