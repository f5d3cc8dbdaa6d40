"""The layers of a body that have an integer kernel: node, weight, bias, and what follows them that they can take in.

Pad(zeros) -> Conv -> Mul(2) -> Add(1) -> Relu
    one layer: pads of the Conv, weight * 2, bias * 2 + 1, and codes that start at zero
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxopt.graph.edit import label
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics.saturation import Layout
from onnxopt.numerics.weights import trouble
from onnxopt.quantization import qdq
from onnxopt.quantization.storage import IN_FUNCTION, from_codes

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """A Conv, Gemm or MatMul with a constant float32 weight, in the body that holds it.

    activation: the tensor it reads, in front of `pad`: a Pad with zeros that goes into the Conv's pads, or None. chain:
    the nodes right behind it that scale or shift by constants, in order; they go into weight and bias. raw: the tensor
    behind the chain. absorbed: the Relu or Clip behind that, if any. rank: axes of `activation`, None when not certain.
    writes_float: the target has an integer kernel for it that writes float, though onnxruntime has none.
    """

    node: Node
    body: Graph
    row: qdq.Row
    layout: Layout
    activation: Variable
    pad: Node | None
    weight: Constant
    chain: tuple[Node, ...]
    raw: Variable
    absorbed: Node | None
    rank: int | None
    writes_float: bool = False

    @property
    def name(self) -> str:
        """How reports name the layer."""
        return label(self.node)

    @property
    def output(self) -> Variable:
        """The tensor whose values leave the layer, the activation it absorbs included."""
        return self.raw if self.absorbed is None else self.absorbed.outputs[0]

    @property
    def needs_codes(self) -> bool:
        """Whether its output must be codes for it to have an integer kernel at all."""
        return self.row.float_kernel is None and not self.writes_float

    @property
    def channels(self) -> int:
        """Output channels."""
        return int(self.weight.shape[self.layout.axis])

    @property
    def depthwise(self) -> bool:
        """One input and one output channel a group: the kernel that never saturates."""
        group = int(self.node.attrs.get("group", 1))
        return self.layout is Layout.CONV and group > 1 and self.channels == group and self.weight.shape[1] == 1

    @property
    def macs_per_output(self) -> int:
        """Multiply-adds behind one element of the output."""
        return int(self.weight.data.size) // max(1, self.channels)

    def follower(self, outputs: set[int]) -> Node | None:
        """The only node that reads `raw`; None when several do or it is in `outputs` (`shared_tensors`)."""
        return only_consumer(self.raw, outputs)

    def would_become_gemm(self, outputs: set[int]) -> bool:
        """Whether the runtime may join this MatMul with an Add behind it to a Gemm of float bias, which stays float.

        (`matmul_add_fusion.cc`.) A MatMul with a bias of its own, be it zero, does not join.
        """
        follower = self.follower(outputs)
        return self.node.op == "MatMul" and self.rank in (2, None) and follower is not None and follower.op == "Add"

    def taken_in(self) -> list[Node]:
        """The nodes that go into the layer: its Pad, when nothing else reads it, and its chain."""
        pads = [self.pad] if self.pad is not None and len(self.pad.outputs[0].outputs) == 1 else []
        return [*pads, *self.chain]

    def padding(self) -> list[int]:
        """The Conv's pads with those of `pad` worked in: [begin of each spatial axis, end of each]."""
        assert self.pad is not None
        added = self.pad.inputs[1].values.reshape(2, -1)[:, 2:]
        own = np.array(self.node.attrs.get("pads", [0] * added.size)).reshape(2, -1)
        return [int(amount) for amount in (own + added).reshape(-1)]

    def parameters(self) -> tuple[FloatArray, FloatArray | None]:
        """Weight (its own shape) and bias [channels] or None, with the chain worked in."""
        weight = self.weight.values.astype(np.float64)
        given = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        bias = given.values.astype(np.float64).reshape(-1) if isinstance(given, Constant) else None
        for node in self.chain:
            factor, shift = _affine(node)
            shape = [1] * weight.ndim
            shape[self.layout.axis] = -1
            weight = weight * np.broadcast_to(factor, self.channels).reshape(shape)
            if bias is not None or shift.any():
                bias = (np.zeros(self.channels) if bias is None else bias) * factor + shift
        with np.errstate(over="ignore"):  # callers refuse what is not finite
            return weight.astype(np.float32), None if bias is None else bias.astype(np.float32)


