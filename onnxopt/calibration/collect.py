"""One streaming run over feeds, at the price of running the model, in memory that does not grow with their number.

The first sample with a new combination of input shapes shows the shapes of the tensors asked about. From then on one
session does all: it reports figures computed in the graph, and the elements on each tensor's grid. What can't change
any more is not asked for again: behind a Relu or a Clip whose bounds have been reached, extremes are known. A sample
whose shapes need other grids goes through a session that reports all elements, in groups that fit into `memory`. What a
sample adds to the figures depends on that sample alone, whichever session took it: each session keeps every tensor that
was asked about from being fused away, also those that it does not measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from onnxopt.calibration.diagnosis import Diagnosis
from onnxopt.calibration.groups import Group
from onnxopt.calibration.instrument import Wanted
from onnxopt.calibration.plan import Plan, Shape, Tensor
from onnxopt.calibration.readings import Readings, Run
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.sampling import ELEMENTS, batch_of
from onnxopt.calibration.sessions import Ask, Probe, Signature, signature_of
from onnxopt.calibration.statistics import Statistics
from onnxopt.errors import FeedError, PassError
from onnxopt.feeds import Sample
from onnxopt.feeds.batches import Batch, batched
from onnxopt.graph.shapes import Fact, known
from onnxopt.graph.spreading import shows_in
from onnxopt.model import Model
from onnxopt.model.collection import collection_paused
from onnxopt.runtime import Port

# Bytes of tensors that one run of the model may hand over.
MEMORY = 64 << 20
# After so many runs it is asked which extremes can't change any more.
_LOOK_AGAIN = (2, 8, 32, 128)
# A session without them is worth its while from this share of all elements on.
_WORTH = 0.1
# and from this many elements on: making a session takes as long as looking at so many in hundreds of runs.
_MANY = 200_000
# Samples whose shapes are remembered, and forms of samples whose sessions are kept.
_REMEMBERED = 256
_FORMS = 4


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
        self._shapes: dict[Signature, Mapping[Tensor, Shape]] = {}
        self._keys: dict[Signature, object] = {}
        self._diagnosis = Diagnosis(model, plan, statistics, threads)
        self._inferable = True
        self._survey: Probe | None = None
        self._looked = False
        self._lean: Group | None = None
        self._lean_key: object = None
        self._left_out: frozenset[tuple[Tensor, bool]] = frozenset()
        self._full: dict[object, Group] = {}  # by Plan.form
        self._usual: Group | None = None

    def add(self, joined: Batch) -> None:
        """Run the model on a sample, or on several joined, and add what it shows. Raises FeedError."""
        inputs = joined.sample.inputs
        signature, items = signature_of(inputs), batch_of(inputs)
        try:
            run = self._run(inputs, signature, items)
        except PassError as error:
            raise self._diagnosis.failure(joined, error) from error
        if run.suspects or run.inner:
            self._settle(run, joined)
        self._readings.count(run)
        self._remember(signature, run.shapes)
        if self.statistics.runs + 1 in _LOOK_AGAIN:
            self._leave_out(run, signature)

    def finish(self) -> None:
        """Write the last figures."""
        self._readings.finish()

    def _settle(self, run: Run, joined: Batch) -> None:
        """Find out which tensors hold NaN or infinities, in which sample. Raises FeedError when it is to blame."""
        for sample in joined.members:
            self._diagnosis.examine(sample)
        for (kind, subject), tensor in run.overflown.items():
            if not tensor.broken:
                self.statistics.record_skip(subject, f"overflows when it is summed ({joined.sample.source})", kind)
        fresh = [tensor for tensor in run.suspects if not (tensor.broken or tensor.watched)]
        for tensor in fresh:
            tensor.watched = True
        if fresh:  # whose overflowing sums new sessions tell from infinities
            self._lean, self._full, self._usual = None, {}, None
        if any(tensor.broken for tensor in run.suspects):
            self._lean = None  # others may have been watched through what is not measured any more
        run.suspects = {tensor for tensor in run.suspects if tensor.broken}

    def _run(self, inputs: Mapping[str, Any], signature: Signature, items: int) -> Run:
        if signature not in self._shapes and not self._covered(signature) and not self._start(inputs, items):
            self._remember(signature, self._look(inputs))
        shapes = self._shapes.get(signature)
        run = Run(items, shapes or {})
        for probe in self._choose(signature, items):
            if not self._take(probe, inputs, run, seen=shapes is not None):
                self._carefully(inputs, signature, run)
                break
        return run

    def _take(self, probe: Probe, inputs: Mapping[str, Any], run: Run, *, seen: bool) -> bool:
        """Add what a session reports; False where it was made for samples of other shapes, or fails."""
        try:
            report = probe.run(inputs, seen=seen)
        except PassError:
            return False
        if not probe.fits(report):
            return False
        self._readings.take(report, run)
        return True

    def _carefully(self, inputs: Mapping[str, Any], signature: Signature, run: Run) -> None:
        """Measure what is left of a sample in sessions made for its own shapes. Raises PassError where they fail."""
        run.adopt(self._look(inputs))
        for probe in self._full_for(run.shapes, signature).probes:
            self._readings.take(probe.run(inputs), run)

    def _start(self, inputs: Mapping[str, Any], items: int) -> bool:
        """Make the session for all elements where inference shows that it takes the sample; whether that was done."""
        shapes = self._inferred(inputs) if self._inferable and not self._full else None
        if shapes is None:
            return False
        worse = self._lean is None and self._cuts(shapes, items)  # than a session that cuts
        if worse or 4 * sum(map(math.prod, shapes.values())) > self.memory:
            return False
        self._usual = self._full_for(shapes, signature_of(inputs))
        return True

    def _inferred(self, inputs: Mapping[str, Any]) -> dict[Tensor, Shape] | None:
        """The shapes of all tensors asked about, where they follow from those of the inputs."""
        if not _declared(self.model, inputs):
            return None
        given = {name: value.shape for name, value in inputs.items() if isinstance(value, np.ndarray)}
        facts = known(self.model, given)
        shapes: dict[Tensor, Shape] = {}
        for tensor in self.plan.tensors:
            found = facts.get(id(tensor.variable), Fact()).shape
            if found is None or not all(isinstance(dim, int) for dim in found):
                self._inferable = False
                return None
            shapes[tensor] = tuple(dim for dim in found if isinstance(dim, int))
        return shapes

    def _look(self, inputs: Mapping[str, Any]) -> dict[Tensor, Shape]:
        """The shapes of all tensors asked about."""
        survey = self._survey
        if survey is None:
            asks = [Ask(tensor, Wanted(shape=True)) for tensor in self.plan.tensors]
            survey = Probe(self.model, self.plan, asks, threads=self.threads)
        # a session holds on to the memory of its largest run: this one is kept where it is asked for again and again
        self._survey = survey if self._looked else None
        self._looked = True
        return dict(survey.run(inputs).shapes)

    def _remember(self, signature: Signature, shapes: Mapping[Tensor, Shape]) -> None:
        """Keep the shapes that go with those of the inputs, of the last samples only."""
        if signature in self._shapes:
            return
        if len(self._shapes) >= _REMEMBERED:
            oldest = next(iter(self._shapes))
            del self._shapes[oldest]
            self._keys.pop(oldest, None)
        self._shapes[signature] = shapes

    def _covered(self, signature: Signature) -> bool:
        """Whether the session for all elements can take a sample of shapes not seen before, by what it hands over."""
        return self._usual is not None and self._usual.covers(signature, self.memory)

    def _choose(self, signature: Signature, items: int) -> Sequence[Probe]:
        shapes = self._shapes.get(signature)
        if shapes is None:
            assert self._usual is not None  # what is not covered is looked at
            return self._usual.probes
        key = self._key(signature, items)
        if key is not None:
            if not self._lean and self._pays(shapes, items):
                self._build_lean(shapes, items, signature, self.memory)
            if self._lean and key == self._lean_key:
                if self._lean.outgrown(shapes, self.memory):
                    self._build_lean(shapes, items, signature, self.memory // 2)
                return self._lean.probes
        self._usual = self._full_for(shapes, signature)
        return self._usual.probes

    def _key(self, signature: Signature, items: int) -> object:
        """`Plan.key`, of which there are many fewer than samples."""
        if signature not in self._keys:
            self._keys[signature] = self.plan.key(self._shapes[signature], items)
        return self._keys[signature]

    def _cuts(self, shapes: Mapping[Tensor, Shape], items: int) -> bool:
        """Whether grids leave any element out."""
        return any(not grid.all for grid in self.plan.grids(shapes, items).values())

    def _pays(self, shapes: Mapping[Tensor, Shape], items: int) -> bool:
        """Whether a session for this one form of sample would do less than one that serves all."""
        return bool(self._left_out) or self._cuts(shapes, items)

    def _build_lean(self, shapes: Mapping[Tensor, Shape], items: int, signature: Signature, memory: int) -> None:
        self._lean = None  # its memory goes before the new one's comes
        self.plan.check_axes(shapes)
        grids, opset = self.plan.grids(shapes, items), self.plan.opset
        wanted = [
            (tensor, tensor.essential(shapes[tensor], grids.get(tensor), self._reached(tensor), opset))
            for tensor in self.plan.tensors
        ]
        self._lean = self._group(_without_watchers(wanted), shapes, signature, memory, blocked=True)
        self._lean_key = self.plan.key(shapes, items)

    def _full_for(self, shapes: Mapping[Tensor, Shape], signature: Signature) -> Group:
        """The sessions for all elements of samples like one with these shapes."""
        form = self.plan.form(shapes)
        full = self._full.get(form)
        if full is None or full.outgrown(shapes, self.memory):
            memory = self.memory if full is None else self.memory // 2
            self.plan.check_axes(shapes)
            if len(self._full) >= _FORMS:
                del self._full[next(iter(self._full))]
            wanted = [(tensor, tensor.everything(shapes[tensor])) for tensor in self.plan.tensors]
            full = self._full[form] = self._group(wanted, shapes, signature, memory, blocked=False)
        full.serve(signature)
        return full

    def _group(
        self,
        wanted: Sequence[tuple[Tensor, Wanted]],
        shapes: Mapping[Tensor, Shape],
        signature: Signature,
        memory: int,
        *,
        blocked: bool,
    ) -> Group:
        asks = [Ask(tensor, what, shapes[tensor]) for tensor, what in wanted]
        return Group(self.model, self.plan, asks, signature, memory=memory, blocked=blocked, threads=self.threads)

    def _reached(self, tensor: Tensor) -> tuple[bool, bool]:
        low, high = (tensor, False) in self._left_out, (tensor, True) in self._left_out
        return low, high

    def _leave_out(self, run: Run, signature: Signature) -> None:
        """Build the session again, without the extremes that can't change any more, where that saves enough."""
        ranged = [tensor for tensor in self.plan.alive() if tensor.range and not tensor.extremes]
        reached = {(tensor, side) for tensor in ranged for side, done in enumerate(self.plan.reached(tensor)) if done}
        fresh = {tensor for tensor, side in reached if (tensor, bool(side)) not in self._left_out}
        total = sum(math.prod(run.shapes[tensor]) for tensor in ranged)
        saved = sum(math.prod(run.shapes[tensor]) for tensor in fresh)
        if not fresh or saved < max(_MANY, _WORTH * total) or self.plan.key(run.shapes, run.batch) is None:
            return
        self._left_out = frozenset((tensor, bool(side)) for tensor, side in reached)
        self._full, self._usual = {}, None  # made again where shapes ask for it
        self._build_lean(run.shapes, run.batch, signature, self.memory)


