"""The proof of each pass: structure, loading, and values against the stage before or the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from onnxopt.errors import FeedError, ModelError, PassError
from onnxopt.feeds import Feeds
from onnxopt.model import Model
from onnxopt.passbase import Effect
from onnxopt.pipeline.figures import comparison_figures
from onnxopt.pipeline.grammar import Step
from onnxopt.pipeline.output import equal
from onnxopt.pipeline.structure import check_structure, checker_complaint, signature
from onnxopt.report import ComparisonFigures
from onnxopt.runtime import Session
from onnxopt.verification import Comparison, Failure, RecordedOutputs, compare, holds, reordering
from onnxopt.verification.tolerances import SQNR_FLOOR_DB

# Passes are proven on this many feeds; the final comparison takes all that evaluate.
STAGE_FEEDS = 8
_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_RULES = {
    Effect.EXACT: "every bit equal",
    Effect.ROUNDING: "rounding tolerance",
    Effect.LOSSY: f"quality floor {SQNR_FLOOR_DB:g} dB",
}


class Stages:
    """Proves one pass after the other. All sessions run unoptimized on one thread, where `exact` means bit-equal.

    reference: the original; raises ModelError when onnxruntime can't load it. floor: hold lossy passes to the quality
    floor; without it to finite values only. synthetic: the feeds are made up. `warnings`: what the original itself
    lacks. `random`: outputs that differ from run to run; they are not compared.
    """

    def __init__(self, reference: Model, feeds: Feeds, *, floor: bool = True, synthetic: bool = False) -> None:
        self.warnings: list[str] = []
        self._floor = floor
        self._synthetic = synthetic
        self.feeds = feeds.take(STAGE_FEEDS)
        self._signature = signature(reference)
        complaint = checker_complaint(reference)
        self._checker = complaint is None
        if complaint is not None:
            self.warnings.append(
                f"the original does not pass onnx's checker, so passes are not held to it: {complaint}"
            )
        self.compute_dtype = narrowest_float(reference)
        self._original = reference
        self.reference = record_original(_session(reference), self.feeds)
        self.random = random_outputs(reference, self.feeds)
        if self.random:
            names = ", ".join(sorted(self.random))
            self.warnings.append(f"outputs that are random from run to run are not compared: {names}")
        self._before = self.reference

    def mark(self) -> RecordedOutputs:
        """The stage before, for `rewind`."""
        return self._before

    def rewind(self, mark: RecordedOutputs) -> None:
        """Hold what comes next against an earlier stage, to which the model was rolled back."""
        self._before = mark

    def prove(self, model: Model, step: Step) -> ComparisonFigures:
        """Hold the rewritten model against what the pass promises. Raises PassError naming what was broken."""
        check_structure(model, self._signature, self._checker)
        try:
            session = _session(model)
        except ModelError as error:
            raise PassError(f"it left a model that can't be loaded: {error.cause}", error.remedy) from error
        outputs = RecordedOutputs(session, self.feeds)
        effect = step.pass_.effect
        lossy = effect is Effect.LOSSY
        comparison = without(compare(self.reference if lossy else self._before, outputs), self.random)
        failures = self._failures(comparison, effect) if comparison.outputs else []
        if failures:
            more = f" (and {len(failures) - 1} outputs more)" if len(failures) > 1 else ""
            promise = "fell below the quality floor" if lossy else f"promised {effect.value} results and broke it"
            raise PassError(f"it {promise}: {failures[0].reason}{more}", _remedy(lossy, self._synthetic))
        self._before = outputs
        against = "the original" if lossy else "the stage before"
        return comparison_figures(comparison, against, _RULES[effect])

    def _failures(self, comparison: Comparison, effect: Effect) -> list[Failure]:
        failures = holds(comparison, effect.value, compute_dtype=self.compute_dtype)
        if failures and effect is Effect.ROUNDING:
            return holds(comparison, effect.value, compute_dtype=self.compute_dtype, noise=self.noise)
        return hard(failures) if effect is Effect.LOSSY and not self._floor else failures

    @cached_property
    def noise(self) -> dict[str, float]:
        """What the runtime's own reordering of the original costs each output: optimized against unoptimized."""
        optimized = Session(self._original, threads=1)
        return reordering(without(compare(self.reference, optimized), self.random))


def record_original(
    session: Session, feeds: Feeds, progress: Callable[[int, int], None] | None = None
) -> RecordedOutputs:
    """The original's outputs. Raises FeedError where it can't run on these inputs: they don't suit it."""
    try:
        return RecordedOutputs(session, feeds, progress=progress)
    except PassError as error:
        raise FeedError(f"the original fails on these inputs: {error.cause}", "give inputs that it accepts") from error


def hard(failures: Sequence[Failure]) -> list[Failure]:
    """Failures that no budget excuses: of the signature, or NaN in other places. Below the floor is not among them."""
    return [failure for failure in failures if failure.rule != "lossy" or failure.measured is None]


def _remedy(lossy: bool, synthetic: bool) -> str:
    if lossy and synthetic:
        return "the model was rolled back; the inputs are made up and may mislead: give real ones with --data"
    if lossy:
        return "the model was rolled back; choose milder options, or go on without it by --on-error skip"
    return "the model was rolled back; leave the pass out, or go on without it by --on-error skip"


def without(comparison: Comparison, names: frozenset[str]) -> Comparison:
    """The comparison of all outputs but those named."""
    kept = {name: output for name, output in comparison.outputs.items() if name not in names}
    return replace(comparison, outputs=kept)


def random_outputs(model: Model, feeds: Feeds) -> frozenset[str]:
    """Outputs that differ between two runs on the same input; only models with random operators have any."""
    if not any(node.op in _RANDOM for body in model.bodies() for node in body.nodes):
        return frozenset()
    inputs = feeds[0].inputs
    session = _session(model)
    one, other = session.run(inputs), session.run(inputs)
    return frozenset(name for name in one if not equal(one[name], other[name]))


def narrowest_float(model: Model) -> str | None:
    """The narrowest float type that the model's weights and described tensors have, None where that is float32."""
    dtypes = {constant.dtype for constant in model.constants()}
    for body in model.bodies():
        dtypes |= {np.dtype(tensor.dtype) for node in body.nodes for tensor in node.outputs if tensor.dtype is not None}
    names = {dtype.name for dtype in dtypes}
    return next((name for name in ("float16", "bfloat16") if name in names), None)


def _session(model: Model) -> Session:
    return Session(model, optimize=False, threads=1)
