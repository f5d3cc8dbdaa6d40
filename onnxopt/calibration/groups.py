"""Sessions that share out the tensors which are handed over whole, so that no run holds more than so many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxopt.calibration.instrument import Wanted
from onnxopt.calibration.plan import Plan, Shape, Tensor
from onnxopt.calibration.sessions import Ask, Probe, Signature
from onnxopt.model import Model

# Shapes of samples that a group is known to serve.
_SERVED = 256


class Group:
    """Sessions that together report what is asked of all tensors, in groups that hand over at most `memory` bytes.

    Each keeps the tensors of the others from being fused away, so that all compute the same values. The first reports
    all that is not about tensors of the main graph too. signature: of the sample whose shapes the asks have.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        asks: Sequence[Ask],
        signature: Signature,
        *,
        memory: int,
        blocked: bool,
        threads: int,
    ) -> None:
        self._held = sum(ask.bytes for ask in asks)
        self._elements = _elements(signature)
        self._served: list[Signature] = [signature]
        self.probes = [
            Probe(
                model,
                plan,
                [ask if ask in part else Ask(ask.tensor, Wanted(), ask.shape) for ask in asks],
                inner=number == 0,
                blocked=blocked,
                threads=threads,
            )
            for number, part in enumerate(_parts(asks, memory))
        ]

    def serve(self, signature: Signature) -> None:
        """Note that a sample of these shapes was found to fit."""
        if not any(_within(signature, known) for known in self._served):
            self._served = [known for known in self._served[-_SERVED:] if not _within(known, signature)]
            self._served.append(signature)

    def covers(self, signature: Signature, memory: int) -> bool:
        """Whether a sample of shapes not seen before is sure to fit, by what would be handed over."""
        if self._held == 0 or any(_within(signature, known) for known in self._served):
            return True
        # at most quadratic in the sizes of the inputs, as attention is
        growth = _elements(signature) / max(1, self._elements)
        return self._held * growth**2 <= memory

    def outgrown(self, shapes: Mapping[Tensor, Shape], memory: int) -> bool:
        """Whether a sample with these shapes would hand over more at once than it has to."""
        sizes = ([4 * math.prod(shapes[tensor]) for tensor in probe.whole] for probe in self.probes)
        return any(len(each) > 1 and sum(each) > memory for each in sizes)


def _parts(asks: Sequence[Ask], memory: int) -> list[set[Ask]]:
    parts: list[set[Ask]] = [set()]
    held = 0
    for ask in asks:
        if held and held + ask.bytes > memory:
            parts.append(set())
            held = 0
        parts[-1].add(ask)
        held += ask.bytes
    return parts


def _elements(signature: Any) -> int:
    """Elements of all inputs of these shapes."""
    if signature and all(isinstance(part, int) for part in signature):
        return math.prod(signature)
    return sum(_elements(part) for part in signature if isinstance(part, tuple))


def _within(one: Any, other: Any) -> bool:
    """Whether every dimension of one signature is at most that of another."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_within(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, int) and isinstance(other, int):
        return one <= other
    return bool(one == other)
