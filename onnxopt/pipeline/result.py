"""What a run hands back, and the error that carries it where the run failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxopt.errors import BudgetError
from onnxopt.model import Model
from onnxopt.report import Report


@dataclass(frozen=True)
class Result:
    """The rewritten model, all that is known about it, and where it was written, if it was."""

    model: Model
    report: Report
    path: Path | None = None


class VerdictError(BudgetError):
    """The run ended with the verdict "failed": a budget or the quality floor. `result` is what was refused."""

    def __init__(self, cause: str, remedy: str, result: Result) -> None:
        super().__init__(cause, remedy)
        self.result = result
