"""The report of a run that ended in an error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onnxopt.errors import NothingCompared, OnnxoptError
from onnxopt.pipeline.facts import versions
from onnxopt.report import ErrorFacts, ModelFacts, Report, Verdict, write


def failed(report: Report, error: OnnxoptError) -> Report:
    """The report with the error as its conclusion."""
    verdict = Verdict.INCONCLUSIVE if isinstance(error, NothingCompared) else Verdict.ERROR
    told = ErrorFacts(error.cause, error.remedy)
    return replace(report, verdict=verdict, reason=error.cause, exit_code=error.exit_code, error=told)


@contextlib.contextmanager
def reported(reports: Sequence[Path], command: str, reference: Path | None, candidate: Path | None) -> Iterator[None]:
    """Write what is known to `reports` when the block ends in an error of ours: the models by path and size alone.

    The error goes on as it came, even where a report can't be written.
    """
    started = time.perf_counter()
    try:
        yield
    except OnnxoptError as error:
        report = Report(
            command=command,
            versions=versions(),
            reference=_unread(reference),
            candidate=_unread(candidate) if candidate is not None else None,
            verdict=Verdict.ERROR,
            reason="",
            exit_code=error.exit_code,
            seconds=time.perf_counter() - started,
        )
        for path in reports:
            with contextlib.suppress(OnnxoptError):
                write(failed(report, error), path)
        raise


def _unread(path: Path | None) -> ModelFacts:
    """A model of which nothing is known but its file: its counts are 0."""
    size = path.stat().st_size if path is not None and path.is_file() else 0
    return ModelFacts(str(path) if path is not None else None, None, size, None, 0, 0, 0, 0)
