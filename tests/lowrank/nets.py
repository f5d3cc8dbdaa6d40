"""Small models through the pass, with everything that it asks of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.model import Model
from onnxopt.passbase import Context, PassResult
from onnxopt.passes.lowrank import LowRank
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session
from onnxopt.target import Target, resolve
from onnxopt.verification import RecordedOutputs, compare
from tests.passes.quantizing import Array, normal, samples

Given = Sequence[Mapping[str, Array]]
_X86 = resolve("x86")
# layers cost nothing besides their multiply-adds, so that small ones pay as large ones do
FREE = replace(_X86, costs=replace(_X86.costs, node=0.0, layer=0.0, float_weight=0.0, float_element=0.0))


def split(
    model: Model, feeds: Given | None = None, target: Target = FREE, holds: Any = None, **options: Any
) -> PassResult:
    """Run the pass in place on all but the last two feeds, which it chooses by; the runtime loads what comes of it."""
    pass_ = LowRank(**options)
    if feeds is None:
        result = pass_.run(model, Context(target=target, evaluate=evaluate))
        model.normalize()
        Session(model)
        return result
    every = samples(feeds)
    fit: list[Any] = every[:-2]
    select: Any = every[-2:]
    original = model.clone().model

    def measure(asked: Model, requests: Requests) -> Statistics:
        asked.normalize()
        return collect(asked, requests, fit)

    def closeness(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        model.normalize()
        return compare(RecordedOutputs(Session(reference or original), select), Session(model)).quality

    context = Context(
        reference=original,
        compare=closeness,
        holds=holds,
        measure=measure,
        target=target,
        evaluate=evaluate,
        shapes={name: np.shape(value) for name, value in feeds[0].items()},
    )
    result = pass_.run(model, context)
    model.normalize()
    Session(model)
    return result


def outputs(model: Model, feed: Mapping[str, Array]) -> list[Array]:
    return [np.asarray(value) for value in Session(model, optimize=False, threads=1).run(dict(feed)).values()]


def apart(model: Model, before: Model, feeds: Given) -> float:
    """The largest relative error of an output, root mean square."""
    found = 0.0
    for feed in feeds:
        for one, other in zip(outputs(before, feed), outputs(model, feed), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            power = float(np.square(one.astype(np.float64)).mean())
            error = float(np.square(one.astype(np.float64) - other).mean())
            found = max(found, (error / power) ** 0.5)
    return found


def together(*shape: int, seed: int = 0, axis: int = -1, mean: float = 1.0) -> Array:
    """Values whose channels along `axis` move together, around a mean."""
    width = shape[axis]
    moved = [*shape]
    moved[axis] = max(2, width // 6)
    mixed = np.moveaxis(normal(*moved, seed=seed), axis, -1) @ normal(moved[axis], width, seed=91)
    values = np.moveaxis(mixed, -1, axis) + 0.2 * normal(*shape, seed=seed + 500)
    return np.asarray(values + mean, np.float32)


def low(*shape: int, rank: int = 8, seed: int = 0) -> Array:
    """A weight that is a matrix of this rank, seen as [shape[0], the rest]."""
    width = int(np.prod(shape[1:]))
    product = normal(shape[0], rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    return np.asarray(product.reshape(shape) / (rank * width) ** 0.5, np.float32)
