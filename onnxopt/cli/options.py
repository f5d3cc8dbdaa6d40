"""Options that `optimize` and `check` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from onnxopt.cli.completion import metrics
from onnxopt.cli.group import SectionOption

F = TypeVar("F", bound=Callable[..., Any])

DATA, BUDGETS, OUTPUT, RUN = "Input data", "Budgets (a broken one fails the run)", "Output", "Run"


def option(*names: str, section: str, **settings: Any) -> Callable[[F], F]:
    """An option listed under `section`."""
    return click.option(*names, cls=SectionOption, section=section, **settings)


def combined(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several; the options are listed in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


data_options = combined(
    option(
        "--data",
        multiple=True,
        type=click.Path(),
        metavar="PATH",
        section=DATA,
        help="Real inputs, repeatable: a folder of .npz files, one .npz, ONNX test_data_set_*, pictures, or "
        "file.py:function.",
    ),
    option(
        "--eval",
        "evaluate",
        multiple=True,
        type=click.Path(),
        metavar="PATH",
        section=DATA,
        help="Inputs kept for the final comparison; else a fifth of --data.",
    ),
    option(
        "--labels",
        type=click.Path(),
        metavar="FILE",
        section=DATA,
        help="Labels of --data: .npy, .npz or .csv, one entry a feed.",
    ),
    option(
        "--eval-labels",
        "evaluate_labels",
        type=click.Path(),
        metavar="FILE",
        section=DATA,
        help="Labels of --eval.",
    ),
    option("--images", metavar="SPEC", section=DATA, help="Preprocessing of pictures: size=224x224,mean=0.5,..."),
    option(
        "--samples", type=click.IntRange(min=1), metavar="N", section=DATA, help="Use at most N feeds of each part."
    ),
    option(
        "--metric",
        "metrics",
        multiple=True,
        metavar="NAME",
        shell_complete=metrics,
        section=DATA,
        help="Task metric of both models: top1, top5, ..., or file.py:function.",
    ),
)

budget_options = combined(
    option(
        "--max-drop",
        multiple=True,
        metavar="METRIC=X",
        section=BUDGETS,
        help="How much worse a metric may get: top1=0.5pt, top1=1%.",
    ),
    option(
        "--min-sqnr", multiple=True, metavar="[OUT=]DB", section=BUDGETS, help="Signal to noise, each output: 20dB."
    ),
    option("--min-agreement", multiple=True, metavar="[OUT=]X", section=BUDGETS, help="Share of equal answers: 99%."),
    option("--max-abs", multiple=True, metavar="[OUT=]X", section=BUDGETS, help="Largest difference: 1e-3."),
    option(
        "--max-relative", multiple=True, metavar="[OUT=]X", section=BUDGETS, help="That over the largest value: 0.1%."
    ),
    option(
        "--max-size", multiple=True, metavar="SIZE", section=BUDGETS, help="File size: 5MB, or 0.35x of the original."
    ),
    option(
        "--max-latency",
        multiple=True,
        metavar="X",
        section=BUDGETS,
        help="Time of a run: 3ms, or 0.8x of the original.",
    ),
)

run_options = combined(
    option("--seed", type=click.IntRange(min=0), default=0, metavar="N", section=RUN, help="Of everything drawn. [0]"),
    option(
        "--limits",
        type=click.Choice(["default", "strict", "off"]),
        default="default",
        section=RUN,
        help="What a model may ask for; off for one you trust. [default]",
    ),
    option("--threads", type=click.IntRange(min=1), default=1, metavar="N", section=RUN, help="Of every session. [1]"),
    option(
        "--latency-seconds",
        type=click.FloatRange(min=0),
        default=2.0,
        metavar="S",
        section=RUN,
        help="Time spent timing both models; 0 leaves it out. [2]",
    ),
)

output_options = combined(
    option(
        "--report",
        "reports",
        multiple=True,
        type=click.Path(),
        metavar="FILE",
        section=OUTPUT,
        help="Write the report, repeatable, format by suffix: .json, .txt.",
    ),
    option("--force", is_flag=True, section=OUTPUT, help="Replace existing files, never an input."),
    option("-v", "--verbose", count=True, section=OUTPUT, help="Every change, and each step; -vv: tracebacks too."),
    option("-q", "--quiet", is_flag=True, section=OUTPUT, help="Nothing but errors."),
)
