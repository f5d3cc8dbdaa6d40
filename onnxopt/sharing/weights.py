"""The constants whose weights may share values, and why others may not."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from onnxopt.encoding import kept_dense
from onnxopt.graph import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model
from onnxopt.passbase import Skip
from onnxopt.quantization.coded import is_quantized
from onnxopt.quantization.layer_weights import FLOATS, LayerWeight, place
from onnxopt.quantization.storage import IN_FUNCTION, Stored, find_weights, in_functions, places

# Elements from which on a constant counts that no layer multiplies by.
SMALLEST = 4096


@dataclass(frozen=True, eq=False)
class Shareable:
    """Constants of one content, and the layers that read them. readers: empty where no layer multiplies by them.

    place: how reports name them.
    """

    constants: list[Constant]
    readers: list[Stored]
    place: str

    @property
    def constant(self) -> Constant:
        """The first of them."""
        return self.constants[0]

    @property
    def weight(self) -> LayerWeight | None:
        """The weight of layers that all see it as the same matrix, or None."""
        weight = LayerWeight(self.constant, self.readers)
        return weight if self.readers and weight.has_one_form() else None

    @property
    def axis(self) -> int:
        """The axis of outputs, along which codebooks may differ."""
        return self.readers[0].kept[-1]


def find_shareable(model: Model, selection: Selection, computed: bool) -> tuple[list[Shareable], list[Skip]]:
    """Float constants that may share values, weights of layers first, and why others may not.

    computed: nodes are to compute their values, which not every reader takes.
    """
    readers: dict[int, list[Stored]] = {}
    reasons: dict[int, str] = {}
    for found in find_weights(model):
        uid = found.weight.data.uid
        readers.setdefault(uid, []).append(found)
        reason = selection.refuses(found.node)
        if reason is not None:
            reasons.setdefault(uid, reason)
    kept, constants = kept_dense(model), _constants(model, readers)
    layers: list[Shareable] = []
    others: list[Shareable] = []
    skipped: list[Skip] = []
    for uid, mine in constants.items():
        layers_of = readers.get(uid, [])
        where = place(layers_of[0]) if layers_of else _place(mine[0])
        each = Shareable(mine, layers_of, where)
        reason = next((kept[id(constant)] for constant in mine if id(constant) in kept), reasons.get(uid))
        reason = reason or _refused(each, selection, computed)
        if reason is not None:
            skipped.append(Skip(each.place, reason))
        else:
            (layers if each.readers else others).append(each)
    return [*layers, *others], [*skipped, *(Skip(label(node), IN_FUNCTION) for node in in_functions(model, SMALLEST))]


def _constants(model: Model, weights: Container[int]) -> dict[int, list[Constant]]:
    """Float constants that nodes outside of local functions read, by their content."""
    found: dict[int, list[Constant]] = {}
    for body in model.bodies():
        if body.function is not None:
            continue
        for constant in body.initializers:
            data = constant.data
            counts = data.uid in weights or data.size >= SMALLEST
            if counts and constant.outputs and str(constant.dtype) in FLOATS:
                found.setdefault(data.uid, []).append(constant)
    return found


def _place(constant: Constant) -> str:
    return f"{min(label(node) for node in constant.outputs)}, constant {constant.name}"


def _refused(found: Shareable, selection: Selection, computed: bool) -> str | None:
    """Why a constant stays for what reads it beside layers."""
    served = {(stored.node, stored.at) for stored in found.readers}
    others = {node for constant in found.constants for node, at in places(constant) if (node, at) not in served}
    for node in sorted(others, key=label):
        reason = selection.refuses(node)
        if reason is not None:
            return f"{label(node)} reads it, which is {reason}"
        if node.kind[0] != "" and computed:
            return f"{node.kind[0]}.{node.op} reads it, whose kernel may need a constant"
        if is_quantized(node):
            return f"{label(node)} reads it, which computes with codes"
    return None


def finite(constant: Constant) -> bool:
    """Whether it holds no NaN or infinity."""
    return bool(np.isfinite(constant.values.astype(np.float64)).all())
