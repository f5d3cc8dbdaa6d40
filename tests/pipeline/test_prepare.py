from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from onnxopt.errors import UsageError
from onnxopt.model import load
from onnxopt.passbase import Effect, Pass, option
from onnxopt.pipeline import grammar
from onnxopt.pipeline.grammar import Step
from onnxopt.pipeline.prepare import check_order, quantized_nodes, with_prepared
from tests.pipeline.breaking_passes import QuantizeInput
from tests.pipeline.builders import classifier


@dataclass(frozen=True)
class Raise(Pass):
    """Raise something, for a test."""

    name: ClassVar[str] = "raise"
    to: int = option(13, "what to")

    @property
    def effect(self) -> Effect:
        """Nothing is lost."""
        return Effect.EXACT


def make(pass_name: str, *wanted: str, kind: Effect = Effect.EXACT) -> type[Pass]:
    @dataclass(frozen=True)
    class Made(Pass):
        """Made for a test."""

        name: ClassVar[str] = pass_name
        prepare: ClassVar[tuple[str, ...]] = wanted

        @property
        def effect(self) -> Effect:
            return kind

    return Made


KNOWN = {
    made.name: made
    for made in (
        make("fold"),
        make("fuse", "fold"),
        make("thin", "fuse"),
        make("pack", "fold", "fuse"),
        make("egg", "hen"),
        make("hen", "egg"),
        make("old", "raise"),
        make("new", "fold", "raise:to=19"),
        make("tidy", kind=Effect.ROUNDING),
        make("codes", "fold", kind=Effect.LOSSY),
        make("store", "tidy", "raise", kind=Effect.LOSSY),
        Raise,
    )
}


@pytest.fixture(autouse=True)
def _known_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "lookup", KNOWN.__getitem__)


def names(*listed: str) -> list[str]:
    """The prepared list, inserted passes written "fuse<thin"."""
    steps = with_prepared(grammar.parse(",".join(listed)))
    return [f"{step}<{step.inserted_for}" if step.inserted_for else str(step) for step in steps]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["fold"], ["fold"]),
        (["thin"], ["fold<thin", "fuse<thin", "thin"]),
        (["pack"], ["fold<pack", "fuse<pack", "pack"]),
        (["fold", "thin"], ["fold", "fuse<thin", "thin"]),
        (["thin", "pack"], ["fold<thin", "fuse<thin", "thin", "pack"]),
        (["thin", "thin"], ["fold<thin", "fuse<thin", "thin", "thin"]),
        (["thin", "fold"], ["fold<thin", "fuse<thin", "thin", "fold"]),
        (["new"], ["fold<new", "raise:to=19<new", "new"]),
        (["old", "new"], ["raise<old", "old", "fold<new", "raise:to=19<new", "new"]),
        (["new", "new", "old"], ["fold<new", "raise:to=19<new", "new", "new", "old"]),
        (["raise:to=19", "new"], ["raise:to=19", "fold<new", "new"]),
        (["codes", "store"], ["fold<codes", "tidy<store", "codes", "raise<store", "store"]),
        (["codes", "tidy", "store"], ["fold<codes", "codes", "tidy", "raise<store", "store"]),
    ],
)
def test_each_preparation_is_inserted_once_before_the_first_that_wants_it(
    listed: list[str], expected: list[str]
) -> None:
    assert names(*listed) == expected


def test_a_circle_of_preparations_ends() -> None:
    assert names("egg") == ["hen<egg", "egg"]


@pytest.mark.parametrize("effect", list(Effect))
def test_only_rounding_passes_are_refused_after_quantization(effect: Effect) -> None:
    model = load(classifier())
    step = Step(make("late", kind=effect)(), "late")
    check_order(step, model, 0)
    QuantizeInput().run(model, None)  # type: ignore[arg-type]
    assert quantized_nodes(model) == 2
    check_order(step, model, 2)
    if effect is Effect.ROUNDING:
        with pytest.raises(UsageError, match="'late'"):
            check_order(step, model, 0)
    else:
        check_order(step, model, 0)
