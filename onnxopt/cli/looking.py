"""What `inspect` and `diff` do with their words: call the Python face and print what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnxopt import api
from onnxopt.cli.terminal import show_lines, spinner
from onnxopt.errors import UsageError


def inspect_files(models: Sequence[str], form: str, limits: str, *, verbose: int, quiet: bool) -> int:
    """Print what is known of one model, or of several side by side."""
    from onnxopt.report import inspection_view

    if not models:
        raise UsageError("no model is given", "run: onnxopt inspect --help")
    with spinner(verbose, quiet) as progress:
        found = [api.inspect(Path(model), limits=limits, progress=progress) for model in models]
    if form == "json":
        click.echo(inspection_view.dump(found), nl=False)
    else:
        show_lines(inspection_view.lines(found, detail=min(verbose, 1)))
    return 0
