"""Samples joined into batches, where the model and the samples allow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxopt.feeds.sample import Sample
from onnxopt.runtime.ports import Array, Port

# What samples must have in common to be joined: of every input the name, the element type and all sizes but the first.
_Form: TypeAlias = tuple[tuple[str, object, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that run together.

    sample: the inputs of all members joined along axis 0, without labels; the member itself where it is alone.
    members: the samples it was made of, in order; their lengths along axis 0 say which rows are whose.
    """

    sample: Sample
    members: tuple[Sample, ...]


def batched(feeds: Iterable[Sample], size: int, ports: Sequence[Port]) -> Iterator[Batch]:
    """Consecutive samples in batches of at most `size` >= 1, read as they are needed.

    Samples are joined as long as all their inputs agree in element type and in every dimension but the first, and the
    model fixes the first dimension of none; otherwise a batch is closed early. An input that is no array, or one
    without axes, is never joined. With size 1 every sample passes as it is, uncopied.
    """
    fixed = frozenset(port.name for port in ports if port.shape and isinstance(port.shape[0], int))
    waiting: list[Sample] = []
    form: _Form | None = None
    for sample in feeds:
        own = _form(sample, fixed) if size > 1 else None
        if waiting and (own is None or own != form):
            yield _joined(waiting)
            waiting = []
        waiting.append(sample)
        form = own
        if len(waiting) >= size or own is None:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def batch_trouble(ports: Sequence[Port]) -> tuple[str, str] | None:
    """(cause, remedy) where some required input makes batches of more than one sample impossible, or None.

    That is an input whose first dimension is a number, one without axes, or one that is no tensor.
    """
    for port in ports:
        why = _trouble(port) if port.required else None
        if why is not None:
            return f"input {port} {why}", "export the model with an open first dimension, or run one feed at a time"
    return None


def _trouble(port: Port) -> str | None:
    if port.kind != "tensor":
        return "is no tensor, and can't be joined"
    if port.shape is None:
        return None
    if not port.shape:
        return "has no axis to join feeds along"
    return f"fixes its first dimension at {port.shape[0]}" if isinstance(port.shape[0], int) else None


def _form(sample: Sample, fixed: frozenset[str]) -> _Form | None:
    """None for a sample that can't be joined with any."""
    inputs = sample.inputs
    if not inputs or any(name in fixed or not _has_axis(value) for name, value in inputs.items()):
        return None
    return tuple((name, _kind(inputs[name]), inputs[name].shape[1:]) for name in sorted(inputs))


def _has_axis(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _kind(array: Array) -> object:
    """The element type; strings of all lengths are alike."""
    return "U" if array.dtype.kind == "U" else array.dtype


def _joined(samples: Sequence[Sample]) -> Batch:
    first, last = samples[0], samples[-1]
    if len(samples) == 1:
        return Batch(first, (first,))
    inputs = {name: np.concatenate([sample.inputs[name] for sample in samples]) for name in first.inputs}
    return Batch(Sample(inputs, None, f"{first.source} to {last.source}"), tuple(samples))
