"""Splitting the layers of a model: look, try, choose, rewrite, refit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxopt.calibration.elements import Seen, run_shapes, seen_sizes
from onnxopt.graph import infer, sort_model
from onnxopt.graph.edit import drop_unused
from onnxopt.graph.judged import is_float, judged, judged_error, judged_outputs
from onnxopt.graph.macs import LAYERS, layer_macs
from onnxopt.graph.selection import Selection
from onnxopt.lowrank.choice import Curve, Step, chosen, frontier, path
from onnxopt.lowrank.forms import FACTORS, FORMS, Form, Positions, Pricing, Splitter, Work, find_forms
from onnxopt.lowrank.inputs import Biases, Inputs, know
from onnxopt.lowrank.layers import Kind, Layer, find_layers
from onnxopt.lowrank.refit import refit_in_order
from onnxopt.lowrank.rewrite import Rewriter, Split
from onnxopt.model import Constant, Model, TensorData, Variable
from onnxopt.numerics.lowrank import Wide
from onnxopt.passbase import Change, Context, Skip
from onnxopt.quantization.coded import left_as_quantized

AUTO = "auto"
# feeds that layers are tried on
TRIAL_FEEDS = 16
# without a target in time the whole model has to become this much faster by the table, or nothing is split
FASTER = 0.95
# others for how many inputs each that was seen may count, where they come closer
_TRUSTS = (1.0, 64.0)
# of the weights' power: what rounding to float32 leaves of a matrix of lower rank
_ROUNDING = 1e-13
_LESS = {"macs": "fewer macs", "parameters": "fewer parameters", "latency": "less latency by the target's costs"}


@dataclass(frozen=True)
class Settings:
    """What is asked for; see `passes.lowrank`. ratio: 0 for what is of lower rank already, a share, or AUTO."""

    ratio: float | str
    of: str = "macs"
    aim: float = 20.0
    forms: tuple[str, ...] = FORMS
    whiten: bool = True
    bias: bool = True
    refit: bool = True
    selection: Selection = field(default_factory=Selection)


@dataclass
class Outcome:
    """What was done, what was left alone, and remarks."""

    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def split_layers(model: Model, context: Context, settings: Settings) -> Outcome:
    """Split layers of a model, in place. With real inputs it asks for context.measure and context.compare."""
    return _Run(model, context, settings).run()


class _Run:
    def __init__(self, model: Model, context: Context, settings: Settings) -> None:
        model.normalize()
        sort_model(model)
        infer(model)
        self.model, self.context, self.settings = model, context, settings
        self.outcome = Outcome()
        self._lossless = settings.ratio == 0
        self._blind = context.measure is None or context.compare is None
        self._biases = Biases(model)
        self._judged = judged_outputs(model)
        clone = model.clone()
        self._before, self._twins = clone.model, clone.tensors
        for tensor in self._judged:
            twin = self._twins[id(tensor)]
            twin.dtype, twin.shape = tensor.dtype, tensor.shape
        self._before.graph.outputs[:] = [self._twins[id(tensor)] for tensor in self._judged]
        self._pricing = Pricing(context.target)

    def run(self) -> Outcome:
        layers, skipped = find_layers(self.model, self.settings.selection, self.settings.of == "parameters")
        self.outcome.skipped += skipped
        self.outcome.notes += left_as_quantized(self.model)
        if self._blind and not self._lossless:
            self.outcome.notes.append("no real inputs: factors are plain singular vectors, and errors those of weights")
        self._positions, self._whole = self._sizes(layers)
        known = self._known(layers)
        curves = self._curves(layers, known)
        if self._lossless:
            self._apply(curves, dict.fromkeys(range(len(curves)), 0))
        elif curves:
            self._split(curves)
        self._biases.clean()
        return self.outcome

    def _split(self, curves: Sequence[Curve]) -> None:
        """Try, choose, and split as chosen."""
        if not self._blind:
            self._measure(curves)
        steps = self._choose(curves)
        taken = chosen(steps)
        self._skip_others(curves, taken)
        if steps:
            self._trust(curves, taken)
            self._report(steps, curves)
            self._apply(curves, taken)

    def _sizes(self, layers: Sequence[Layer]) -> tuple[dict[Layer, Positions], Work]:
        """Where each layer computes, and the work of the whole model."""
        context, model = self.context, self.model
        seen = Seen() if context.measure is None else seen_sizes(model, context.shapes, context.measure)
        shapes = run_shapes(model, context.shapes, seen)
        positions = {layer: Positions(layer, shapes, seen) for layer in layers}
        counted = {reader.node for layer in layers for reader in layer.readers}
        whole = Work(parameters=model.parameters())
        costs = context.target.costs
        for body in model.bodies():
            for node in body.nodes:
                made = shapes.get(id(node.outputs[0])) if node.outputs else None
                elements = math.prod(made) if made is not None else 0
                if node.op not in LAYERS:
                    whole += Work(latency=costs.node + elements * costs.known("float_element", 0.0))
                elif node not in counted and node not in seen.idle:
                    macs = layer_macs(node, lambda t: t.shape if isinstance(t, Constant) else shapes.get(id(t))) or 0
                    depthwise = node.op == "Conv" and int(node.attrs.get("group", 1)) > 1
                    whole += Work(macs, 0, macs * (costs.float_depthwise_mac if depthwise else costs.float_mac))
        for layer, at in positions.items():
            own = self._pricing.whole(layer, at)
            whole += Work(own.macs, 0, own.latency)
            if layer.kind is Kind.GATES:
                whole += _recurrence(layer, at, costs.float_mac)
        return positions, whole

    def _known(self, layers: Sequence[Layer]) -> dict[Layer, Inputs]:
        if self._lossless or not self.settings.whiten:
            return {layer: Inputs() for layer in layers}
        known = know(self.model, layers, self._biases, self.context.measure)
        if not self.settings.bias:
            for inputs in known.values():
                inputs.means.clear()
        return known

    def _curves(self, layers: Sequence[Layer], known: Mapping[Layer, Inputs]) -> list[Curve]:
        self._splitters: dict[Layer, Splitter] = {}
        self._inputs = dict(known)
        curves = []
        for done, layer in enumerate(layers):
            self.context.progress(done, len(layers))
            at = self._positions[layer]
            if self.settings.of != "parameters" and not at.out:
                why = "its shapes are not known" if at.unknown else "no feed comes here, so splitting it saves nothing"
                self.outcome.skipped.append(Skip(layer.name, why))
                continue
            splitter = Splitter(layer, known[layer].seconds(layer))
            forms, why = self._forms(layer, splitter, at)
            if not forms:
                self.outcome.skipped.append(Skip(layer.name, why))
                continue
            whole = self._pricing.whole(layer, at)
            self._splitters[layer] = splitter
            curves.append(Curve(layer, whole, frontier(forms, whole, self.settings.of)))
        return curves

    def _forms(self, layer: Layer, splitter: Splitter, at: Positions) -> tuple[list[Form], str]:
        if not self._lossless:
            return find_forms(layer, splitter, at, self._pricing, self.settings.forms, self.settings.of)
        least = max(each.rank(_ROUNDING) for each in splitter.spectra)
        step = self._pricing.step(layer)
        rank = max(step, -(-least // step) * step)
        if rank >= min(layer.outputs // layer.groups, layer.inputs):
            return [], f"it is of full rank: {least} of {min(layer.outputs // layer.groups, layer.inputs)}"
        forms, why = find_forms(layer, splitter, at, self._pricing, (FACTORS,), self.settings.of)
        work, whole = self._pricing.split(layer, FACTORS, (rank,), at), self._pricing.whole(layer, at)
        unit = "parameters" if self.settings.of == "parameters" else "latency"
        if not forms or work.of(unit) > max(form.work.of(unit) for form in forms):
            share = work.of(unit) / whole.of(unit) if whole.of(unit) else math.inf
            return [], why or f"it is of rank {least}, and split there takes {share:.2f} of the {unit}"
        return [Form(FACTORS, (rank,), 0.0, work)], ""

    def _measure(self, curves: Sequence[Curve]) -> None:
        for done, curve in enumerate(curves):
            self.context.progress(done, len(curves))
            curve.measure(lambda at, curve=curve: self._error({curve.layer: curve.forms[at]}))  # type: ignore[misc]

    def _error(self, forms: Mapping[Layer, Form]) -> float:
        """Squared error over variance at the outputs, with these layers replaced by what their factors stand for."""
        undo = [self._replace(layer, form) for layer, form in forms.items()]
        try:
            return self._present_error()
        finally:
            for layer, data in undo:
                layer.weight.values = data
                for node in self._inputs[layer].means:
                    self._biases.set(layer, node, None)

    def _replace(self, layer: Layer, form: Form) -> tuple[Layer, TensorData]:
        before = layer.weight.data
        splitter = self._splitters[layer]
        matrices = layer.matrices()
        dense = splitter.dense(form.name, splitter.factors(form.name, form.ranks))
        layer.weight.values = layer.stored(dense)
        self._give_means(layer, matrices - dense)
        return layer, before

    def _give_means(self, layer: Layer, lost: Wide) -> None:
        """Add to biases what is lost of the means, lost [groups, N / groups, K]."""
        for node, mean in self._inputs[layer].means.items():
            self._biases.set(layer, node, np.einsum("gnk,gk->gn", lost, mean).reshape(-1))

    def _present_error(self) -> float:
        assert self.context.compare is not None
        with judged(self.model, self._judged):
            closeness = self.context.compare(self.model, TRIAL_FEEDS, self._before)
        return judged_error(closeness, self._judged)

    def _choose(self, curves: Sequence[Curve]) -> list[Step]:
        settings, whole = self.settings, self._whole.of(self.settings.of)
        if settings.ratio != AUTO:
            wanted = float(settings.ratio) * whole
            steps = path(curves, settings.of, wanted)
            if not steps or steps[-1].saved < wanted:
                got = steps[-1].saved / whole if steps else 0.0
                asked = f"asked for {float(settings.ratio):.0%} {_LESS[settings.of]}"
                self.outcome.notes.append(f"{asked}; splits that pay save {got:.1%}")
            return steps
        steps = path(curves, settings.of, math.inf)
        low, high = 0, len(steps)
        while low < high:  # the most steps that hold
            middle = (low + high + 1) // 2
            if self._holds({curves[at].layer: curves[at].forms[form] for at, form in chosen(steps[:middle]).items()}):
                low = middle
            else:
                high = middle - 1
        return self._worth_it(steps[:low], curves)

    def _holds(self, forms: Mapping[Layer, Form]) -> bool:
        if self.context.holds is None:
            return self._error(forms) <= 10 ** (-self.settings.aim / 10)
        undo = [self._replace(layer, form) for layer, form in forms.items()]
        try:
            return self.context.holds(self.model)
        finally:
            for layer, data in undo:
                layer.weight.values = data
                for node in self._inputs[layer].means:
                    self._biases.set(layer, node, None)

    def _worth_it(self, steps: list[Step], curves: Sequence[Curve]) -> list[Step]:
        """The steps, or none where the model as a whole gains too little by them."""
        limit = "the budgets on quality" if self.context.holds is not None else f"{self.settings.aim:g} dB"
        if not steps:
            self.outcome.notes.append(f"no layer can be split within {limit}")
            return []
        if self.settings.of == "parameters":
            return steps
        ratio = 1 - self._saved(steps, curves, "latency") / self._whole.latency
        if ratio <= FASTER:
            return steps
        self.outcome.notes.append(
            f"nothing is split: within {limit} the whole model would take {ratio:.3f} of the time by the target's"
            f" costs, and above {FASTER:g} that is not worth the error"
        )
        return []

    def _saved(self, steps: Sequence[Step], curves: Sequence[Curve], unit: str) -> float:
        return sum(curves[at].saved(form, unit) for at, form in chosen(steps).items())

    def _skip_others(self, curves: Sequence[Curve], taken: Mapping[int, int]) -> None:
        for at, curve in enumerate(curves):
            if at in taken:
                continue
            unit = "parameters" if self.settings.of == "parameters" else "latency"
            saves = curve.saved(0, unit) / curve.whole.of(unit) if curve.whole.of(unit) else 0.0
            what = f"{curve.forms[0]} would save {saves:.0%} of its {'parameters' if unit == 'parameters' else 'time'}"
            if curve.points:
                what += f" at {-10 * math.log10(max(curve.error(0), 1e-30)):.0f} dB of the outputs"
            self.outcome.skipped.append(Skip(curve.layer.name, f"it costs more than others for what it saves: {what}"))

    def _trust(self, curves: Sequence[Curve], taken: Mapping[int, int]) -> None:
        """Let factors trust the inputs that were seen as far as suits feeds that they were not fitted to best."""
        layers = {curves[at].layer: curves[at].forms[form] for at, form in taken.items()}
        if self._blind or all(self._inputs[layer].rows is None for layer in layers):
            return
        best = self._error(layers), dict(self._splitters)
        for trust in _TRUSTS:
            for layer in layers:
                self._splitters[layer] = Splitter(layer, self._inputs[layer].seconds(layer, trust))
            error = self._error(layers)
            if error < best[0]:
                best = error, dict(self._splitters)
        self._splitters = best[1]

    def _apply(self, curves: Sequence[Curve], taken: Mapping[int, int]) -> None:
        rewriter = Rewriter(self.model)
        splits: list[Split] = []
        for at, which in sorted(taken.items()):
            layer, form = curves[at].layer, curves[at].forms[which]
            splitter = self._splitters[layer]
            factors = splitter.factors(form.name, form.ranks)
            self._give_means(layer, layer.matrices() - splitter.dense(form.name, factors))
            splits.append(rewriter.split(layer, form, factors))
            self.outcome.changes.append(Change("split", layer.name, self._told(curves[at], form)))
        if self.settings.refit and not self._blind and not self._lossless:
            self._refit(splits)
        if splits:
            self._biases.clean()
            drop_unused([split.layer.weight for split in splits], self.model)

    def _refit(self, splits: Sequence[Split]) -> None:
        assert self.context.measure is not None
        accepted, tried, _ = refit_in_order(
            self.model,
            self._before,
            self._twins,
            splits,
            self._biases,
            self.context.measure,
            self._present_error,
            self.context.progress,
        )
        if tried:
            self.outcome.notes.append(f"{accepted} of {tried} layers came closer by a fit to what they now read")

    def _told(self, curve: Curve, form: Form) -> str:
        layer = curve.layer
        of = f"{layer.outputs // layer.groups} x {layer.inputs}" + (f" in {layer.groups} groups" * (layer.groups > 1))
        unit = "parameters" if self.settings.of == "parameters" else "latency"
        share = form.work.of(unit) / curve.whole.of(unit)
        what = "of its parameters" if unit == "parameters" else "of its time"
        if not form.error:
            return f"{form} of {of}, {share:.2f} {what}"
        inputs = self._inputs[layer]
        left = f"leaves {form.error:.2g} of its {'outputs' if inputs.rows is not None else 'weights'}"
        blind = f", by its weights alone: {inputs.reason}" if inputs.reason and not self._blind else ""
        return f"{form} of {of}, {share:.2f} {what}, {left}{blind}"

    def _report(self, steps: Sequence[Step], curves: Sequence[Curve]) -> None:
        unit = self.settings.of
        share = steps[-1].saved / self._whole.of(unit)
        self.outcome.notes.append(f"{share:.1%} {_LESS[unit]}, from {len(chosen(steps))} of {len(curves)} layers")
        if unit != "parameters":
            ratio = 1 - self._saved(steps, curves, "latency") / self._whole.latency
            self.outcome.notes.append(f"by the target's costs the model takes {ratio:.2f} of the time")
        if not self._blind and any(is_float(tensor) for tensor in self._judged):
            decibels = -10 * math.log10(max(steps[-1].error, 1e-30))
            self.outcome.notes.append(f"predicted signal-to-noise ratio {decibels:.1f} dB")


def _recurrence(layer: Layer, at: Positions, rate: float) -> Work:
    """What recurrent operators do besides multiplying their inputs."""
    work = Work()
    for reader in layer.readers:
        weights = reader.node.inputs[2]
        if isinstance(weights, (Constant, Variable)) and weights.shape is not None:
            macs = math.prod(int(size) for size in weights.shape) * sum(at.out) / max(1, len(layer.readers))
            work += Work(macs, 0, macs * rate)
    return work
