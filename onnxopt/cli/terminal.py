"""Talk and result on a terminal: stdout = result, stderr = talk; colours and progress only where a person looks."""

from __future__ import annotations

import contextlib
import io
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


def hold_streams() -> None:
    """Open what stands for closed standard streams, so that no file of ours gets their numbers and their talk.

    Characters that stdout's encoding lacks are written as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon(stream: Any) -> None:
    """Let what is still to be written to a stream that failed go nowhere: the interpreter writes it again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        hole = os.open(os.devnull, os.O_WRONLY)
        os.dup2(hole, stream.fileno())
        os.close(hole)


def show(report: Report, verbose: int, quiet: bool) -> bool:
    """Print the report on stdout. Returns whether it could be; a reader that went away is no failure."""
    if quiet:
        return True
    try:
        _print(report, verbose)
    except BrokenPipeError:
        abandon(sys.stdout)
    except OSError as error:
        abandon(sys.stdout)
        tell(f"can't write the report to stdout: {error.strerror or error}", "redirect it elsewhere, or use --report")
        return False
    return True


def _print(report: Report, verbose: int) -> None:
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
    _say(f"error: {' '.join(cause.split())}\nhint: {' '.join(remedy.split())}")


def _say(text: str) -> None:
    """Write to stderr, where it can be written to."""
    try:
        click.echo(text, err=True)
    except OSError:
        abandon(sys.stderr)


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
            _say(what)

    return step


def _fancy(stream: Any) -> bool:
    """Whether a person watches who did not ask for plain text."""
    return stream is not None and bool(stream.isatty()) and not any(os.environ.get(name) for name in _PLAIN)
