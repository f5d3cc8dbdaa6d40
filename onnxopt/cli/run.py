"""From words to an exit code: the one place that prints errors."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from onnxopt.cli.commands import root
from onnxopt.cli.group import Interrupted, ReaderGone, translate
from onnxopt.cli.terminal import abandon, tell
from onnxopt.errors import INTERRUPTED, OnnxoptError, UsageError

_UNEXPECTED = 4
# signals that ask to leave: SIGTERM, and SIGHUP where a terminal is closed
_LEAVE = ("SIGTERM", "SIGHUP")


class Terminated(BaseException):
    """A signal that asks to leave. Not SystemExit, which a pass may raise too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def run(words: Sequence[str]) -> int:
    """Run the command and return its exit code. Errors go to stderr as `error: cause` and `hint: remedy`."""
    verbose = _wants_traceback(words)
    try:
        outcome = root.main(args=list(words), prog_name="onnxopt", standalone_mode=False)
    except OnnxoptError as error:
        return _tell(error, verbose)
    except click.ClickException as error:
        return _tell(translate(error, root.commands), verbose)
    except (Interrupted, KeyboardInterrupt, click.Abort):
        tell("interrupted", "an output is written whole or not at all, and last; run again")
        return INTERRUPTED
    except Terminated as error:
        tell("terminated", "an output is written whole or not at all, and last; run again")
        return error.exit_code
    except ReaderGone:
        # a report's reader is dealt with where it is shown, so only help or a list was cut short
        abandon(sys.stdout)
        return 0
    except OSError as error:
        abandon(sys.stdout)
        place = f"{error.filename}: " if error.filename else ""
        refused = UsageError(
            f"the system refused to read or write: {place}{error.strerror or error}", "check space and permissions"
        )
        return _tell(refused, verbose)
    except Exception as error:  # noqa: BLE001  the last resort: one line instead of a traceback
        if verbose:
            traceback.print_exc()
        text = " ".join(str(error).split())
        tell(f"unexpected {type(error).__name__}: {text}", "this is a bug; run again with -vv and report it")
        return _UNEXPECTED
    return outcome if isinstance(outcome, int) else 0


def _tell(error: OnnxoptError, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    tell(error.cause, error.remedy)
    return error.exit_code


def _wants_traceback(words: Sequence[str]) -> bool:
    """Whether -vv was given; asked before parsing, since parsing may be what fails."""
    count = sum(word.count("v") for word in words if word.startswith("-v") and not word.strip("-v"))
    return count + words.count("--verbose") >= 2


def end_cleanly_when_terminated() -> None:
    """Let SIGTERM and SIGHUP unwind the stack, so that temporary files and child processes go.

    Who ignores one of them from the start, as nohup does, goes on ignoring it.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    for name in _LEAVE:
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) == signal.SIG_IGN:
            continue
        try:
            signal.signal(number, leave)
        except ValueError:  # not in the main thread
            return
