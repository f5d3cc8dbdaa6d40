"""Means and second moments of the channels of tensors, wherever in the model they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.moments import ENTRY, MOST_BYTES
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Statistics
from onnxopt.graph import remove_dead
from onnxopt.graph.beside import beside
from onnxopt.graph.names import Names
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable
from onnxopt.numerics.elimination import Floats

Measure = Callable[[Model, Requests], Statistics]

# Channels beyond which a matrix is not gathered: 5,120 take 0.4 GB and minutes to invert.
WIDEST = 5120


@dataclass(frozen=True)
class Source:
    """Where the values of channels can be seen: an axis of a tensor, counted from the end.

    direction: of a recurrent output [steps, directions, batch, units] the one that is meant.
    """

    tensor: Variable
    axis: int
    direction: int | None = None


@dataclass(frozen=True)
class Moments:
    """centred [K, K] float32: covariances, kept as such since the difference of large moments holds no more than noise.

    mean [K]; rows: how many x they are taken over.
    """

    centred: npt.NDArray[np.float32]
    mean: Floats
    rows: int

    @classmethod
    def taken(cls, second: Floats, mean: Floats, rows: int) -> Moments:
        """Of E[x x^T] [K, K] in double precision."""
        return cls((second - np.outer(mean, mean)).astype(np.float32), np.asarray(mean), rows)

    @property
    def covariance(self) -> Floats:
        """E[x x^T] - E[x] E[x]^T."""
        return self.centred.astype(np.float64)

    @property
    def second(self) -> Floats:
        """E[x x^T]."""
        return np.asarray(self.centred + np.outer(self.mean, self.mean))

    def of(self, positions: slice) -> Moments:
        """Those of some of the channels."""
        return Moments(self.centred[positions, positions], self.mean[positions], self.rows)

    def joined(self, other: Moments) -> Moments:
        """Those of both sets of x."""
        rows = self.rows + other.rows
        mine, theirs = self.rows / rows, other.rows / rows
        apart = self.mean - other.mean
        centred = self.covariance * mine + other.covariance * theirs + mine * theirs * np.outer(apart, apart)
        return Moments(centred.astype(np.float32), np.asarray(self.mean * mine + other.mean * theirs), rows)


@dataclass
class Seen:
    """moments, firing: of each source, the latter the share of positions above the threshold [K]; reasons: why not."""

    moments: dict[Source, Moments] = field(default_factory=dict)
    firing: dict[Source, Floats] = field(default_factory=dict)
    reasons: dict[Source, str] = field(default_factory=dict)


def gather(model: Model, sources: Iterable[Source], measure: Measure, threshold: float | None = None) -> Seen:
    """What is seen at the sources, in as many runs as memory asks for. threshold: that of `firing`, None for none."""
    seen = Seen()
    for part in _parts(list(dict.fromkeys(sources)), seen.reasons):
        probe = _Probe(model)
        requests = []
        for source in part:
            reached = probe.reach(source)
            if isinstance(reached, str):
                seen.reasons[source] = reached
            else:
                requests.append((source, reached, source.axis))
        asked = Requests(channel_grams=tuple((tensor, axis) for _, tensor, axis in requests))
        if threshold is not None:
            asked |= Requests(firings=tuple((tensor, axis, threshold) for _, tensor, axis in requests))
        statistics = measure(probe.model, asked) if requests else Statistics()
        for source, tensor, axis in requests:
            gram = statistics.channel_gram(tensor, axis)
            if gram is None:
                why = statistics.reason((tensor, axis), "channel_grams")
                seen.reasons[source] = f"what it reads {why or 'was never computed: no feed came here'}"
                continue
            seen.moments[source] = Moments.taken(gram.second[0], gram.mean[0], gram.rows)
            fired = statistics.firing(tensor, axis, threshold) if threshold is not None else None
            if fired is not None:
                seen.firing[source] = fired
    return seen


def crossed(
    first: tuple[Model, Variable], second: tuple[Model, Variable], axis: int, measure: Measure
) -> Moments | None:
    """Moments of [x; y] on the same feeds: x the channels of a tensor of one model, y those of one of another.

    Both tensors are in main graphs and agree in all other axes; axis: of the channels, counted from the first. None
    where a tensor is an input that both models share, or what it holds was never computed or is not finite.
    """
    both = beside(first[0], second[0])
    one, other = both.first.get(id(first[1])), both.second.get(id(second[1]))
    if one is None or other is None:
        return None
    names = Names(both.model)
    joined = Variable(names.tensor("both_seen"), one.dtype, None)
    concat = Node("Concat", names.node("both_seen"), attrs={"axis": axis})
    concat.inputs, concat.outputs = [one, other], [joined]
    both.model.graph.nodes.append(concat)
    both.model.graph.outputs[:] = [joined]
    remove_dead(both.model)
    gram = measure(both.model, Requests(channel_grams=((joined, axis),))).channel_gram(joined, axis)
    return None if gram is None else Moments.taken(gram.second[0], gram.mean[0], gram.rows)


def _parts(sources: Sequence[Source], reasons: dict[Source, str]) -> list[list[Source]]:
    parts: list[list[Source]] = [[]]
    room = MOST_BYTES
    for source in sources:
        width = source.tensor.shape[source.axis] if source.tensor.shape is not None else None
        if not isinstance(width, int) or width > WIDEST:
            reasons[source] = f"reads {width or 'an unknown number of'} channels, more than are related to each other"
            continue
        size = width * width * ENTRY
        if parts[-1] and size > room:
            parts.append([])
            room = MOST_BYTES
        parts[-1].append(source)
        room -= size
    return [part for part in parts if part]


class _Probe:
    """A clone of a model, in which the values at sources are tensors of the main graph."""

    def __init__(self, model: Model) -> None:
        clone = model.clone()
        self.model = clone.model
        self._tensors = clone.tensors
        self._names = Names(self.model)
        self._homes: dict[Variable, Graph] = {}
        for body in self.model.bodies():
            owned = [*body.inputs, *(tensor for node in body.nodes for tensor in node.outputs)]
            self._homes.update((tensor, body) for tensor in owned)

    def reach(self, source: Source) -> Variable | str:
        """The tensor to measure; in words, why there is none."""
        tensor = self._tensors.get(id(source.tensor))
        if tensor is None or tensor not in self._homes:
            return "what it reads is not computed in the model"
        rank = len(tensor.shape) if tensor.shape is not None else -source.axis
        lifted = self._lift(tensor, self._homes[tensor], rank)
        if isinstance(lifted, str) or source.direction is None:
            return lifted
        return self._direction(lifted, source.direction)

    def _lift(self, tensor: Variable, body: Graph, rank: int) -> Variable | str:
        """Carry a tensor out of the branches of If; the other branch gives an empty one."""
        if body.function is not None:
            return "what it reads is in a local function"
        if body.parent is None:
            return tensor
        owner = body.owner
        if owner is None or owner.kind != ("", "If"):
            return f"what it reads is in the body of a {owner.op if owner is not None else 'node'}, which hides it"
        out = Variable(self._names.tensor(f"{tensor.name}_seen"), tensor.dtype, None)
        for branch in owner.graphs():
            branch.outputs.append(tensor if branch is body else self._nothing(branch, tensor, rank))
        owner.outputs.append(out)
        out.shape = [None] * rank
        self._homes[out] = body.parent
        return self._lift(out, body.parent, rank)

    def _nothing(self, branch: Graph, like: Variable, rank: int) -> Variable:
        dtype: Any = like.dtype if like.dtype is not None else np.float32
        empty = Constant(self._names.tensor("nothing"), TensorData.from_array(np.zeros([0] * rank, dtype)))
        out = Variable(self._names.tensor("nothing_seen"), dtype, [0] * rank)
        node = Node("Identity", self._names.node("nothing_seen"))
        node.inputs, node.outputs = [empty], [out]
        branch.nodes.append(node)
        return out

    def _direction(self, units: Variable, direction: int) -> Variable:
        """One direction of [steps, directions, batch, units]."""
        at = Constant(self._names.tensor("direction"), TensorData.from_array(np.array([direction], np.int64)))
        out = Variable(self._names.tensor(f"{units.name}_{direction}"), units.dtype, None)
        node = Node("Gather", self._names.node(f"direction_{direction}"), attrs={"axis": 1})
        node.inputs, node.outputs = [units, at], [out]
        self.model.graph.nodes.append(node)
        return out
