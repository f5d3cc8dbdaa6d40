"""Talk and result on a terminal: stdout = result, stderr = talk; colours and progress only where a person looks."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnxopt.report import Report
    from onnxopt.report.layout import Line

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
    from onnxopt.report.text_view import lines

    show_lines(lines(report, detail=min(verbose, 1)))


def show_lines(made: Iterable[Line]) -> None:
    """Print lines on stdout, coloured where a person looks."""
    if not _fancy(sys.stdout):
        from onnxopt.report.layout import joined

        click.echo(joined(made), nl=False)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in made:
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
    """A line on stderr that says what is being done; where the steps are known, with a bar, rate and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[pace]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=8) as bar:
        task = bar.add_task("starting", total=None, pace="")
        pace = Pace()

        def update(what: str, done: int, total: int) -> None:
            if what.startswith("timing"):
                # a line that moves would take part in what is timed
                bar.stop()
                return
            bar.start()
            told = pace.tell(what, done, total)
            bar.update(task, description=what, completed=done, total=total or None, pace=told)

        yield update


class Pace:
    """How far, how fast, and how long it will still take, in words."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._started = 0.0
        self._before = 0

    def tell(self, what: str, done: int, total: int) -> str:
        """ "37/128, 42.1/s, 2 s left"; only how far while nothing is known of the speed."""
        if what != self._what or done == 0:
            # the first step may include what is done once
            self._what, self._started, self._before = what, self._clock(), done
        if not total:
            return ""
        seconds, steps = self._clock() - self._started, done - self._before
        if steps <= 0 or seconds <= 0:
            return f"{done}/{total}"
        rate = steps / seconds
        return f"{done}/{total}, {rate:.3g}/s, {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


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
