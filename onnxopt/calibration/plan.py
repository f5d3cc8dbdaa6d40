"""From what passes ask to what sessions are told to report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxopt.calibration.bodies import closed, homes
from onnxopt.calibration.gram import Patches, patches_of
from onnxopt.calibration.instrument import Subject, Wanted, can_cut
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.sampling import Grid, grid
from onnxopt.calibration.statistics import Statistics
from onnxopt.graph.bounds import Bounds, value_bounds
from onnxopt.graph.determined import shape_determined
from onnxopt.graph.layouts import blocked, channels_first
from onnxopt.model import Model, Node, Variable

Shape = tuple[int, ...]


@dataclass(eq=False)
class Tensor:
    """One tensor of the main graph, all that is asked of it, and what its graph says about it.

    channels_first, blocked: see `graph.layouts`. determined: its shape follows from those of the inputs. bounds: values
    that it can't pass. broken: it held NaN or infinities, and is not looked at any more.
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
    grams: list[tuple[Node, Patches]] = field(default_factory=list)
    broken: bool = False

    def grid(self, shape: Shape, batch: int, elements: int | None) -> Grid:
        """The elements that its histogram looks at."""
        return grid(shape, self.channels_first, batch, elements)

    def subject(self, variable: Variable, shape: Shape | None, blocked: bool) -> Subject:
        """How the instrument sees it in a clone, where it is `variable`."""
        channels = shape[1] if shape is not None and len(shape) > 1 else None
        return Subject(variable, None if shape is None else len(shape), channels, blocked and self.blocked)

    def everything(self) -> Wanted:
        """All that can be asked of it, with all elements where any are wanted."""
        return Wanted(
            shape=True,
            low=self.range or self.extremes,
            high=self.range or self.extremes,
            total=True,
            moments=self.moments,
            whole=self.histogram or bool(self.grams),
            ranges=tuple(self.ranges),
            means=tuple(self.means),
            squares=tuple(self.squares),
            firings=tuple(self.firings),
        )

    def essential(self, shape: Shape, chosen: Grid | None, reached: tuple[bool, bool], opset: int) -> Wanted:
        """What has to be asked for in samples with this shape; reached: whether its lower and upper bound have been."""
        low = self.extremes or (self.range and not reached[0])
        high = self.extremes or (self.range and not reached[1])
        pooled = self.blocked and len(shape) == 4 and not low
        cut = self.determined and chosen is not None and not chosen.all and can_cut(chosen, opset)
        whole = bool(self.grams) or (chosen is not None and not cut)
        return Wanted(
            shape=not self.determined,
            low=low,
            high=high,
            total=low or (high and not pooled),
            moments=self.moments,
            grid=chosen if cut and not whole else None,
            whole=whole,
            ranges=tuple(self.ranges),
            means=tuple(self.means),
            squares=tuple(self.squares),
            firings=tuple(self.firings),
        )


class Plan:
    """The tensors that requests are about.

    tensors: those of the main graph. inner: those of inner bodies, of which only ranges can be had. What can't be
    measured is recorded as skipped in `statistics`.
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
        self._sort(requests)

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
        for node in requests.grams:
            patches = patches_of(node)
            if isinstance(patches, str):
                self._statistics.record_skip(node, patches, "grams")
                continue
            for tensor in self._tensor(node.inputs[0], "grams", node):
                tensor.grams.append((node, patches))

    def _sort_ranges(self, requests: Requests) -> None:
        wanted = set(requests.ranges)
        placed = homes(self._model, wanted)
        for body, variables in placed.items():
            reason = closed(body)
            for variable in variables:
                wanted.discard(variable)
                if reason is not None:
                    self._statistics.record_skip(variable, reason)
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
                if axis not in tensor.means:
                    tensor.means.append(axis)
        for variable, axis, threshold in requests.firings:
            for tensor in self._tensor(variable, "firings", (variable, axis, threshold)):
                tensor.firings.append((axis, threshold))

    def _tensor(self, variable: object, kind: str, subject: object) -> Iterator[Tensor]:
        """The tensor, or none where it is not of the main graph, which is recorded."""
        if not isinstance(variable, Variable) or variable not in self._main:
            reason = "is not measured there: only ranges leave an inner body"
            self._statistics.record_skip(subject, reason, kind)  # type: ignore[arg-type]
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
        if any(math.prod(shapes[tensor]) == 0 for tensor in self.tensors):
            return None
        grids = self.grids(shapes, batch)
        return tuple(
            (len(shapes[tensor]), shapes[tensor][1:2] if tensor.blocked else (), grids.get(tensor))
            for tensor in self.tensors
            if tensor.determined
        )

    def reached(self, tensor: Tensor) -> tuple[bool, bool]:
        """Whether the minimum and the maximum can't change any more."""
        found = self._statistics.range(tensor.variable)
        if found is None or not tensor.determined:
            return False, False
        return found.minimum == tensor.bounds[0], found.maximum == tensor.bounds[1]
