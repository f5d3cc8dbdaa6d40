"""Scale and zero-point of every tensor that carries codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxopt.model import Constant, Node, Variable
from onnxopt.numerics.affine import QParams, activation_qparams
from onnxopt.quantization import qdq
from onnxopt.quantization.islands import Islands

Bounds = Callable[[Variable], tuple[float, float]]


def shared_params(
    island: Islands, bounds: Bounds, dtype: np.dtype[np.generic], symmetric: bool = False
) -> dict[Variable, QParams]:
    """Format of each tensor of an island, from its (minimum, maximum).

    Tensors between which codes are moved as they are (role PASS) get one format, that of their joint range: the runtime
    asks for bit-equal scale and zero-point. Pointers to leaders are halved on the way (Tarjan and van Leeuwen 1984).
    """
    leader = {tensor: tensor for tensor in island.codes}

    def find(tensor: Variable) -> Variable:
        while leader[tensor] is not tensor:
            leader[tensor] = leader[leader[tensor]]
            tensor = leader[tensor]
        return tensor

    for node, leaving in island.nodes.items():
        row = qdq.island_row(node)
        if row is not None and row.role is qdq.Role.PASS:
            for output in leaving:
                leader[find(output)] = find(node.inputs[0])
    joint: dict[Variable, tuple[float, float]] = {}
    for tensor in island.codes:
        low, high = bounds(tensor)
        before = joint.get(find(tensor), (low, high))
        joint[find(tensor)] = (min(low, before[0]), max(high, before[1]))
    formats = {head: activation_qparams(low, high, dtype, symmetric) for head, (low, high) in joint.items()}
    return {tensor: formats[find(tensor)] for tensor in island.codes}


def within(params: QParams, clip: Node) -> bool:
    """Whether every code stands for a value inside the bounds of a Clip, so that the Clip is implied."""
    low, high = (params.value(code) for code in params.codes)
    minimum, maximum = (_bound(clip, at) for at in (1, 2))
    return (minimum is None or low >= minimum) and (maximum is None or high <= maximum)


def implied(activation: Node | None) -> bool:
    """Whether codes of the activation's output imply it whatever its range: it bounds by zero on one side."""
    if activation is None or activation.op == "Relu":
        return True
    return 0.0 in (_bound(activation, 1), _bound(activation, 2))


def _bound(clip: Node, at: int) -> float | None:
    tensor = clip.inputs[at] if at < len(clip.inputs) else None
    return float(tensor.values.item()) if isinstance(tensor, Constant) else None
