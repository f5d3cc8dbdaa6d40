"""The layers of a model that is quantized already, whoever did it, and however it is spelled.

static        DequantizeLinear(x) and DequantizeLinear(w) -> Conv, Gemm, MatMul: one integer kernel when it fuses
weights       w alone comes from a DequantizeLinear: MatMulNBits where it fuses, else it is computed at every run
kernel        QLinearConv, MatMulInteger, MatMulNBits, ...: it runs on integers as it stands
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from onnxopt.graph.edit import label
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics.saturation import Layout
from onnxopt.quantization.layers import layout_of
from onnxopt.quantization.storage import MOVERS, between_codes, from_codes

# Operators with the work of a layer on floats: the positions of their activation and of their weights.
FLOAT_LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm"), (0, (1,))),
    **dict.fromkeys(("MatMul", "FusedMatMul", "TransposeMatMul"), (0, (1,))),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (0, (1, 2))),
}
# Operators with the work of a layer on codes: the positions of the activation's codes, of their zero-point and of the
# weight's codes, None where the codes are not to be seen or lie in another form.
INTEGER_LAYERS: dict[str, tuple[int, int, int] | None] = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (0, 2, 3)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), (0, 2, 1)),
    "MatMulIntegerToFloat": (0, 4, 1),
    **dict.fromkeys(("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits", "GatherBlockQuantized")),
    **dict.fromkeys(("QAttention", "QEmbedLayerNormalization", "QLinearConvTranspose")),
}
# Operators that make or read codes without the work of a layer, beside all QLinear ones.
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_TABLES = ("Gather",)
# Operators that hand on values as they are, and those that unpack stored codes.
_UNPACKERS = MOVERS | {"Cast", "Gather", "Slice"}


class Form(Enum):
    """How a layer is quantized: see the module."""

    STATIC = "static"
    WEIGHTS = "weights"
    KERNEL = "kernel"


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes that a float tensor is computed from. tensor, zero_point: what its DequantizeLinear reads.

    constant: whether they are stored. names: of all tensors on the way from where they are stored.
    """

    tensor: Variable | Constant
    zero_point: Variable | Constant | None
    constant: bool
    names: frozenset[str]

    @property
    def dtype(self) -> str:
        """Name of the type of the codes; without a zero-point that tells it, computed ones are uint8."""
        told = self.tensor if isinstance(self.tensor, Constant) else self.zero_point
        told = self.tensor if told is None or told.dtype is None else told
        return "uint8" if told.dtype is None else str(np.dtype(told.dtype))


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """A quantized layer. activation: the codes it reads, None where it reads floats. weight: those of its first weight.

    A weight that is computed, as where both operands of a MatMul are activations, is None.
    """

    node: Node
    body: Graph
    form: Form
    activation: Codes | None
    weight: Codes | None

    @property
    def name(self) -> str:
        """How reports name the layer."""
        return label(self.node)

    @property
    def layout(self) -> Layout:
        """How it keeps its weight."""
        return Layout.CONV if "Conv" in self.node.op else layout_of(self.node)

    def weight_codes(self) -> npt.NDArray[np.generic] | None:
        """The integer codes of a constant weight as the kernel gets them; None where they are packed or computed."""
        if self.weight is None:
            return None
        tensor, dtype = self.weight.tensor, None
        while not isinstance(tensor, Constant):
            producer = tensor.inputs[0] if tensor.inputs else None
            if producer is None or producer.op not in ("Cast", "Identity"):
                return None
            dtype = dtype or (producer.attrs.get("to") if producer.op == "Cast" else None)
            tensor = producer.inputs[0]
        values = tensor.values
        return values if dtype is None else values.astype(_CAST.get(int(dtype), np.int32))


_CAST: dict[int, type[np.generic]] = {2: np.uint8, 3: np.int8}


def is_quantized(node: Node) -> bool:
    """Whether a node computes on codes in place of floats, or converts between the two."""
    return node.op in _CONVERSIONS or node.op in INTEGER_LAYERS or node.op.startswith("QLinear")


