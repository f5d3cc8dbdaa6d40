"""Options that `optimize` and `check` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from onnxopt.cli.completion import metrics, pass_list, targets
from onnxopt.cli.group import SectionOption

F = TypeVar("F", bound=Callable[..., Any])

MODEL, PASSES, DATA, OUTPUT, RUN = "Model", "Passes", "Input data", "Output", "Run"
BUDGETS = "Budgets (a broken one fails the run)"


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


def passes_option(help: str, **settings: Any) -> Callable[[F], F]:
    """-p, --passes."""
    return option("-p", "--passes", metavar="LIST", shell_complete=pass_list, section=PASSES, help=help, **settings)


def samples_option(of: str) -> Callable[[F], F]:
    """--samples. of: what it counts."""
    return option(
        "--samples",
        type=click.IntRange(min=1),
        metavar="N",
        section=DATA,
        help=f"Use at most N {of}, drawn by --seed.",
    )


signature_options = combined(
    option(
        "--input-shape",
        "input_shapes",
        multiple=True,
        metavar="NAME:DIMS",
        section=MODEL,
        help="Other dims for an input, repeatable: x:1,3,224,224; -1 or a symbol leaves a length open.",
    ),
    option(
        "--inputs",
        multiple=True,
        metavar="NAMES",
        section=MODEL,
        help="Take the part of the model that begins at these tensors: a,b.",
    ),
    option(
        "--outputs",
        multiple=True,
        metavar="NAMES",
        section=MODEL,
        help="Take the part of the model that ends at these tensors: y,z.",
    ),
    option(
        "--opset",
        type=int,
        metavar="N",
        section=MODEL,
        help="Raise the operator set to N, by convert_opset in front of the passes.",
    ),
)

target_option = option(
    "--target",
    default="auto",
    metavar="NAME",
    shell_complete=targets,
    section=PASSES,
    help="Where the result will run: auto, x86, x86-vnni, arm64, tensorrt, openvino, qnn, web.",
)
_data_option = option(
    "--data",
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    section=DATA,
    help="Real inputs, repeatable: .npz, .parquet or Polygraphy's .json, a folder of one of these, pictures, ONNX "
    "test_data_set_*, a saved data set, or file.py:function.",
)
_images_option = option(
    "--images", metavar="SPEC", section=DATA, help="Preprocessing of pictures: size=224x224,mean=0.5,..."
)
_batch_option = option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    section=DATA,
    help="Feeds that calibration joins into one run. [1]",
)
_stats_option = option(
    "--stats",
    "statistics",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    section=DATA,
    help="Statistics that onnxopt calibrate gathered for these passes, repeatable.",
)

data_options = combined(
    _data_option,
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
    _images_option,
    samples_option("feeds of each part"),
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
        "--max-compressed",
        multiple=True,
        metavar="SIZE",
        section=BUDGETS,
        help="Size as in a zip archive: 4MB, or 0.3x of the original.",
    ),
    option(
        "--max-memory",
        multiple=True,
        metavar="SIZE",
        section=BUDGETS,
        help="Memory of the loaded model: 50MB, or 0.5x of the original.",
    ),
    option(
        "--max-load",
        multiple=True,
        metavar="X",
        section=BUDGETS,
        help="Time of loading: 200ms, or 0.8x of the original.",
    ),
    option(
        "--max-latency",
        multiple=True,
        metavar="X",
        section=BUDGETS,
        help="Time of a run: 3ms, or 0.8x of the original.",
    ),
)

_seed_option = option(
    "--seed", type=click.IntRange(min=0), default=0, metavar="N", section=RUN, help="Of everything drawn. [0]"
)
_limits_option = option(
    "--limits",
    type=click.Choice(["default", "strict", "off"]),
    default="default",
    section=RUN,
    help="What a model may ask for; off for one you trust. [default]",
)
_threads_option = option(
    "--threads", type=click.IntRange(min=1), default=1, metavar="N", section=RUN, help="Of every session. [1]"
)
run_options = combined(
    _seed_option,
    _limits_option,
    _threads_option,
    option(
        "--latency-seconds",
        type=click.FloatRange(min=0),
        default=2.0,
        metavar="S",
        section=RUN,
        help="Time spent timing both models; 0 leaves it out. [2]",
    ),
    option(
        "--compressed",
        is_flag=True,
        section=RUN,
        help="Compressed sizes of files above 64 MiB too; it takes a second for every 20 MB.",
    ),
)

calibration_options = combined(_batch_option, _stats_option)

format_option = option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    section=OUTPUT,
    help="What to print. [text]",
)
_verbose_option = option(
    "-v", "--verbose", count=True, section=OUTPUT, help="Every change, and each step; -vv: tracebacks too."
)
_quiet_option = option("-q", "--quiet", is_flag=True, section=OUTPUT, help="Nothing but errors.")
_force_option = option("--force", is_flag=True, section=OUTPUT, help="Replace existing files, never an input.")

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
    _force_option,
    _verbose_option,
    _quiet_option,
)

calibrate_options = combined(
    _data_option,
    _images_option,
    samples_option("feeds"),
    _batch_option,
    option(
        "--elements",
        default=None,
        metavar="N|all",
        section=DATA,
        help="Elements of each tensor that histograms look at, for each feed. [4096]",
    ),
    option("--shard", metavar="I/N", section=DATA, help="Only part I of N of the feeds; see: onnxopt merge"),
    _stats_option,
    _seed_option,
    _limits_option,
    _threads_option,
)
quiet_options = combined(_force_option, _verbose_option, _quiet_option)
looking_options = combined(
    option(
        "-v", "--verbose", count=True, section=OUTPUT, help="List everything, and tell each step; -vv: tracebacks too."
    ),
    _limits_option,
)
