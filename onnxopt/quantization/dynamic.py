"""Dynamic 8-bit quantization: weights are int8 in the file, the scale of each input is found when the model runs.

Algebra: x = s_x (c_x - z_x) with s_x, z_x from the extremes of x itself, and w = s_w c_w per output channel, so that
x w = s_x s_w (c_x - z_x) c_w:

    x ── MatMul(w) ── Add(b) ── y

    x ── DynamicQuantizeLinear ── MatMulInteger(int8 w) ── Cast ── Mul ── Add(b) ── y     one DynamicQuantizeMatMul
                   └─────────── Mul(s_x, s_w) ──────────────────────┘

The runtime takes the first factor of the product of scales for that of the input: with s_w in front the nodes become
a MatMulIntegerToFloat behind a DynamicQuantizeLinear, and with two Muls one after the other they are not joined at all
(`matmul_integer_to_float.cc`, `dynamic_quantize_matmul_fusion.cc`, and the optimized graphs of 1.32). Layers that read
one tensor share its codes, each as MatMulIntegerToFloat. The runtime joins equal DynamicQuantizeLinear nodes anyway,
and DynamicQuantizeMatMul written out for each of three layers 384 x 384 took 1.02 (1 row) to 1.09 (128) times as long.

    LSTM(x, W, R, ...)     com.microsoft.DynamicQuantizeLSTM(x, int8 W', int8 R', ..., scales)    W' = [D, inputs, 4 H]

Its scales are per channel. A simulation of 50 steps with 128 inputs, 256 states and normally distributed weights gave
37.0 dB with one scale a direction and 39.1 with one a channel; where pairs saturate 36.9 and 28.7, because the codes of
every channel fill their range; with pair bounds 38.1 a channel. (Evenly distributed weights: 40.1 and 40.1, saturating
18.7 and 18.3, bounded 38.7.) So scales per channel need the bounds, and with them lose nothing to saturation.

Left float: GRU and RNN, which have no kernel; Conv, whose ConvInteger takes 1.03 (unsigned weights) to 4.8 (signed)
times as long as the float Conv.

The kernels add products in pairs of adjacent rows of w, W' and R' (`MlasGemmPackB`), so the scales that rule saturation
out on x86 without VNNI (`onnxopt.numerics.saturation`) are those of a MatMul. Codes of inputs are always 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from onnxopt.graph.edit import label
from onnxopt.graph.selection import Selection
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics.affine import CodeArray, FloatArray
from onnxopt.numerics.saturation import Layout
from onnxopt.numerics.weights import LayerWeight, quantize_layer_weight, trouble
from onnxopt.passbase import Change, PassResult, Skip
from onnxopt.quantization import qdq, storage
from onnxopt.quantization.coded import left_as_quantized
from onnxopt.quantization.layers import layout_of, only_consumer, shared_tensors, unfit_weight
from onnxopt.quantization.writer import FLOAT, QdqWriter
from onnxopt.target import CostFacts, Target

# Operator sets before it have no DynamicQuantizeLinear.
OLDEST_OPSET = 11
CONTRIB = "com.microsoft"
# An LSTM quantizes its state again at every step, so it needs so many times the weights of a MatMul to be faster: with
# 64 inputs and states it takes 0.9 of the float time, with 48 as long, with 32 1.14 times as long (20 steps).
LSTM_FACTOR = 4

_NO_KERNEL = {
    "Conv": "ConvInteger is slower than the float Conv; the pass int8 quantizes Conv with data",
    "ConvTranspose": "the runtime has no integer ConvTranspose",
    "GRU": "the runtime has no integer GRU",
    "RNN": "the runtime has no integer RNN",
}
_LAYERS = frozenset({"MatMul", "Gemm", "LSTM", *_NO_KERNEL})
_LSTM_ATTRIBUTES = frozenset(
    {"activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget"}
)


@dataclass(frozen=True)
class Settings:
    """What a pass decides of dynamic quantization.

    selection: the nodes wanted. min_weights: fewest weights of a layer that is quantized (an LSTM needs LSTM_FACTOR
    times as many). all_layers: also those whose inputs cost more to convert than integers save.
    """

    selection: Selection = field(default_factory=Selection)
    min_weights: int = 4096
    all_layers: bool = False


@dataclass(frozen=True, eq=False)
class _Layer:
    """A MatMul, Gemm or LSTM that integer kernels can do. ats: the inputs of `node` that are weights."""

    node: Node
    body: Graph
    ats: tuple[int, ...]

    @property
    def activation(self) -> Variable:
        """What it reads."""
        tensor: Variable = self.node.inputs[0]
        return tensor

    @property
    def weights(self) -> list[Constant]:
        """Its constant weights."""
        return [self.node.inputs[at] for at in self.ats]

    @property
    def places(self) -> set[storage.Place]:
        """The inputs that are to be codes."""
        return {(self.node, at) for at in self.ats}

    @property
    def recurrent(self) -> bool:
        """Whether it is an LSTM."""
        return len(self.ats) > 1


@dataclass(frozen=True)
class _Written:
    """Codes and scales of one weight as constants, and what is to be said of them."""

    codes: Constant
    scales: Constant
    growth: float
    largest_pair: int


def quantize(model: Model, target: Target, settings: Settings) -> PassResult:
    """Rewrite every layer of `model` that qualifies and pays, in place; all others are skipped with the reason."""
    work = _Work(model, target, settings)
    layers = work.choose()
    for layer in layers:
        work.write(layer)
    work.writer.finish()
    return PassResult(work.changes, work.skipped, work.notes(len(layers)))


class _Work:
    """One run of the pass over one model."""

    def __init__(self, model: Model, target: Target, settings: Settings) -> None:
        self.model, self.target, self.settings = model, target, settings
        self.outputs = shared_tensors(model)
        self.facts = known(model)
        self.writer = QdqWriter(model)
        self.changes: list[Change] = []
        self.skipped: list[Skip] = []
        self.written: dict[tuple[object, ...], _Written] = {}
        self.sharers: dict[tuple[Variable, Graph], int] = {}
        self.already = left_as_quantized(model)

    def notes(self, count: int) -> list[str]:
        """What the reader of the report should know."""
        kernels = f"{count} layers on dynamic integer kernels ({self.target.name})"
        return [f"{kernels}, {len(self.skipped)} left float", *self.already]

    # which layers

    def choose(self) -> list[_Layer]:
        """The layers to write: each gains by itself or with those that read the same tensor, and no weight doubles."""
        layers = list(self._fitting())
        while True:
            losing = self._unprofitable(layers)
            if not losing:
                served = {place for layer in layers for place in layer.places}
                stays = storage.doubled({w for layer in layers for w in layer.weights}, served, self.outputs)
                losing = {
                    layer: f"its weight {stays[weight]}"
                    for layer in layers
                    for weight in layer.weights
                    if weight in stays
                }
            if not losing:
                break
            self.skipped += [Skip(label(layer.node), reason) for layer, reason in losing.items()]
            layers = [layer for layer in layers if layer not in losing]
        for layer in layers:
            if not layer.recurrent:
                key = layer.activation, layer.body
                self.sharers[key] = self.sharers.get(key, 0) + 1
        return layers

    def _fitting(self) -> Iterator[_Layer]:
        for body in self.model.bodies():
            for node in body.nodes:
                if node.kind[0] != "" or node.op not in _LAYERS:
                    continue
                reason = self.settings.selection.refuses(node) or self._unfit(node, body)
                layer = _Layer(node, body, (1, 2) if node.op == "LSTM" else (1,))
                reason = reason or self._too_small(layer)
                if reason is None:
                    yield layer
                else:
                    self.skipped.append(Skip(label(node), reason))

    def _unfit(self, node: Node, body: Graph) -> str | None:
        if body.function is not None:
            return storage.IN_FUNCTION
        if any(storage.from_codes(tensor) for tensor in node.inputs[:2]):
            return "it is quantized already"
        if node.op in _NO_KERNEL:
            return _NO_KERNEL[node.op]
        if node.op == "LSTM":
            return _unfit_lstm(node)
        if self.model.opset < OLDEST_OPSET:
            return f"operator set {self.model.opset} has no DynamicQuantizeLinear; {OLDEST_OPSET} has"
        if isinstance(node.inputs[0], Constant) and not isinstance(node.inputs[1], Constant):
            return "its weight is the first operand; the integer kernels take the second"
        row = qdq.row(node)
        return unfit_weight(node, body) or (row and row.refuses(node)) or self._misread(node)

    def _misread(self, node: Node) -> str | None:
        """Why the runtime would take a constant added behind the layer for a bias that it is not.

        It looks at the last axis only (`matmul_integer_to_float.cc`): a constant that widens a single column fails when
        the model runs, one with more axes than the product loses them.
        """
        follower = only_consumer(node.outputs[0], self.outputs)
        if follower is None or follower.kind != ("", "Add") or _bias(node) is not None:
            return None
        added = next((tensor for tensor in follower.inputs if isinstance(tensor, Constant)), None)
        if added is None or added.shape[-1:] in ((), (1,)) or any(dim != 1 for dim in added.shape[:-1]):
            return None
        columns = node.inputs[1].shape[layout_of(node).axis]
        rank = 2 if node.op == "Gemm" else self._rank(node.inputs[0])
        if columns != 1 and (len(added.shape) == 1 or (rank is not None and len(added.shape) <= rank)):
            return None
        return f"the runtime would take what {label(follower)} adds for its bias, which has another shape"

    def _rank(self, tensor: Variable) -> int | None:
        shape = self.facts.get(id(tensor), Fact()).shape
        return None if shape is None else len(shape)

    def _too_small(self, layer: _Layer) -> str | None:
        wanted = self.settings.min_weights * (LSTM_FACTOR if layer.recurrent else 1)
        found = sum(weight.data.size for weight in layer.weights)
        if found >= wanted:
            return None
        return f"its {found} weights are less than the {wanted} that pay (min_weights)"

    def _unprofitable(self, layers: list[_Layer]) -> dict[_Layer, str]:
        if self.settings.all_layers:
            return {}
        losing: dict[_Layer, str] = {}
        for group in _groups(layer for layer in layers if not layer.recurrent):
            rows = self._rows(group[0].activation)
            if _saving(group, rows, self.target.costs) <= 0:
                losing |= dict.fromkeys(group, "quantizing its input would cost more than the integer kernel saves")
        return losing

    def _rows(self, tensor: Variable) -> int | None:
        """How many vectors `tensor` holds; None when that is not certain, or none."""
        shape = self.facts.get(id(tensor), Fact()).shape
        sizes = [dim for dim in (shape or [None])[:-1] if isinstance(dim, int)]
        certain = shape is not None and len(sizes) == len(shape) - 1
        return math.prod(sizes) or None if certain else None

    # writing

    def write(self, layer: _Layer) -> None:
        """Put the integer form in the place of one layer."""
        name, op = label(layer.node), layer.node.op
        kernel, written = self._write_lstm(layer) if layer.recurrent else self._write_product(layer)
        detail = f"{op} to {kernel}"
        if self.target.saturates:
            growth = max(each.growth for each in written)
            detail += f", scales {growth:.2f}x, largest pair sum {max(each.largest_pair for each in written)} of 128"
        self.changes.append(Change("quantized", name, detail))

    def _write_product(self, layer: _Layer) -> tuple[str, list[_Written]]:
        node, body, writer = layer.node, layer.body, self.writer
        weight = self._weight(node.inputs[1], layout_of(node))
        shared = self.sharers[layer.activation, body] > 1
        codes, scale, zero = writer.dynamic(layer.activation, body)
        base, shape = node.outputs[0].name, node.outputs[0].shape
        product = writer.node(body, "MatMulInteger", [codes, weight.codes, zero], f"{base}_product")
        product.dtype, product.shape = np.dtype(np.int32), shape
        values = writer.node(body, "Cast", [product], f"{base}_cast", to=FLOAT)
        # the input's scale first: the runtime tells the two apart by their order
        scales = writer.node(body, "Mul", [scale, weight.scales], f"{base}_scales")
        bias = _bias(node)
        if bias is None:
            writer.replace(node, body, "Mul", [values, scales])
        else:
            scaled = writer.node(body, "Mul", [values, scales], f"{base}_scaled")
            writer.replace(node, body, "Add", [scaled, bias])
        return "MatMulIntegerToFloat" if shared else "DynamicQuantizeMatMul", [weight]

    def _write_lstm(self, layer: _Layer) -> tuple[str, list[_Written]]:
        node, body = layer.node, layer.body
        written = [self._gates(weight) for weight in layer.weights]
        inputs = [*node.inputs, *(Variable.empty() for _ in range(8 - len(node.inputs)))]
        for at, weight in zip(layer.ats, written, strict=True):
            self.writer.set_input(node, at, weight.codes, body)
            inputs[at] = weight.codes
            zeros = self.writer.constant(f"{weight.scales.name}_zeros", np.zeros(weight.scales.shape, np.int8))
            inputs += [weight.scales, zeros]
        node.inputs = inputs
        node.op, node.domain = "DynamicQuantizeLSTM", CONTRIB
        node.attrs = {name: value for name, value in node.attrs.items() if name in _LSTM_ATTRIBUTES}
        node.attrs["hidden_size"] = int(layer.weights[1].shape[1])
        if CONTRIB not in self.model.opset_imports:
            self.model.import_opset(CONTRIB, 1)
        return "DynamicQuantizeLSTM", written

    def _weight(self, weight: Constant, layout: Layout) -> _Written:
        """Codes [K, N] and scales [N] of a MatMul's or Gemm's weight, once for all that read it the same way."""
        key = weight.data.uid, layout
        if key not in self.written:
            found = quantize_layer_weight(weight.values, layout, self.target.saturates)
            codes = found.codes.T if layout is Layout.COLUMNS else found.codes
            self.written[key] = self._store(weight, [found], codes, found.scales)
        return self.written[key]

    def _gates(self, weight: Constant) -> _Written:
        """Codes [D, inputs, 4 H] and scales [D, 4 H] of an LSTM's W or R [D, 4 H, inputs]."""
        key = weight.data.uid, "gates"
        if key not in self.written:
            found = [quantize_layer_weight(each, Layout.COLUMNS, self.target.saturates) for each in weight.values]
            codes = np.stack([each.codes.T for each in found])
            self.written[key] = self._store(weight, found, codes, np.stack([each.scales for each in found]))
        return self.written[key]

    def _store(self, weight: Constant, found: list[LayerWeight], codes: CodeArray, scales: FloatArray) -> _Written:
        return _Written(
            self.writer.constant(f"{weight.name}_codes", np.ascontiguousarray(codes)),
            self.writer.constant(f"{weight.name}_scale", scales),
            max(each.growth for each in found),
            max(each.largest_pair for each in found),
        )


