"""The constants whose weights may be zeroed one by one, as matrices of outputs and inputs, and why others may not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxopt.graph import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model
from onnxopt.numerics.blocks import Wide
from onnxopt.numerics.saturation import Layout, gram_order
from onnxopt.passbase import Skip
from onnxopt.quantization.layer_weights import FLOATS, LayerWeight, place
from onnxopt.quantization.storage import IN_FUNCTION, Stored, find_weights, in_functions, places

# Elements below which a weight stays: zeros there save nothing, and small weights are those that hurt.
SMALLEST = 256


@dataclass(frozen=True, eq=False)
class Prunable(LayerWeight):
    """A constant whose weights may go, with its K inputs in the order in which N:M groups follow each other."""

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
        if str(found.weight.dtype) not in FLOATS:
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
    return weights, [*skipped, *(Skip(label(node), IN_FUNCTION) for node in in_functions(model, SMALLEST))]


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
    if not weight.has_one_form():
        return "its weight is read in different ways"
    values = weight.constant.values.astype(np.float64)
    if not np.isfinite(values).all():
        return "its weight holds NaN or infinity"
    return None if values.any() else "its weight is zero already"
