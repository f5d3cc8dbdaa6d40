"""From words to an exit code: the one place that prints errors."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from onnxopt.cli.commands import root
from onnxopt.cli.group import Interrupted, translate
from onnxopt.cli.terminal import tell
from onnxopt.errors import INTERRUPTED, OnnxoptError

_UNEXPECTED = 4
_BROKEN_PIPE = 141
_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM. Not SystemExit, which a pass may raise too."""


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
    except Terminated:
        tell("terminated", "an output is written whole or not at all, and last; run again")
        return _TERMINATED
    except BrokenPipeError:
        # the reader went away; keep the interpreter from failing on it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
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
    """Let SIGTERM unwind the stack, so that temporary files and child processes go."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    if hasattr(signal, "SIGTERM"):
        try:
            signal.signal(signal.SIGTERM, leave)
        except ValueError:  # not in the main thread
            return
