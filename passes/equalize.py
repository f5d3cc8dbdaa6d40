"""Cross-layer equalization: channels between two layers get equal ranges. `quantization.balance` says how.

    x ── Conv(v, b) ── Relu ── Conv(w) ── y        x ── Conv(v / s, b / s) ── Relu ── Conv(s w) ── y

It serves formats with one scale for a whole weight. `int8` has one for each output channel, and there it gained nothing
to rely on: -2.5 and +2.0 dB with two sets of samples on a ResNet (open_nsfw, whose rank correlation fell each time),
0.0 and -0.1 on EfficientNet-Lite0, whose layers have Clip(0, 6) between them, +0.1 and -0.1 dB on a text recognizer and
a detector, +0.9 on a MobileNetV3. So no pass asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.quantization import balance


@dataclass(frozen=True)
class Equalize(Pass):
    """Give each channel between two layers equal ranges of weights; before a quantizing pass, needs no data."""

    name: ClassVar[str] = "equalize"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    @property
    def effect(self) -> Effect:
        """Products are scaled, by powers of two."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Equalize every pair of layers with nothing but Relu, PRelu and the like between."""
        return balance.equalize(model)
