"""Compute a layer through a thinner one, as its outputs allow: W x + b becomes A (B x) + b'.

    Before                                After
    MatMul [K, N]                         MatMul [K, r], MatMul [r, N]
    Conv C -> N, k x k                    Conv C -> r, k x k;  Conv r -> N, 1 x 1        factors
                                          Conv C -> r, k x 1;  Conv r -> N, 1 x k        strips
                                          Conv 1 x 1;  Conv k x k;  Conv 1 x 1           tucker
    LSTM, GRU, RNN (X, W)                 MatMul [I, r];  the cell with W [D, gates, r]
    Gather of rows [V, D]                 Gather of rows [V, r];  MatMul [r, D]          of=parameters

With real inputs A is made of the r strongest directions of the layer's outputs, eigenvectors of W C W^T with C the
covariance of its inputs, B = A^T W, and b' = b + (W - A B) E[x] (`onnxopt.numerics.lowrank`). Layers are split where
the target's table of costs says that it pays, those first that cost the outputs least for what they save
(`onnxopt.lowrank.choice`), and the last piece of each is then fitted to what the pieces before it really give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.errors import UsageError
from onnxopt.graph.selection import Selection
from onnxopt.lowrank.engine import AUTO, Settings, split_layers
from onnxopt.lowrank.forms import FORMS, UNITS
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, Skip, option


@dataclass(frozen=True)
class LowRank(Pass):
    """Compute layers through thinner ones, two or three in place of one."""

    name: ClassVar[str] = "lowrank"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    ratio: float | str = option(
        0.0, "share to save, 0 to 0.95, or auto: as much as quality allows; 0: what is of low rank to rounding"
    )
    of: str = option("macs", "what ratio is a share of", choices=UNITS)
    aim: float = option(20.0, "with ratio=auto and no budget on quality: dB to keep", minimum=0.0)
    forms: tuple[str, ...] = option(FORMS, f"what a layer may become: {', '.join(FORMS)}")
    whiten: bool = option(True, "weigh errors of weights by what the layer reads; false: plain singular vectors")
    bias: bool = option(True, "put what is lost of the mean into biases")
    refit: bool = option(True, "fit the last piece of each layer to what the pieces before it really give")
    only: tuple[str, ...] = option((), "names or patterns of the nodes that may be split; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay whole")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio != AUTO and not (isinstance(self.ratio, (int, float)) and 0 <= self.ratio <= 0.95):
            raise UsageError(
                f"pass 'lowrank', option 'ratio': {self.ratio!r} is no share", "use a number from 0 to 0.95, or auto"
            )
        unknown = [form for form in self.forms if form not in FORMS]
        if unknown or not self.forms:
            raise UsageError(
                f"pass 'lowrank', option 'forms': {'+'.join(unknown) or 'nothing'} is no form",
                f"use some of: {'+'.join(FORMS)}",
            )

    @property
    def effect(self) -> Effect:
        """Without `ratio` only what is of low rank to rounding is split."""
        return Effect.ROUNDING if self.ratio == 0 else Effect.LOSSY

    def run(self, model: Model, context: Context) -> PassResult:
        """Split layers, in place."""
        selection = Selection(self.only, self.exclude)
        selection.check(model, self.name)
        if self.ratio == AUTO and (context.measure is None or context.compare is None):
            why = "there are no real inputs to judge on (--data); ratio= with a number splits by weights alone"
            return PassResult(skipped=[Skip("ratio=auto", why)])
        settings = Settings(
            ratio=self.ratio,
            of=self.of,
            aim=self.aim,
            forms=self.forms,
            whiten=self.whiten,
            bias=self.bias,
            refit=self.refit,
            selection=selection,
        )
        outcome = split_layers(model, context, settings)
        return PassResult(outcome.changes, outcome.skipped, outcome.notes)