def find_layers(model: Model, float_outputs: frozenset[str] = frozenset()) -> Iterator[Layer | tuple[Node, str]]:
    """Every layer of every body, in order; a node that is one in kind but can't be quantized comes with the reason.

    float_outputs: operators for which the target has integer kernels that write float.
    """
    outputs = shared_tensors(model)
    ranks = {key: len(fact.shape) for key, fact in known(model).items() if fact.shape is not None}
    for body in model.bodies():
        for node in body.nodes:
            found = qdq.row(node)
            if found is not None and found.role is qdq.Role.LAYER:
                reason = _refusal(node, body, found)
                if reason is not None:
                    yield node, reason
                    continue
                yield _layer(node, body, found, outputs, ranks, node.op in float_outputs)


def shared_tensors(model: Model) -> set[int]:
    """Ids of the tensors that more than nodes of their own body read: outputs of bodies, and what inner bodies use."""
    found = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    for body in model.bodies():
        own = {id(tensor) for tensor in body.inputs} | {id(t) for node in body.nodes for t in node.outputs}
        found |= {id(t) for node in body.nodes for t in node.inputs if isinstance(t, Variable) and id(t) not in own}
    return found


def unfit_weight(node: Node, body: Graph) -> str | None:
    """Why the weight of a Conv, Gemm or MatMul, in the body that holds it, can't be 8-bit codes; None when it can."""
    if body.function is not None:
        return IN_FUNCTION
    activation, weight = node.inputs[0], node.inputs[1]
    if from_codes(activation) or from_codes(weight):
        return "it is quantized already"
    if not isinstance(weight, Constant):
        return "its weight is not a constant"
    if isinstance(activation, Constant):
        return "its input is a constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}, not float32"
    if weight.data.size == 0:
        return "its weight is empty"
    if node.op != "Conv" and len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} axes; the integer kernel takes 2"
    found = trouble(weight.values)
    return None if found is None else f"its weight {found}"


def _refusal(node: Node, body: Graph, row: qdq.Row) -> str | None:
    weight = node.inputs[1]
    found = unfit_weight(node, body)
    if found is not None:
        return found
    if len(node.inputs) > 2 and not node.inputs[2].is_empty() and not _is_bias(node.inputs[2], weight, node):
        return "its bias is not a constant with one value per output channel"
    if len(node.inputs) > 2 and isinstance(node.inputs[2], Constant) and not np.isfinite(node.inputs[2].values).all():
        return "its bias holds NaN or infinity"
    return row.refuses(node)


def _layer(
    node: Node, body: Graph, row: qdq.Row, outputs: set[int], ranks: dict[int, int], writes_float: bool
) -> Layer | tuple[Node, str]:
    layout = layout_of(node)
    weight = node.inputs[1]
    pad = _zero_pad(node)
    activation = node.inputs[0] if pad is None else pad.inputs[0]
    rank = len(weight.shape) if node.op != "MatMul" else ranks.get(id(activation))
    chain = tuple(_chain(node, weight.shape[layout.axis], rank or 1, outputs))
    raw = chain[-1].outputs[0] if chain else node.outputs[0]
    absorbed = only_consumer(raw, outputs)
    found = qdq.row(absorbed) if absorbed is not None else None
    if (
        absorbed is None
        or found is None
        or found.role is not qdq.Role.FOLDED
        or absorbed.inputs[0] is not raw
        or found.refuses(absorbed) is not None
    ):
        absorbed = None
    layer = Layer(node, body, row, layout, activation, pad, weight, chain, raw, absorbed, rank, writes_float)
    if layer.needs_codes and body.parent is None and any(layer.output is tensor for tensor in body.outputs):
        return node, "its output is an output of the model, which stays float"
    return layer


