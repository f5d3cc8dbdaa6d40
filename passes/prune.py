"""Remove channels that the rest of the graph can do without.

A channel is a position of an axis, followed from the node that makes it through everything that carries it to the nodes
that sum over it (`onnxopt.graph.axes`). With y = W x + b at such a node, column j of W and channel x_j can go when

    x_j = 0                    nothing is lost
    x_j = c                    b += c W_j                       (or, where padding forbids it, as the next line)
    x_j = a x_i                W_i += a W_j                     duplicate channels: a = 1

Before                                   After
    Conv(8 -> 64)                            Conv(8 -> 59)          2 filters were zero, 3 made constants
    Relu                                     Relu
    Conv(64 -> 32, W, b)                     Conv(59 -> 32, W', b')

With `ratio` channels that carry signal go as well (`onnxopt.pruning`): those that cost the outputs least for what they
save, and what stays is refitted, W' = W_S + W_D C_DS C_SS^-1 with the covariance C of what the layer reads.

Convolutions compute channels in blocks, so 31 channels take longer than 32: a convolution keeps a multiple of
`round_to` channels, by default what the target asks for (benchmarks/widths.py).

Channels joined by Add, Concat, gates or groups go together or not at all. An operator without an axis rule keeps every
channel it touches, and is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.graph import remove_dead
from onnxopt.graph.axes import AxisMaps
from onnxopt.graph.channels import Plan, describe, frozen_reasons, held_channels, plan_lossless, remove, site_label
from onnxopt.graph.selection import Selection
from onnxopt.model import Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option
from onnxopt.pruning.curves import SCOPES
from onnxopt.pruning.engine import AUTO, Settings, prune_channels
from onnxopt.pruning.maps import axis_maps
from onnxopt.pruning.order import CRITERIA
from onnxopt.pruning.sizes import UNITS

# what one round removes can make more removable; real models settle in two or three
_MOST_ROUNDS = 20


@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels that the rest of the graph can do without."""

    name: ClassVar[str] = "prune"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn")

    ratio: float | str = option(0.0, "share to save, 0 to 0.95, or auto: as much as quality allows")
    of: str = option("macs", "what ratio is a share of", choices=UNITS)
    criterion: str = option("obs", "which channels go first", choices=CRITERIA)
    threshold: float = option(0.0, "with never_fires: a channel fires where it is above this", minimum=0.0)
    scope: str = option(
        "global",
        "which groups lose the same share: none, those of the same structure, or all",
        choices=SCOPES,
    )
    steps: int = option(1, "rounds of measuring and cutting", minimum=1, maximum=16)
    refit: bool = option(True, "fit the weights that stay by least squares to make up for those that go")
    sequential: bool = option(True, "then fit again, layer by layer, to what each reads from layers already pruned")
    mean_fold: bool = option(True, "with refit=false: add the mean of what goes to the biases")
    only: tuple[str, ...] = option((), "names or patterns of nodes whose channels alone ratio may take")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes whose channels ratio leaves alone")
    round_to: int = option(
        0,
        "keep a multiple of this many channels at convolutions; 1: whatever can go; 0: as the target likes it",
        minimum=0,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio != AUTO and not (isinstance(self.ratio, (int, float)) and 0 <= self.ratio <= 0.95):
            raise UsageError(
                f"pass 'prune', option 'ratio': {self.ratio!r} is no share", "use a number from 0 to 0.95, or auto"
            )

    @property
    def effect(self) -> Effect:
        """Without `ratio` sums are re-associated, nothing else."""
        return Effect.LOSSY if self._lossy else Effect.ROUNDING

    @property
    def _lossy(self) -> bool:
        return self.ratio != 0 or self.criterion == "never_fires"

    def run(self, model: Model, context: Context) -> PassResult:
        """Remove what nothing depends on; then, with `ratio`, what costs least."""
        selection = Selection(self.only, self.exclude)
        selection.check(model, self.name)
        result = self._lossless(model, context)
        if not self._lossy:
            return result
        if context.measure is None or context.compare is None:
            why = "there are no real inputs to measure on (--data), so only what costs nothing went"
            asked = "ratio" if self.ratio != 0 else "criterion"
            return PassResult(result.changes, [*result.skipped, Skip(asked, why)], result.notes)
        settings = Settings(
            ratio=self.ratio,
            of=self.of,
            criterion=self.criterion,
            threshold=self.threshold,
            scope=self.scope,
            steps=self.steps,
            sequential=self.sequential,
            round_to=self.round_to or context.target.channels,
            refit=self.refit,
            mean_fold=self.mean_fold,
            selection=selection,
        )
        outcome = prune_channels(model, context, settings)
        return PassResult([*result.changes, *outcome.changes], outcome.skipped, [*result.notes, *outcome.notes])

    def _lossless(self, model: Model, context: Context) -> PassResult:
        """Plan and cut until nothing more can go."""
        changes: list[Change] = []
        skipped: list[Skip] = []
        for _ in range(_MOST_ROUNDS):
            maps = axis_maps(model, context)
            plan = plan_lossless(maps, self.round_to or context.target.channels)
            skipped = [Skip(where, reason) for where, reason in frozen_reasons(maps)]
            if not plan.removed:
                break
            changes += _changes(plan)
            remove(maps, plan)
            remove_dead(model)
        return PassResult(changes, skipped, _notes(maps))


def _changes(plan: Plan) -> list[Change]:
    return [Change("channels removed", site_label(cut), describe(cut), cut.total) for cut in plan.sites]


def _notes(maps: AxisMaps) -> list[str]:
    made = np.concatenate([np.zeros(0, np.int64), *(site.channels for site in maps.sites)])
    fixed = np.isin(maps.channels.roots(made), sorted(held_channels(maps)))
    return [f"{len(made):,} channels remain, {int(fixed.sum()):,} of them fixed by the graph"]
