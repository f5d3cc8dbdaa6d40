"""Where a constant for each output channel can be added to what a layer computes, without a new node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.model import Constant, Node


@dataclass(frozen=True, eq=False)
class BiasSlot:
    """An input that holds a bias, or has a place for one.

    node, at: the input: of the layer itself, or of the Add behind it. given: what stands there, None for nothing.
    factor: how much of it one unit of W x is worth, where the layer scales one of them (Gemm).
    """

    node: Node
    at: int
    given: Constant | None
    factor: float = 1.0

    def plus(self, amounts: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The bias with `amounts` [N], in units of W x, added; of its own type, or of `dtype` where there is none."""
        added = amounts * self.factor
        if self.given is None:
            return added.astype(dtype)
        return np.asarray(self.given.values.astype(np.float64) + added).astype(self.given.dtype)


def bias_slot(layer: Node, shared: set[int]) -> BiasSlot | None:
    """The slot of a Conv, Gemm or MatMul(x, W) with a W of two axes; None where there is none.

    A bias that is computed is no slot. shared: ids of tensors that more than nodes of their own body read.
    """
    if layer.kind in (("", "Conv"), ("", "Gemm")):
        alpha, beta = (float(layer.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
        if len(layer.inputs) <= 2 or layer.inputs[2].is_empty():
            return BiasSlot(layer, 2, None, alpha / beta) if beta else None
        given = layer.inputs[2]
        return BiasSlot(layer, 2, given, alpha / beta) if isinstance(given, Constant) and beta else None
    if layer.kind != ("", "MatMul") or len(layer.inputs[1].shape or ()) != 2:
        return None
    output = layer.outputs[0]
    if id(output) in shared or len(output.outputs) != 1 or output.outputs[0].kind != ("", "Add"):
        return None
    add: Node = output.outputs[0]
    at = 1 if add.inputs[0] is output else 0
    given = add.inputs[at]
    return BiasSlot(add, at, given) if isinstance(given, Constant) else None
