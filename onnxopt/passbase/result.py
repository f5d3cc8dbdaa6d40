"""What goes into a pass besides the model, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray
from onnx import ModelProto

from onnxopt.target import Target, resolve

if TYPE_CHECKING:
    from onnxopt.calibration import Requests, Statistics
    from onnxopt.model import Model


@dataclass(frozen=True)
class Change:
    """One edit: what kind ("merged", "removed", "quantized", ...), where (node or tensor), and details.

    `count`: how many things of that kind, where one edit stands for several ("channels removed").
    """

    kind: str
    where: str
    detail: str = ""
    count: int = 1


@dataclass(frozen=True)
class Skip:
    """One candidate left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did, what it left, and remarks for the reader of the report."""

    changes: Sequence[Change] = ()
    skipped: Sequence[Skip] = ()
    notes: Sequence[str] = ()


# (model with no inputs, or with the given ones) -> values of its outputs, unoptimized, one thread
Evaluate = Callable[[ModelProto, dict[str, NDArray[Any]]], list[NDArray[Any]]]


def _no_evaluate(_model: ModelProto, _inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    from onnxopt.errors import PassError

    raise PassError(
        "this pass computes constants with the runtime, and was given none", "run it through onnxopt.optimize"
    )


class Compare(Protocol):
    """See `Context`."""

    def __call__(self, model: Model, most: int | None = None, reference: Model | None = None) -> float:
        """DB of the worst float output, or the worst share of agreement."""
        ...


@dataclass(frozen=True)
class Context:
    """Services and settings of one run of a pass.

    `statistics` is what the pass asked for in `needs`, None when there are no real feeds. `reference` is the original
    model. `compare(model, most, reference)` runs a model, as it would be deployed, on the feeds kept for choosing (at
    most so many), and tells how close its outputs are to the original's, or to those of another model: dB of the worst
    float output, or where there is none the worst share of agreement. `holds(model)` tells whether a model holds the
    budgets on quality on these feeds. `measure(model, requests)` gathers statistics of any model on the feeds for
    calibration. These three are None when there are no real feeds, `holds` also when there are no such budgets.
    `evaluate(proto, inputs)` computes a small model with the runtime, unoptimized. `progress(done, total)` may be
    called at will. `shapes` are those of the model's inputs in one feed.
    """

    reference: Model | None = None
    statistics: Statistics | None = None
    compare: Compare | None = None
    holds: Callable[[Model], bool] | None = None
    measure: Callable[[Model, Requests], Statistics] | None = None
    target: Target = field(default_factory=lambda: resolve("auto"))
    seed: int = 0
    evaluate: Evaluate = _no_evaluate
    progress: Callable[[int, int], None] = lambda _done, _total: None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
