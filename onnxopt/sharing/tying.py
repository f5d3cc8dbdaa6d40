"""One tensor for two layers whose weights are nearly the same, as far as the outputs allow it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onnxopt.graph.selection import Selection
from onnxopt.model import Model, TensorData
from onnxopt.passbase import Change, Context
from onnxopt.sharing.weights import Shareable, find_shareable, finite

# Elements by which tensors are compared before all of them are.
_SAMPLE = 4096


def tie(model: Model, context: Context, selection: Selection, distance: float) -> list[Change]:
    """Give weights of one shape, type and operator that are at most `distance` apart the mean of both, near ones first.

    The distance is |W - V| / sqrt(|W| |V|). Where outputs can be compared, a pair is tied only if these hold the
    budgets on quality, or without budgets stay within `distance` of the original's.
    """
    found, _ = find_shareable(model, selection, False)
    layers = [each for each in found if each.readers and finite(each.constant)]
    pairs = sorted(_pairs(layers, distance), key=lambda pair: pair[0])
    members = {each: [each] for each in layers}
    changes: list[Change] = []
    for apart, one, other in pairs:
        if members[one] is members[other]:
            continue
        group = [*members[one], *members[other]]
        before = [each.constant.data for each in group]
        mean = np.mean([data.array().astype(np.float64) for data in before], axis=0)
        _assign(group, [TensorData.from_array(mean.astype(one.constant.dtype))] * len(group))
        if not _allowed(model, context, distance):
            _assign(group, before)
            continue
        members |= dict.fromkeys(group, group)
        changes.append(Change("tied", other.place, f"with {one.place}, {apart:.3g} apart"))
    return changes


def _pairs(layers: list[Shareable], distance: float) -> Iterator[tuple[float, Shareable, Shareable]]:
    alike: dict[tuple[object, ...], list[Shareable]] = {}
    for each in layers:
        constant, reader = each.constant, each.readers[0]
        alike.setdefault((constant.shape, str(constant.dtype), reader.node.op, reader.at), []).append(each)
    for one, other in itertools.chain.from_iterable(itertools.combinations(mine, 2) for mine in alike.values()):
        first, second = one.constant.values.reshape(-1), other.constant.values.reshape(-1)
        step = max(1, first.size // _SAMPLE)
        if _apart(first[::step], second[::step]) <= 2 * distance:
            apart = _apart(first, second)
            if apart <= distance:
                yield apart, one, other


def _apart(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> float:
    first, second = one.astype(np.float64), other.astype(np.float64)
    size = math.sqrt(float(np.linalg.norm(first)) * float(np.linalg.norm(second)))
    return float(np.linalg.norm(first - second)) / size if size > 0 else math.inf


def _assign(group: list[Shareable], contents: list[TensorData]) -> None:
    for each, data in zip(group, contents, strict=True):
        for constant in each.constants:
            constant.values = data


def _allowed(model: Model, context: Context, distance: float) -> bool:
    if context.holds is not None:
        return context.holds(model)
    return context.compare is None or context.compare(model) >= -20 * math.log10(distance)
