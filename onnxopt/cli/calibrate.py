"""What `calibrate` and `merge` do with their words, and what they print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxopt import api
from onnxopt.calibration.sampling import ELEMENTS
from onnxopt.calibration.tallies import KINDS
from onnxopt.cli.terminal import spinner
from onnxopt.errors import UsageError

_WIDTH = 80
_SHOWN = 8  # reasons for skipping, each with its first tensor


def calibrate_file(
    model: str,
    output: str | None,
    *,
    verbose: int,
    quiet: bool,
    data: tuple[str, ...],
    elements: str | None,
    shard: str | None,
    statistics: tuple[str, ...],
    **settings: Any,
) -> int:
    """Gather statistics of a file into a file, `<stem>.stats.npz` in the current folder unless said otherwise."""
    part = _shard(shard)
    target = Path(output if output is not None else _default_name(model, part))
    with spinner(verbose, quiet) as progress:
        calibration = api.calibrate(
            Path(model),
            list(data) or None,
            elements=_elements(elements),
            shard=part,
            statistics=list(statistics) or None,
            output=target,
            progress=progress,
            **settings,
        )
    if not quiet:
        rate = calibration.saved.samples / max(calibration.seconds, 1e-9)
        click.echo("\n".join(_lines(calibration.saved, f"for {calibration.gathered_for}", verbose)))
        click.echo(f"time      {calibration.seconds:.1f} s for the feeds, {rate:,.0f} a second")
        click.echo(f"written   {target}")
    return 0


def merge_files(files: Sequence[str], output: str, *, verbose: int, quiet: bool, force: bool) -> int:
    """Put files of statistics together."""
    merged = api.merge(files, output=output, force=force)
    if not quiet:
        click.echo("\n".join(_lines(merged, f"from {len(files)} file{'s' if len(files) > 1 else ''}", verbose)))
        click.echo(f"written   {output}")
    return 0


def _default_name(model: str, shard: tuple[int, int] | None) -> str:
    part = "" if shard is None else f".{shard[0]}of{shard[1]}"
    return f"{Path(model).stem}{part}.stats.npz"


def _lines(saved: api.SavedStatistics, what: str, verbose: int) -> list[str]:
    """What was measured, in 80 columns."""
    source = saved.provenance
    part = "" if source.shard is None else f", part {source.shard[0]}/{source.shard[1]}"
    counts = {kind: sum(other == kind for other, _ in saved.tallies) for kind in KINDS if kind in saved.asked}
    lines = [
        f"model     {source.model}, {source.graph}",
        f"measured  {what}: " + ", ".join(f"{count} {_words(kind, count)}" for kind, count in counts.items()),
        f"samples   {saved.samples}{part}",
    ]
    reasons: dict[str, list[str]] = {}
    for (_, key), reason in saved.reasons.items():
        reasons.setdefault(reason, []).append(str(key[1]))
    shown = list(reasons.items()) if verbose else list(reasons.items())[:_SHOWN]
    for reason, names in shown:
        distinct = sorted(set(names))
        more = f" and {len(distinct) - 1} more" if len(distinct) > 1 else ""
        lines.append(f"skipped   {distinct[0]}{more}: {reason}")
    if len(reasons) > len(shown):
        lines.append(f"skipped   {len(reasons) - len(shown)} more reasons; -v shows them")
    return [textwrap.fill(line, _WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False) for line in lines]


def _words(kind: str, count: int) -> str:
    words = kind.replace("_", " ")
    return words.removesuffix("s") if count == 1 else words


def _elements(text: str | None) -> int | None:
    if text is None:
        return ELEMENTS
    if text == "all":
        return None
    try:
        count = int(text)
    except ValueError:
        raise UsageError(f"--elements: {text!r} is no number", "give a number, or all") from None
    if count < 1:
        raise UsageError(f"--elements: {count} is too few", "give 1 or more, or all")
    return count


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    try:
        if not slash:
            raise ValueError
        return int(index), int(count)
    except ValueError:
        raise UsageError(f"--shard: {text!r} names no part", "write it as I/N: 1/4, 2/4, 3/4 and 4/4") from None
