"""The constants whose weights may be zeroed one by one, as matrices of outputs and inputs, and why others may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.gram import patches_of
from onnxopt.calibration.requests import Channels
from onnxopt.graph import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.numerics.blocks import Wide
from onnxopt.numerics.saturation import Layout, gram_order
from onnxopt.passbase import Skip
from onnxopt.quantization.storage import Stored, find_weights, places, weight_inputs

# Elements below which a weight stays: zeros there save nothing, and small weights are those that hurt.
SMALLEST = 256
RECURRENT = ("LSTM", "GRU", "RNN")
_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, eq=False)
class Prunable:
    """A constant whose weights may go, and all that read it, in the same way.

    Seen as a matrix [R, K]: R outputs, each a sum over K inputs, in the order in which N:M groups follow each other.
    """

    constant: Constant
    readers: list[Stored]

    @property
    def node(self) -> Node:
        """The first reader."""
        return self.readers[0].node

    @property
    def place(self) -> str:
        """How reports name it."""
        return place(self.readers[0])

    @property
    def parts(self) -> int:
        """Groups of a Conv, whose rows have second moments of their own."""
        return int(self.node.attrs.get("group", 1)) if self.node.op == "Conv" else 1

    @property
    def stretch(self) -> int:
        """Inputs behind which N:M groups begin anew."""
        if self.node.op == "Conv":
            return int(self.constant.shape[1])
        groups = int(self.node.attrs.get("group", 1)) if self.node.op == "ConvTranspose" else 1
        return self.readers[0].view.inputs // groups

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """Where each input stands in the weight: of a Conv, all channels of a position follow each other."""
        if self.node.op == "Conv":
            return gram_order(self.constant.values, Layout.CONV)
        return np.arange(self.readers[0].view.inputs)

    def matrix(self) -> Wide:
        """[R, K] float64, rows of one group after those of another."""
        return np.asarray(self.readers[0].view.matrix(self.constant.values).astype(np.float64)[:, self.order])

    def stored(self, matrix: Wide) -> npt.NDArray[Any]:
        """The constant's values from a matrix [R, K]."""
        back = np.empty_like(matrix)
        back[:, self.order] = matrix
        return self.readers[0].view.back(back).astype(self.constant.dtype)

    def empty_channels(self, matrix: Wide) -> tuple[int, int]:
        """(output, input) channels without any weight."""
        outputs = int((~matrix.any(axis=1)).sum())
        channels = matrix.reshape(len(matrix), -1, self.stretch).any(axis=(0, 1))
        return outputs, int((~channels).sum())


def find_prunable(model: Model, selection: Selection, depthwise: bool) -> tuple[list[Prunable], list[Skip]]:
    """The constants whose weights may go, and why others stay. depthwise: whether depthwise convolutions count."""
    readers: dict[Constant, list[Stored]] = {}
    skipped: list[Skip] = []
    for found in find_weights(model):
        if str(found.weight.dtype) not in _FLOATS:
            continue
        reason = selection.refuses(found.node) or _unfit(found, depthwise)
        if reason is None:
            readers.setdefault(found.weight, []).append(found)
        else:
            skipped.append(Skip(place(found), reason))
    given_out = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    weights = []
    for constant, mine in readers.items():
        weight = Prunable(constant, mine)
        reason = "it is an output too" if id(constant) in given_out else _refusal(weight)
        if reason is None:
            weights.append(weight)
        else:
            skipped.append(Skip(weight.place, reason))
    return weights, [*skipped, *_in_functions(model)]


def _unfit(found: Stored, depthwise: bool) -> str | None:
    """Why a node's weight stays, whatever its values are."""
    node, shape = found.node, found.weight.shape
    if node.op == "Gather":
        return "its rows are looked up, not multiplied: a zero changes what a row is for all that read it"
    if found.weight.data.size < SMALLEST:
        return f"its weight has {found.weight.data.size} elements, fewer than {SMALLEST}"
    single = node.op in ("Conv", "ConvTranspose") and int(node.attrs.get("group", 1)) == shape[0] > 1 == shape[1]
    if single and not depthwise:
        return "it is depthwise; depthwise=true zeroes those too"
    return None


def _refusal(weight: Prunable) -> str | None:
    """Why the weights of a constant stay, which all its readers share."""
    others = places(weight.constant) - {found.place for found in weight.readers}
    if others:
        return f"its weight is read by {min(label(node) for node, _ in others)} too, which is to stay as it is"
    forms = {(found.view, Prunable(weight.constant, [found]).parts) for found in weight.readers}
    if len(forms) > 1:
        return "its weight is read in different ways"
    values = weight.constant.values.astype(np.float64)
    if not np.isfinite(values).all():
        return "its weight holds NaN or infinity"
    return None if values.any() else "its weight is zero already"


def _in_functions(model: Model) -> Iterator[Skip]:
    for body in model.bodies():
        if body.function is None:
            continue
        for node in body.nodes:
            held = [node.inputs[at] for at in weight_inputs(node) if at < len(node.inputs)]
            if any(isinstance(each, Constant) and each.data.size >= SMALLEST for each in held):
                yield Skip(label(node), "it is in a local function, which several callers share")


def has_gram(found: Stored) -> bool:
    """Whether rows of the input times the weight are what the layer computes (`onnxopt.calibration.gram`)."""
    is_layer = found.node.op in ("Conv", "Gemm") or (found.node.op == "MatMul" and found.at == 1)
    return is_layer and len(found.view.grid) == 2 and not isinstance(patches_of(found.node), str)


def fed(found: Stored) -> Channels | None:
    """The tensor of the main graph whose channels a weight multiplies, and their axis."""
    node, source, axis = found.node, found.node.inputs[0], -1
    if node.op in ("Conv", "ConvTranspose"):
        axis = 1
    elif node.op == "MatMul" and found.at == 0:
        source, axis = node.inputs[1], -2
    elif node.op == "Gemm" and node.attrs.get("transA", 0):
        axis = 0
    if not isinstance(source, Variable) or (node.op in RECURRENT and found.at != 1):
        return None
    return source, axis


def place(found: Stored) -> str:
    """How reports name one input of one node."""
    return f"{label(found.node)}, weight {found.weight.name}"
