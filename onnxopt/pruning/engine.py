"""Lossy pruning of channels: measure, order, try, choose, fit, cut.

1. Groups of channels that depend on each other (`groups`), and means and second moments of what their readers see
   (`moments`).
2. In each group an order of removal and its cost at the readers (`order`), and a few measurements of what it costs the
   outputs (`curves`).
3. The cheapest steps first, until the wanted share is saved (`curves.path`).
4. What stays is refitted (`fit`) where that brings the outputs closer on feeds that were not fitted to; then the
   channels are cut from weights, attributes and shapes (`graph.channels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnxopt.calibration.channels import Moments, Source, gather
from onnxopt.calibration.elements import seen_sizes
from onnxopt.graph import remove_dead
from onnxopt.graph.axes import AxisMaps, Product
from onnxopt.graph.axes.axis import Floats, Ints
from onnxopt.graph.channels import Plan, frozen_reasons, remove
from onnxopt.graph.edit import label
from onnxopt.graph.judged import is_float, judged, judged_error, judged_outputs
from onnxopt.graph.selection import Selection
from onnxopt.model import Model, Variable
from onnxopt.passbase import Change, Context, Skip
from onnxopt.pruning.curves import Curve, Step, allowed_counts, path, removed
from onnxopt.pruning.fit import MEAN_FOLD, NOTHING, REFIT, Fitting
from onnxopt.pruning.gradients import fisher
from onnxopt.pruning.groups import Group, find_groups
from onnxopt.pruning.maps import channel_maps
from onnxopt.pruning.order import magnitudes, removal_order
from onnxopt.pruning.reads import Read, reads_of
from onnxopt.pruning.sequence import refit_in_order
from onnxopt.pruning.sizes import Sizes

# feeds that groups are tried on
TRIAL_FEEDS = 16
# without a budget on quality, `auto` keeps the outputs this close to the original's, in dB
AUTO_QUALITY = 20.0
AUTO = "auto"
# see `Fitting.trust`
_TRUSTS = (1.0, 8.0, 64.0)
# less of a unit, in words
_LESS = {"macs": "fewer macs", "parameters": "fewer parameters", "latency": "less latency by the target's costs"}


@dataclass(frozen=True)
class Settings:
    """What is asked for; see `passes.prune`.

    ratio: share of `of` to save, or AUTO; 0 with the criterion "never_fires": all that never fire. threshold: what
    counts as firing. steps: in how many rounds of measuring and cutting.
    """

    ratio: float | str
    of: str = "macs"
    criterion: str = "obs"
    threshold: float = 0.0
    scope: str = "global"
    steps: int = 1
    round_to: int = 8
    refit: bool = True
    mean_fold: bool = True
    sequential: bool = True
    selection: Selection = field(default_factory=Selection)

    @property
    def how(self) -> str:
        """How what stays makes up for what goes."""
        return REFIT if self.refit else MEAN_FOLD if self.mean_fold else NOTHING


@dataclass
class Outcome:
    """What was done, what was left alone, and remarks."""

    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prune_channels(model: Model, context: Context, settings: Settings) -> Outcome:
    """Remove channels from a model, in place. Asks for context.measure and context.compare."""
    outcome = Outcome()
    judge: Model | None = None
    dead = remove_dead(model)  # what nothing reads would count in shares
    if dead:
        outcome.changes.append(Change("removed", "nodes and constants that nothing reads", "", dead))
    for _ in range(settings.steps):
        ratio = settings.ratio if isinstance(settings.ratio, str) else 1 - (1 - settings.ratio) ** (1 / settings.steps)
        pruner = _Pruner(model, context, replace(settings, ratio=ratio), judge)
        done = pruner.run()
        judge = pruner.judge
        outcome = Outcome([*outcome.changes, *done.changes], done.skipped, [*outcome.notes, *done.notes])
    return outcome


class _Pruner:
    """One round. judge: the model that errors are measured against, by default as it is when the round begins."""

    def __init__(self, model: Model, context: Context, settings: Settings, judge: Model | None) -> None:
        self.model, self.context, self.settings = model, context, settings
        self.maps = channel_maps(model, context)
        self._reads = reads_of(self.maps)
        self.outcome = Outcome()
        # what the model computes before anything goes, with the tensors for outputs that errors are measured at
        clone = model.clone()
        self._judged = judged_outputs(model)
        self._before = clone.model
        self._twins = clone.tensors
        self._before.graph.outputs[:] = [_twin(tensor, clone.tensors) for tensor in self._judged]
        self._exact = not any(is_float(tensor) for tensor in self._judged)
        self.judge = judge if judge is not None else self._before

    def run(self) -> Outcome:
        groups = self._groups()
        assert self.context.measure is not None
        seen = seen_sizes(self.model, self.context.shapes, self.context.measure)
        sizes = Sizes(self.model, self.maps, self.context.shapes, self.settings.of, self.context.target, seen)
        moments = self._moments(groups)
        fitting = Fitting(self.model, self.maps, self._reads, moments)
        curves = self._curves(groups, moments)
        if self.settings.scope != "layer" and self.settings.ratio != 0:
            self._measure(curves, fitting)
        steps = self._choose(curves, sizes, fitting)
        gone = removed(curves, steps)
        if gone:
            self._report(curves, steps, sizes)
            self._fit(fitting, gone, curves)
        fitting.clean()
        if gone:
            remove(self.maps, Plan(dict.fromkeys(gone, "pruned"), ()), compensate=False)
            remove_dead(self.model)
        return self.outcome

    def _groups(self) -> list[Group]:
        found = find_groups(self.maps, self._reads)
        self.outcome.skipped += [Skip(where, reason) for where, reason in frozen_reasons(self.maps)]
        wanted = []
        for group in found:
            refusals = [(node, why) for node in group.nodes if (why := self.settings.selection.refuses(node))]
            if refusals:
                self.outcome.skipped += [Skip(label(node), why) for node, why in refusals]
            elif not group.reads and not any(product.factors for product in group.products):
                self.outcome.skipped.append(Skip(group.name, "no layer with constant weights reads its channels"))
            else:
                wanted.append(group)
        return wanted

    def _moments(self, groups: Sequence[Group]) -> dict[Read, Moments]:
        assert self.context.measure is not None
        reads = list(dict.fromkeys(read for group in groups for read in group.reads))
        sources = {read: read.source for read in reads if read.source is not None}
        self._factors = _factor_sources(groups, self.maps)
        wanted = [*sources.values(), *(source for pair in self._factors.values() for source in pair)]
        fires = self.settings.threshold if self.settings.criterion == "never_fires" else None
        self._seen = gather(self.model, wanted, self.context.measure, fires)
        found, reasons = self._seen.moments, self._seen.reasons
        self._unseen = {read: reasons[source] for read, source in sources.items() if source in reasons}
        return {read: found[source].of(read.positions) for read, source in sources.items() if source in found}

    def _curves(self, groups: Sequence[Group], moments: Mapping[Read, Moments]) -> list[Curve]:
        curves: list[Curve] = []
        for done, group in enumerate(groups):
            self.context.progress(done, len(groups))
            unseen = [read for read in group.reads if read not in moments]
            if unseen:
                why = self._unseen.get(unseen[0], "what it reads is not known")
                self.outcome.skipped.append(Skip(group.name, f"{label(unseen[0].node)} reads its channels, and {why}"))
                continue
            scores = self._scores(group)
            shares = [self._shares(product) for product in group.products if id(product) in self._factors]
            order = removal_order(group, moments, shares, self.settings.criterion, scores)
            counts = allowed_counts(group, order, self.settings.round_to)
            if self.settings.ratio == 0:
                assert scores is not None
                silent = sum(scores.get(root, 1.0) == 0 for root in order.sets)
                counts = [count for count in counts if count <= silent]
                if not counts:
                    continue
            if counts:
                curves.append(Curve(group, order, counts))
            else:
                asked = f"a multiple of {self.settings.round_to} (round_to)"
                why = f"no width below its {group.channels} channels leaves every node {asked}"
                self.outcome.skipped.append(Skip(group.name, why))
        return curves

    def _scores(self, group: Group) -> dict[int, float] | None:
        """set -> the score of a criterion that does not follow from moments."""
        if self.settings.criterion in ("l1", "l2"):
            return magnitudes(group, self.maps, int(self.settings.criterion[1]))
        if self.settings.criterion not in ("never_fires", "fisher"):
            return None
        told = self._seen.firing if self.settings.criterion == "never_fires" else self._fisher
        found: dict[int, float] = {}
        for read in group.reads:
            every = told.get(read.source) if read.source is not None else None
            values = every[read.positions] if every is not None else np.ones(len(read.roots))
            for root, value in zip(read.roots.tolist(), values.tolist(), strict=True):
                found[root] = max(found.get(root, 0.0), value)
        return found

    @cached_property
    def _fisher(self) -> dict[Source, Floats]:
        assert self.context.measure is not None
        sources = list(self._seen.moments)
        return fisher(self.model, sources, self._judged, self.context.shapes, self.context.measure, self.context.seed)

    def _shares(self, product: Product) -> tuple[Ints, Floats]:
        """Sets of the positions that a product sums over, and the share of its power that each holds."""
        one, other = (self._seen.moments.get(source) for source in self._factors[id(product)])
        roots = self.maps.channels.roots(product.channels)
        if one is None or other is None:
            return roots, np.full(len(roots), 1 / len(roots))
        power = np.diagonal(one.second) * np.diagonal(other.second)
        return roots, np.asarray(power / max(float(power.sum()), 1e-30))

    def _measure(self, curves: Sequence[Curve], fitting: Fitting) -> None:
        for done, curve in enumerate(curves):
            self.context.progress(done, len(curves))
            curve.measure(lambda gone, curve=curve: self._error(fitting, gone, [curve.group]))  # type: ignore[misc]

    def _error(self, fitting: Fitting, gone: set[int], groups: Sequence[Group], how: str | None = None) -> float:
        """Squared error over variance at the outputs with these sets gone."""
        fitting.apply(gone, how or self.settings.how, groups)
        try:
            return self._present_error()
        finally:
            fitting.restore()

    def _present_error(self) -> float:
        """Squared error over variance at the outputs of the model as it is."""
        assert self.context.compare is not None
        with judged(self.model, self._judged):
            closeness = self.context.compare(self.model, TRIAL_FEEDS, self.judge)
        return judged_error(closeness, self._judged)

    def _choose(self, curves: Sequence[Curve], sizes: Sizes, fitting: Fitting) -> list[Step]:
        scope = self.settings.scope
        if self.settings.ratio == 0:
            return path(curves, sizes, 0.0)
        if self.settings.ratio != AUTO:
            ratio = float(self.settings.ratio)
            steps = path(curves, sizes, sizes.total * (1 - ratio), scope)
            left = steps[-1].size if steps else sizes.total
            if left > sizes.total * (1 - ratio):
                self.outcome.notes.append(
                    f"asked for {ratio:.0%} {_LESS[self.settings.of]}; what can go saves {1 - left / sizes.total:.1%}"
                )
            return steps
        if self.context.holds is None:
            self.outcome.notes.append(f"no budget on quality: outputs are kept within {AUTO_QUALITY:g} dB")
        steps = path(curves, sizes, 0.0, scope)
        low, high = 0, len(steps)
        while low < high:  # the most steps that hold
            middle = (low + high + 1) // 2
            if self._holds(fitting, removed(curves, steps[:middle]), [curve.group for curve in curves]):
                low = middle
            else:
                high = middle - 1
        return steps[:low]

    def _holds(self, fitting: Fitting, gone: set[int], groups: Sequence[Group]) -> bool:
        if self.context.holds is None:
            return self._error(fitting, gone, groups) <= 10 ** (-AUTO_QUALITY / 10)
        fitting.apply(gone, self.settings.how, groups)
        try:
            return self.context.holds(self.model)
        finally:
            fitting.restore()

    def _fit(self, fitting: Fitting, gone: set[int], curves: Sequence[Curve]) -> None:
        how = self.settings.how
        groups = [curve.group for curve in curves]
        if how == REFIT:
            fitted, folded = self._best_trust(fitting, gone, groups), self._error(fitting, gone, groups, MEAN_FOLD)
            if fitted > folded:
                how = MEAN_FOLD
                self.outcome.notes.append("refitted weights came no closer on feeds not fitted to; means were folded")
        fitting.apply(gone, how, groups)
        if how == REFIT and self.settings.sequential:
            self._refit_in_order(fitting, gone)
        fitting.keep()

    def _best_trust(self, fitting: Fitting, gone: set[int], groups: Sequence[Group]) -> float:
        """Let the fit trust its rows as far as suits feeds that are not fitted to best; returns the error then."""
        errors: dict[float, float] = {}
        for trust in _TRUSTS:
            fitting.trust = trust
            errors[trust] = self._error(fitting, gone, groups, REFIT)
        fitting.trust = min(errors, key=lambda trust: (errors[trust], trust))
        return errors[fitting.trust]

    def _refit_in_order(self, fitting: Fitting, gone: set[int]) -> None:
        assert self.context.measure is not None
        accepted, tried = refit_in_order(
            fitting,
            self._before,
            self._twins,
            self._reads,
            gone,
            self.context.measure,
            self._present_error,
            self.context.progress,
        )
        if tried:
            self.outcome.notes.append(f"{accepted} of {tried} layers came closer by a second fit to what they now read")

    def _report(self, curves: Sequence[Curve], steps: Sequence[Step], sizes: Sizes) -> None:
        counts = {step.curve: step.count for step in steps}
        for at, count in sorted(counts.items()):
            group = curves[at].group
            gone = set(curves[at].order.sets[:count])
            change = Change("channels pruned", group.name, group.describe(gone), sum(group.losses(gone)))
            self.outcome.changes.append(change)
        last = steps[-1]
        self.outcome.notes.append(
            f"{1 - last.size / sizes.total:.1%} {_LESS[sizes.unit]}, from {len(counts)} of {len(curves)} groups"
        )
        if any(curve.points for curve in curves) and not self._exact:
            self.outcome.notes.append(
                f"predicted signal-to-noise ratio {-10 * np.log10(max(last.error, 1e-30)):.1f} dB"
            )


def _twin(tensor: Variable, twins: Mapping[int, Variable]) -> Variable:
    """The tensor's clone, with what was inferred of it: outputs need a type."""
    twin = twins[id(tensor)]
    twin.dtype, twin.shape = tensor.dtype, tensor.shape
    return twin


def _factor_sources(groups: Sequence[Group], maps: AxisMaps) -> dict[int, tuple[Source, Source]]:
    found: dict[int, tuple[Source, Source]] = {}
    for group in groups:
        for product in group.products:
            if product.node is None or len(product.factors) != 2:
                continue
            pair = []
            for index, axis in product.factors:
                tensor = product.node.inputs[index]
                assert isinstance(tensor, Variable)
                pair.append(Source(tensor, axis - len(tensor.shape or ())))
            found[id(product)] = (pair[0], pair[1])
    return found
