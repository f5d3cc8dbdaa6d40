"""The layers that may be split, each as a matrix of outputs and inputs, and why others may not."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.channels import Source
from onnxopt.graph import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.numerics.lowrank import Wide
from onnxopt.passbase import Skip
from onnxopt.quantization.storage import (
    IN_FUNCTION,
    Stored,
    find_weights,
    from_codes,
    in_functions,
    places,
)

# the shorter side beyond which a weight is not taken apart: minutes and gigabytes
WIDEST = 5120
# a weight below this many elements is not worth a node
SMALLEST = 1024
_RECURRENT = ("LSTM", "GRU", "RNN")


@enum.unique
class Kind(enum.Enum):
    """How a weight meets what it multiplies."""

    ROWS = "rows"  # x W of MatMul, Gemm
    COLUMNS = "columns"  # W x of MatMul
    CONV = "convolution"
    GATES = "gates"  # the input weights of LSTM, GRU, RNN
    TABLE = "table"  # rows looked up by Gather


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and all nodes that read it, in the same way."""

    weight: Constant
    readers: tuple[Stored, ...]
    kind: Kind

    @property
    def node(self) -> Node:
        """The first reader."""
        return self.readers[0].node

    @property
    def name(self) -> str:
        """How reports name it."""
        return label(self.node)

    @property
    def groups(self) -> int:
        """Parts of a convolution that share no inputs."""
        return int(self.node.attrs.get("group", 1)) if self.kind is Kind.CONV else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution."""
        return tuple(self.weight.shape[2:]) if self.kind is Kind.CONV else ()

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return int(np.prod(self.kernel, dtype=np.int64))

    @property
    def outputs(self) -> int:
        """N, over all groups."""
        return self._sides[0]

    @property
    def inputs(self) -> int:
        """K: how many inputs an output adds up."""
        return self._sides[1]

    @property
    def _sides(self) -> tuple[int, int]:
        shape = self.weight.shape
        if self.kind is Kind.TABLE:
            return int(shape[1]), int(shape[0])
        inputs = self.readers[0].view.inputs
        return int(np.prod(shape)) // inputs, inputs

    def matrices(self) -> Wide:
        """[groups, N / groups, K] float64."""
        values = np.asarray(self.weight.values, np.float64)
        if self.kind is Kind.TABLE:
            return np.ascontiguousarray(values.T)[None]
        matrix = self.readers[0].view.matrix(values)
        return np.asarray(matrix, np.float64).reshape(self.groups, -1, self.inputs)

    def stored(self, matrices: Wide) -> npt.NDArray[Any]:
        """The weight's values from its matrices."""
        if self.kind is Kind.TABLE:
            return np.ascontiguousarray(matrices[0].T).astype(self.weight.dtype)
        return self.readers[0].view.back(matrices.reshape(-1, self.inputs)).astype(self.weight.dtype)

    def source(self, reader: Stored) -> Source | None:
        """Where the channels that the weight multiplies can be seen; of a table, its rows as they are looked up."""
        tensor, axis = reader.node.inputs[0], -1
        if self.kind is Kind.CONV:
            axis = -1 - len(self.kernel)
        elif self.kind is Kind.COLUMNS:
            tensor, axis = reader.node.inputs[1], -2
        elif self.kind is Kind.TABLE:
            tensor = reader.node.outputs[0]
        elif reader.node.op == "Gemm" and reader.node.attrs.get("transA", 0):
            axis = -2
        return Source(tensor, axis) if isinstance(tensor, Variable) else None


def find_layers(model: Model, selection: Selection, tables: bool) -> tuple[list[Layer], list[Skip]]:
    """The layers that may be split, and why others stay whole. tables: whether those of Gather count."""
    readers: dict[Constant, list[tuple[Stored, Kind]]] = {}
    skipped: list[Skip] = []
    for found in find_weights(model):
        kind = _kind(found)
        if found.weight.data.size < SMALLEST or (kind is Kind.TABLE and not tables):
            continue
        reason = selection.refuses(found.node) or (_unfit(found) if kind is not None else _no_form(found))
        if reason is not None or kind is None:
            skipped.append(Skip(_place(found), reason or ""))
        else:
            readers.setdefault(found.weight, []).append((found, kind))
    given_out = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    layers = []
    for weight, mine in readers.items():
        layer = Layer(weight, tuple(found for found, _ in mine), mine[0][1])
        reason = "its weight is an output too" if id(weight) in given_out else _refusal(layer, mine)
        if reason is None:
            layers.append(layer)
        else:
            skipped.append(Skip(layer.name, reason))
    return layers, [*skipped, *(Skip(label(node), IN_FUNCTION) for node in in_functions(model, SMALLEST))]


def _kind(found: Stored) -> Kind | None:
    node, rank = found.node, len(found.weight.shape)
    if node.op == "Conv":
        return Kind.CONV
    if node.op == "Gather":
        return Kind.TABLE if rank == 2 else None
    if node.op in _RECURRENT:
        return Kind.GATES if found.at == 1 else None
    if node.op in ("MatMul", "Gemm") and rank == 2:
        return Kind.ROWS if found.at == 1 else Kind.COLUMNS
    return None


def _no_form(found: Stored) -> str:
    node = found.node
    if node.op in _RECURRENT:
        return "recurrent weights stay whole: the cell multiplies its state by them at every step"
    if node.op == "MatMul":
        return "its weight has more than two axes, each matrix of its own"
    return f"a {node.op} has no form of two factors here"


def _unfit(found: Stored) -> str | None:
    """Why a node's weight stays, whatever its values are."""
    node, shape = found.node, found.weight.shape
    if str(found.weight.dtype) not in ("float32", "float16", "float64"):
        return f"its weight is {found.weight.dtype}, which factors would not be precise enough in"
    if node.op in ("MatMul", "Gemm") and isinstance(node.inputs[1 - found.at], Constant):
        return "its input is a constant"
    if any(from_codes(tensor) for tensor in node.inputs):
        return "it is quantized already"
    groups = int(node.attrs.get("group", 1))
    if node.op == "Conv" and groups > 1 and min(shape[0] // groups, shape[1]) == 1:
        return "it is depthwise: a channel a group leaves nothing between two factors"
    if isinstance(node.inputs[0], Constant) and node.op in ("Conv", *_RECURRENT):
        return "its input is a constant"
    return None


def _refusal(layer: Layer, readers: Sequence[tuple[Stored, Kind]]) -> str | None:
    """Why a weight stays that all its readers share."""
    others = places(layer.weight) - {found.place for found in layer.readers}
    if others:
        return f"its weight is read by {min(label(node) for node, _ in others)} too, which stays whole"
    forms = {(kind, found.view, int(found.node.attrs.get("group", 1)), found.node.op) for found, kind in readers}
    if len(forms) > 1:
        return "its weight is read in different ways"
    values = layer.weight.values.astype(np.float64)
    if not np.isfinite(values).all():
        return "its weight holds NaN or infinity"
    if min(layer.outputs // layer.groups, layer.inputs) > WIDEST:
        return f"its weight is {layer.outputs} x {layer.inputs}, too wide to be taken apart"
    return None if values.any() else "its weight is zero"


def _place(found: Stored) -> str:
    return f"{label(found.node)}, weight {found.weight.name}" if found.node.op in _RECURRENT else label(found.node)
