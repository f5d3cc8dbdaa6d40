"""What `optimize` and `check` do with their words: call the Python face, show its report, give its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxopt import api
from onnxopt.cli.terminal import show, spinner, tell
from onnxopt.errors import OnnxoptError, UsageError
from onnxopt.report import Report


def optimize_file(model: str, output: str | None, *, verbose: int, quiet: bool, **settings: Any) -> int:
    """Optimize a file into a file, `<stem>.onnxopt.onnx` in the current folder unless said otherwise."""
    _check_there_is_work(settings)
    target = output if output is not None else f"{Path(model).stem}.onnxopt.onnx"
    with spinner(verbose, quiet) as progress:
        try:
            result = api.optimize(
                Path(model), feeds=_or_none(settings.pop("data")), output=target, progress=progress, **_named(settings)
            )
        except api.VerdictError as error:
            refused: OnnxoptError | None = error
            result = error.result
        else:
            refused = None
    shown = show(result.report, verbose, quiet)
    if refused is not None:
        raise refused
    if result.report.exit_code:
        tell(result.report.reason, f"it was kept as {result.path}" if result.path else "loosen the budget")
    return result.report.exit_code or _code(shown)


def _check_there_is_work(settings: dict[str, Any]) -> None:
    """Raise UsageError where neither passes nor another change of the model are asked for."""
    changes = ("input_shapes", "inputs", "outputs", "opset")
    if settings["passes"] is None and not any(settings[name] for name in changes):
        raise UsageError("no passes are given", "add for example --passes prune,int8; onnxopt passes lists them")
    settings["passes"] = settings["passes"] or ()


def check_file(candidate: str, reference: str, *, verbose: int, quiet: bool, **settings: Any) -> int:
    """Hold one file against another."""
    with spinner(verbose, quiet) as progress:
        report = api.check(
            Path(candidate), Path(reference), _or_none(settings.pop("data")), progress=progress, **_named(settings)
        )
    shown = show(report, verbose, quiet)
    if report.exit_code:
        tell(f"the candidate failed the check: {report.reason}", _remedy(report))
    return report.exit_code or _code(shown)


def _remedy(report: Report) -> str:
    """What to do about a candidate that failed, by what failed first."""
    if report.comparison is None:
        return "nothing was compared: give a candidate that takes and runs on the reference's inputs"
    if any(output.problem is not None for output in report.comparison.outputs):
        return "see closeness in the report; a budget on quality, such as --max-drop, would decide instead of the floor"
    broken = {budget.name.partition("[")[0] for budget in report.budgets if not budget.passed}
    if broken and broken <= _SMALL_OR_FAST:
        return "its answers are close enough: make it smaller or faster, or loosen the budget"
    return "see closeness in the report for the output that differs most; use milder passes, or loosen the budget"


def _code(shown: bool) -> int:
    """The exit code of a run that passed."""
    return 0 if shown else UsageError.exit_code


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Options as keyword arguments: an empty tuple of a repeatable one means that it was not given."""
    return {name: None if value == () and name in _OPTIONAL else value for name, value in settings.items()}


_OPTIONAL = (
    "input_shapes",
    "inputs",
    "outputs",
    "evaluate",
    "statistics",
    "max_drop",
    "min_sqnr",
    "min_agreement",
    "max_abs",
    "max_relative",
    "max_size",
    "max_compressed",
    "max_memory",
    "max_load",
    "max_latency",
)
_SMALL_OR_FAST = {"max_size", "max_compressed", "max_memory", "max_load", "max_latency"}


def _or_none(data: tuple[str, ...]) -> list[str] | None:
    return list(data) or None
