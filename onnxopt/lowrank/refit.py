"""Refitting the last pieces of layers to what the first ones really hand them, once layers before are split too.

With y what a layer gave before anything was split and z what its last piece reads now, on the same feeds, the last
piece becomes the least-squares prediction of y from z, its bias what is left of the means. Layers are taken in the
order of the graph, each after those before it have changed, and a step is kept only where the outputs come closer on
feeds that nothing is fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.channels import Measure, Moments, crossed
from onnxopt.lowrank.forms import STRIPS
from onnxopt.lowrank.inputs import Biases
from onnxopt.lowrank.layers import Kind, Layer
from onnxopt.lowrank.rewrite import Split
from onnxopt.model import Model, Node, Variable
from onnxopt.numerics.lowrank import Wide, refitted

# channels of y and z together beyond which a layer is left as it is
_WIDEST = 3200


def refit_in_order(
    model: Model,
    before: Model,
    twins: Mapping[int, Variable],
    splits: Sequence[Split],
    biases: Biases,
    measure: Measure,
    error: Callable[[], float],
    progress: Callable[[int, int], None],
) -> tuple[int, int, float]:
    """Refit the last pieces; returns how many steps helped, of how many, and the error left.

    before: the model as it was, with its tensors by id of the model's own. error: what the model leaves wrong on feeds
    that are not fitted to.
    """
    order = {node: at for at, node in enumerate(model.graph.nodes)}
    stages = [split for split in splits if _can(split, order)]
    stages.sort(key=lambda split: order[split.layer.node])
    best, accepted = error(), 0
    for done, split in enumerate(stages):
        progress(done, len(stages))
        undo = _refit(model, before, twins, split, biases, measure)
        if undo is None:
            continue
        now = error()
        if now < best:
            best, accepted = now, accepted + 1
        else:
            undo()
    return accepted, len(stages), best


def _can(split: Split, order: Mapping[Node, int]) -> bool:
    layer = split.layer
    one = len(layer.readers) == 1 and layer.node in order
    wide = layer.outputs if layer.kind is not Kind.GATES else layer.inputs
    fits = wide + split.form.ranks[-1] * layer.groups <= _WIDEST
    return one and fits and layer.kind is not Kind.TABLE and split.form.name != STRIPS


def _refit(
    model: Model, before: Model, twins: Mapping[int, Variable], split: Split, biases: Biases, measure: Measure
) -> Callable[[], None] | None:
    """Change the last piece and its bias; returns what takes that back, None where nothing was changed."""
    layer, node = split.layer, split.layer.node
    shown, axis = _shown(split)
    centred = biases.has(layer, node)
    twin = twins.get(id(shown)) if shown is not None else None
    if twin is None or axis is None or not (centred or node.op == "MatMul"):
        return None
    both = crossed((before, twin), (model, split.handed[node]), axis, measure)
    if both is None:
        return None
    start = _matrices(split)
    crossing, means = _wanted(layer, both, len(both.mean) - start.shape[0] * start.shape[2], centred, biases)
    now = slice(len(both.mean) - start.shape[0] * start.shape[2], None)
    second = (both.covariance if centred else both.second)[now, now]
    handed = both.mean[now]
    groups, rows, width = start.shape
    found, offsets = np.empty_like(start), np.empty((groups, rows))
    for group in range(groups):
        inner, mine = slice(group * width, (group + 1) * width), slice(group * rows, (group + 1) * rows)
        found[group] = refitted(crossing[mine, inner], second[inner, inner], start[group], both.rows)
        offsets[group] = means[mine] - found[group] @ handed[inner]
    old, offset = split.last.data, biases.given(node)
    split.last.values = _stored(split, found)
    if centred:
        biases.set(layer, node, offsets.reshape(-1))

    def undo() -> None:
        split.last.values = old
        if centred:
            biases.set(layer, node, offset)

    return undo


def _shown(split: Split) -> tuple[Variable | None, int | None]:
    """The tensor that shows what the layer gave before, or of a recurrent one what it read, and its channels' axis."""
    layer, node = split.layer, split.layer.node
    if layer.kind is Kind.GATES:
        read = split.handed[node].inputs[0].inputs[0]
        return (read, 2) if isinstance(read, Variable) else (None, None)
    output: Variable = node.outputs[0]
    if layer.kind is Kind.CONV:
        return output, 1
    if output.shape is None:
        return None, None
    return output, len(output.shape) - (2 if layer.kind is Kind.COLUMNS else 1)


def _wanted(layer: Layer, both: Moments, count: int, centred: bool, biases: Biases) -> tuple[Wide, Wide]:
    """E[(W x) z^T] [N, r] and E[W x] [N], of what was shown in the first `count` channels."""
    second = (both.covariance if centred else both.second)[:count, count:]
    means = both.mean[:count]
    if layer.kind is Kind.GATES:
        weights = layer.matrices()[0]
        return weights @ second, weights @ means
    slot = biases.slot(layer.node)
    if slot is None or slot.node is not layer.node:
        return second, means
    alpha, beta = (float(layer.node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
    own = 0.0 if slot.given is None else beta * slot.given.values.astype(np.float64)
    return second / alpha, np.asarray((means - own) / alpha).reshape(-1)


def _matrices(split: Split) -> Wide:
    """The last piece as [groups, N / groups, r]."""
    values = np.asarray(split.last.values, np.float64)
    if split.layer.kind is Kind.ROWS and not _turned(split):
        values = values.T
    return values.reshape(split.layer.groups, split.layer.outputs // split.layer.groups, -1)


def _stored(split: Split, matrices: Wide) -> npt.NDArray[Any]:
    found = matrices.reshape(split.layer.outputs, -1)
    if split.layer.kind is Kind.ROWS and not _turned(split):
        found = found.T
    return np.ascontiguousarray(found).reshape(split.last.shape).astype(split.last.dtype)


def _turned(split: Split) -> bool:
    node = split.layer.node
    return node.op == "Gemm" and bool(node.attrs.get("transB", 0))
