"""How many elements the tensors of layers have in a run, where inference can't tell: seen on feeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from onnxopt.calibration.channels import Measure
from onnxopt.calibration.requests import Requests
from onnxopt.calibration.statistics import Statistics
from onnxopt.graph.macs import LAYERS
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Model, Node, Variable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What runs show of layers whose shapes inference can't tell.

    elements: id of a tensor -> how many it has in a run, on average; idle: layers in branches that no feed takes.
    """

    elements: Mapping[int, float] = field(default_factory=dict)
    idle: frozenset[Node] = frozenset()


def seen_sizes(model: Model, shapes: Mapping[str, Sequence[int]], measure: Measure) -> Seen:
    """Look at the layers of inner bodies, and at those of unknown shape. shapes: those of the inputs in one run."""
    facts = known(model, shapes)
    asked: dict[Node, list[Variable]] = {}
    for body in model.bodies():
        for node in body.nodes if body.function is None else ():
            tensors = [t for t in (*node.inputs[:2], node.outputs[0]) if isinstance(t, Variable) and not t.is_empty()]
            unknown = any(not _is_known(facts.get(id(tensor))) for tensor in tensors)
            if node.op in LAYERS and (body.parent is not None or unknown):
                asked[node] = tensors
    if not asked:
        return Seen()
    wanted = list(dict.fromkeys(tensor for tensors in asked.values() for tensor in tensors))
    statistics = measure(model, Requests(ranges=tuple(wanted)))
    ranges = {tensor: statistics.range(tensor) for tensor in wanted}
    elements = {id(tensor): found.count / statistics.samples for tensor, found in ranges.items() if found is not None}
    idle = {node for node, tensors in asked.items() if any(_never(statistics, tensor) for tensor in tensors)}
    return Seen(elements, frozenset(idle))


def _never(statistics: Statistics, tensor: Variable) -> bool:
    return statistics.range(tensor) is None and statistics.reason(tensor) is None


def _is_known(fact: Fact | None) -> bool:
    return fact is not None and fact.shape is not None and all(isinstance(dim, int) for dim in fact.shape)


def _variables(model: Model) -> Iterator[Variable]:
    for body in model.bodies():
        yield from (tensor for tensor in body.inputs if isinstance(tensor, Variable))
        yield from (tensor for node in body.nodes for tensor in node.outputs)


def _shape_of(tensor: Variable, facts: Mapping[int, Fact]) -> Sequence[int | str | None] | None:
    """What follows from the inputs' shapes, or else what the model says."""
    fact = facts.get(id(tensor))
    return fact.shape if fact is not None and fact.shape is not None else tensor.shape


def _filled(dims: Sequence[int | str | None], elements: float | None) -> Shape:
    """A shape in numbers: unknown dims are 1 but for one, which makes up the elements that were seen."""
    found = [dim if isinstance(dim, int) else 1 for dim in dims]
    unknown = [at for at, dim in enumerate(dims) if not isinstance(dim, int)]
    if unknown and elements is not None:
        found[unknown[0]] = max(1, round(elements / max(1, math.prod(found))))
    return tuple(found)


def run_shapes(model: Model, shapes: Mapping[str, Sequence[int]], seen: Seen) -> dict[int, Shape]:
    """id of a tensor -> its shape in one run, in numbers: what neither inference nor `seen` tells counts as 1.

    shapes: those of the inputs in that run. Tensors of unknown rank are left out.
    """
    facts = known(model, shapes)
    return {
        id(tensor): _filled(shape, seen.elements.get(id(tensor)))
        for tensor in _variables(model)
        if (shape := _shape_of(tensor, facts)) is not None
    }
