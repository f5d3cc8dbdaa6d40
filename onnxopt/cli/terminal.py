"""Talk and result on a terminal: stdout = result, stderr = talk; colours and progress only where a person looks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnxopt.report import Report

_STYLES = {"head": "bold", "dim": "dim", "good": "green", "bad": "red", "warn": "yellow"}
# variables by which the environment asks for plain text
_PLAIN = ("NO_COLOR", "CI")


def show(report: Report, verbose: int, quiet: bool) -> None:
    """Print the report on stdout."""
    if quiet:
        return
    from onnxopt.report.text_view import lines, plain

    if not _fancy(sys.stdout):
        click.echo(plain(report, detail=min(verbose, 1)), nl=False)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines(report, detail=min(verbose, 1)):
        console.print(Text.assemble(*((span.text, _STYLES.get(span.role, "")) for span in line)))


def tell(cause: str, remedy: str) -> None:
    """One line of cause and one of remedy on stderr."""
    click.echo(f"error: {' '.join(cause.split())}", err=True)
    click.echo(f"hint: {' '.join(remedy.split())}", err=True)


@contextlib.contextmanager
def spinner(verbose: int, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows progress on stderr: a live line on a terminal, with -v one line a step, else nothing."""
    if quiet or (not verbose and not _fancy(sys.stderr)):
        yield lambda _what, _done, _total: None
    elif verbose:
        yield _steps()
    else:
        yield from _live()


def _live() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def update(what: str, done: int, total: int) -> None:
            if what.startswith("timing"):
                # a line that moves would take part in what is timed
                status.stop()
                return
            status.start()
            status.update(f"{what} {done}/{total}" if total else what)

        yield update


def _steps() -> Callable[[str, int, int], None]:
    last: list[Any] = [None]

    def step(what: str, _done: int, _total: int) -> None:
        if what != last[0]:
            last[0] = what
            click.echo(what, err=True)

    return step


def _fancy(stream: Any) -> bool:
    """Whether a person watches who did not ask for plain text."""
    return bool(stream.isatty()) and not any(os.environ.get(name) for name in _PLAIN)
