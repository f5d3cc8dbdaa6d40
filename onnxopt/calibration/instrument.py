"""Nodes added to a clone of the model so that it reports figures of its own tensors.

The runtime walks a graph from the outputs back, in the order of the nodes that end it. So each measurement ends in a
node that stands right behind the producer of its tensor, and the model's own outputs are not asked for: then every
figure is taken while the tensor is in the cache, and its memory is free for the next one.

Convolutions run in a blocked layout that only pooling, element-wise operators and convolutions know; any other reader
makes the runtime copy the whole tensor first. So what a large convolutional tensor is asked for goes through these: its
maximum and its mean through global pooling, the elements on a grid through a depthwise Conv whose kernel is 1 at one
place and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.sampling import Grid
from onnxopt.graph.names import Names
from onnxopt.model import Constant, Model, Node, TensorData, Variable

# Convolutions run blocked where their channels come in multiples of this.
_BLOCK = 8
# beyond every axis
_END = 1 << 62


@dataclass(frozen=True)
class Wanted:
    """What one session reports of one tensor of the main graph.

    shape: its dims. low, high: extremes. total: a sum that spreads NaN, of magnitudes or, of blocked tensors, of
    channels. moments: sums of x and x * x in parts. grid: the elements on it; `can_cut` says whether the graph can take
    them. whole: all elements, which tell of shape, low, high and total as well. ranges, means, squares: channel axes.
    firings: (axis, threshold).
    """

    shape: bool = False
    low: bool = False
    high: bool = False
    total: bool = False
    moments: bool = False
    grid: Grid | None = None
    whole: bool = False
    ranges: tuple[int, ...] = ()
    means: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    firings: tuple[tuple[int, float], ...] = ()

    def __bool__(self) -> bool:
        return self != Wanted()


@dataclass(frozen=True)
class Subject:
    """A tensor of the main graph as the instrument sees it.

    rank, channels: of what a run showed, None before one. blocked: whether the runtime keeps it in the blocked layout.
    filled: whether it is sure to have elements, without which pooling fails.
    """

    tensor: Variable
    rank: int | None
    channels: int | None
    blocked: bool
    filled: bool


@dataclass(frozen=True)
class Reading:
    """One added output: its name, which field of Wanted it answers, and the axis (and threshold) it is about.

    shaped: whether it tells the shape of the tensor.
    """

    name: str
    figure: str
    detail: tuple[Any, ...] = ()
    shaped: bool = False


def can_cut(grid: Grid, opset: int) -> bool:
    """Whether nodes of this operator set can take the elements on the grid; Slice has steps from 10 on."""
    return opset >= 10 and (grid.items == 1 or grid.steps[0] == 1)


def mean_is_sum(axis: int, rank: int) -> bool:
    """Whether nothing is reduced in the graph for the mean of each channel: there are no axes but the first and it."""
    return rank == 1 or (rank == 2 and axis % 2 == 1)


class Instrument:
    """Adds nodes to the main graph of `model`, which is changed in place; `finish` puts them where they belong."""

    def __init__(self, model: Model, names: Names) -> None:
        self.model = model
        self.names = names
        self._behind: dict[Node | None, list[Node]] = {}
        self._outputs: dict[Variable, None] = {}

    def measure(self, subject: Subject, wanted: Wanted) -> list[Reading]:
        """Report what is wanted of one tensor."""
        return _Measurement(self, subject, wanted).readings

    def expose(self, tensors: Sequence[Variable]) -> None:
        """Report these tensors as they are."""
        self._outputs.update(dict.fromkeys(tensors))

    def finish(self) -> None:
        """Put every added node behind the producer of what it measures; the added outputs replace the model's own."""
        nodes = list(self._behind.pop(None, []))
        for node in self.model.graph.nodes:
            nodes.append(node)
            nodes += self._behind.pop(node, [])
        self.model.graph.nodes[:] = nodes
        self.model.graph.outputs[:] = list(self._outputs)

    def add(self, producer: Node | None, op: str, inputs: Sequence[Variable | Constant], **attrs: object) -> Variable:
        """A node behind `producer`; returns its float32 output."""
        output = Variable(self.names.tensor(f"calibration_{op.lower()}"), dtype=np.dtype(np.float32))
        node = Node(op=op, name=self.names.node(f"calibration_{op.lower()}"), attrs=attrs)
        node.inputs = list(inputs)
        node.outputs = [output]
        self._behind.setdefault(producer, []).append(node)
        return output

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> Constant:
        """A constant of the main graph."""
        array = np.array(values, dtype)
        return Constant(self.names.tensor("calibration_constant"), TensorData.from_array(array))


