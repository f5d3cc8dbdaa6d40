"""The codebooks of one weight and the entries that stand for its elements, with what is known of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.encoding import Palette
from onnxopt.numerics.blocks import Wide
from onnxopt.numerics.clustering import (
    Cells,
    feedback_share,
    feedback_vectors,
    fit,
    fit_cells,
    fit_vectors,
    nearest,
    nearest_vector,
)
from onnxopt.quantization.layer_weights import Known
from onnxopt.sharing.weights import Shareable

Array = npt.NDArray[Any]

# What codebooks of groups may take beside the indices, unless more are asked for; bytes that say where one begins.
_OVERHEAD, _OFFSET = 0.05, 4


@dataclass(frozen=True)
class Form:
    """entries: of each codebook. group: outputs that share one, at least; 0 for as many as keep codebooks small.

    vector: weights that an entry stands for together. feedback: make good for errors where second moments are known.
    """

    entries: int
    group: int = 0
    vector: int = 1
    feedback: bool = True
    seed: int = 0


def shared(found: Shareable, form: Form, known: Known, book: Wide | None = None) -> tuple[Palette, str]:
    """The palette of a finite weight, and how its entries were chosen. book: [1, entries], one that others use too."""
    values = found.constant.values.astype(np.float64)
    # times a power of two: the largest is near 1 then, and squares are finite
    scale = float(np.ldexp(1.0, -int(np.frexp(np.abs(values).max())[1])))
    values *= scale
    if form.vector > 1 and vectors_fit(found, form.vector):
        return _vectors(found, form, values, scale, known)
    shape, axis, masses = found.constant.shape, found.axis, importance(found, known)
    groups = 1 if book is not None else group_count(found, form)
    rows, zeros = _rows(values, axis, groups), values == 0
    sparse = bool(zeros.mean() * form.entries > 1)
    if book is None:
        book = fit(rows, form.entries, None if masses is None else _rows(masses, axis, groups), sparse) / scale
    stored = book.astype(found.constant.dtype)
    scaled = stored.astype(np.float64) * scale
    codes = _back(nearest(rows, scaled), shape, axis)
    how = "nearest of k-means" if masses is None else "nearest of weighted k-means"
    if form.feedback and known.seconds is not None and (weight := found.weight) is not None:
        kept = np.asarray(weight.readers[0].view.matrix(zeros), np.bool_) if sparse else None
        fed = feedback_share(weight.matrix() * scale, known.seconds, scaled, kept)
        codes, how = weight.stored(fed, np.uint8), "error feedback"
    palette = Palette(shape, axis if groups > 1 else 0, stored[..., None], codes.astype(np.uint8))
    return palette, how + (", zeros kept" if sparse else "")


def common_book(all_of: Sequence[tuple[Shareable, Known]], entries: int) -> Wide:
    """One codebook [1, entries] for finite weights, each of which counts for its squared error over its power."""
    largest = max(float(np.abs(found.constant.values.astype(np.float64)).max()) for found, _ in all_of)
    scale = np.ldexp(1.0, -int(np.frexp(largest)[1]))
    pools, zeros = [], False
    for found, known in all_of:
        values = found.constant.values.astype(np.float64) * scale
        masses = importance(found, known)
        pools.append(Cells.of(values.reshape(1, -1), None if masses is None else masses.reshape(1, -1)))
        zeros |= bool((values == 0).mean() * entries > 1)
    return np.asarray(fit_cells(Cells.pooled(pools), entries, zeros) / scale)


def _vectors(found: Shareable, form: Form, values: Wide, scale: float, known: Known) -> tuple[Palette, str]:
    width, masses = form.vector, importance(found, known)
    points = values.reshape(-1, width)
    mass = None if masses is None else masses.reshape(-1, width)
    stored = (fit_vectors(points, form.entries, form.seed, mass) / scale).astype(found.constant.dtype)
    book = stored.astype(np.float64) * scale
    codes, how = nearest_vector(points, book, mass), f"vectors of {width}, nearest of k-means"
    if form.feedback and known.seconds is not None and (weight := found.weight) is not None:
        across = weight.readers[0].view.axis == 0
        fed = feedback_vectors(weight.matrix() * scale, known.seconds, book, across)
        codes, how = fed.T if across else fed, f"vectors of {width}, error feedback"
    shape = found.constant.shape
    return Palette(shape, 0, stored[None], codes.reshape(shape[0], -1).astype(np.uint8)), how


def relative_error(found: Shareable, palette: Palette, known: Known) -> float:
    """Squared error over power: of the outputs as far as is known what the weight multiplies, else of the weight."""
    weight = found.weight
    exact, stored = (each.astype(np.float64) for each in (found.constant.values, palette.values()))
    pair = (exact - stored, exact)
    if known.seconds is not None and weight is not None:
        view, seconds = weight.readers[0].view, known.seconds
        rows = [view.matrix(each).reshape(weight.parts, -1, view.inputs) for each in pair]
        error, power = (float(np.sum(np.matmul(each, seconds) * each)) for each in rows)
    else:
        masses = importance(found, known)
        mass = np.ones(()) if masses is None else masses
        error, power = (float(np.sum(np.square(each) * mass)) for each in pair)
    return error / power if power > 0 else 0.0


def vectors_fit(found: Shareable, width: int) -> bool:
    """Whether rows of the weight are whole vectors."""
    shape = found.constant.shape
    return bool(shape) and int(np.prod(shape[1:])) % width == 0


def importance(found: Shareable, known: Known) -> Wide | None:
    """E[x^2] of what each element multiplies, in the shape of the weight; None where it is not known."""
    weight = found.weight
    if weight is None or known.powers is None:
        return None
    rows = int(found.constant.data.size) // known.powers.shape[1]
    spread = np.repeat(known.powers, rows // len(known.powers), axis=0)
    return np.asarray(weight.stored(spread, np.float64))


def group_count(found: Shareable, form: Form) -> int:
    """How many codebooks serve a weight: each holds `form.group` outputs, or a few more where that divides them."""
    constant, outputs = found.constant, int(found.constant.shape[found.axis])
    group = form.group
    if not group:
        indices = int(constant.data.size) * int(form.entries - 1).bit_length() / 8
        room = _OVERHEAD * indices - _OFFSET * outputs
        group = max(1, outputs // max(1, int(room) // (form.entries * constant.dtype.itemsize)))
    if group >= outputs:
        return 1
    return outputs // next(run for run in range(group, outputs + 1) if outputs % run == 0)


def _rows(values: Array, axis: int, groups: int) -> Array:
    """[groups, n]: the elements of each run of `axis`."""
    if groups == 1:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(groups, -1)


def _back(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of `_rows`."""
    if len(rows) == 1:
        return rows.reshape(shape)
    turned = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, axis))