def layout_of(node: Node) -> Layout:
    """How a Conv, Gemm or MatMul keeps its weight."""
    if node.op == "Conv":
        return Layout.CONV
    return Layout.COLUMNS if node.attrs.get("transB", 0) else Layout.ROWS


def channel_axis(node: Node) -> int:
    """The axis of a Conv's, Gemm's or MatMul's input along which its weight adds up."""
    return 1 if node.op == "Conv" else -1


def _zero_pad(node: Node) -> Node | None:
    """The Pad in front of a Conv that only adds constant amounts of zeros to spatial axes."""
    tensor = node.inputs[0]
    pad = tensor.inputs[0] if tensor.inputs else None
    if node.op != "Conv" or pad is None or pad.kind != ("", "Pad") or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    if (
        pad.attrs.get("mode", "constant") != "constant"
        or len(pad.inputs) < 2
        or not isinstance(pad.inputs[1], Constant)
    ):
        return None
    value = pad.inputs[2] if len(pad.inputs) > 2 and not pad.inputs[2].is_empty() else None
    if value is not None and not (isinstance(value, Constant) and not value.values.any()):
        return None
    if len(pad.inputs) > 3 and not pad.inputs[3].is_empty():
        return None
    amounts = pad.inputs[1].values.reshape(2, -1)
    spatial = amounts.shape[1] == len(node.inputs[1].shape) and not amounts[:, :2].any() and (amounts >= 0).all()
    return pad if spatial and not isinstance(pad.inputs[0], Constant) else None


def _is_bias(tensor: object, weight: Constant, node: Node) -> bool:
    channels = weight.shape[layout_of(node).axis]
    shapes = [(channels,), (1, channels)] if node.op == "Gemm" else [(channels,)]
    return isinstance(tensor, Constant) and tensor.dtype == np.float32 and tensor.shape in shapes


def _chain(node: Node, channels: int, rank: int, outputs: set[int]) -> Iterator[Node]:
    """The Mul, Div, Add and Sub nodes behind `node` whose other operand is one number or one number per channel."""
    spatial = [1] * (rank - 2) if node.op == "Conv" else []
    shapes = [(*[1] * ahead, channels, *spatial) for ahead in range(rank - len(spatial))]
    tensor = node.outputs[0]
    while (follower := only_consumer(tensor, outputs)) is not None:
        if follower.kind[0] != "" or follower.op not in ("Mul", "Div", "Add", "Sub"):
            return
        at = 1 if follower.inputs[0] is tensor else 0
        other = follower.inputs[at]
        if not isinstance(other, Constant) or other.dtype != np.float32 or (at == 0 and follower.op in ("Div", "Sub")):
            return
        single = other.data.size == 1 and len(other.shape) <= rank
        if not (single or other.shape in shapes) or not np.isfinite(other.values).all():
            return
        if follower.op == "Div" and not other.values.all():
            return
        yield follower
        tensor = follower.outputs[0]


def _affine(node: Node) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(factor, shift) of one node of a chain, each [1] or [channels]."""
    constant = next(tensor for tensor in node.inputs if isinstance(tensor, Constant))
    value = constant.values.astype(np.float64).reshape(-1)
    if node.op in ("Add", "Sub"):
        return np.ones(1), value if node.op == "Add" else -value
    return value if node.op == "Mul" else 1.0 / value, np.zeros(1)


def only_consumer(tensor: Variable, outputs: set[int]) -> Node | None:
    """The one node that reads `tensor` once, where nothing else does."""
    if id(tensor) in outputs or len(tensor.outputs) != 1:
        return None
    consumer: Node = tensor.outputs[0]
    return consumer