def _without_watchers(wanted: Sequence[tuple[Tensor, Wanted]]) -> list[tuple[Tensor, Wanted]]:
    """What is wanted, but for tensors that are only watched for NaN which shows in another tensor that is measured.

    Nothing is computed differently for that: they stand behind a Clip or Relu of a convolution, and fuse with nothing.
    """
    only = Wanted(total=True)
    goals = {tensor.variable for tensor, what in wanted if what and what != only and _spreads(what)}
    return [
        (tensor, what)
        for tensor, what in wanted
        if what != only or not tensor.blocked or not shows_in(tensor.variable, goals)
    ]


def _spreads(what: Wanted) -> bool:
    """Whether NaN in any element shows in these figures; extremes and grids may miss it."""
    return what.total or what.whole or what.moments or bool(what.means)


def _ports(model: Model) -> list[Port]:
    """The model's inputs, as far as joining samples asks."""
    return [
        Port(tensor.name, None, None if tensor.shape is None else tuple(tensor.shape)) for tensor in model.graph.inputs
    ]


def _declared(model: Model, inputs: Mapping[str, Any]) -> bool:
    """Whether arrays have the shapes that the model asks for."""
    for tensor in model.graph.inputs:
        value = inputs.get(tensor.name)
        if tensor.shape is None or not isinstance(value, np.ndarray):
            continue
        dims = list(tensor.shape)
        if len(dims) != value.ndim or any(
            isinstance(d, int) and d != n for d, n in zip(dims, value.shape, strict=True)
        ):
            return False
    return True
