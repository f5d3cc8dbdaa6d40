"""The commands and their options; what they do is in onnxopt.api."""

from __future__ import annotations

from typing import Any

import click

from onnxopt import __version__
from onnxopt.cli import completion as completions
from onnxopt.cli.group import DefaultGroup, SectionCommand
from onnxopt.cli.options import (
    DATA,
    OUTPUT,
    PASSES,
    RUN,
    budget_options,
    calibrate_options,
    calibration_options,
    combined,
    data_options,
    format_option,
    looking_options,
    option,
    output_options,
    passes_option,
    quiet_options,
    run_options,
    signature_options,
    target_option,
)

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


@click.group(cls=DefaultGroup, context_settings=_CONTEXT, invoke_without_command=True)
@click.version_option(__version__, prog_name="onnxopt", message="%(prog)s %(version)s")
@click.pass_context
def root(context: click.Context) -> None:
    """Make a trained ONNX model smaller and faster, and prove what it cost."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_optimize_options = combined(
    target_option,
    option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        section=PASSES,
        help="What a failing pass, always rolled back, does to the run. [stop]",
    ),
    signature_options,
    data_options,
    calibration_options,
    option("--require-data", is_flag=True, section=DATA, help="Exit 5 instead of making inputs up."),
    budget_options,
    option(
        "-o",
        "--output",
        type=click.Path(),
        metavar="FILE",
        section=OUTPUT,
        help="Where to write. [./MODEL.onnxopt.onnx]",
    ),
    option("--keep-failed", is_flag=True, section=OUTPUT, help="Write a failed result too, as .failed.onnx."),
    option(
        "--external-data",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        section=OUTPUT,
        help="Weights in a file beside the model; auto: above 2 GB. [auto]",
    ),
    option("--dry-run", is_flag=True, section=OUTPUT, help="Do all but write the model."),
    output_options,
    run_options,
    option("--no-verify", is_flag=True, section=RUN, help="Compare nothing; the report says so."),
)


@root.command(cls=SectionCommand, short_help="Rewrite MODEL, compare, and write the result.")
@click.argument("model", metavar="MODEL", type=click.Path())
@passes_option("What to do, in order: prune,int8 or prune:round_to=8,int8. See: onnxopt passes")
@_optimize_options
def optimize(model: str, output: str | None, no_verify: bool, verbose: int, quiet: bool, **settings: Any) -> int:
    """Rewrite MODEL with passes, compare the result with it, and write the result if it keeps its promises.

    Exit codes: 0 passed, 1 a budget or the quality floor failed, 2 wrong usage, 3 unreadable model, 4 a pass failed,
    5 nothing compared, 6 a limit was reached, 130 interrupted.
    """
    from onnxopt.cli.actions import optimize_file

    return optimize_file(model, output, verify=not no_verify, verbose=verbose, quiet=quiet, **settings)


@root.command(cls=SectionCommand, short_help="Take out of MODEL what it can do without: --passes simplify.")
@click.argument("model", metavar="MODEL", type=click.Path())
@_optimize_options
def simplify(model: str, output: str | None, no_verify: bool, verbose: int, quiet: bool, **settings: Any) -> int:
    """Simplify MODEL: what onnxopt MODEL --passes simplify does, with the same options and exit codes."""
    from onnxopt.cli.actions import optimize_file

    settings = {**settings, "passes": "simplify"}
    return optimize_file(model, output, verify=not no_verify, verbose=verbose, quiet=quiet, **settings)


@root.command(cls=SectionCommand, short_help="Hold CANDIDATE against a reference; the exit code is the answer.")
@click.argument("candidate", metavar="CANDIDATE", type=click.Path())
@option(
    "--reference",
    required=True,
    type=click.Path(),
    metavar="MODEL",
    section="Models",
    help="The model to hold it against.",
)
@data_options
@budget_options
@output_options
@run_options
def check(candidate: str, reference: str, verbose: int, quiet: bool, **settings: Any) -> int:
    """Hold CANDIDATE against a reference model on the same inputs, and against budgets.

    Exit codes: 0 passed, 1 a budget or the quality floor failed, 2 wrong usage, 3 unreadable model, 5 nothing compared:
    without real inputs there is no verdict.
    """
    from onnxopt.cli.actions import check_file

    return check_file(candidate, reference, verbose=verbose, quiet=quiet, **settings)


@root.command("inspect", cls=SectionCommand, short_help="Tell what MODEL holds and what passes could win.")
@click.argument("models", metavar="MODEL...", nargs=-1, type=click.Path())
@format_option
@looking_options
def inspect_(models: tuple[str, ...], form: str, verbose: int, limits: str) -> int:
    """Tell what MODEL holds, and what passes could win on it, estimated; several models side by side.

    Exit codes: 0 told, 2 wrong usage, 3 unreadable model, 6 a limit was reached, 130 interrupted.
    """
    from onnxopt.cli.looking import inspect_files

    return inspect_files(models, form, limits, verbose=verbose)


@root.command(cls=SectionCommand, short_help="Tell how model B differs from model A.")
@click.argument("model_a", metavar="A", type=click.Path())
@click.argument("model_b", metavar="B", type=click.Path())
@format_option
@option("--html", type=click.Path(), metavar="FILE", section=OUTPUT, help="Write a page that shows it, .html.")
@option("--exit-code", is_flag=True, section=OUTPUT, help="Exit 1 where the models differ.")
@option("--force", is_flag=True, section=OUTPUT, help="Replace an existing page.")
@looking_options
def diff(model_a: str, model_b: str, form: str, limits: str, verbose: int, **settings: Any) -> int:
    """Tell how model B differs from model A: nodes, weights, signature, metadata.

    Nodes are matched by what they compute, so that what was merely renamed counts as equal.

    Exit codes: 0 told, 1 with --exit-code where the models differ, 2 wrong usage, 3 unreadable model, 6 a limit was
    reached, 130 interrupted.
    """
    from onnxopt.cli.looking import diff_files

    return diff_files(model_a, model_b, form, limits, verbose=verbose, **settings)


@root.command(cls=SectionCommand, short_help="Gather the statistics that passes ask for into a file.")
@click.argument("model", metavar="MODEL", type=click.Path())
@passes_option("The passes that will use them; those before the first that asks are run. [int8]", default="int8")
@target_option
@calibrate_options
@option("-o", "--output", type=click.Path(), metavar="FILE", section=OUTPUT, help="Where to write. [./MODEL.stats.npz]")
@quiet_options
def calibrate(model: str, output: str | None, verbose: int, quiet: bool, **settings: Any) -> int:
    """Run MODEL on real inputs and write the statistics that passes ask for, for onnxopt MODEL --stats FILE.

    With --shard the feeds can be divided among machines: onnxopt merge puts the parts together.

    Exit codes: 0 written, 2 wrong usage or feeds, 3 unreadable model, 4 a pass failed, 5 no real inputs, 6 a limit was
    reached, 130 interrupted.
    """
    from onnxopt.cli.calibrate import calibrate_file

    return calibrate_file(model, output, verbose=verbose, quiet=quiet, **settings)


@root.command(cls=SectionCommand, short_help="Put the parts of a calibration together.")
@click.argument("files", metavar="FILE...", nargs=-1, type=click.Path())
@option("-o", "--output", required=True, type=click.Path(), metavar="FILE", section=OUTPUT, help="Where to write.")
@quiet_options
def merge(files: tuple[str, ...], output: str, verbose: int, quiet: bool, force: bool) -> int:
    """Put together what onnxopt calibrate wrote: all parts of one calibration, or several over different feeds."""
    from onnxopt.cli.calibrate import merge_files

    return merge_files(files, output, verbose=verbose, quiet=quiet, force=force)


@root.command(short_help="List the passes, or show one with its options.")
@click.argument("name", required=False, metavar="[NAME]", shell_complete=completions.pass_list)
def passes(name: str | None) -> None:
    """List the installed passes, or show the options of one: defaults, ranges, effect.

    NAME may also be a pass of your own: ./my_pass.py:MyPass
    """
    from onnxopt.cli.passes import describe, overview

    click.echo(describe(name) if name is not None else overview())


@root.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL. For bash, in ~/.bashrc: eval "$(onnxopt completion bash)" ."""
    click.echo(completions.script(shell, root))
