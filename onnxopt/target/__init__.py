"""Where the result will run: number formats, saturation, and the committed cost facts that say what pays.

`auto` looks at the machine's architecture only, never at CPU flags or timings: the same model, data and seed give the
same bytes on every x86-64 machine, and a file made on a build box with VNNI is right on a laptop without.
"""

import platform
from dataclasses import dataclass

import numpy as np

from onnxopt.target.costs import AVX2, DOT_PRODUCT, NEON_DOT, CostFacts

__all__ = ["TARGETS", "CostFacts", "Target", "resolve"]


@dataclass(frozen=True)
class Target:
    """A kind of processor.

    activation: integer type of activations (weights are always signed 8-bit).
    saturates: U8S8 products may overflow 16-bit pair sums (`onnxopt.numerics.saturation`).
    folds_constants: its runtime computes operators on constants once, when it loads a model.
    costs: nanoseconds of the work the int8 pass weighs against each other.
    """

    name: str
    summary: str
    activation: np.dtype[np.generic]
    saturates: bool
    costs: CostFacts
    folds_constants: bool = True


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("x86", "any x86-64 with AVX2; safe without VNNI", np.dtype(np.uint8), True, AVX2),
        Target("x86-vnni", "x86-64 with AVX512-VNNI or AVX-VNNI", np.dtype(np.uint8), False, DOT_PRODUCT),
        Target("arm64", "ARM64 with dot product instructions", np.dtype(np.int8), False, NEON_DOT),
    )
}

_ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}


def resolve(target: "str | Target | None" = "auto", machine: str | None = None) -> Target:
    """The target called `target`; `auto` (or None) follows `machine`, by default this machine's architecture.

    An unknown architecture gets `x86`, whose files are right everywhere. Raises ValueError for an unknown name.
    """
    if isinstance(target, Target):
        return target
    if target in (None, "auto"):
        architecture = (machine if machine is not None else platform.machine()).lower()
        return TARGETS[_ARCHITECTURES.get(architecture, "x86")]
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: auto, {', '.join(TARGETS)}")
    return TARGETS[target]
