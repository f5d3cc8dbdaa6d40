"""The command that may be left out, options in sections, and errors in our words."""

from __future__ import annotations

import difflib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from onnxopt.cli.completion import files, models
from onnxopt.errors import OnnxoptError, UsageError, did_you_mean

DEFAULT = "optimize"


class SectionOption(click.Option):
    """An option that `--help` lists under a heading of its own section."""

    def __init__(self, *args: Any, section: str = "General", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Nothing: defaults and ranges stand in the help texts where they matter."""
        return {}


class SectionCommand(click.Command):
    """A command whose help lists options by section, and that takes no option for one value twice."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words. Raises UsageError for an option for one value that is given twice."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            _refuse_repeated(order)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one definition list a section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        own = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for parameter in sorted(own, key=lambda parameter: not isinstance(parameter, SectionOption)):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "General"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=26)


def _refuse_repeated(given: Sequence[click.Parameter]) -> None:
    single = [item for item in given if isinstance(item, click.Option) and not (item.multiple or item.is_flag)]
    for option in single:
        if not option.count and single.count(option) > 1:
            name = option.opts[-1]
            joined = "join the lists by commas: --passes prune,int8" if name == "--passes" else "give it once"
            raise UsageError(f"{name} is given more than once", joined)


class Interrupted(BaseException):
    """Ctrl-C. click would print an empty line of its own for KeyboardInterrupt."""


class ReaderGone(BaseException):
    """Nobody reads stdout any more. click would end the process with exit code 1 for BrokenPipeError."""


class DefaultGroup(click.Group):
    """A group whose first word may be a model instead of a command: then `optimize` is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `optimize` in front of words that name no command. Raises UsageError for a mistyped command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if not ctx.resilient_parsing:
                self._refuse_typo(args[0])
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the words; `--help` is printed here. Raises ReaderGone for a closed pipe."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except BrokenPipeError as error:
            raise ReaderGone from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises Interrupted on Ctrl-C, ReaderGone for a closed pipe."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The first word: a command, a model, or an option of `optimize`."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            command = self.commands[DEFAULT]
            inner = click.Context(command, info_name=DEFAULT, parent=ctx, resilient_parsing=True)
            return found + [item for item in command.shell_complete(inner, incomplete) if item.value != "--help"]
        return found + models(incomplete) if found else files(incomplete)

    def _refuse_typo(self, word: str) -> None:
        if word.startswith("-") or any(mark in word for mark in "./\\") or Path(word).exists():
            return
        raise UsageError(
            f"{word!r} is neither a command nor a file",
            f"{did_you_mean(word, self.commands)}; a model is given by its path: model.onnx",
        )

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The short form of `optimize` with all its options, then the other commands."""
        command = self.commands[DEFAULT]
        with formatter.section("Usage"):
            formatter.write_text("onnxopt MODEL --passes LIST [OPTIONS]")
            formatter.write_text("onnxopt COMMAND ...")
        self.format_help_text(ctx, formatter)
        inner = click.Context(command, info_name="onnxopt", parent=None, help_option_names=["-h", "--help"])
        command.format_options(inner, formatter)
        with formatter.section("Commands"):
            others = [(name, command.get_short_help_str(60)) for name, command in self.commands.items()]
            formatter.write_dl(others)


def translate(error: click.ClickException, commands: Container[str | None]) -> OnnxoptError:
    """click's errors as ours: one line of cause, one of remedy."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    place = context.info_name if context is not None and context.info_name in commands else None
    help_line = f"run: onnxopt {place} --help" if place not in (None, DEFAULT) else "run: onnxopt --help"
    if isinstance(error, click.NoSuchOption):
        return UsageError(f"no such option: {error.option_name}", _closest_option(error) or help_line)
    if isinstance(error, click.MissingParameter):
        return _missing(error, help_line)
    if isinstance(error, click.BadOptionUsage):
        return UsageError(_lower(error.message), help_line)
    if isinstance(error, click.BadParameter):
        name = error.param.opts[-1] if error.param is not None else "argument"
        return UsageError(f"{name}: {_lower(error.message)}", help_line)
    return _extra_words(error.message) or UsageError(_lower(error.message), help_line)


def _closest_option(error: click.NoSuchOption) -> str:
    known = [name for parameter in (error.ctx.command.params if error.ctx else ()) for name in parameter.opts]
    close = difflib.get_close_matches(error.option_name, known, n=1, cutoff=0.55)
    return f"did you mean {close[0]}?" if close else ""


def _missing(error: click.MissingParameter, help_line: str) -> OnnxoptError:
    parameter = error.param
    if isinstance(parameter, click.Argument):
        return UsageError(f"no {(parameter.name or '').replace('_', ' ')} is given", help_line)
    name = parameter.opts[-1] if parameter is not None else "an option"
    return UsageError(f"{name} is missing", help_line)


def _extra_words(message: str) -> OnnxoptError | None:
    """A word too many; where it has an equals sign, most likely an option of a pass that the shell broke off."""
    if "unexpected extra argument" not in message:
        return None
    words: Sequence[str] = message.partition("(")[2].rstrip(")").split()
    option = next((word for word in words if "=" in word), None)
    if option is not None:
        from onnxopt.pipeline.grammar import stray

        return stray(option)
    return UsageError(f"unexpected word: {' '.join(words)}", "give one model; quote a path that has spaces")


def _lower(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]
