"""Float weights that may be stored as int8: which inputs of which operators, and along which axes scales run.

For weights that no integer kernel serves. `Cast -> Mul(scale)` of int8 codes is folded by the runtime when it loads the
model: float speed, a quarter of the file. A table behind Gather is never folded but gathered as codes and scaled after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.graph.edit import label
from onnxopt.model import Constant, Graph, Model, Node, Variable

# Why weights of local functions stay.
IN_FUNCTION = "it is in a local function, which several callers share"

# One input of one node, by its position.
Place = tuple[Node, int]

# Bytes that two nodes, a scale tensor's header and their names take in the file, as measured on saved models.
NODE_BYTES = 220

# Operators that hand on values as they are, also where the runtime puts them.
MOVERS = frozenset(
    {"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "ReorderInput", "ReorderOutput"}
)
# nodes that may stand between codes and the weight that they stand for; the passes here write 14 at most
_LONGEST_UNPACKING = 32

# Bytes that a layer's int8 weight may take beside float values that stay for another reader: its Q and DQ take as much.
SMALL_COPY = 1024


@dataclass(frozen=True)
class View:
    """A weight of `shape` seen as a matrix [R, K]: its elements in `grid`, whose `axis` holds the K inputs.

    A Conv's weight [N, C, 3, 3] has the grid [N, 9 C] and axis 1; others keep their shape.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    axis: int

    @property
    def inputs(self) -> int:
        """K."""
        return self.grid[self.axis]

    def matrix(self, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[R, K] of a weight of `shape`."""
        return np.moveaxis(weight.reshape(self.grid), self.axis, -1).reshape(-1, self.inputs)

    def back(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A weight of `shape` from its matrix [R, K]."""
        outer = (*self.grid[: self.axis], *self.grid[self.axis + 1 :])
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(*outer, -1), -1, self.axis)).reshape(self.shape)

    def cut_shape(self, size: int) -> tuple[int, ...]:
        """The grid with its axis cut in blocks of `size`, the last one filled up: [..., n, size, ...]."""
        return (*self.grid[: self.axis], -(-self.inputs // size), size, *self.grid[self.axis + 1 :])

    def cut(self, rows: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
        """[R, n * size] as the grid with its axis cut in two, [..., n, size, ...]."""
        outer = (*self.grid[: self.axis], *self.grid[self.axis + 1 :])
        blocks = rows.reshape(*outer, -1, size)
        return np.ascontiguousarray(np.moveaxis(blocks, (-2, -1), (self.axis, self.axis + 1)))


@dataclass(frozen=True, eq=False)
class Stored:
    """One input of one node that is a constant weight. kept: axes along which scales run."""

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
    def view(self) -> View:
        """The weight as a matrix of outputs and the inputs that each adds up, for scales in blocks of inputs."""
        return _view(self.node, self.at, tuple(self.weight.shape))

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


def saved_bytes(readers: Sequence[Stored], size_of: Callable[[Stored], int] | None = None) -> int:
    """What codes save in the file, less scales and nodes, when `readers` are all that read one weight.

    size_of: bytes of codes and scales, by default of int8 with a scale for each index of the kept axes.
    """
    size_of = size_of or eight_bit_bytes
    codes = {found.kept: size_of(found) for found in readers}
    # rows are scaled behind each Gather, other weights once a body
    scaled = {(found.kept, id(found.node if found.node.op == "Gather" else found.body)) for found in readers}
    return 4 * int(readers[0].weight.data.size) - sum(codes.values()) - NODE_BYTES * len(scaled)


def eight_bit_bytes(found: Stored) -> int:
    """Bytes of int8 codes and float32 scales."""
    return int(found.weight.data.size) + 4 * int(np.prod(found.scale_shape))


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


def from_codes(tensor: object) -> bool:
    """Whether a tensor holds what codes stand for.

    A DequantizeLinear makes it, with only nodes that move values behind, or it is computed from constants alone and
    there are codes among them.
    """
    producer = _producer(tensor)
    while producer is not None and producer.op in MOVERS:
        producer = _producer(producer.inputs[0])
    if producer is None:
        return False
    return producer.op == "DequantizeLinear" or _unpacked(producer)


def _unpacked(node: Node) -> bool:
    """Whether `node` computes from constants alone, among them codes: Cast and Mul, or what unpacks 4 bits."""
    pending, codes = [node], False
    for _ in range(_LONGEST_UNPACKING):
        if not pending:
            return codes
        for tensor in pending.pop().inputs:
            if isinstance(tensor, Constant):
                codes |= np.dtype(tensor.dtype).itemsize == 1 and tensor.dtype != np.bool_
            elif not tensor.is_empty():
                producer = _producer(tensor)
                if producer is None:
                    return False
                pending.append(producer)
    return False


def _producer(tensor: object) -> Node | None:
    if not isinstance(tensor, Variable) or not tensor.inputs:
        return None
    node: Node = tensor.inputs[0]
    return node


def find_stored(model: Model) -> Iterator[Stored]:
    """Every float32 weight of a listed operator, outside of local functions."""
    return (found for found in find_weights(model) if found.weight.dtype == np.float32)


def find_other_floats(model: Model) -> Iterator[Stored]:
    """The weights that would be among those of `find_stored` if they were not of another floating type."""
    floats = ("float16", "bfloat16", "float64")
    return (found for found in find_weights(model) if str(found.weight.dtype) in floats)


def find_weights(model: Model) -> Iterator[Stored]:
    """Every constant weight of a listed operator, of any type, outside of local functions."""
    for body in model.bodies():
        if body.function is not None:
            continue
        for node in body.nodes:
            for at in weight_inputs(node):
                weight = node.inputs[at] if at < len(node.inputs) else None
                if not isinstance(weight, Constant):
                    continue
                kept = _kept(node, at, len(weight.shape))
                if kept is not None:
                    yield Stored(node, at, body, weight, kept)


def in_functions(model: Model, smallest: int) -> Iterator[Node]:
    """Nodes of local functions that read a constant weight of at least `smallest` elements: these are left alone."""
    for body in model.bodies():
        for node in body.nodes if body.function is not None else ():
            held = [node.inputs[at] for at in weight_inputs(node) if at < len(node.inputs)]
            if any(isinstance(each, Constant) and each.data.size >= smallest for each in held):
                yield node


def weight_inputs(node: Node) -> tuple[int, ...]:
    """Positions of the inputs that may be a weight, of the listed operators; none of others."""
    table = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1), "Gather": (0,)}
    table |= dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2))
    return table.get(node.op, ()) if node.kind[0] == "" else ()


def _view(node: Node, at: int, shape: tuple[int, ...]) -> View:
    if node.op == "Conv":
        return View(shape, (shape[0], int(np.prod(shape[1:]))), 1)
    if node.op == "Gather":
        return View(shape, (shape[0], int(np.prod(shape[1:]))), 1)
    if node.op in ("LSTM", "GRU", "RNN"):
        return View(shape, shape, 2)
    if node.op == "MatMul":
        return View(shape, shape, len(shape) - 2 if at == 1 else len(shape) - 1)
    if node.op == "Gemm":
        return View(shape, shape, 1 if node.attrs.get("transB", 0) else 0)
    return View(shape, shape, 0)


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
