"""Static 8-bit quantization for onnxruntime's integer kernels, and int8 storage for the weights they do not serve.

Algebra: x = s_x (c_x - z_x) and w = s_w c_w per output channel, so  w x = s_w s_x c_w (c_x - z_x)  is integer work with
one scale per channel; the bias is added as an int32 code of scale s_x s_w. Only what the runtime turns into an integer
kernel gets Q and DQ (`onnxopt.quantization.qdq`), nothing behind the last layer does, and everything else stays float:

    x ── Conv(w, b) ── Relu ── y

    x ── Q ── DQ ── Conv(DQ(int8 w), DQ(int32 b)) ── Relu ── Q ── DQ ── y      becomes one QLinearConv
    x ── LSTM(Mul(Cast(int8 w), s), ...)                                       is folded when the model is loaded

On x86 without VNNI a kernel adds two products in 16 bits. Scales are raised just enough that no pair of codes can
overflow, whatever the input (`onnxopt.numerics.saturation`), so the model gives the same answers on every CPU. Where
that costs much accuracy and little time would be lost, weights are unsigned instead: that kernel adds in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Range, Requests, Statistics, calibrated_ranges, calibration_requests, choose
from onnxopt.calibration.moments import affordable, second_moments
from onnxopt.graph.edit import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics import affine, fixed_point
from onnxopt.numerics.affine import QParams
from onnxopt.numerics.fixed_point import q_formats
from onnxopt.numerics.formats import INTEGER
from onnxopt.numerics.histogram import Histogram
from onnxopt.numerics.weights import (
    LayerWeight,
    fed_back,
    lost_decibels,
    mean_output_error,
    quantize_layer_weight,
    trouble,
)
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.quantization import balance, fallback, qdq, storage
from onnxopt.quantization.coded import left_as_quantized
from onnxopt.quantization.codes import implied, shared_params, within
from onnxopt.quantization.fallback import Choice
from onnxopt.quantization.islands import Islands, drop_unprofitable, multiply_adds, plan
from onnxopt.quantization.layers import FloatArray, Layer, channel_axis, find_layers, shared_tensors
from onnxopt.quantization.precision import before_logarithms
from onnxopt.quantization.storage import Stored
from onnxopt.quantization.weight_store import Storing, WeightStore
from onnxopt.quantization.writer import QdqWriter
from onnxopt.target import Target

# A weight is stored unsigned when the pair bound would cost more dB than this, as far as the layers together get slower
# by at most this share.
UNSIGNED_GAIN = 3.0
UNSIGNED_TIME = 0.05

# Channels that an input needs to be looked at for outliers: among few, none stands out by much.
FEWEST_SMOOTHED = 32

# what the pass writes of one weight: its codes, and as constants codes, scales, zero-points
Written = tuple[LayerWeight, Constant, Constant, Constant]
Key = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """What a pass decides of static quantization.

    storage: store weights as int8 that no integer kernel serves. islands: keep codes between layers. gates: also
    through a Sigmoid and the product with its input. correct_bias: take the mean error of rounded weights out of
    biases. calibrators: names, of several the one that does best is used. min_sqnr: dB of typical values over rounding
    noise that a layer needs. all_layers: also those that do not pay. feedback: round weights with second moments.
    weights: `s8`, `u8`, or `auto`: s8 but for the layers that `unsigned_weights` names. selection: the layers that may
    be quantized; what it excludes joins no island and is not stored either. fallback: leave layers float, those that
    cost the outputs most first, until the budgets on quality hold; aim: or until outputs reach so many dB, 0 for none.
    smooth: move outliers of the inputs of MatMul and Gemm into their weights (`balance`). sequential_bias: choose
    biases layer by layer by means measured in the quantized model, where that helps. power_of_two: all scales are
    (fixed point). bits: of weights, activation_bits: what ranges are to need; below 8 of fixed point only. per_channel:
    a scale for each output channel where the target has kernels for them.
    """

    storage: bool = True
    islands: bool = True
    correct_bias: bool = True
    calibrators: tuple[str, ...] = ("minmax",)
    min_sqnr: float = 3.0
    all_layers: bool = False
    feedback: bool = False
    weights: str = "auto"
    selection: Selection = field(default_factory=Selection)
    fallback: bool = True
    aim: float = 0.0
    sequential_bias: bool = False
    smooth: bool = True
    gates: bool = True
    power_of_two: bool = False
    bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True


def requests(model: Model, settings: Settings) -> Requests:
    """Ranges of every tensor that may carry codes; channel means of layer inputs in the main graph."""
    outputs = shared_tensors(model)
    tensors: dict[Variable, None] = {}
    layers: list[Layer] = []
    for float_outputs in (frozenset[str](), frozenset({"Conv"})):  # what targets differ in; the second finds more
        layers = [found for found in find_layers(model, float_outputs) if isinstance(found, Layer)]
        for body, mine in _by_body(model, layers):
            found = plan(body, mine, outputs, lambda _: True, settings.islands, qdq.GATES_ON_CODES)
            tensors |= dict.fromkeys(found.codes)
            tensors |= dict.fromkeys(layer.raw for layer in mine if layer.needs_codes and not implied(layer.absorbed))
    means = [
        (layer.activation, channel_axis(layer.node))
        for layer in layers
        if settings.correct_bias and layer.body is model.graph
    ]
    grams = affordable([layer.node for layer in layers if layer.body is model.graph]) if settings.feedback else []
    smooth = balance.smooth_requests(model, least=FEWEST_SMOOTHED) if settings.smooth else Requests()
    means = [channels for channels in means if channels not in smooth.channel_moments]  # which tell the means too
    more = Requests(channel_means=tuple(means), grams=tuple(grams))
    return calibration_requests(tensors, settings.calibrators) | smooth | more


def quantize(model: Model, context: Context, settings: Settings) -> PassResult:
    """Quantize the layers that have statistics and pay; store the other weights."""
    before = left_as_quantized(model)
    smoothed: list[Change] = []
    if settings.smooth and context.statistics is not None:
        context, smoothed = _smoothed(model, context, settings)
    calibrator, chosen = _choose(model, context, settings)
    choice = fallback.choose(_Trials(model, context, settings, calibrator))
    work = _run(model, context, _limited(settings, choice), calibrator, choice.floats)
    target = context.target
    done = "on integer kernels" if target.runs_here else "quantized"
    kernels = f"{_counted(len(work.done), 'layer')} {done} ({target.name})"
    notes = [f"{kernels}, {_counted(work.stored, 'weight')} stored as int8, {work.left} Conv, Gemm, MatMul left float"]
    if context.statistics is None:
        notes.append("no real inputs to calibrate with: nothing runs on integers, weights are only stored as int8")
    if not target.measured:
        notes.append(f"what pays on {target.name} follows {target.costs.source}, not measurements")
    if settings.weights == "u8" and not target.unsigned_weights:
        notes.append(f"{target.name} has no kernels for unsigned weights: signed ones were written")
    return PassResult(smoothed + work.changes, work.skipped, [*notes, *before, *chosen, *choice.told, *work.remarks])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _smoothed(model: Model, context: Context, settings: Settings) -> tuple[Context, list[Change]]:
    """Smooth the inputs of the layers that will be quantized; the statistics follow without another run."""
    assert context.statistics is not None
    statistics = context.statistics.copy()
    context = replace(context, statistics=statistics)
    planned = frozenset(_Work(settings, model, context, settings.calibrators[0], {}).planned(statistics))
    found = balance.smooth(model, statistics, balance.Smoothing(among=planned, near=True, least=FEWEST_SMOOTHED))
    model.normalize()
    return context, list(found.changes)


def _limited(settings: Settings, choice: Choice) -> Settings:
    return settings if choice.storage else replace(settings, storage=False)


def _run(model: Model, context: Context, settings: Settings, calibrator: str, floats: Mapping[Variable, str]) -> _Work:
    """Quantize a model in place. floats: outputs of layers that stay float -> why."""
    work = _Work(settings, model, context, calibrator, floats)
    if context.statistics is None:
        work.without_data()
    else:
        work.quantize(context.statistics)
    work.left = len(work.skipped)
    work.skipped += work.excluded()
    work.store()
    work.writer.finish()
    if settings.sequential_bias and context.measure is not None:
        work.correct_in_order(context)
    return work


@dataclass(frozen=True)
class _Trials:
    """Candidates of one model for `fallback.choose`."""

    model: Model
    context: Context
    settings: Settings
    calibrator: str

    @property
    def layers(self) -> list[tuple[Variable, str]]:
        """(output of the node, name) of the layers that quantization takes."""
        work = self._tried(Choice(), self.settings)[1]
        names = {label(node): node for node in work.done}
        outputs = {label(node): node.outputs[0] for body in self.model.bodies() for node in body.nodes if node.outputs}
        return [(outputs[name], name) for name in names]

    def made(self, choice: Choice) -> Model:
        """The quantized model with what was chosen to stay float."""
        return self._tried(choice, _limited(self.settings, choice))[0]

    def alone(self, output: Variable) -> Model:
        """The model with nothing quantized but one layer."""
        layer = output.inputs[0]
        alone = replace(
            self.settings,
            selection=Selection(only=(label(layer),)),
            islands=False,
            storage=False,
            all_layers=True,
            sequential_bias=False,
        )
        return self._tried(Choice(), alone)[0]

    def _tried(self, choice: Choice, settings: Settings) -> tuple[Model, _Work]:
        clone = self.model.clone()
        statistics = self.context.statistics
        context = replace(self.context, statistics=statistics and statistics.moved(clone.tensors))
        there = {clone.tensors[id(output)]: reason for output, reason in choice.floats.items()}
        return clone.model, _run(clone.model, context, settings, self.calibrator, there)


def _choose(model: Model, context: Context, settings: Settings) -> tuple[str, list[str]]:
    """The calibrator whose ranges leave the least error at the outputs, and what is to be said of the choice."""
    names = settings.calibrators
    if len(names) == 1 or context.statistics is None:
        return names[0], []
    if context.compare is None:
        return names[0], [f"nothing to compare calibrators on: {names[0]}, the first, was used"]
    scores = {name: context.compare(_Trials(model, context, settings, name).made(Choice())) for name in names}
    best = choose(scores)
    others = ", ".join(f"{name} {score:.1f}" for name, score in scores.items() if name != best)
    return best, [f"ranges by {best}: {scores[best]:.1f} dB at the outputs; {others}"]


def _by_body(model: Model, layers: list[Layer]) -> list[tuple[Graph, list[Layer]]]:
    groups: dict[Graph, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.body, []).append(layer)
    return [(body, groups[body]) for body in model.bodies() if body in groups]


@dataclass(frozen=True, eq=False)
class _Bias:
    """A bias as written: its codes for products of `scale` and the weight's; mean: E of the layer's output in float."""

    layer: Layer
    codes: Constant
    weight: LayerWeight
    scale: npt.NDArray[np.float32]
    mean: FloatArray | None


class _Work:
    """One run of the pass over one model."""

    def __init__(
        self, options: Settings, model: Model, context: Context, calibrator: str, floats: Mapping[Variable, str]
    ) -> None:
        self.options, self.model, self.target = options, model, context.target
        self.calibrator, self.floats = calibrator, floats
        self.left = self.stored = 0
        self.biases: list[_Bias] = []
        self.remarks: list[str] = []
        self.ranges: dict[Variable, tuple[float, float]] = {}
        self.outputs = shared_tensors(model)
        self.writer = QdqWriter(model)
        self.changes: list[Change] = []
        self.skipped: list[Skip] = []
        self.measured: Statistics | None = None
        self.done: set[Node] = set()
        self.coded: dict[tuple[int, tuple[int, ...]], tuple[Constant, FloatArray]] = {}  # as `WeightStore` takes it
        self.layers: dict[Node, Layer] = {}  # all that are layers in kind and form, while there are statistics

    def without_data(self) -> None:
        """Every layer stays float."""
        for found in find_layers(self.model):
            node, reason = (found.node, "no real inputs") if isinstance(found, Layer) else found
            self.skipped.append(Skip(label(node), reason))

    def excluded(self) -> list[Skip]:
        """The operators other than layers whose weight is not to be stored."""
        named = {skip.node for skip in self.skipped}
        selection = self.options.selection
        nodes = {found.node for found in storage.find_stored(self.model) if selection.excludes(found.node)}
        reasons = {label(node): selection.refuses(node) for node in nodes}
        return [Skip(name, why) for name, why in sorted(reasons.items()) if why is not None and name not in named]

    def planned(self, statistics: Statistics) -> list[Node]:
        """The layers that would be quantized."""
        self._know(statistics)
        return [layer.node for _, island in self._plans(self._candidates()) for layer in island.layers]

    def _know(self, statistics: Statistics) -> None:
        self.statistics = self.measured = statistics
        self.ranges = calibrated_ranges(statistics, statistics.ranged(), self.calibrator)

    def quantize(self, statistics: Statistics) -> None:
        """Write the integer form of every body."""
        self._know(statistics)
        plans = [
            (body, island, shared_params(island, self._bounds, self._format))
            for body, island in self._plans(self._candidates())
        ]
        weights = self._weights([(layer, params) for _, island, params in plans for layer in island.layers])
        for body, island, params in plans:
            for layer in island.layers:
                self._write_layer(layer, weights[_key(layer)], params)
            for node in island.nodes:
                self._write_node(node, body)
        for body, island, params in reversed(plans):  # inner bodies first: they read tensors of the outer ones
            for tensor in island.codes:
                self.writer.connect(tensor, body, island, params[tensor])
            for layer in island.layers:
                self._bound_codes(layer, params)

    def _candidates(self) -> list[Layer]:
        """Layers with everything known that an integer kernel needs; the others are skipped with the reason."""
        layers = []
        logarithmic = before_logarithms(self.model)
        for found in find_layers(self.model, self.target.float_outputs):
            if isinstance(found, Layer):
                self.layers[found.node] = found
                node, layer = found.node, self._without_uncovered_clip(found)
                reason = self._unwanted(node) or self._unfit(layer, logarithmic)
                if reason is None:
                    layers.append(layer)
                    continue
            else:
                node, reason = found
            self.skipped.append(Skip(label(node), reason))
        return layers

    def _unwanted(self, node: Node) -> str | None:
        return self.options.selection.refuses(node) or self.floats.get(node.outputs[0])

    def _without_uncovered_clip(self, layer: Layer) -> Layer:
        """A Clip is implied only by codes that lie within its bounds; any other Clip stays, behind the codes.

        That is onnxruntime's rule; other runtimes join a Clip with the layer whatever the codes behind it.
        """
        if (
            not self.target.integer_kernels
            or layer.absorbed is None
            or layer.absorbed.op != "Clip"
            or self.statistics.range(layer.output) is None
            or self.options.power_of_two  # no scale ends at the bounds: codes are clipped
        ):
            return layer
        params = self._format([layer.output], *self._bounds(layer.output))
        return layer if within(params, layer.absorbed) else replace(layer, absorbed=None)

    def _unfit(self, layer: Layer, logarithmic: set[Node]) -> str | None:
        if self.model.opset < 13:
            return f"operator set {self.model.opset} has no scales per channel; 13 has"
        if layer.node in logarithmic:
            return "its output goes into a logarithm, which needs relative accuracy"
        shown = any(layer.output is tensor for tensor in self.model.graph.outputs)
        if shown and (layer.needs_codes or any(_is_layer(node) for node in layer.output.outputs)):
            return "its output is an output of the model, which stays float"
        if layer.chain:
            found = trouble(layer.parameters()[0])
            if found is not None:
                return f"its weight, with what scales its output, {found}"
        return self._unfit_values(layer)

    def _unfit_values(self, layer: Layer) -> str | None:
        places = {"its input": layer.activation} | ({"its output": layer.output} if layer.needs_codes else {})
        for place, tensor in places.items():
            found = self.statistics.range(tensor)
            if found is None:
                reason = self.statistics.reason(tensor)
                return "no sample reached it" if reason is None else f"{place} {reason}"
            if not _representable(found):
                return f"{place} is too small for 8 bits, [{found.minimum:.1g}, {found.maximum:.1g}]"
            magnitude = self.statistics.mean_magnitude(tensor)
            if magnitude is None:
                continue
            decibels = affine.typical_sqnr_db(*self._represented(tensor), magnitude)
            if decibels < self.options.min_sqnr:
                return f"outliers of {tensor.name} leave only {decibels:.0f} dB at 8 bits"
        return None

    def _plans(self, candidates: list[Layer]) -> list[tuple[Graph, Islands]]:
        """The plan of each body, without layers whose int8 weight would only come on top of the float one."""
        stored = self._stored() if self.options.storage else []
        sound = {weight for weight in {found.weight for found in stored} if trouble(weight.values) is None}
        storable = {found.place for found in stored if found.weight in sound}
        while True:
            skipped: list[Skip] = []
            plans = [(body, self._plan(body, layers, skipped)) for body, layers in _by_body(self.model, candidates)]
            chosen = [layer for _, island in plans for layer in island.layers]
            served = storable | {(layer.node, 1) for layer in chosen}
            stays = storage.doubled({layer.weight for layer in chosen}, served, self.outputs)
            doubled = {layer: stays[layer.weight] for layer in chosen if layer.weight in stays}
            if not doubled:
                self.skipped += skipped
                return plans
            self.skipped += [Skip(layer.name, f"its weight {reason}") for layer, reason in doubled.items()]
            candidates = [layer for layer in candidates if layer not in doubled]

    def _plan(self, body: Graph, layers: list[Layer], skipped: list[Skip]) -> Islands:
        def known(tensor: Variable) -> bool:
            found = self.statistics.range(tensor)
            excluded = any(self.options.selection.excludes(node) for node in tensor.inputs)
            return found is not None and _representable(found) and not excluded

        left_float = qdq.LEFT_FLOAT | self.target.float_operators
        if not self.options.all_layers:
            layers, dropped = drop_unprofitable(
                body,
                layers,
                self.outputs,
                known,
                self._elements,
                self.target.costs,
                self.options.islands,
                left_float,
            )
            for layer in dropped:
                saver = f"{layer.row.kernel} saves" if self.target.runs_here else "8 bits save"
                skipped.append(Skip(layer.name, f"converting its borders would cost more than {saver}"))
        # layers were chosen as if gates stayed float: which pay by gates alone are early ones, where codes lose most
        if self.options.gates:
            left_float = qdq.GATES_ON_CODES | self.target.float_operators
        return plan(body, layers, self.outputs, known, self.options.islands, left_float)

    def _bounds(self, tensor: Variable) -> tuple[float, float]:
        low, high = self.ranges[tensor]  # candidates and islands hold measured tensors only
        return (-max(-low, high), max(-low, high)) if self.target.symmetric else (low, high)

    def _format(self, tensors: Sequence[Variable], low: float, high: float) -> QParams:
        """The format of tensors that share one."""
        dtype, symmetric = self.target.activation, self.target.symmetric
        if not self.options.power_of_two:
            return affine.activation_qparams(low, high, dtype, symmetric)
        counted = [found for tensor in tensors if (found := self.statistics.histogram(tensor)) is not None]
        histogram = reduce(Histogram.merged, counted) if len(counted) == len(tensors) and counted else None
        return fixed_point.activation_qparams(low, high, dtype, self.options.activation_bits, symmetric, histogram)

    def _represented(self, tensor: Variable) -> tuple[float, float]:
        """The range that 8 bits of the tensor's scale represent."""
        bounds = self._bounds(tensor)
        if not self.options.power_of_two or bounds[0] == bounds[1]:
            return bounds
        params = self._format([tensor], *bounds)
        low, high = (params.value(code) for code in params.codes)
        return low, high

    def _elements(self, tensor: Variable) -> float:
        """Elements of a tensor that one run computes, on average; 0 when unknown."""
        found = self.statistics.range(tensor)
        return 0.0 if found is None else found.count / self.statistics.samples

    def _weights(self, layers: list[tuple[Layer, dict[Variable, QParams]]]) -> dict[Key, Written]:
        """One set of codes for each weight, whatever the number of layers that share it."""
        groups: dict[Key, list[tuple[Layer, QParams]]] = {}
        for layer, params in layers:
            groups.setdefault(_key(layer), []).append((layer, params[layer.activation]))
        quantized: dict[Key, LayerWeight] = {}
        gains: dict[Key, tuple[float, float]] = {}
        for key, sharers in groups.items():
            quantized[key], lost = self._quantized(sharers)
            gains[key] = lost, sum(multiply_adds(each, self._elements) for each, _ in sharers)
        for key in unsigned_weights(gains, self.target, self.options.weights):
            quantized[key], _ = self._quantized(groups[key], unsigned=True)
        if self.options.feedback:
            quantized = {key: self._fed_back(groups[key], found) for key, found in quantized.items()}
        written: dict[Key, Written] = {}
        for key, found in quantized.items():
            name = groups[key][0][0].weight.name
            codes = self.writer.constant(f"{name}_codes", found.stored_codes)
            scales = self.writer.constant(f"{name}_scale", found.stored_scales)
            zeros = self.writer.constant(f"{name}_zero_point", found.stored_zero)
            written[key] = found, codes, scales, zeros
            layer = groups[key][0][0]
            if not (found.unsigned or found.per_tensor or layer.chain):
                self.coded[layer.weight.data.uid, (layer.layout.axis,)] = codes, found.scales
        return written

    def _quantized(self, sharers: list[tuple[Layer, QParams]], unsigned: bool = False) -> tuple[LayerWeight, float]:
        """(codes of one weight for all that share it, dB that keeping them from saturating costs; nan if nothing)."""
        layer = sharers[0][0]
        values, _ = layer.parameters()
        biases = [(bias, given.scale) for each, given in sharers if (bias := each.parameters()[1]) is not None]
        dense = not all(each.depthwise for each, _ in sharers)
        given = self.options
        per_tensor = not given.per_channel or any(each.node.op not in self.target.per_channel for each, _ in sharers)
        form = (biases, per_tensor, given.bits, given.power_of_two)
        free = quantize_layer_weight(values, layer.layout, False, *form)
        if not dense:
            return free, float("nan")
        if unsigned:
            return replace(free, unsigned=True), float("nan")
        if not self.target.saturates:
            return free, 0.0
        bounded = quantize_layer_weight(values, layer.layout, True, *form)
        return bounded, lost_decibels(values, bounded, free, layer.layout)

    def _fed_back(self, sharers: list[tuple[Layer, QParams]], found: LayerWeight) -> LayerWeight:
        """The codes chosen anew with second moments, where these are known."""
        seconds = second_moments(self.statistics, [layer.node for layer, _ in sharers])
        if seconds is None:
            return found
        dense = not all(layer.depthwise for layer, _ in sharers)
        bounded = self.target.saturates and dense and not found.unsigned
        layer = sharers[0][0]
        return fed_back(layer.parameters()[0], layer.layout, found, seconds, bounded)

    def _write_layer(self, layer: Layer, weight: Written, params: dict[Variable, QParams]) -> None:
        found, codes, scales, zeros = weight
        coded = layer.output in params
        detail = f"{layer.node.op} to {layer.row.kernel if coded else layer.row.float_kernel}"
        if not self.target.runs_here:
            detail = f"{layer.node.op} on 8 bits"
        if self.options.power_of_two:
            detail += f", {q_formats(found.scales, found.bits)} weights"
        if found.unsigned:
            detail += ", unsigned weights"
        elif self.target.saturates and not layer.depthwise:
            detail += f", scales {found.growth:.2f}x, largest pair sum {found.largest_pair} of 128"
        self.changes.append(Change("quantized", layer.name, detail))
        self.changes += [Change("absorbed", label(node), f"into {layer.name}") for node in layer.taken_in()]
        values, bias = layer.parameters()
        exact = bias
        bias = self._corrected(layer, values, bias, found)
        restored = self.writer.dequantize(layer.body, codes, scales, zeros, layer.layout.axis)
        self.writer.set_input(layer.node, 1, restored, layer.body)
        scale = params[layer.activation].scale
        constant = self.writer.replace_chain(layer, None if bias is None else _bias_codes(bias, scale, found))
        if constant is not None and layer.body is self.model.graph:
            self.biases.append(_Bias(layer, constant, found, scale, self._mean_output(layer, values, exact)))
        self.done.add(layer.node)
        follower = layer.follower(self.outputs)
        if self.target.integer_kernels and follower is not None and follower.op in ("Relu", "Clip") and not coded:
            self.changes.append(Change("rewritten", label(follower), f"{follower.op} as Max and Min of constants"))
            self.writer.spell_out(follower, layer.body)

    def _bound_codes(self, layer: Layer, params: dict[Variable, QParams]) -> None:
        """Clip codes where they reach beyond the bounds of a Clip that goes into the layer."""
        clip = layer.absorbed
        if clip is None or clip.op != "Clip" or not clip.outputs or not self.target.integer_kernels:
            return
        coded = params.get(layer.output)
        if coded is None or within(coded, clip):
            return
        self.changes.append(Change("rewritten", label(clip), "Clip of codes"))
        self.writer.bound_codes(clip, layer.body, coded)

    def _corrected(
        self, layer: Layer, values: FloatArray, bias: FloatArray | None, found: LayerWeight
    ) -> FloatArray | None:
        mean = None
        if self.options.correct_bias:
            mean = self.statistics.channel_mean(layer.activation, channel_axis(layer.node))
        if bias is None and layer.node.op == "MatMul":
            if not layer.would_become_gemm(self.outputs):
                return None
            bias = np.zeros(layer.channels, np.float32)
        if mean is None:
            return bias
        rounded = found.values(layer.layout.axis)
        error = mean_output_error(values, rounded, layer.layout, int(layer.node.attrs.get("group", 1)), mean)
        return np.asarray((0.0 if bias is None else bias) - error, np.float32)

    def _mean_output(self, layer: Layer, values: FloatArray, bias: FloatArray | None) -> FloatArray | None:
        """E[W x + b] per channel in the float model; None where the mean of x is not known."""
        mean = self.statistics.channel_mean(layer.activation, channel_axis(layer.node))
        if mean is None:
            return None
        group = int(layer.node.attrs.get("group", 1))
        product = mean_output_error(np.zeros_like(values), values, layer.layout, group, mean)
        return np.asarray(product + (0.0 if bias is None else bias), np.float32)

    def correct_in_order(self, context: Context) -> None:
        """Choose every bias anew so that the mean of its layer's output is what it is in the float model.

        Layer after layer, by the mean that its input has in the quantized model as it is by then: one run over the
        feeds each. Kept where the outputs come closer to the reference's. (Full bias correction: Nagel et al. 2019,
        arXiv 1906.04721, section 4.2, empirical; all layers at once overshoot, each counting the errors of the others.)
        """
        assert context.measure is not None
        before = [each.codes.values for each in self.biases]
        score = context.compare(self.model) if context.compare is not None else None
        places = {node: at for at, node in enumerate(self.model.graph.nodes)}
        for done, each in enumerate(sorted(self.biases, key=lambda each: places[each.layer.node])):
            context.progress(done, len(self.biases))
            self._correct_measured(each, context.measure)
        if score is not None and context.compare is not None and context.compare(self.model) < score:
            for each, codes in zip(self.biases, before, strict=True):
                each.codes.values = codes
            self.remarks.append(
                "biases chosen layer by layer brought the outputs no closer: they were left as they were"
            )

    def _correct_measured(self, each: _Bias, measure: Callable[[Model, Requests], Statistics]) -> None:
        node, layout = each.layer.node, each.layer.layout
        tensor, axis = node.inputs[0], channel_axis(node)
        mean = measure(self.model, Requests(channel_means=((tensor, axis),))).channel_mean(tensor, axis)
        if mean is None or each.mean is None:
            return
        rounded = each.weight.values(layout.axis)
        product = mean_output_error(np.zeros_like(rounded), rounded, layout, int(node.attrs.get("group", 1)), mean)
        each.codes.values = _bias_codes(np.asarray(each.mean - product, np.float32), each.scale, each.weight)[0]

    def _write_node(self, node: Node, body: Graph) -> None:
        for at, tensor in enumerate(node.inputs):
            row = qdq.island_row(node)
            if isinstance(tensor, Constant) and row is not None and row.inputs is None:
                value = float(tensor.values.item())
                self.writer.number(node, at, body, self._format([], value, value))
        self.changes.append(Change("integer", label(node), f"{node.op} on codes"))

    def _stored(self) -> list[Stored]:
        """The weights that may be stored as int8."""
        alone = {node for node in self.layers if node.outputs and node.outputs[0] in self.floats}
        wanted = [found for found in storage.find_stored(self.model) if found.node not in alone]
        return [found for found in wanted if not self.options.selection.excludes(found.node)]

    def store(self) -> None:
        """Int8 codes for float weights that pay for it, and for those the runtime would round worse."""
        storing = Storing(
            form=INTEGER[self.options.bits],
            memory=not self.target.folds,
            power_of_two=self.options.power_of_two,
            correct_bias=self.options.correct_bias,
            all_weights=self.options.storage,
        )
        store = WeightStore(
            self.model,
            self.writer,
            storing,
            self.measured,
            self.target.saturates,
            {node: layer.activation for node, layer in self.layers.items() if node.op != "MatMul"},
            self.coded,
            self.changes,
            self.skipped,
        )
        store.run(self._stored())
        self.stored = store.stored


