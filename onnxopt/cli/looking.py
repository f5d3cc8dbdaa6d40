"""What `inspect` and `diff` do with their words: call the Python face and print what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnxopt import api
from onnxopt.cli.terminal import show_lines, spinner
from onnxopt.errors import BudgetError, UsageError


def inspect_files(models: Sequence[str], form: str, limits: str, *, verbose: int) -> int:
    """Print what is known of one model, or of several side by side."""
    from onnxopt.report import inspection_view

    if not models:
        raise UsageError("no model is given", "run: onnxopt inspect --help")
    with spinner(verbose, False) as progress:
        found = [api.inspect(Path(model), limits=limits, progress=progress) for model in models]
    if form == "json":
        click.echo(inspection_view.dump(found), nl=False)
    else:
        show_lines(inspection_view.lines(found, detail=min(verbose, 1)))
    return 0


def diff_files(
    before: str, after: str, form: str, limits: str, *, html: str | None, force: bool, exit_code: bool, verbose: int
) -> int:
    """Print how two models differ, and write a page that shows it."""
    from onnxopt.report import difference_view
    from onnxopt.report.files import check_page, write_page

    page = None if html is None else Path(html)
    if page is not None:
        check_page(page, force=force, taken=[Path(before), Path(after)])
    with spinner(verbose, False) as progress:
        found = api.diff(Path(before), Path(after), limits=limits, progress=progress)
    if form == "json":
        click.echo(difference_view.dump(found), nl=False)
    else:
        show_lines(difference_view.lines(found, detail=min(verbose, 1)))
    if page is not None:
        write_page(found.to_html(), page)
    return BudgetError.exit_code if exit_code and not found.equal else 0
