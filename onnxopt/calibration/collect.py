"""One streaming run over feeds, at the price of running the model, in memory that does not grow with their number.

The first sample with a new combination of input shapes shows the shapes of the tensors asked about. From then on one
session does all: it reports figures computed in the graph, and the elements on each tensor's grid. What can't change
any more is not asked for again: behind a Relu or a Clip whose bounds have been reached, extremes are known. A sample
whose shapes need other grids goes through a session that reports all elements, in groups that fit into `memory`. What a
sample adds to the figures depends on that sample alone, whichever session took it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from onnxopt.calibration.instrument import Wanted
from onnxopt.calibration.plan import Plan, Shape, Tensor
from onnxopt.calibration.readings import INFINITE, NAN, Readings, Run
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.sampling import ELEMENTS, batch_of
from onnxopt.calibration.sessions import Ask, Probe, Signature, signature_of
from onnxopt.calibration.statistics import Statistics
from onnxopt.errors import FeedError, OnnxoptError, PassError
from onnxopt.feeds import Sample
from onnxopt.feeds.batches import Batch, batched
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Model, Variable
from onnxopt.model.collection import collection_paused
from onnxopt.runtime import Port, Session

# Bytes of tensors that one run of the model may hand over.
MEMORY = 64 << 20
# After so many runs it is asked which extremes can't change any more.
_LOOK_AGAIN = (2, 8, 32, 128)
# A session without them is worth its while from this share of all elements on.
_WORTH = 0.1
# and from this many elements on: making a session takes as long as looking at so many in hundreds of runs.
_MANY = 200_000


def collect(
    model: Model,
    requests: Requests,
    feeds: Iterable[Sample],
    *,
    threads: int = 1,
    batch: int = 1,
    elements: int | None = ELEMENTS,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure what `requests` asks for, over all feeds, in optimized sessions of clones of `model`.

    batch: feeds joined into one run where their shapes allow it. elements: how many of each tensor, for each item of a
    batch, histograms look at; None for all. memory: bytes of tensors that one run may hand over.

    A tensor that holds NaN or infinity is skipped with the sample named: masks of -inf are nothing wrong. Raises
    FeedError, naming input and sample, where that comes from the sample itself (the tensor is an input of the model, or
    an input holds NaN), where the model fails on a sample, and when there are no feeds.
    """
    statistics = Statistics()
    if not requests:
        return statistics
    collector = _Collector(model, Plan(model, requests, statistics, elements), statistics, threads, memory)
    if not collector.worthwhile:
        return statistics
    total = len(feeds) if isinstance(feeds, Sized) else 0
    for joined in batched(feeds, batch, _ports(model)):
        with collection_paused():  # thousands of arrays a run, none of them in a cycle
            collector.add(joined)
        statistics.samples += len(joined.members)
        statistics.runs += 1
        if progress is not None:
            progress(statistics.samples, total)
    if statistics.samples == 0:
        raise FeedError("there are no feeds to calibrate with", "give at least one sample")
    collector.finish()
    return statistics


