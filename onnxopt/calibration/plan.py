"""From what passes ask to what sessions are told to report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxopt.calibration.bodies import closed, homes
from onnxopt.calibration.gram import ChannelRows, Cutter, patches_of
from onnxopt.calibration.instrument import Subject, Wanted, can_cut
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.sampling import Grid, grid
from onnxopt.calibration.statistics import Statistics
from onnxopt.graph.bounds import Bounds, value_bounds
from onnxopt.graph.determined import shape_determined
from onnxopt.graph.layouts import blocked, channels_first
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Model, Variable

Shape = tuple[int, ...]

_INNER = "is not measured there: only ranges leave an inner body"


@dataclass(eq=False)
class Tensor:
    """One tensor of the main graph, all that is asked of it, and what its graph says about it.

    channels_first, blocked: see `graph.layouts`. determined: its shape follows from those of the inputs. bounds: values
    that it can't pass. watched: its extremes are looked at whether asked for or not, as its sums overflow. broken: it
    held NaN or infinities, and is not looked at any more.
    """

    variable: Variable
    channels_first: bool
    blocked: bool
    determined: bool
    bounds: Bounds
    range: bool = False
    extremes: bool = False
    moments: bool = False
    histogram: bool = False
    ranges: list[int] = field(default_factory=list)
    means: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    firings: list[tuple[int, float]] = field(default_factory=list)
    grams: list[tuple[str, Any, Cutter]] = field(default_factory=list)
    watched: bool = False
    broken: bool = False

    @property
    def averaged(self) -> list[int]:
        """Channel axes whose means are wanted, for themselves or beside mean squares."""
        return list(dict.fromkeys(self.means + self.squares))

    @property
    def bounded(self) -> bool:
        """Whether its extremes are looked at in any case, so that infinities show in them."""
        return self.range or self.extremes or self.watched

    def grid(self, shape: Shape, batch: int, elements: int | None) -> Grid:
        """The elements that its histogram looks at."""
        return grid(shape, self.channels_first, batch, elements)

    def subject(self, variable: Variable, shape: Shape | None, blocked: bool) -> Subject:
        """How the instrument sees it in a clone, where it is `variable`."""
        channels = shape[1] if shape is not None and len(shape) > 1 else None
        rank = None if shape is None else len(shape)
        return Subject(variable, rank, channels, blocked and self.blocked and self.determined, self.determined)

    def form(self, shape: Shape) -> int | None:
        """What of its shape a session is made for: the number of its axes, None where it is known to be empty."""
        return None if self.determined and math.prod(shape) == 0 else len(shape)

    def everything(self, shape: Shape) -> Wanted:
        """All that can be asked of it in samples with a shape like this, with all elements where any are wanted."""
        if self.broken or self.form(shape) is None:
            return Wanted(shape=True)
        whole = self.histogram or bool(self.grams)
        return self._wanted(low=self.bounded, high=self.bounded, shape=True, whole=whole)

    def essential(self, shape: Shape, chosen: Grid | None, reached: tuple[bool, bool], opset: int) -> Wanted:
        """What has to be asked for in samples with this shape; reached: whether its lower and upper bound have been."""
        if self.broken:
            return Wanted()
        always = self.extremes or self.watched
        cut = self.determined and chosen is not None and not chosen.all and can_cut(chosen, opset)
        whole = bool(self.grams) or (chosen is not None and not cut)
        return self._wanted(
            shape=not self.determined,
            low=always or (self.range and not reached[0]),
            high=always or (self.range and not reached[1]),
            grid=chosen if cut and not whole else None,
            whole=whole,
        )

    def _wanted(self, *, shape: bool, low: bool, high: bool, whole: bool, grid: Grid | None = None) -> Wanted:
        """With a sum that spreads NaN where no other figure does."""
        spreads = whole or self.moments or bool(self.averaged)
        return Wanted(
            shape=shape,
            low=low,
            high=high,
            total=self.watched or not spreads,
            moments=self.moments,
            grid=grid,
            whole=whole,
            ranges=tuple(self.ranges),
            means=tuple(self.averaged),
            squares=tuple(self.squares),
            firings=tuple(self.firings),
        )

    def asked(self) -> Iterator[tuple[str, Any]]:
        """(kind, subject) of everything asked of it."""
        variable = self.variable
        flags = {"ranges": self.range, "extremes": self.extremes, "moments": self.moments, "histograms": self.histogram}
        yield from ((kind, variable) for kind, wanted in flags.items() if wanted)
        yield from self.by_channel()
        yield from ((kind, subject) for kind, subject, _ in self.grams if kind == "grams")

    def by_channel(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """(kind, (variable, axis, ...)) of what is asked of each of its channels."""
        axes = {"channel_ranges": self.ranges, "channel_means": self.means, "channel_moments": self.squares}
        for kind, wanted in axes.items():
            yield from ((kind, (self.variable, axis)) for axis in wanted)
        yield from (("firings", (self.variable, axis, threshold)) for axis, threshold in self.firings)
        yield from ((kind, subject) for kind, subject, _ in self.grams if kind == "channel_grams")

    def drop_axes(self, rank: int) -> None:
        """Forget the channel axes that a tensor of so many axes does not have."""
        self.ranges, self.means, self.squares = (
            [axis for axis in axes if -rank <= axis < rank] for axes in (self.ranges, self.means, self.squares)
        )
        self.firings = [(axis, threshold) for axis, threshold in self.firings if -rank <= axis < rank]
        self.grams = [
            gram for gram in self.grams if not isinstance(gram[2], ChannelRows) or -rank <= gram[2].axis < rank
        ]


class Plan:
    """The tensors that requests are about.

    tensors: those of the main graph. inner: those of inner bodies, of which only ranges can be had. dtypes: element
    types that the file does not tell. What can't be measured is recorded as skipped in `statistics`.
    """

    def __init__(self, model: Model, requests: Requests, statistics: Statistics, elements: int | None) -> None:
        self.elements = elements
        self.opset = model.opset
        self.tensors: list[Tensor] = []
        self.inner: list[Variable] = []
        self._model = model
        self._statistics = statistics
        self._of: dict[Variable, Tensor] = {}
        graph = model.graph
        self._determined, self._bounds = shape_determined(graph), value_bounds(graph)
        self._first, self._blocked = channels_first(graph), blocked(graph)
        self._main = set(graph.inputs) | {tensor for node in graph.nodes for tensor in node.outputs}
        self._sort(requests | Requests())  # each thing once
        self.dtypes = _dtypes(model, [*(tensor.variable for tensor in self.tensors), *self.inner])

    def _sort(self, requests: Requests) -> None:
        self._sort_ranges(requests)
        for variable in requests.extremes:
            for tensor in self._tensor(variable, "extremes", variable):
                tensor.extremes = True
        for variable in requests.moments:
            for tensor in self._tensor(variable, "moments", variable):
                tensor.moments = True
        for variable in requests.histograms:
            for tensor in self._tensor(variable, "histograms", variable):
                tensor.histogram = True
        self._sort_channels(requests)
        self._sort_grams(requests)

    def _sort_ranges(self, requests: Requests) -> None:
        wanted = set(requests.ranges)
        placed = homes(self._model, wanted)
        for body, variables in placed.items():
            reason = closed(body)
            for variable in variables:
                wanted.discard(variable)
                why = reason or _no_numbers(variable)
                if why is not None:
                    self._statistics.record_skip(variable, why)
                elif body is self._model.graph:
                    for tensor in self._tensor(variable, "ranges", variable):
                        tensor.range = True
                else:
                    self.inner.append(variable)
        for variable in requests.ranges:
            if variable in wanted:
                self._statistics.record_skip(variable, "is not produced in the model")

    def _sort_channels(self, requests: Requests) -> None:
        for variable, axis in requests.channel_ranges:
            for tensor in self._tensor(variable, "channel_ranges", (variable, axis)):
                tensor.ranges.append(axis)
        for variable, axis in requests.channel_means:
            for tensor in self._tensor(variable, "channel_means", (variable, axis)):
                tensor.means.append(axis)
        for variable, axis in requests.channel_moments:
            for tensor in self._tensor(variable, "channel_moments", (variable, axis)):
                tensor.squares.append(axis)
        for variable, axis, threshold in requests.firings:
            for tensor in self._tensor(variable, "firings", (variable, axis, threshold)):
                tensor.firings.append((axis, threshold))

    def _sort_grams(self, requests: Requests) -> None:
        here = set(self._model.graph.nodes)
        for node in requests.grams:
            patches = patches_of(node)
            if node not in here:
                self._statistics.record_skip(node, _INNER, "grams")
            elif isinstance(patches, str):
                self._statistics.record_skip(node, patches, "grams")
            elif isinstance(node.inputs[0], Constant):
                self._statistics.record_skip(node, "multiplies a constant", "grams")
            else:
                for tensor in self._tensor(node.inputs[0], "grams", node):
                    tensor.grams.append(("grams", node, patches))
        for variable, axis in requests.channel_grams:
            for tensor in self._tensor(variable, "channel_grams", (variable, axis)):
                tensor.grams.append(("channel_grams", (variable, axis), ChannelRows(axis)))

    def _tensor(self, variable: object, kind: str, subject: object) -> Iterator[Tensor]:
        """The tensor, or none where it is not of the main graph or holds no numbers, which is recorded."""
        why: str | None = _INNER
        if isinstance(variable, Variable) and variable in self._main:
            why = _no_numbers(variable)
        if why is not None or not isinstance(variable, Variable):
            self._statistics.record_skip(subject, str(why), kind)  # type: ignore[arg-type]
            return
        if variable not in self._of:
            self._of[variable] = Tensor(
                variable,
                variable in self._first,
                variable in self._blocked,
                variable in self._determined,
                self._bounds.get(variable, (-np.inf, np.inf)),
            )
            self.tensors.append(self._of[variable])
        yield self._of[variable]

    def alive(self) -> Iterator[Tensor]:
        """The tensors that are still looked at."""
        return (tensor for tensor in self.tensors if not tensor.broken)

    def grids(self, shapes: Mapping[Tensor, Shape], batch: int) -> dict[Tensor, Grid]:
        """The grid of every tensor whose histogram is wanted."""
        return {
            tensor: tensor.grid(shapes[tensor], batch, self.elements) for tensor in self.tensors if tensor.histogram
        }

    def key(self, shapes: Mapping[Tensor, Shape], batch: int) -> object:
        """Equal for shapes that one session serves. None: for empty tensors, which few operators take."""
        if None in self.form(shapes):
            return None
        grids = self.grids(shapes, batch)
        return tuple(
            (len(shapes[tensor]), shapes[tensor][1:2] if tensor.blocked else (), grids.get(tensor))
            for tensor in self.tensors
            if tensor.determined
        )

    def form(self, shapes: Mapping[Tensor, Shape]) -> tuple[int | None, ...]:
        """Equal for shapes that one session for all elements serves."""
        return tuple(tensor.form(shapes[tensor]) for tensor in self.tensors)

    def check_axes(self, shapes: Mapping[Tensor, Shape]) -> None:
        """Skip what is asked of channel axes that a tensor does not have."""
        for tensor in self.alive():
            rank = len(shapes[tensor])
            before = list(tensor.by_channel())
            tensor.drop_axes(rank)
            for kind, subject in before:
                if not -rank <= subject[1] < rank:
                    self._statistics.record_skip(subject, f"has {rank} axes, none of them is {subject[1]}", kind)

    def reached(self, tensor: Tensor) -> tuple[bool, bool]:
        """Whether the minimum and the maximum can't change any more."""
        found = self._statistics.range(tensor.variable)
        if found is None:
            return False, False
        return found.minimum == tensor.bounds[0], found.maximum == tensor.bounds[1]


def _no_numbers(variable: Variable) -> str | None:
    """Why a tensor can't have figures."""
    if variable.type != "tensor_type":
        return "is no tensor"
    if variable.dtype is not None and np.dtype(variable.dtype).kind in "OUST":
        return "holds text"
    return None


def _dtypes(model: Model, variables: Iterable[Variable]) -> dict[Variable, np.dtype[Any]]:
    """What inference tells of the element types that the file leaves open."""
    unknown = [variable for variable in variables if variable.dtype is None]
    facts = known(model) if unknown else {}
    found = {variable: facts[id(variable)].dtype for variable in unknown if id(variable) in facts}
    return {variable: dtype for variable, dtype in found.items() if dtype is not None}
