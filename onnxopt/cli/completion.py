"""What the shell is offered while a command is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
_BASH = "complete -o nosort -F"


def script(shell: str, root: click.Command) -> str:
    """The completion script of bash, zsh or fish. In bash, file names follow where nothing else fits."""
    made = get_completion_class(shell)
    assert made is not None
    source = made(root, {}, "onnxopt", "_ONNXOPT_COMPLETE").source()
    return source.replace(_BASH, _BASH.replace("-F", "-o default -F"))


def files(incomplete: str) -> list[CompletionItem]:
    """Let the shell complete file names."""
    return [CompletionItem(incomplete, type="file")]


def models(incomplete: str) -> list[CompletionItem]:
    """Model files, to stand beside other words: shells offer either words or file names of their own."""
    folder = Path(incomplete).parent
    found = sorted(folder.glob("*.onnx")) if folder.is_dir() else []
    return [CompletionItem(str(path)) for path in found if str(path).startswith(incomplete)]


def pass_list(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The last pass of a list, or the file of a pass of one's own."""
    done, comma, last = incomplete.rpartition(",")
    found = [CompletionItem(done + comma + name) for name in _pass_names() if name.startswith(last)]
    return found or files(incomplete)


def targets(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The known targets."""
    from onnxopt.target import TARGETS

    return _starting(incomplete, ["auto", *TARGETS])


def metrics(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The metrics that are built in, or the file of one's own."""
    from onnxopt.verification.metrics import BUILTINS

    return _starting(incomplete, BUILTINS) or files(incomplete)


def _starting(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _pass_names() -> list[str]:
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group="onnxopt.passes")})
