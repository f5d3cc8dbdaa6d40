"""Refitting layer after layer to what each really reads once others before it are pruned.

The first fit (`fit`) takes the inputs of every layer for those of the original network. They are not: errors of earlier
layers come in with them. With x what a layer read before anything was pruned and z what it reads now, on the same
feeds, the best linear estimate of x from z is

    x ~ T z + c        T = T0 + (E[x z^T] - T0 E[z z^T]) E[z z^T]^-1

so W T and b + W c bring the layer's outputs closest to what they were (asymmetric reconstruction: He et al., "Channel
Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.2). T0 is the first fit; the correction to it is
trusted as far as rows were seen. Where they are few, only a factor is fitted: T = a T0. Layers are taken in the order
of the graph, each after those before it have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from onnxopt.calibration.channels import Measure, Moments, Source, crossed
from onnxopt.graph.axes.axis import Floats, Mask
from onnxopt.model import Model, Variable
from onnxopt.numerics.elimination import damped
from onnxopt.pruning.fit import Fitting
from onnxopt.pruning.order import kept
from onnxopt.pruning.reads import Read

# channels beyond which a layer keeps its first fit: twice as many are related to each other here
WIDEST = 1600
# rows (samples) for each channel without which no more than a factor is fitted
_ROWS = 4
_RIDGE = 1e-2


def refit_in_order(
    fitting: Fitting,
    before: Model,
    twins: Mapping[int, Variable],
    reads: Iterable[Read],
    gone: set[int],
    measure: Measure,
    error: Callable[[], float],
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Refit the layers of `fitting.model`, where `gone` was applied; returns how many steps helped, and of how many.

    before: the model as it was, with its tensors by id of the model's own. error: what `fitting.model` leaves wrong on
    feeds that are not fitted to; a step that does not lower it is taken back.
    """
    by_source: dict[Source, list[Read]] = {}
    for read in reads:
        fits = len(read.roots) <= WIDEST and not fitting.is_shared(read)
        if read.source is not None and read.source.direction is None and fits:
            by_source.setdefault(read.source, []).append(read)
    order = {tensor: at for at, tensor in enumerate(t for n in fitting.model.graph.nodes for t in n.outputs)}
    stages = sorted((source for source in by_source if source.tensor in order), key=lambda s: order[s.tensor])
    best, accepted = error(), 0
    for done, source in enumerate(stages):
        progress(done, len(stages))
        moments = _crossed(fitting.model, before, twins, source, measure)
        if moments is None:
            continue
        mark = fitting.mark()
        for read in by_source[source]:
            fitting.transform(read, kept(read.roots, gone), *_estimate(read, gone, moments, fitting))
        now = error()
        if now < best:
            best = now
            accepted += 1
        else:
            fitting.restore(mark)
    return accepted, len(stages)


def _crossed(
    model: Model, before: Model, twins: Mapping[int, Variable], source: Source, measure: Measure
) -> Moments | None:
    """Moments of [x; z] at one place, x of the model before and z of the model now."""
    twin = twins.get(id(source.tensor))
    if twin is None:
        return None
    axis = source.axis + len(source.tensor.shape or ())
    return crossed((before, twin), (model, source.tensor), axis, measure)


def _estimate(read: Read, gone: set[int], both: Moments, fitting: Fitting) -> tuple[Floats, Floats]:
    """T [K, kept] and c [K]."""
    keep: Mask = kept(read.roots, gone)
    total = len(both.mean) // 2
    first = np.arange(total)[read.positions]
    second = total + first[keep]
    centred = fitting.has_slot(read)
    moments = both.covariance if centred else both.second
    start = fitting.first_fit(read, keep)
    inner = moments[np.ix_(second, second)]
    crossed = moments[np.ix_(first, second)]
    if both.rows < _ROWS * len(second):
        estimate = start * _factor(fitting.energy(read), crossed @ start.T, start @ inner @ start.T)
    else:
        share = both.rows / (both.rows + len(second))
        change = np.linalg.solve(damped(inner, both.rows, _RIDGE), (crossed - start @ inner).T).T
        estimate = start + share * change
    offset = both.mean[first] - estimate @ both.mean[second] if centred else np.zeros(len(first))
    return estimate, offset


def _factor(energy: Floats, crossed: Floats, own: Floats) -> float:
    """a with the least E|W x - a W T0 z|^2. energy: W^T W; crossed: E[x (T0 z)^T]; own: E[(T0 z) (T0 z)^T]."""
    power = float(np.sum(energy * own))
    return float(np.sum(energy * crossed)) / power if power > 0 else 1.0