class _Collector:
    """The sessions of one run over feeds, and which of them takes a sample."""

    def __init__(self, model: Model, plan: Plan, statistics: Statistics, threads: int, memory: int) -> None:
        self.model, self.plan, self.statistics = model, plan, statistics
        self.threads, self.memory = threads, memory
        self.worthwhile = bool(plan.tensors or plan.inner)
        self._readings = Readings(plan, statistics)
        self._guards = [tensor for tensor in model.graph.outputs if _is_float(tensor)]
        self._shapes: dict[Signature, dict[Tensor, Shape]] = {}
        self._keys: dict[tuple[Signature, int], object] = {}
        self._survey: Probe | None = None
        self._lean: list[Probe] = []
        self._lean_key: object = None
        self._left_out: frozenset[tuple[Tensor, bool]] = frozenset()
        self._full: list[Probe] = []
        self._full_bytes: dict[Tensor, int] = {}
        self._full_elements = 0

    def add(self, joined: Batch) -> None:
        """Run the model on a sample, or on several joined, and add what it shows. Raises FeedError."""
        inputs = joined.sample.inputs
        signature, items = signature_of(inputs), batch_of(inputs)
        try:
            run = self._run(inputs, signature, items)
        except PassError as error:
            raise self._failure(joined, error) from error
        if run.suspects or run.inner or run.alarm:
            self._settle(run, joined)
        self._readings.count(run)
        self._shapes.setdefault(signature, {}).update(run.shapes)
        if self.statistics.runs + 1 in _LOOK_AGAIN:
            self._leave_out(run)

    def finish(self) -> None:
        """Write the last figures."""
        self._readings.finish()

    # which sessions run

    def _run(self, inputs: Mapping[str, Any], signature: Signature, items: int) -> Run:
        if signature not in self._shapes and not self._covered(signature) and not self._start(inputs, items):
            self._shapes[signature] = self._look(inputs)
        shapes = self._shapes.get(signature)
        run = Run(items, shapes or {})
        for probe in self._choose(signature, items):
            self._readings.take(probe.run(inputs, seen=shapes is not None), run)
        return run

    def _start(self, inputs: Mapping[str, Any], items: int) -> bool:
        """Make the first session where inference shows that it may report all elements; whether that was done."""
        if self._full or self._lean:
            return False
        given = {name: value.shape for name, value in inputs.items() if isinstance(value, np.ndarray)}
        facts = known(self.model, given)
        shapes: dict[Tensor, Shape] = {}
        for tensor in self.plan.tensors:
            found = facts.get(id(tensor.variable), Fact()).shape
            if found is None or not all(isinstance(dim, int) for dim in found):
                return False
            shapes[tensor] = tuple(dim for dim in found if isinstance(dim, int))
        if 4 * sum(map(math.prod, shapes.values())) > self.memory or self._cuts(shapes, items):
            return False
        self._build_full(shapes, signature_of(inputs))
        return True

    def _look(self, inputs: Mapping[str, Any]) -> dict[Tensor, Shape]:
        """The shapes of all tensors asked about."""
        if self._survey is None:
            asks = [Ask(tensor, Wanted(shape=True)) for tensor in self.plan.tensors]
            self._survey = Probe(self.model, asks, threads=self.threads)
        readings = self._survey.run(inputs).readings
        return {tensor: tuple(int(dim) for dim in value) for tensor, _, value in readings}

    def _covered(self, signature: Signature) -> bool:
        """Whether the session for all elements can take a sample of shapes not seen before, by what it hands over."""
        if not self._full:
            return False
        held = sum(self._full_bytes.values())
        if held == 0 or any(_within(signature, known) for known in self._shapes):
            return True
        # at most quadratic in the sizes of the inputs, as attention is
        growth = _elements(signature) / max(1, self._full_elements)
        return held * growth**2 <= self.memory

    def _choose(self, signature: Signature, items: int) -> Sequence[Probe]:
        shapes = self._shapes.get(signature)
        if shapes is not None:
            key = self._key(signature, items)
            if not self._lean and key is not None and self._cuts(shapes, items):
                self._build_lean(shapes, items)
            if self._lean and key == self._lean_key:
                return self._lean
        if not self._full or (shapes is not None and self._outgrown(shapes)):
            assert shapes is not None  # the first sample is always looked at
            self._build_full(shapes, signature)
        return self._full

    def _key(self, signature: Signature, items: int) -> object:
        """`Plan.key`, of which there are many fewer than samples."""
        at = (signature, items)
        if at not in self._keys:
            self._keys[at] = self.plan.key(self._shapes[signature], items)
        return self._keys[at]

    def _cuts(self, shapes: Mapping[Tensor, Shape], items: int) -> bool:
        """Whether grids leave any element out."""
        return any(not grid.all for grid in self.plan.grids(shapes, items).values())

    def _build_lean(self, shapes: Mapping[Tensor, Shape], items: int) -> None:
        grids = self.plan.grids(shapes, items)
        asks = [
            Ask(tensor, wanted, shapes[tensor])
            for tensor in self.plan.alive()
            if (wanted := tensor.essential(shapes[tensor], grids.get(tensor), self._reached(tensor), self.plan.opset))
        ]
        sizes = {ask.tensor: 4 * math.prod(shapes[ask.tensor]) for ask in asks if ask.wanted.whole}
        self._lean = self._probes(asks, sizes, blocked=True)
        self._lean_key = self.plan.key(shapes, items)

    def _build_full(self, shapes: Mapping[Tensor, Shape], signature: Signature) -> None:
        asks = [Ask(tensor, tensor.everything(), shapes[tensor]) for tensor in self.plan.alive()]
        sizes = {ask.tensor: 4 * math.prod(shapes[ask.tensor]) for ask in asks if ask.wanted.whole}
        self._full = self._probes(asks, sizes, blocked=False)
        self._full_bytes, self._full_elements = sizes, _elements(signature)

    def _outgrown(self, shapes: Mapping[Tensor, Shape]) -> bool:
        """Whether groups that were made for smaller samples would hand over more than `memory` of this one."""
        now = sum(4 * math.prod(shapes[tensor]) for tensor in self._full_bytes)
        return now > self.memory and now > sum(self._full_bytes.values())

    def _probes(self, asks: Sequence[Ask], sizes: Mapping[Tensor, int], *, blocked: bool) -> list[Probe]:
        """Sessions whose whole tensors fit into `memory`; the first one reports all that is not about tensors too."""
        groups: list[list[Ask]] = [[]]
        held = 0
        for ask in asks:
            size = sizes.get(ask.tensor, 0)
            if held and held + size > self.memory:
                groups.append([])
                held = 0
            groups[-1].append(ask)
            held += size
        return [
            Probe(
                self.model,
                group,
                inner=self.plan.inner if number == 0 else (),
                guards=[tensor for tensor in self._guards if number == 0],
                blocked=blocked,
                threads=self.threads,
            )
            for number, group in enumerate(groups)
        ]

    def _reached(self, tensor: Tensor) -> tuple[bool, bool]:
        low, high = (tensor, False) in self._left_out, (tensor, True) in self._left_out
        return low, high

    def _leave_out(self, run: Run) -> None:
        """Build the session again, without the extremes that can't change any more, where that saves enough."""
        ranged = [tensor for tensor in self.plan.alive() if tensor.range and not tensor.extremes]
        reached = {(tensor, side) for tensor in ranged for side, done in enumerate(self.plan.reached(tensor)) if done}
        fresh = {tensor for tensor, side in reached if (tensor, bool(side)) not in self._left_out}
        total = sum(math.prod(run.shapes[tensor]) for tensor in ranged)
        saved = sum(math.prod(run.shapes[tensor]) for tensor in fresh)
        if saved < max(_MANY, _WORTH * total) or self.plan.key(run.shapes, run.batch) is None:
            return
        self._left_out = frozenset((tensor, bool(side)) for tensor, side in reached)
        self._build_lean(run.shapes, run.batch)

    # what goes wrong

    def _settle(self, run: Run, joined: Batch) -> None:
        """Find out which tensors hold NaN or infinities, in which sample. Raises FeedError when it is to blame."""
        for sample in joined.members:
            found, inner = self._diagnose(sample)
            if found or inner:
                self._blame(found, inner, sample)
            for tensor, what in found.items():
                tensor.broken = True
                self._skip_all(tensor, f"holds {what} ({sample.source})")
            for variable, what in inner.items():
                self.statistics.record_skip(variable, f"holds {what} ({sample.source})")
        for (kind, subject), tensor in run.overflown.items():
            if not tensor.broken:
                self.statistics.record_skip(subject, f"overflows when it is summed ({joined.sample.source})", kind)
        if run.alarm:
            self._readings.quiet.update(self._guards)
        run.suspects = {tensor: what for tensor, what in run.suspects.items() if tensor.broken}

    def _diagnose(self, sample: Sample) -> tuple[dict[Tensor, str], dict[Variable, str]]:
        """What each tensor holds that is not finite, in the main graph and in inner bodies."""
        asks = [Ask(tensor, Wanted(low=True, high=True, total=True)) for tensor in self.plan.alive()]
        report = Probe(self.model, asks, inner=self.plan.inner, blocked=False, threads=self.threads).run(sample.inputs)
        found: dict[Tensor, str] = {}
        for tensor, reading, value in report.readings:
            if math.isnan(value):
                found[tensor] = NAN
            elif reading.figure != "total" and math.isinf(value):
                found.setdefault(tensor, INFINITE)
        empty = self._empty(sample)
        inner = {}
        for variable, low, high, magnitudes, count in report.inner:
            if count and (math.isnan(magnitudes) or not math.isfinite(low) or not math.isfinite(high)):
                inner[variable] = NAN if math.isnan(magnitudes) or math.isnan(low + high) else INFINITE
        known = {variable for variable in inner if self.statistics.reason(variable) is not None}
        return (
            {tensor: what for tensor, what in found.items() if tensor not in empty},
            {variable: what for variable, what in inner.items() if variable not in known},
        )

    def _empty(self, sample: Sample) -> set[Tensor]:
        """Tensors without elements in this sample, whose extremes mean nothing."""
        shapes = self._shapes.get(signature_of(sample.inputs)) or self._look(sample.inputs)
        return {tensor for tensor, shape in shapes.items() if math.prod(shape) == 0}

    def _blame(self, found: Mapping[Tensor, str], inner: Mapping[Variable, str], sample: Sample) -> None:
        """Raise FeedError where NaN or infinities come from an input."""
        inputs = set(self.model.graph.inputs)
        blamed = [(tensor.variable.name, what) for tensor, what in found.items() if tensor.variable in inputs]
        for name, value in sample.inputs.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
                blamed.append((name, NAN))
        if blamed:
            raise FeedError(
                f"input {blamed[0][0]!r} holds {blamed[0][1]} for sample {sample.source}",
                "check the preprocessing of this sample, or leave it out",
            )

    def _skip_all(self, tensor: Tensor, reason: str) -> None:
        """Drop everything that was asked about a tensor."""
        variable = tensor.variable
        for kind, wanted in (
            ("ranges", tensor.range),
            ("extremes", tensor.extremes),
            ("moments", tensor.moments),
            ("histograms", tensor.histogram),
        ):
            if wanted:
                self.statistics.record_skip(variable, reason, kind)
        for kind, axes in (
            ("channel_ranges", tensor.ranges),
            ("channel_means", tensor.means),
            ("channel_moments", tensor.squares),
        ):
            for axis in axes:
                self.statistics.record_skip((variable, axis), reason, kind)
        for axis, threshold in tensor.firings:
            self.statistics.record_skip((variable, axis, threshold), reason, "firings")
        for node, _ in tensor.grams:
            self.statistics.record_skip(node, f"its input {reason}", "grams")

    def _failure(self, joined: Batch, error: PassError) -> OnnxoptError:
        """The error for a run that failed: the sample's fault where the model itself fails on it too."""
        session = Session(self.model, threads=self.threads)
        for sample in joined.members:
            try:
                session.run(sample.inputs)
            except PassError as refused:
                return FeedError(
                    f"sample {sample.source}: the model fails on it: {refused.cause}",
                    "correct this sample, or leave it out",
                )
        return PassError(f"measuring {joined.sample.source} failed: {error.cause}", error.remedy)


def _ports(model: Model) -> list[Port]:
    """The model's inputs, as far as joining samples asks."""
    return [
        Port(tensor.name, None, None if tensor.shape is None else tuple(tensor.shape)) for tensor in model.graph.inputs
    ]


def _is_float(tensor: Variable) -> bool:
    if not isinstance(tensor, Variable) or tensor.dtype is None:
        return False
    try:
        return np.dtype(tensor.dtype).kind == "f"
    except TypeError:
        return False


def _elements(signature: Any) -> int:
    """Elements of all inputs of these shapes."""
    if signature and all(isinstance(part, int) for part in signature):
        return math.prod(signature)
    return sum(_elements(part) for part in signature if isinstance(part, tuple))


def _within(one: Any, other: Any) -> bool:
    """Whether every dimension of one signature is at most that of another."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_within(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, int) and isinstance(other, int):
        return one <= other
    return bool(one == other)
