from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.passbase import Effect, Pass, lookup, option
from onnxopt.pipeline import grammar
from onnxopt.pipeline.grammar import Step, canonical, parse


@dataclass(frozen=True)
class Thin(Pass):
    """Thin it out."""

    name: ClassVar[str] = "thin"
    ratio: float = option(0.0, "share", minimum=0.0, maximum=0.95)
    round_to: int = option(1, "multiple", minimum=1)
    names: tuple[str, ...] = option((), "nodes")
    deep: bool = option(False, "more")
    mode: str = option("fast", "how")

    @property
    def effect(self) -> Effect:
        return Effect.LOSSY if self.ratio else Effect.ROUNDING


@dataclass(frozen=True)
class Pack(Pass):
    """Pack it."""

    name: ClassVar[str] = "pack"


KNOWN: dict[str, type[Pass]] = {"thin": Thin, "pack": Pack}


def find(name: str) -> type[Pass]:
    if name not in KNOWN:
        raise UsageError(f"unknown pass {name!r}", did_you_mean(name, KNOWN))
    return KNOWN[name]


@pytest.fixture(autouse=True)
def _known_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "names", lambda: sorted(KNOWN))
    real = lookup
    monkeypatch.setattr(grammar, "lookup", lambda name: real(name) if ".py:" in name else find(name))


def passes(text: str) -> list[Pass]:
    return [step.pass_ for step in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("thin", [Thin()]),
        ("thin,pack", [Thin(), Pack()]),
        (" thin , pack ", [Thin(), Pack()]),
        ("thin:ratio=0.3:round_to=8,pack", [Thin(ratio=0.3, round_to=8), Pack()]),
        ("thin{ratio=0.3,round_to=8},pack", [Thin(ratio=0.3, round_to=8), Pack()]),
        ("thin{}", [Thin()]),
        ("thin:names=/a/b+/c", [Thin(names=("/a/b", "/c"))]),
        ('thin:names="a:0+b,1"', [Thin(names=("a:0", "b,1"))]),
        ("thin{names='x{1}',deep=true}", [Thin(names=("x{1}",), deep=True)]),
        ("thin:mode=a=b", [Thin(mode="a=b")]),
        ("thin,thin", [Thin(), Thin()]),
    ],
)
def test_what_a_text_means(text: str, expected: list[Pass]) -> None:
    assert passes(text) == expected


def test_python_may_mix_texts_instances_and_classes() -> None:
    steps = parse(["thin:ratio=0.5,pack", Thin(deep=True), Pack])
    assert [step.pass_ for step in steps] == [Thin(ratio=0.5), Pack(), Thin(deep=True), Pack()]
    assert parse(Pack)[0].pass_ == parse(Pack())[0].pass_ == Pack()


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("", "the pass list is empty", "--passes prune,int8"),
        ("thin,,pack", "empty place", "comma"),
        ("thin,", "empty place", "comma"),
        ("thim", "unknown pass 'thim'", "did you mean 'thin'?"),
        ("thin,ratio=0.3", "'ratio=0.3' stands alone", "thin:ratio=0.3"),
        ("thinratio=0.3", "stands alone", "quote the list"),
        ("thin:0.3", "'0.3' is no option", "onnxopt passes thin"),
        ("thin:ratio=0.3:ratio=0.4", "given twice", "one of the two"),
        ("thin{ratio=0.3,pack", "brace is not closed", "thin{key=value}"),
        ("thin:mode='x", "quote is not closed", "'"),
        ("thin:ratoi=0.3", "no option 'ratoi'", "did you mean 'ratio'?"),
        ("thin:ratio=lots", "not a number", "onnxopt passes thin"),
        ("thin:ratio=0.99", "out of range", "0.0 to 0.95"),
        ("mine.py", "names a file but no class", "mine.py:CLASS"),
        ("./mine.py:Mine", "no such pass file", "FILE.py:CLASS"),
    ],
)
def test_what_is_refused(text: str, cause: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_all_unknown_passes_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse("thim,pack,pakc")
    assert caught.value.cause == "unknown passes 'thim', 'pakc'"
    assert caught.value.remedy == "did you mean 'thin'?; did you mean 'pack'?"


MINE = """
from dataclasses import dataclass
from typing import ClassVar
from onnxopt import Effect, Pass, option

@dataclass(frozen=True)
class Mine(Pass):
    "Mine."
    name: ClassVar[str] = "mine"
    level: float = option(0.5, "how much")
"""


def test_a_pass_of_a_file_keeps_its_path_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    text = f"{tmp_path}/mine.py:Mine:level=0.25"
    steps = parse(f"{text},pack")
    assert steps[0].pass_.name == "mine"
    assert canonical(steps) == f"{text},pack"
    braces = parse(f"{tmp_path}/mine.py:Mine{{level=0.25}}")
    assert canonical(braces) == text


def test_inserted_passes_are_not_printed() -> None:
    assert canonical([Step(Pack(), "pack", inserted_for="thin"), Step(Thin(), "thin")]) == "thin"


words = st.text(st.characters(blacklist_characters="+'\"", blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(
    ratio=st.floats(0, 0.95),
    round_to=st.integers(1, 64),
    listed=st.lists(words, max_size=3),
    deep=st.booleans(),
    mode=words,
)
def test_printing_and_parsing_are_inverse(
    ratio: float, round_to: int, listed: list[str], deep: bool, mode: str
) -> None:
    steps = [
        Step(Pack(), "pack"),
        Step(Thin(ratio=ratio, round_to=round_to, names=tuple(listed), deep=deep, mode=mode), "thin"),
    ]
    text = canonical(steps)
    entries = grammar._entries(text)
    assert [KNOWN[name].parse(settings) for name, settings in entries] == [step.pass_ for step in steps]
    assert canonical([Step(KNOWN[name].parse(settings), name) for name, settings in entries]) == text
