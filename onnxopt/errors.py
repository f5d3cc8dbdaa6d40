"""The exceptions users may meet, each with its cause, its remedy and the exit code of the command line.

| class           | exit code | meaning                                                                |
|-----------------|-----------|------------------------------------------------------------------------|
| BudgetError     | 1         | a budget or the quality floor failed                                   |
| UsageError      | 2         | missing path, bad option, unknown pass, unwritable output, wrong feeds |
| ModelError      | 3         | the model is unreadable, invalid or unsafe                             |
| PassError       | 4         | a pass or the tool failed or broke its promise                         |
| NothingCompared | 5         | nothing, or too little, was compared                                   |
| LimitError      | 6         | a resource limit was reached                                           |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130


class OnnxoptError(Exception):
    """An error with one line of cause (what and where) and one of remedy (what to do)."""

    exit_code = 4

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


class BudgetError(OnnxoptError):
    """A budget or the quality floor failed."""

    exit_code = 1


class UsageError(OnnxoptError):
    """The command, an option, a path or a configuration is wrong."""

    exit_code = 2


class FeedError(UsageError):
    """The feeds can't be read or don't match the model's inputs."""


class ModelError(OnnxoptError):
    """The model is unreadable, invalid or unsafe."""

    exit_code = 3


class PassError(OnnxoptError):
    """A pass failed or broke its promise; the model was rolled back."""

    exit_code = 4


class NothingCompared(OnnxoptError):
    """There was nothing, or too little, to compare."""

    exit_code = 5


class LimitError(OnnxoptError):
    """A limit on a resource was reached."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'prune'?" for the closest known word, or the list of all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known"
