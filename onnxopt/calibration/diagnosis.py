"""What a sample did that should not be: values that are not finite, and runs that fail."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxopt.calibration.instrument import Wanted
from onnxopt.calibration.plan import Plan, Tensor
from onnxopt.calibration.sessions import Ask, Probe, Report
from onnxopt.calibration.statistics import Statistics
from onnxopt.errors import FeedError, OnnxoptError, PassError
from onnxopt.feeds import Sample
from onnxopt.feeds.batches import Batch
from onnxopt.model import Model, Variable
from onnxopt.runtime import Session

_NAN, _INFINITE = "NaN", "infinities"


class Diagnosis:
    """Finds the tensors that hold NaN or infinities in a sample, and marks them as skipped in `statistics`."""

    def __init__(self, model: Model, plan: Plan, statistics: Statistics, threads: int) -> None:
        self._model, self._plan, self._statistics, self._threads = model, plan, statistics, threads
        self._probe: Probe | None = None

    def examine(self, sample: Sample) -> None:
        """Skip everything asked of what is not finite in this sample. Raises FeedError where an input is to blame."""
        if self._probe is None:
            wanted = Wanted(shape=True, low=True, high=True, total=True)
            asks = [Ask(tensor, wanted) for tensor in self._plan.tensors]
            self._probe = Probe(self._model, self._plan, asks, blocked=False, threads=self._threads)
        report = self._probe.run(sample.inputs)
        found, inner = _broken(report), dict(_broken_inside(report))
        inner = {variable: what for variable, what in inner.items() if self._statistics.reason(variable) is None}
        if found or inner:
            self._blame(found, sample)
        for tensor, what in found.items():
            tensor.broken = True
            for kind, subject in tensor.asked():
                its = "its input " if kind == "grams" else ""
                self._statistics.record_skip(subject, f"{its}holds {what} ({sample.source})", kind)
        for variable, what in inner.items():
            self._statistics.record_skip(variable, f"holds {what} ({sample.source})")

    def _blame(self, found: dict[Tensor, str], sample: Sample) -> None:
        """Raise FeedError where NaN or infinities come from an input."""
        inputs = set(self._model.graph.inputs)
        blamed = [(tensor.variable.name, what) for tensor, what in found.items() if tensor.variable in inputs]
        for name, value in sample.inputs.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
                blamed.append((name, _NAN))
        if blamed:
            raise FeedError(
                f"input {blamed[0][0]!r} holds {blamed[0][1]} for sample {sample.source}",
                "check the preprocessing of this sample, or leave it out",
            )

    def failure(self, joined: Batch, error: PassError) -> OnnxoptError:
        """The error for a run that failed: the sample's fault where the model itself fails on it too."""
        session = Session(self._model, threads=self._threads)
        for sample in joined.members:
            try:
                session.run(sample.inputs)
            except PassError as refused:
                return FeedError(
                    f"sample {sample.source}: the model fails on it: {refused.cause}",
                    "correct this sample, or leave it out",
                )
        if len(joined.members) > 1:
            return FeedError(
                f"the model fails on {len(joined.members)} samples joined, {joined.sample.source}, "
                f"though on none of them alone: {error.cause}",
                "run one feed at a time",
            )
        return PassError(f"measuring {joined.sample.source} failed: {error.cause}", error.remedy)


def _broken(report: Report) -> dict[Tensor, str]:
    """Tensors of the main graph that were whole and are not finite."""
    found: dict[Tensor, str] = {}
    for tensor, reading, value in report.readings:
        if reading.figure == "shape" or tensor.broken or 0 in report.shapes[tensor]:
            continue
        if math.isnan(value):
            found[tensor] = _NAN
        elif math.isinf(value) and reading.figure != "total":
            found.setdefault(tensor, _INFINITE)
    return found


def _broken_inside(report: Report) -> Iterator[tuple[Variable, str]]:
    """Tensors of inner bodies that are not finite."""
    for variable, low, high, magnitudes, count in report.inner:
        nan = math.isnan(magnitudes) or math.isnan(low + high)
        if count and (nan or math.isinf(low) or math.isinf(high)):
            yield variable, _NAN if nan else _INFINITE
