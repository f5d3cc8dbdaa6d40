"""Static 8-bit quantization for onnxruntime's integer kernels, and int8 storage for the weights they do not serve.

Algebra: x = s_x (c_x - z_x) and w = s_w c_w per output channel, so  w x = s_w s_x c_w (c_x - z_x)  is integer work with
one scale per channel; the bias is added as an int32 code of scale s_x s_w. Only what the runtime turns into an integer
kernel gets Q and DQ (`onnxopt.graph.qdq`), nothing behind the last layer does, and everything else stays float:

    x ── Conv(w, b) ── Relu ── y

    x ── Q ── DQ ── Conv(DQ(int8 w), DQ(int32 b)) ── Relu ── Q ── DQ ── y      becomes one QLinearConv
    x ── LSTM(Mul(Cast(int8 w), s), ...)                                       is folded when the model is loaded

On x86 without VNNI a kernel adds two products in 16 bits. Scales are raised just enough that no pair of codes can
overflow, whatever the input (`onnxopt.numerics.saturation`), so the model gives the same answers on every CPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph import qdq, storage
from onnxopt.graph.edit import label
from onnxopt.graph.islands import Islands, drop_unprofitable, plan
from onnxopt.graph.layers import Layer, find_layers
from onnxopt.graph.precision import before_logarithms
from onnxopt.graph.qdq_nodes import QdqWriter
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics import affine
from onnxopt.numerics.affine import QParams
from onnxopt.numerics.saturation import Layout
from onnxopt.numerics.weights import LayerWeight, mean_output_error, quantize_layer_weight
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option

# body, its islands, and scale and zero-point of each tensor that carries codes
BodyPlan = tuple[Graph, Islands, dict[Variable, QParams]]
# a weight's codes, and as constants: codes, scales, zero-points
Written = tuple[LayerWeight, Constant, Constant, Constant]


@dataclass(frozen=True)
class Int8(Pass):
    """Run layers on 8-bit integers; store as int8 what stays float."""

    name: ClassVar[str] = "int8"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants", "fuse_bn", "convert_opset")
    storage: bool = option(True, "store weights that no integer kernel serves as int8")
    islands: bool = option(True, "keep integers between layers where every operator on the way can take them")
    correct_bias: bool = option(True, "take the mean error of rounded weights out of the bias")
    min_sqnr: float = option(3.0, "dB of typical values over rounding noise that a layer needs", minimum=0.0)
    all_layers: bool = option(False, "quantize layers too whose conversions cost more than their integer kernel saves")

    @property
    def effect(self) -> Effect:
        """Lossy, always."""
        return Effect.LOSSY

    def needs(self, model: Model) -> Requests:
        """Ranges of every tensor that may carry codes; channel means of layer inputs in the main graph."""
        layers = [found for found in find_layers(model) if isinstance(found, Layer)]
        tensors: dict[Variable, None] = {}
        outputs = _outputs(model)
        for body in model.bodies():
            mine = [layer for layer in layers if layer.body is body]
            tensors |= dict.fromkeys(plan(body, mine, outputs, lambda _: True, self.islands).codes)
            tensors |= dict.fromkeys(t for layer in mine if layer.needs_codes for t in (layer.raw, layer.output))
        means = [(layer.activation, _channel_axis(layer)) for layer in layers if layer.body is model.graph]
        return Requests(tuple(tensors), tuple(means) if self.correct_bias else ())

    def run(self, model: Model, context: Context) -> PassResult:
        """Quantize the layers that have statistics and pay, store the other weights."""
        return _Quantization(self, model, context).run()


class _Quantization:
    """One run of the pass."""

    def __init__(self, options: Int8, model: Model, context: Context) -> None:
        self.options, self.model, self.target = options, model, context.target
        self.statistics = context.statistics
        self.outputs = _outputs(model)
        self.main_outputs = {id(tensor) for tensor in model.graph.outputs}
        self.writer = QdqWriter(model)
        self.changes: list[Change] = []
        self.skipped: list[Skip] = []

    def run(self) -> PassResult:
        candidates = self._candidates()
        plans = []
        for body in self.model.bodies():
            mine = [layer for layer in candidates if layer.body is body]
            if mine:
                island = self._plan(body, mine)
                plans.append((body, island, self._codes(island)))
        weights = self._weights(plans)
        for body, island, params in plans:
            self._write_body(body, island, params, weights)
        quantized = [layer for _, island, _ in plans for layer in island.layers]
        stored = self._store({layer.node for layer in quantized})
        self.writer.finish()
        return PassResult(self.changes, self.skipped, self._notes(quantized, stored))

    def _candidates(self) -> list[Layer]:
        """Layers with everything known that an integer kernel needs; the others are skipped with the reason."""
        layers = []
        logarithmic = before_logarithms(self.model)
        for found in list(find_layers(self.model)):
            if not isinstance(found, Layer):
                self._skip(*found)
                continue
            found = self._without_uncovered_clip(found)
            reason = self._unfit(found)
            if found.node in logarithmic:
                reason = "its output goes into a logarithm, which needs relative accuracy"
            if reason is None:
                layers.append(found)
            else:
                self._skip(found.node, reason)
        return layers

    def _skip(self, node: Node, reason: str) -> None:
        self.skipped.append(Skip(label(node), reason))

    def _range_params(self, tensor: Variable) -> QParams | None:
        found = self.statistics.range(tensor) if self.statistics is not None else None
        return None if found is None else affine.activation_qparams(found.minimum, found.maximum, self.target.activation)

    def _without_uncovered_clip(self, layer: Layer) -> Layer:
        """A Clip is implied only by codes that lie within its bounds; any other Clip stays, behind the codes."""
        if layer.absorbed is None or layer.absorbed.op != "Clip":
            return layer
        params = self._range_params(layer.output)
        if params is None or not _within(params, layer.absorbed):
            return replace(layer, absorbed=None)
        return layer

    def _unfit(self, layer: Layer) -> str | None:
        if self.statistics is None:
            return "no real inputs to calibrate with"
        if self.model.opset < 13:
            return f"operator set {self.model.opset} has no per-channel scales; 13 has"
        if id(layer.output) in self.main_outputs and (layer.needs_codes or _read_by_layer(layer.output)):
            return "its output is an output of the model, which stays float"
        for tensor in [layer.activation, layer.output] if layer.needs_codes else [layer.activation]:
            found = self.statistics.range(tensor)
            if found is None:
                return "no sample reached it"
            decibels = affine.typical_sqnr_db(found.minimum, found.maximum, found.mean_absolute)
            if decibels < self.options.min_sqnr:
                return f"outliers of {tensor.name} leave only {decibels:.0f} dB at 8 bits"
        return None

    def _plan(self, body: Graph, layers: list[Layer]) -> Islands:
        if not self.options.all_layers:
            layers, dropped = drop_unprofitable(
                body, layers, self.outputs, self._may_join, self._elements, self.target.costs
            )
            for layer in dropped:
                self._skip(layer.node, f"converting its borders would cost more than {layer.row.kernel} saves")
        return plan(body, layers, self.outputs, self._may_join, self.options.islands)

    def _may_join(self, tensor: Variable) -> bool:
        assert self.statistics is not None
        return self.statistics.range(tensor) is not None

    def _elements(self, tensor: Variable) -> float:
        assert self.statistics is not None
        found = self.statistics.range(tensor)
        return 0.0 if found is None else found.count / max(1, self.statistics.samples)

    def _codes(self, island: Islands) -> dict[Variable, QParams]:
        """Scale and zero-point of every tensor that carries codes; tensors that share codes share them."""
        assert self.statistics is not None
        leader = {tensor: tensor for tensor in island.codes}

        def find(tensor: Variable) -> Variable:
            while leader[tensor] is not tensor:
                tensor = leader[tensor]
            return tensor

        for node in island.nodes:
            row = qdq.island_row(node)
            if row is not None and row.role is qdq.Role.PASS:
                for output in node.outputs:
                    leader[find(output)] = find(node.inputs[0])
        bounds: dict[Variable, tuple[float, float]] = {}
        for tensor in island.codes:
            found = self.statistics.range(tensor)
            assert found is not None
            low, high = bounds.get(find(tensor), (np.inf, -np.inf))
            bounds[find(tensor)] = (min(low, found.minimum), max(high, found.maximum))
        shared = {head: affine.activation_qparams(*bounds[head], self.target.activation) for head in bounds}
        return {tensor: shared[find(tensor)] for tensor in island.codes}

    def _weights(self, plans: list[BodyPlan]) -> dict[tuple[int, ...], Written]:
        """One set of codes for each weight, whatever the number of layers that share it."""
        groups: dict[tuple[int, ...], list[tuple[Layer, QParams]]] = {}
        for _, island, params in plans:
            for layer in island.layers:
                groups.setdefault(_key(layer), []).append((layer, params[layer.activation]))
        written = {}
        for key, sharers in groups.items():
            layer = sharers[0][0]
            values, _ = layer.parameters()
            biases = [(bias, given.scale) for each, given in sharers if (bias := each.parameters()[1]) is not None]
            bounded = self.target.saturates and not all(each.depthwise for each, _ in sharers)
            found = quantize_layer_weight(values, layer.layout, bounded, biases)
            base = layer.weight.name
            written[key] = (
                found,
                self.writer.constant(f"{base}_codes", found.codes),
                self.writer.constant(f"{base}_scale", found.scales),
                self.writer.constant(f"{base}_zero_point", np.zeros(layer.channels, np.int8)),
            )
        return written

    def _write_body(
        self, body: Graph, island: Islands, params: dict[Variable, QParams], weights: dict[tuple[int, ...], Written]
    ) -> None:
        for layer in island.layers:
            self._write_layer(layer, weights[_key(layer)], params)
        for node in island.nodes:
            self._write_node(node, body, params)
        for tensor in island.codes:
            self._connect(tensor, body, island, params[tensor])

    def _write_layer(self, layer: Layer, weight: Written, params: dict[Variable, QParams]) -> None:
        found, codes, scales, zeros = weight
        absorbed = [Change("absorbed", label(node), f"into {layer.name}") for node in layer.chain]
        values, bias = layer.parameters()
        bias = self._corrected(layer, values, bias, found)
        restored = self.writer.dequantize(layer.body, codes, scales, zeros, layer.layout.axis % values.ndim)
        self.writer.set_input(layer.node, 1, restored, layer.body)
        scale = params[layer.activation].scale
        self.writer.replace_chain(layer, None if bias is None else affine.quantize_bias(bias, scale, found.scales))
        kernel = layer.row.kernel if layer.output in params else layer.row.float_kernel
        detail = f"{layer.node.op} to {kernel}"
        if self.target.saturates and not layer.depthwise:
            detail += f", scales {found.growth:.2f}x, largest pair sum {found.largest_pair} of 128"
        self.changes.append(Change("quantized", layer.name, detail))
        self.changes += absorbed

    def _corrected(
        self, layer: Layer, values: np.ndarray, bias: np.ndarray | None, found: LayerWeight
    ) -> np.ndarray | None:
        assert self.statistics is not None
        mean = self.statistics.channel_mean(layer.activation) if self.options.correct_bias else None
        if mean is None or (bias is None and layer.node.op == "MatMul"):
            return bias
        group = int(layer.node.attrs.get("group", 1))
        error = mean_output_error(values, found, layer.layout, group, mean)
        return ((0.0 if bias is None else bias) - error).astype(np.float32)

    def _write_node(self, node: Node, body: Graph, params: dict[Variable, QParams]) -> None:
        row = qdq.island_row(node)
        for at, tensor in enumerate(node.inputs):
            if isinstance(tensor, Constant) and row is not None and row.inputs is None:
                value = float(tensor.values.reshape(-1)[0])
                own = affine.activation_qparams(value, value, self.target.activation)
                quantized = affine.quantize(tensor.values, own)
                self.writer.set_input(node, at, self.writer.codes_of_number(body, tensor, own, quantized), body)
        self.changes.append(Change("integer", label(node), node.op))

    def _connect(self, tensor: Variable, body: Graph, island: Islands, params: QParams) -> None:
        """Put the Q/DQ pair on `tensor` and give its values to the readers that take codes, or to all."""
        restored = self.writer.pair(tensor, body, params)
        quantize = restored.inputs[0].inputs[0].inputs[0]
        if tensor in island.produced:
            self.writer.redirect(tensor, restored, quantize)
            return
        for node in {id(n): n for n in tensor.outputs}.values():
            if node in island.takers:
                for at, given in enumerate(node.inputs):
                    if given is tensor:
                        node.inputs[at] = restored

    def _store(self, quantized: set[Node]) -> int:
        """Int8 codes for float weights that pay for it; returns how many weights."""
        written: dict[tuple[int, tuple[int, ...]], tuple[Constant, Constant]] = {}
        for found in list(storage.find_stored(self.model)):
            wanted = self.options.storage and found.saved_bytes > 0
            between = storage.between_codes(found.node)
            if not (wanted or between) or found.node in quantized or not np.isfinite(found.weight.values).all():
                continue
            key = (found.weight.data.uid, found.kept)
            if key not in written:
                axes = tuple(axis for axis in range(len(found.weight.shape)) if axis not in found.kept)
                maximum = np.abs(found.weight.values).max(axis=axes, keepdims=True, initial=0.0).astype(np.float64)
                scales = affine.weight_scales(maximum)
                codes = np.rint(found.weight.values / scales).astype(np.int8)
                base = found.weight.name
                written[key] = (
                    self.writer.constant(f"{base}_codes", codes),
                    self.writer.constant(f"{base}_scale", scales),
                )
            self._write_stored(found, between, *written[key])
        return len(written)

    def _write_stored(self, found: storage.Stored, between: bool, codes: Constant, scales: Constant) -> None:
        where = f"{label(found.node)}, weight {found.weight.name}"
        if found.node.op == "Gather":
            self.writer.rows(found.body, found.node, codes, scales)
            self.changes.append(Change("stored", where, "int8 rows, one scale each"))
            return
        if between:
            flat = self.writer.constant(f"{found.weight.name}_scale", scales.values.reshape(-1))
            zeros = self.writer.constant(f"{found.weight.name}_zero_point", np.zeros(flat.shape, np.int8))
            restored = self.writer.dequantize(found.body, codes, flat, zeros, found.kept[0])
        else:
            restored = self.writer.stored(found.body, codes, scales)
        self.writer.set_input(found.node, found.at, restored, found.body)
        self.changes.append(Change("stored", where, "int8, float again when the model is loaded"))

    def _notes(self, quantized: list[Layer], stored: int) -> list[str]:
        left = Counter(skip.reason for skip in self.skipped)
        notes = [
            f"{len(quantized)} layers on integer kernels ({self.target.name}), {stored} weights stored as int8, "
            f"{sum(left.values())} layers left float"
        ]
        if self.statistics is None:
            notes.append("no real inputs: weights are only stored as int8, nothing runs on integers")
        return notes


def _outputs(model: Model) -> set[int]:
    return {id(tensor) for body in model.bodies() for tensor in body.outputs}


def _key(layer: Layer) -> tuple[int, ...]:
    """Layers with equal keys have equal weight values in the same layout."""
    return (layer.weight.data.uid, layer.layout.axis, *(id(node) for node in layer.chain))


def _read_by_layer(tensor: Variable) -> bool:
    rows = [qdq.row(node) for node in tensor.outputs]
    return any(row is not None and row.role is qdq.Role.LAYER for row in rows)


def _channel_axis(layer: Layer) -> int:
    return 1 if layer.layout is Layout.CONV else -1


def _within(params: QParams, clip: Node) -> bool:
    """Whether every code stands for a value within the bounds of a Clip."""
    info = np.iinfo(params.dtype)
    bounds = [clip.inputs[i].values.item() if i < len(clip.inputs) and isinstance(clip.inputs[i], Constant) else None for i in (1, 2)]
    low = np.float32(params.scale * np.float32(info.min - int(params.zero_point)))
    high = np.float32(params.scale * np.float32(info.max - int(params.zero_point)))
    return (bounds[0] is None or low >= bounds[0]) and (bounds[1] is None or high <= bounds[1])