def unsigned_weights(gains: dict[Key, tuple[float, float]], target: Target, weights: str) -> list[Key]:
    """The weights that are better stored unsigned, which costs time but no accuracy (never depthwise ones).

    gains: weight -> (dB that its signed codes lose by the pair bound, nan where it has none; multiply-adds a run). Of
    those that lose more than UNSIGNED_GAIN dB, the ones with the most dB for the time go first, until all layers
    together take UNSIGNED_TIME more. weights: `u8` takes all, `s8` none.
    """
    able = [key for key, (lost, _) in gains.items() if not np.isnan(lost)]
    if weights == "s8" or not target.unsigned_weights:
        return []
    if weights == "u8":
        return able
    costs = target.costs
    left = UNSIGNED_TIME * sum(macs for _, macs in gains.values()) * costs.integer_mac
    slower = costs.unsigned_mac - costs.integer_mac
    losing = [key for key in able if gains[key][0] > UNSIGNED_GAIN and costs.unsigned_mac < costs.float_mac]
    chosen = []
    for key in sorted(losing, key=lambda key: gains[key][1] / gains[key][0]):
        left -= gains[key][1] * slower
        if left < 0:
            break
        chosen.append(key)
    return chosen


def _bias_codes(
    bias: FloatArray, input_scale: npt.NDArray[np.float32], found: LayerWeight
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Int32 codes of a bias [channels] and their scales, one a channel or 0-d as those of the weight."""
    codes, product = affine.quantize_bias(bias, input_scale, found.scales)
    return codes, product[0].reshape(()) if found.per_tensor else product


def _key(layer: Layer) -> Key:
    """Layers with equal keys have equal weight values in the same layout."""
    return (layer.weight.data.uid, layer.layout.axis, *(id(node) for node in layer.chain))


def _representable(found: Range) -> bool:
    """Whether codes can tell the values apart."""
    return not affine.underflows(max(found.maximum, 0.0) - min(found.minimum, 0.0), 255)


def _is_layer(node: Node) -> bool:
    row = qdq.row(node)
    return row is not None and row.role is qdq.Role.LAYER
