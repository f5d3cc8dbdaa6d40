"""Zero weights one by one, or N of every M, so that outputs change least; the weights that stay make good for the rest.

    y = W x + b        becomes        y = W' x + b',   b' = b + (W - W') E[x]

`onnxopt.numerics.sparsity` chooses W' and says from where each method is. With real inputs it does so by the covariance
of x, for what the mean of x loses goes into the bias; where a layer has no place for one, as a MatMul without an Add
behind it, by E[x x^T]. What criterion=auto does:

    E[x x^T] of the layer is affordable     SparseGPT or Wanda, then least squares; per weight what leaves less error
    only E[x^2] is                          Wanda: ConvTranspose, input weights of LSTM, GRU and RNN, batched MatMul
    no statistics                           magnitude: no real inputs, bodies of If, Loop and Scan, recurrent weights

Layers of a transformer and of a convolutional network at 50 %, relative error on inputs not seen: magnitude .21 and
.18, Wanda .16 and .15, SparseGPT .135 and .124, on the covariance with the bias .130 and .122, and with least squares
after it .125 and .117. Wanda that counts by row, as published (scope=row), left .165 and .19.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.errors import UsageError
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.numerics.sparsity import Groups, Share
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.sparsity import pruning
from onnxopt.sparsity.pruning import CRITERIA, Pruning, Threshold, Wanted

SCOPES = ("layer", "row", "global")
_PATTERN = re.compile(r"(\d+)(?::|of)(\d+)")


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Zero single weights, or N of every M; the ones that stay make good for it."""

    name: ClassVar[str] = "prune_weights"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    sparsity: float = option(0.0, "share of the weights to zero", minimum=0.0, maximum=0.99)
    threshold: float = option(0.0, "zero every weight of at most this size", minimum=0.0)
    relative: float = option(
        0.0, "zero every weight of at most this share of the largest of its tensor", minimum=0.0, maximum=1.0
    )
    pattern: str = option("", 'N:M: keep at most N of each M consecutive inputs, as 2of4, or "2:4" in quotes')
    criterion: str = option("auto", "which weights go, and whether others make good for them", choices=CRITERIA)
    scope: str = option("layer", "where `sparsity` is counted: each tensor, each row, all together", choices=SCOPES)
    bias: bool = option(True, "put what is lost of the mean of the inputs into the layer's bias")
    refit: bool = option(True, "change the weights that stay; false: zeros alone, those of magnitude or wanda")
    depthwise: bool = option(False, "zero weights of depthwise convolutions too")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be zeroed; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self._asked
        if len(asked) > 1:
            raise UsageError(f"pass {self.name!r}: {' and '.join(asked)} exclude each other", "keep one of them")
        if self.pattern:
            self._groups()
        if self.scope != "layer" and asked and asked != ["sparsity"]:
            raise UsageError(f"pass {self.name!r}: scope={self.scope} has no meaning with {asked[0]}", "leave it out")
        by_size = {"threshold", "relative"} & set(asked)
        if by_size and self.criterion in ("wanda", "sparsegpt"):
            raise UsageError(
                f"pass {self.name!r}: {asked[0]} goes by size alone, not by criterion={self.criterion}",
                "use criterion=magnitude or least_squares, or sparsity=",
            )

    @property
    def effect(self) -> Effect:
        """Lossy; exact where nothing is asked for."""
        return Effect.LOSSY if self._asked else Effect.EXACT

    @property
    def pruning(self) -> Pruning:
        """What the engine is told."""
        wanted: Wanted = Share(self.sparsity, self.scope == "row")
        if self.pattern:
            wanted = self._groups()
        elif self.threshold or self.relative:
            wanted = Threshold(self.threshold or self.relative, bool(self.relative))
        return Pruning(
            wanted=wanted,
            by_all=self.scope == "global",
            criterion=self.criterion,
            bias=self.bias,
            refit=self.refit,
            depthwise=self.depthwise,
            selection=Selection(self.only, self.exclude),
        )

    def needs(self, model: Model) -> Requests | None:
        """Second moments of what weights multiply, as far as they are affordable; of the rest those of channels."""
        return pruning.requests(model, self.pruning) if self._asked else None

    def run(self, model: Model, context: Context) -> PassResult:
        """Zero weights, tensor by tensor."""
        self.pruning.selection.check(model, self.name)
        if not self._asked:
            return PassResult(notes=["nothing is asked for: give sparsity=0.5, pattern=2of4, threshold= or relative="])
        return pruning.prune_weights(model, context, self.pruning)

    @property
    def _asked(self) -> list[str]:
        return [name for name in ("sparsity", "threshold", "relative", "pattern") if getattr(self, name)]

    def _groups(self) -> Groups:
        found = _PATTERN.fullmatch(self.pattern)
        kept, of = (int(number) for number in found.groups()) if found else (0, 0)
        if not 0 < kept < of:
            raise UsageError(
                f"pass {self.name!r}, option 'pattern': {self.pattern!r} is not N:M with N below M",
                "write pattern=2of4, or in braces {pattern=2:4}",
            )
        return Groups(kept, of)