def _bias(node: Node) -> Variable | Constant | None:
    """What a Gemm adds."""
    found: Variable | Constant | None = node.inputs[2] if len(node.inputs) > 2 else None
    return None if found is None or found.is_empty() else found


def _unfit_lstm(node: Node) -> str | None:
    if isinstance(node.inputs[0], Constant):
        return "its input is a constant"
    if node.attrs.get("layout", 0):
        return "its batch comes first (layout 1), which the integer LSTM does not know"
    unknown = next((name for name in node.attrs if name not in _LSTM_ATTRIBUTES | {"layout"}), None)
    if unknown is not None:
        return f"the integer LSTM does not know its attribute {unknown}"
    for what, weight in (("weight W", node.inputs[1]), ("weight R", node.inputs[2])):
        if not isinstance(weight, Constant):
            return f"its {what} is not a constant"
        if weight.dtype != np.float32:
            return f"its {what} is {weight.dtype}, not float32"
        if weight.data.size == 0 or len(weight.shape) != 3:
            return f"its {what} has the shape {list(weight.shape)}"
        found = trouble(weight.values)
        if found is not None:
            return f"its {what} {found}"
    directions, gates, hidden = node.inputs[2].shape
    if gates != 4 * hidden or node.inputs[1].shape[:2] != (directions, gates):
        return f"its weights have shapes that don't fit, {list(node.inputs[1].shape)} and {list(node.inputs[2].shape)}"
    return None


def _groups(layers: Iterable[_Layer]) -> list[list[_Layer]]:
    """Layers of one body that read one tensor share its codes."""
    found: dict[tuple[Variable, Graph], list[_Layer]] = {}
    for layer in layers:
        found.setdefault((layer.activation, layer.body), []).append(layer)
    return list(found.values())


def _saving(group: list[_Layer], rows: int | None, costs: CostFacts) -> float:
    """Nanoseconds a run gains by integer kernels for layers that read one tensor of `rows` vectors.

    Without `rows` it is the gain of one vector, which has the same sign but for the node that quantizes: a layer alone
    is joined with it, several share one node more.
    """
    gain = sum(layer.weights[0].data.size for layer in group) * (costs.float_mac - costs.integer_mac)
    inputs = group[0].weights[0].shape[1 - layout_of(group[0].node).axis]
    gain -= inputs * costs.convert
    if rows is None:
        return gain
    return gain * rows - (costs.node if len(group) > 1 else 0.0)
