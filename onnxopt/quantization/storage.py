"""Float weights that may be stored as int8: which inputs of which operators, and along which axes scales run.

For weights that no integer kernel serves. `Cast -> Mul(scale)` of int8 codes is folded by the runtime when it loads the
model: float speed, a quarter of the file. A table behind Gather is never folded but gathered as codes and scaled after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.graph.edit import label
from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.numerics.affine import CodeArray, FloatArray
from onnxopt.numerics.weights import quantize_kept, quantize_layer_weight
from onnxopt.quantization.layers import layout_of

# One input of one node, by its position.
Place = tuple[Node, int]

# Bytes that two nodes, a scale tensor's header and their names take in the file, as measured on saved models.
NODE_BYTES = 220

# Bytes that a layer's int8 weight may take beside float values that stay for another reader: its Q and DQ take as much.
SMALL_COPY = 1024


@dataclass(frozen=True, eq=False)
class Stored:
    """One input of one node that is a large float32 constant. kept: axes along which scales run."""

    node: Node
    at: int
    body: Graph
    weight: Constant
    kept: tuple[int, ...]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: the weight's with every axis that is not kept set to 1."""
        return tuple(size if axis in self.kept else 1 for axis, size in enumerate(self.weight.shape))

    @property
    def place(self) -> Place:
        """What is to read the codes."""
        return self.node, self.at


def places(weight: Constant) -> set[Place]:
    """Every (node, input) of any body that reads `weight`."""
    return {(node, at) for node in weight.outputs for at, tensor in enumerate(node.inputs) if tensor is weight}


def stays_float(weight: Constant, served: set[Place], outputs: set[int]) -> str | None:
    """Why the float values of `weight` stay in the file when `served` read its codes; None when they go.

    outputs: the model's `shared_tensors`.
    """
    if id(weight) in outputs:
        return "is an output too, so its float values stay in the file"
    others = places(weight) - served
    if not others:
        return None
    return f"is read in float by {min(label(node) for node, _ in others)} too, so its float values stay in the file"


def doubled(weights: Iterable[Constant], served: set[Place], outputs: set[int]) -> dict[Constant, str]:
    """Those weights whose codes would only come on top of their float values, and why (`stays_float`)."""
    large = {weight for weight in weights if weight.data.size > SMALL_COPY}
    return {weight: reason for weight in large if (reason := stays_float(weight, served, outputs)) is not None}


def saved_bytes(readers: Sequence[Stored]) -> int:
    """What int8 saves in the file, less scales and nodes, when `readers` are all that read one weight."""
    size = readers[0].weight.data.size
    codes = {found.kept: size + 4 * int(np.prod(found.scale_shape)) for found in readers}
    # rows are scaled behind each Gather, other weights once a body
    scaled = {(found.kept, id(found.node if found.node.op == "Gather" else found.body)) for found in readers}
    return 4 * size - sum(codes.values()) - NODE_BYTES * len(scaled)


def between_codes(node: Node) -> bool:
    """Whether the runtime would quantize this float node's weight by itself, with one scale for the whole tensor.

    It does so to a Conv, ConvTranspose or Gemm behind a DequantizeLinear that leads to a QuantizeLinear, with at most
    Relu and Clip between (`weight_bias_quantization.cc`), unless the weight comes from a DequantizeLinear of its own.
    """
    if node.kind[0] != "" or node.op not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    source = node.inputs[0].inputs
    if not source or source[0].op != "DequantizeLinear":
        return False
    tensor = node.outputs[0]
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Relu", "Clip"):
        tensor = tensor.outputs[0].outputs[0]
    return len(tensor.outputs) == 1 and bool(tensor.outputs[0].op == "QuantizeLinear")


def find_stored(model: Model) -> Iterator[Stored]:
    """Every float32 weight of a listed operator, outside of local functions."""
    for body in model.bodies():
        if body.function is not None:
            continue
        for node in body.nodes:
            for at in _inputs(node):
                weight = node.inputs[at] if at < len(node.inputs) else None
                if not isinstance(weight, Constant) or weight.dtype != np.float32:
                    continue
                kept = _kept(node, at, len(weight.shape))
                if kept is not None:
                    yield Stored(node, at, body, weight, kept)


def quantize(found: Stored, bounded: bool) -> tuple[CodeArray, FloatArray]:
    """(int8 codes, scales of `scale_shape`).

    bounded: no pair of codes may saturate, for a Conv or Gemm that the runtime may run on integers after all.
    """
    if bounded and found.node.op in ("Conv", "Gemm"):
        layer = quantize_layer_weight(found.weight.values, layout_of(found.node), bounded=True)
        return layer.codes, layer.scales.reshape(found.scale_shape)
    return quantize_kept(found.weight.values, found.kept)


def _inputs(node: Node) -> tuple[int, ...]:
    table = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1), "Gather": (0,)}
    table |= dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2))
    return table.get(node.op, ()) if node.kind[0] == "" else ()


def _kept(node: Node, at: int, rank: int) -> tuple[int, ...] | None:
    """The axes that keep a scale per index; None when the weight's form is not known."""
    if node.op in ("LSTM", "GRU", "RNN"):
        return (0, 1) if rank == 3 else None  # [directions, gates * hidden, inputs]
    if node.op == "Gather":
        return (0,) if rank >= 2 and node.attrs.get("axis", 0) == 0 and _variable(node.inputs[1]) else None
    if rank < 2:
        return None
    if node.op == "MatMul":
        inner = rank - 2 if at == 1 else rank - 1
        return tuple(axis for axis in range(rank) if axis != inner)
    if node.op == "Gemm":
        return (0,) if node.attrs.get("transB", 0) else (1,)
    return (0,) if node.op == "Conv" else (1,)


def _variable(tensor: object) -> bool:
    return not isinstance(tensor, Constant)