class _Measurement:
    """The nodes of one tensor."""

    def __init__(self, instrument: Instrument, subject: Subject, wanted: Wanted) -> None:
        self.instrument = instrument
        self.producer = subject.tensor.inputs[0] if subject.tensor.inputs else None
        self.subject = subject
        self.readings: list[Reading] = []
        self._flats: dict[int, Variable] = {}
        self.values: Variable = subject.tensor
        if self.values.dtype is None or np.dtype(self.values.dtype) != np.float32:
            self.values = self._node("Cast", [self.values], to=1)
        if wanted in (Wanted(), Wanted(shape=True)):
            self._keep(wanted.shape)
            return
        self.pools = subject.blocked and subject.rank == 4
        if wanted.whole:
            self._whole(wanted)
        else:
            self._figures(wanted)
        if wanted.moments:
            self._moments()
        self._channels(wanted)

    def _keep(self, shape: bool) -> None:
        """Nothing but the shape is wanted; a reader that the runtime can't compute ahead keeps the tensor as it is."""
        size = self._node("Size", [self.values])
        size.dtype = np.dtype(np.int64)
        self.instrument.expose([size])
        if shape:
            self._report("shape", self._node("Shape", [self.values]), dtype=np.int64)

    def _whole(self, wanted: Wanted) -> None:
        """All elements; they show their shape, extremes and NaN themselves.

        Blocked ones end in a node of their own, and those of another type, whose Cast the runtime may join with one
        before it: then it has to be so in every session.
        """
        cast = self.values is not self.subject.tensor
        if self.pools or cast:
            if wanted.shape:
                self._report("shape", self._node("Shape", [self.values]), dtype=np.int64)
            self._report("whole", self._flat(self.values))
            return
        exposed = self._node("Identity", [self.values]) if self.producer is None else self.values
        self.instrument.expose([exposed])
        self.readings.append(Reading(exposed.name, "whole", shaped=True))

    def _figures(self, wanted: Wanted) -> None:
        if wanted.shape:
            self._report("shape", self._node("Shape", [self.values]), dtype=np.int64)
        self._extremes(wanted)
        if wanted.total and self.pools and not wanted.low:
            self._report("total", self._flat(self._node("GlobalAveragePool", [self.values])))
        elif wanted.total:
            self._report("total", self._node("ReduceL1", [self.values], keepdims=0))
        if wanted.grid is not None:
            self._report("grid", self._flat(self._on_grid(wanted.grid)))

    def _node(self, op: str, inputs: Sequence[Variable | Constant], **attrs: object) -> Variable:
        return self.instrument.add(self.producer, op, inputs, **attrs)

    def _report(
        self, figure: str, tensor: Variable, detail: tuple[Any, ...] = (), dtype: npt.DTypeLike = np.float32
    ) -> None:
        tensor.dtype = np.dtype(dtype)
        self.instrument.expose([tensor])
        self.readings.append(Reading(tensor.name, figure, detail, figure == "shape"))

    def _flat(self, tensor: Variable) -> Variable:
        """[n]; a node of its own that ends the graph, whatever the layout of the tensor."""
        return self._node("Reshape", [tensor, self.instrument.constant([-1], np.int64)])

    def _extremes(self, wanted: Wanted) -> None:
        if wanted.low:
            self._report("low", self._node("ReduceMin", [self.values], keepdims=0))
        if wanted.high and self.pools and not wanted.low:
            self._report("high", self._flat(self._node("GlobalMaxPool", [self.values])))
        elif wanted.high:
            self._report("high", self._node("ReduceMax", [self.values], keepdims=0))

    def _moments(self) -> None:
        """Sums over small parts, which float32 holds to a few roundings; the parts are summed in float64 later."""
        rank = self.subject.rank or 0
        for figure, op in (("moments", "ReduceSum"), ("moment_squares", "ReduceSumSquare")):
            summed = self._reduce_parts(op, min(2, rank - 1)) if rank else self._reduce(op, [])
            self._report(figure, self._flat(summed))

    def _reduce_parts(self, op: str, kept: int) -> Variable:
        """Reduce all axes from `kept` on, [parts]; with `kept` negative all axes before it, [those from it on].

        Behind a Flatten: the runtime moves a Transpose through a reduction, which then sums in another order, depending
        on what else reads the tensor.
        """
        at = kept if kept >= 0 else (self.subject.rank or 0) + kept
        if at not in self._flats:
            self._flats[at] = self._node("Flatten", [self.values], axis=at)
        return self._reduce(op, [1 if kept >= 0 else 0], self._flats[at])

    def _reduce(self, op: str, axes: Sequence[int], values: Variable | None = None) -> Variable:
        """Reduce away these axes; nothing is reduced where there are none, but squared where `op` squares."""
        values = self.values if values is None else values
        if not axes:
            return self._node("Mul", [values, values]) if op == "ReduceSumSquare" else values
        since = 13 if op == "ReduceSum" else 18
        if self.instrument.model.opset < since:
            return self._node(op, [values], axes=list(axes), keepdims=0)
        return self._node(op, [values, self.instrument.constant(axes, np.int64)], keepdims=0)

    def _on_grid(self, grid: Grid) -> Variable:
        channels = self.subject.channels
        if self.pools and channels and channels % _BLOCK == 0 and grid.steps[:2] == (1, 1):
            return self._by_depthwise(grid.steps[2:], channels)
        axes = [axis for axis, step in enumerate(grid.steps) if step > 1]
        steps = [grid.steps[axis] for axis in axes]
        bounds = [[step // 2 for step in steps], [_END] * len(axes), axes, steps]
        return self._node("Slice", [self.values, *(self.instrument.constant(part, np.int64) for part in bounds)])

    def _by_depthwise(self, steps: Sequence[int], channels: int) -> Variable:
        """Element (step // 2 + i * step) along each position axis: a kernel of two taps, the first of them zero."""
        kernel = [2 if step > 1 else 1 for step in steps]
        weight = np.zeros((channels, 1, *kernel), np.float32)
        last: tuple[Any, ...] = (..., *(size - 1 for size in kernel))
        weight[last] = 1.0
        dilations = [max(1, step // 2) for step in steps]
        constant = self.instrument.constant(weight, np.float32)
        attrs = {"kernel_shape": kernel, "strides": list(steps), "dilations": dilations, "group": channels}
        return self._node("Conv", [self.values, constant], **attrs)

    def _channels(self, wanted: Wanted) -> None:
        rank = self.subject.rank or 0
        for axis in wanted.ranges:
            others = [other for other in range(rank) if other != axis % rank]
            self._report("channel_low", self._flat(self._reduce("ReduceMin", others)), (axis,))
            if self.pools and axis % rank == 1:
                self._report("channel_high", self._flat(self._node("GlobalMaxPool", [self.values])), (axis,))
            else:
                self._report("channel_high", self._flat(self._reduce("ReduceMax", others)), (axis,))
        for axis in wanted.means:
            if wanted.whole and mean_is_sum(axis, rank):
                continue  # of all elements there are, just as in the graph
            self._report("channel_mean", self._flat(self._channel_mean(axis % rank, rank)), (axis,))
        for axis in wanted.squares:
            squares = self._reduce_channels("ReduceSumSquare", axis % rank, rank)
            self._report("channel_squares", self._flat(squares), (axis,))
        for axis, threshold in wanted.firings:
            others = [other for other in range(rank) if other != axis % rank]
            self._report("channel_fired", self._flat(self._fired(threshold, others)), (axis, threshold))

    def _channel_mean(self, axis: int, rank: int) -> Variable:
        """The mean of each channel, [C] or [parts, C]."""
        if axis == 1 and 3 <= rank <= 5 and self.subject.filled:
            return self._node("GlobalAveragePool", [self.values])
        return self._reduce_channels("ReduceMean", axis, rank)

    def _reduce_channels(self, op: str, axis: int, rank: int) -> Variable:
        """[C] or [parts, C]: reduced over the axes other than `axis`, in as many parts as need no work."""
        if mean_is_sum(axis, rank):
            return self._reduce(op, [])
        if axis in (0, 1):
            return self._reduce_parts(op, axis + 1)
        if axis == rank - 1:
            return self._reduce_parts(op, -1)
        return self._reduce(op, [other for other in range(1, rank) if other != axis])

    def _fired(self, threshold: float, others: Sequence[int]) -> Variable:
        above = self._node("Greater", [self.values, self.instrument.constant(threshold, np.float32)])
        above.dtype = np.dtype(bool)
        whole, self.values = self.values, self._node("Cast", [above], to=1)
        counted = self._reduce("ReduceSum", others)
        self.values = whole
        return counted
