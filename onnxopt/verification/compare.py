"""Two models on the same feeds, output by output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxopt.runtime import Session
from onnxopt.verification.accumulate import Accumulator, Difference
from onnxopt.verification.outputs import Progress, RecordedOutputs


@dataclass(frozen=True)
class OutputComparison:
    """What two models gave for one output, over all feeds. d = candidate - reference, y = reference.

    kind: "float", "discrete" (integers, bools, strings) or "mixed" (a sequence or map of both).
    dtype, candidate_dtype: element types; dtype_mismatch when they differ anywhere.
    elements, differing: elements compared, and how many differ in a bit. Any NaN equals any other; +0 differs from -0.
    max_abs: largest |d|, infinite where only one side is finite. max_reference: largest finite |y|. relative: max_abs /
    max_reference (0 when both are 0, infinite when only max_reference is).
    sqnr_db: 10 log10(n var(y) / sum d^2) with the variance of all elements over all feeds; infinite when d is 0, minus
    infinite for a shape difference or a value that is finite on one side only. Where y is constant up to its rounding
    (var(y) <= (eps max|y|)^2), var(y) is replaced by mean(y^2). None for discrete outputs.
    sqnr_over_feeds_db: the same with the variance of each position over the feeds: near 0 for a model that gives the
    same average answer to everything. None with one feed, varying shapes or values that are not finite.
    cosine: of all finite elements; 1 when both are 0, 0 when one is.
    agreement: share of equal discrete elements. argmax_agreement: share of equal argmax along the last axis, for float
    outputs of rank 2 or 3. close: share of float elements with |d| <= 0.1 of the largest |y| of that tensor. Each None
    where it does not apply; elements of a mismatched shape count as unequal in agreement and close.
    nonfinite_*: NaN and infinities on each side, and places where they differ. shape_mismatches: tensors whose shape
    differs or that exist on one side only. worst: the five largest differences.
    """

    name: str
    kind: str
    dtype: str
    candidate_dtype: str
    dtype_mismatch: bool
    elements: int
    differing: int
    max_abs: float
    max_reference: float
    relative: float
    sqnr_db: float | None
    sqnr_over_feeds_db: float | None
    cosine: float | None
    agreement: float | None
    argmax_agreement: float | None
    close: float | None
    nonfinite_reference: int
    nonfinite_candidate: int
    nonfinite_mismatches: int
    shape_mismatches: int
    worst: tuple[Difference, ...]

    @property
    def bit_equal(self) -> bool:
        """No element, shape or type differs."""
        return not (self.differing or self.shape_mismatches or self.dtype_mismatch)


@dataclass(frozen=True)
class Comparison:
    """All outputs that both models have, by name. missing: only the reference has them; added: only the candidate.

    reordered: both have the same outputs in another order. feeds: how many were compared.
    """

    outputs: dict[str, OutputComparison]
    feeds: int
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    reordered: bool = False

    @property
    def quality(self) -> float:
        """dB of the worst float output; without any, the worst share of agreement; -inf where outputs are missing."""
        if self.missing:
            return -math.inf
        decibels = [output.sqnr_db for output in self.outputs.values() if output.sqnr_db is not None]
        shares = [output.agreement for output in self.outputs.values() if output.agreement is not None]
        return min(decibels or shares, default=-math.inf)

    @property
    def bit_equal(self) -> bool:
        """Same outputs, every bit equal."""
        same = not (self.missing or self.added or self.reordered)
        return same and all(output.bit_equal for output in self.outputs.values())

    @property
    def elements(self) -> int:
        """Elements compared, over all outputs and feeds."""
        return sum(output.elements for output in self.outputs.values())

    @property
    def min_sqnr_db(self) -> float | None:
        """The lowest SQNR of the float outputs; None without any."""
        return min((output.sqnr_db for output in self.outputs.values() if output.sqnr_db is not None), default=None)


class Comparer:
    """Takes in the outputs of both models feed by feed."""

    def __init__(self, reference: Sequence[str], candidate: Sequence[str]) -> None:
        self._reference = tuple(reference)
        self._candidate = tuple(candidate)
        self._feeds = 0
        self._outputs = {name: Accumulator(name) for name in reference if name in set(candidate)}

    def add(self, reference: Mapping[str, Any], candidate: Mapping[str, Any], source: str) -> None:
        """Compare the outputs of one feed; `source` names it in the worst differences."""
        self._feeds += 1
        for name, accumulator in self._outputs.items():
            accumulator.add(reference[name], candidate[name], source)

    def result(self) -> Comparison:
        """The comparison of all feeds taken in so far."""
        missing = tuple(name for name in self._reference if name not in self._candidate)
        added = tuple(name for name in self._candidate if name not in self._reference)
        reordered = not missing and not added and self._reference != self._candidate
        outputs = {name: _summary(accumulator) for name, accumulator in self._outputs.items()}
        return Comparison(outputs, self._feeds, missing, added, reordered)


def compare(
    reference: RecordedOutputs, candidate: Session | RecordedOutputs, *, progress: Progress | None = None
) -> Comparison:
    """Hold the candidate against the reference on the reference's feeds.

    candidate: a session, run on each feed as it is compared, or outputs recorded on the same feeds. Raises PassError
    when a run fails.
    """
    if isinstance(candidate, Session):
        comparer = Comparer(reference.names, [output.name for output in candidate.outputs])
        found = _run(candidate, reference)
    else:
        if candidate.sources != reference.sources:
            raise ValueError("the outputs were recorded on different feeds")
        comparer = Comparer(reference.names, candidate.names)
        found = iter(candidate)
    for index, (ours, theirs) in enumerate(zip(reference, found, strict=True)):
        comparer.add(ours, theirs, reference.sources[index])
        if progress is not None:
            progress(index + 1, len(reference))
    return comparer.result()


def _run(session: Session, reference: RecordedOutputs) -> Iterator[dict[str, Any]]:
    return (session.run(sample.inputs) for sample in reference.feeds)


def _summary(found: Accumulator) -> OutputComparison:
    floats = found.float_elements > 0 or found.kind in ("float", "mixed")
    zero = found.max_reference == 0
    relative = 0.0 if found.max_abs == 0 else math.inf if zero else found.max_abs / found.max_reference
    return OutputComparison(
        name=found.name,
        kind=found.kind or ("float" if floats else "discrete"),
        dtype=found.dtype,
        candidate_dtype=found.candidate_dtype,
        dtype_mismatch=found.dtype_mismatch,
        elements=found.elements,
        differing=found.differing,
        max_abs=math.inf if floats and found.shape_mismatches else found.max_abs,
        max_reference=found.max_reference,
        relative=math.inf if floats and found.shape_mismatches else relative,
        sqnr_db=_sqnr(found, _signal(found)) if floats else None,
        sqnr_over_feeds_db=_sqnr(found, found.positions.signal) if _varies(found) and found.positions else None,
        cosine=_cosine(found) if floats else None,
        agreement=found.discrete_equal / found.discrete_elements if found.discrete_elements else _empty(found, floats),
        argmax_agreement=found.rows_agreeing / found.rows if found.rows else None,
        close=(found.close / found.float_elements if found.float_elements else 1.0) if floats else None,
        nonfinite_reference=found.nonfinite_reference,
        nonfinite_candidate=found.nonfinite_candidate,
        nonfinite_mismatches=found.nonfinite_mismatches,
        shape_mismatches=found.shape_mismatches,
        worst=tuple(found.worst),
    )


def _empty(found: Accumulator, floats: bool) -> float | None:
    """The agreement without discrete elements: complete for an output that was always empty, none for floats."""
    return None if floats else float(found.shape_mismatches == 0)


def _signal(found: Accumulator) -> float:
    """n var(y), or the sum of y^2 where y is constant up to the rounding of its type."""
    step = found.epsilon * found.max_reference
    return (
        found.moments.squares if found.moments.squares > step * step * found.moments.count else found.reference_squares
    )


def _varies(found: Accumulator) -> bool:
    return found.positions is not None and found.positions.count > 1 and found.positions.count == found.feeds


def _sqnr(found: Accumulator, signal: float) -> float:
    if found.shape_mismatches or found.nonfinite_mismatches:
        return -math.inf
    if found.noise == 0 and found.max_abs == 0:
        return math.inf
    # A sum of squares that overflows or underflows says nothing: count it as the worst.
    if not (0 < signal < math.inf and 0 < found.noise < math.inf):
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(found.noise))


def _cosine(found: Accumulator) -> float:
    lengths = math.sqrt(found.reference_squares) * math.sqrt(found.candidate_squares)
    if lengths == 0:
        return float(found.reference_squares == found.candidate_squares)
    cosine = found.dot / lengths
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan
