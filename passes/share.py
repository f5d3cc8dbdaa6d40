"""Store each weight as the index of one of a few values: codebooks that fit the weights and what they multiply.

    y = W x + b        becomes        y = c[I] x + b',   b' = b + (W - c[I]) E[x]

W [R, K] takes 32 bits a weight, the indices I take `bits`; c holds 2^bits values. `onnxopt.numerics.clustering` finds c
and I and says from where each method is; `onnxopt.encoding` writes them as standard operators, which the runtime makes
floats of when it loads the model. A tensor with few distinct values as it is loses none.

    E[x x^T] of the layer is affordable     k-means weighted by E[x^2], then entries are chosen input after input, and
                                            each error is made good in later inputs
    only E[x^2] is                          weighted k-means, nearest entries
    no statistics                           k-means, nearest entries

Layers of a transformer and of a ResNet at 4 bits, one codebook a tensor, relative error on inputs not seen: as many
levels evenly spread .33 and .33, k-means .107 and .104, weighted .093 and .104, with error feedback .065 and .069. A
codebook for each 4,096 weights takes 2.5 % more bytes, and leaves .058 and .063.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxopt.calibration import Requests
from onnxopt.errors import UsageError
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.sharing import engine
from onnxopt.sharing.engine import Sharing

MODES = ("kmeans", "unique")
SCOPES = ("tensor", "model")
STORES = ("palette", "plain")


@dataclass(frozen=True)
class Share(Pass):
    """Store weights as indices into codebooks of a few values."""

    name: ClassVar[str] = "share"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")

    bits: int = option(4, "of one index: 2^bits values a codebook", minimum=1, maximum=8)
    mode: str = option("kmeans", "unique: only tensors of at most 256 distinct values, without loss", choices=MODES)
    group: int = option(
        0, "output channels that share a codebook, at least; 0: as many as keep codebooks small", minimum=0
    )
    vector: int = option(1, "weights that one index stands for, as vector=2:bits=8", minimum=1, maximum=16)
    scope: str = option("tensor", "model: one codebook for all tensors together", choices=SCOPES)
    fine: float = option(
        0.02, "so large a share of all weights gets 8 bits, where that helps most", minimum=0.0, maximum=1.0
    )
    feedback: bool = option(True, "choose values so that errors make good for each other; needs real inputs")
    bias: bool = option(True, "put what is lost of the mean of the inputs into the layer's bias")
    store: str = option("palette", "plain: floats, few of them distinct, for archives", choices=STORES)
    tie: float = option(
        0.0, "weights of two layers at most so far apart become one, where outputs allow", minimum=0.0, maximum=1.0
    )
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may share; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes that stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "unique":  # what else prepares re-orders arithmetic, or makes few values many
            object.__setattr__(self, "prepare", ("convert_opset",))
        if self.vector > 1 and self.group:
            raise UsageError(f"pass {self.name!r}: group= is for single weights, not for vectors", "leave one out")
        if self.scope == "model" and (self.group or self.vector > 1):
            asked = "group" if self.group else "vector"
            raise UsageError(
                f"pass {self.name!r}: scope=model is one codebook for all, {asked}= is not", "leave one out"
            )
        if self.mode == "unique" and self.tie:
            raise UsageError(f"pass {self.name!r}: mode=unique loses nothing, tie= does", "leave one out")

    @property
    def effect(self) -> Effect:
        """Lossy; exact where only equal values are shared."""
        return Effect.EXACT if self.mode == "unique" else Effect.LOSSY

    @property
    def sharing(self) -> Sharing:
        """What the engine is told."""
        return Sharing(
            bits=self.bits,
            unique=self.mode == "unique",
            group=self.group,
            vector=self.vector,
            common=self.scope == "model",
            fine=self.fine,
            feedback=self.feedback,
            bias=self.bias,
            plain=self.store == "plain",
            tied=self.tie,
            selection=Selection(self.only, self.exclude),
        )

    def needs(self, model: Model) -> Requests | None:
        """Second moments of what weights multiply, as far as they are affordable; of the rest those of channels."""
        return engine.requests(model, self.sharing) or None

    def run(self, model: Model, context: Context) -> PassResult:
        """Share values, tensor by tensor."""
        self.sharing.selection.check(model, self.name)
        return engine.share(model, context, self.sharing)