def coded_layers(model: Model) -> Iterator[CodedLayer]:
    """Every quantized layer of every body outside of local functions, in order."""
    for body in model.bodies():
        if body.function is None:
            yield from (layer for node in body.nodes if (layer := _layer(node, body)) is not None)


def left_as_quantized(model: Model) -> list[str]:
    """What a pass says of the layers that were quantized before it, which it leaves as they are: a note, or none."""
    layers = {layer.node for layer in coded_layers(model)}
    for body in model.bodies():
        for node in body.nodes:
            _, weights = FLOAT_LAYERS.get(node.op, (0, (0,) if node.op in _TABLES else ()))
            if any(at < len(node.inputs) and from_codes(node.inputs[at]) for at in weights):
                layers.add(node)
    return [f"already quantized: {len(layers)} nodes left as they are"] if layers else []


def _layer(node: Node, body: Graph) -> CodedLayer | None:
    if node.op in INTEGER_LAYERS:
        return CodedLayer(node, body, Form.KERNEL, *_read_codes(node))
    activation, weights = decoded_inputs(node)
    stored = next((codes for codes in weights if codes.constant), None)
    if activation is not None and (weights or between_codes(node)):
        return CodedLayer(node, body, Form.STATIC, activation, stored)
    return CodedLayer(node, body, Form.WEIGHTS, None, stored) if stored is not None else None


def decoded_inputs(node: Node) -> tuple[Codes | None, list[Codes]]:
    """(codes of the activation, codes of the weights) of a float operator that reads the output of DequantizeLinear.

    A Gather has its table as weight. Constants that are multiplied from the left count as weights as well.
    """
    if node.op in _TABLES:
        table = decoded(node.inputs[0])
        return None, [table] if table is not None and table.constant else []
    if node.op not in FLOAT_LAYERS:
        return None, []
    at, others = FLOAT_LAYERS[node.op]
    activation = decoded(node.inputs[at])
    weights = [codes for at in others if at < len(node.inputs) and (codes := decoded(node.inputs[at])) is not None]
    if activation is not None and activation.constant:
        moving = next((codes for codes in weights if not codes.constant), None)
        return moving, [activation]
    return activation, weights


def decoded(tensor: Variable | Constant) -> Codes | None:
    """The codes behind a tensor that a DequantizeLinear made, also where nodes that only move values stand between."""
    names: set[str] = set()
    producer = _producer(tensor)
    while producer is not None and producer.op in MOVERS:
        tensor = producer.inputs[0]
        producer = _producer(tensor)
    if producer is None or producer.op != "DequantizeLinear":
        return None
    codes = tensor = producer.inputs[0]
    zero = producer.inputs[2] if len(producer.inputs) > 2 and not producer.inputs[2].is_empty() else None
    names.add(tensor.name)
    while not isinstance(tensor, Constant):
        above = _producer(tensor)
        if above is None or above.op not in _UNPACKERS:
            return Codes(codes, zero, False, frozenset(names))
        tensor = above.inputs[0]
        names.add(tensor.name)
    return Codes(codes, zero, True, frozenset(names))


def _producer(tensor: Variable | Constant) -> Node | None:
    if isinstance(tensor, Constant) or not tensor.inputs:
        return None
    node: Node = tensor.inputs[0]
    return node


def _read_codes(node: Node) -> tuple[Codes | None, Codes | None]:
    places = INTEGER_LAYERS[node.op]
    if places is None:
        return None, None
    read, zero, weight = ((node.inputs[at] if at < len(node.inputs) else None) for at in places)
    zero_point = zero if zero is not None and not zero.is_empty() else None
    assert read is not None
    assert weight is not None
    activation = None if isinstance(read, Constant) else Codes(read, zero_point, False, frozenset({read.name}))
    stored = Codes(weight, None, True, frozenset({weight.name})) if isinstance(weight, Constant) else None
    return activation, stored
