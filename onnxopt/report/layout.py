"""Lines of text in 80 columns, made of spans with a role, so that a terminal may colour them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WIDTH = 80


@dataclass(frozen=True)
class Span:
    """A piece of a line. role: "plain", "head", "dim", "good", "bad" or "warn"."""

    text: str
    role: str = "plain"


Line = tuple[Span, ...]


def joined(lines: Iterable[Line]) -> str:
    """The lines as text that ends with a newline, without colours."""
    return "\n".join("".join(span.text for span in line).rstrip() for line in lines) + "\n"


def wrapped(text: str, *, break_words: bool = False, margin: int = 0) -> list[str]:
    """A paragraph, set in by two spaces, its further lines by four; `margin` columns are left for what comes before."""
    return textwrap.wrap(
        text,
        WIDTH - margin,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=break_words,
        break_on_hyphens=False,
    )


def table(rows: Sequence[Sequence[str]], align: str, *, headers: Sequence[int] = (0,)) -> Iterator[Line]:
    """Rows in columns. align: "<" or ">" for each column. headers: which rows head the others."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(align))]
    for number, row in enumerate(rows):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        yield (Span("  " + "  ".join(cells), "dim" if number in headers else "plain"),)
