"""Bounds that an operator puts on its output and reaches exactly: 0 behind a Relu, both ends of a Clip."""

from __future__ import annotations

import numpy as np

from onnxopt.model import Constant, Graph, Node, Variable

Bounds = tuple[float, float]

_OPEN: Bounds = (-np.inf, np.inf)
# Every element of the output is one of the first input's.
_SELECTING = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


def value_bounds(graph: Graph) -> dict[Variable, Bounds]:
    """Tensor -> (lowest, highest) value it can hold, NaN aside; infinite where nothing is known.

    Only bounds that hold to the last bit are told. The main graph's nodes are in order.
    """
    found: dict[Variable, Bounds] = {}

    def of(tensor: Variable | Constant) -> Bounds:
        return _OPEN if isinstance(tensor, Constant) else found.get(tensor, _OPEN)

    for node in graph.nodes:
        if node.kind[0] != "" or not node.inputs:
            continue
        bounds = _bounds(node, [of(tensor) for tensor in node.inputs])
        if bounds != _OPEN:
            found.update((tensor, bounds) for tensor in node.outputs[: None if node.op == "Split" else 1])
    return found


def _bounds(node: Node, inputs: list[Bounds]) -> Bounds:
    low, high = inputs[0]
    if node.op == "Relu":
        return max(low, 0.0), max(high, 0.0)
    if node.op == "Abs":
        return 0.0, np.inf
    if node.op == "Clip":
        return _clip(node, low, high)
    if node.op in _SELECTING:
        return low, high
    if node.op == "Concat":
        return min(low for low, _ in inputs), max(high for _, high in inputs)
    return _OPEN


def _clip(node: Node, low: float, high: float) -> Bounds:
    lowest, highest = _clip_bound(node, 1, "min", -np.inf), _clip_bound(node, 2, "max", np.inf)
    if lowest is None or highest is None or not lowest <= highest:
        return _OPEN
    return min(max(low, lowest), highest), max(min(high, highest), lowest)


def _clip_bound(node: Node, position: int, name: str, absent: float) -> float | None:
    """The bound as an attribute (before opset 11) or a constant input; None where it is computed."""
    if name in node.attrs:
        return float(np.float32(node.attrs[name]))
    if position >= len(node.inputs) or node.inputs[position].is_empty():
        return absent
    bound = node.inputs[position]
    if not isinstance(bound, Constant) or bound.data.size != 1:
        return None
    return float(bound.values.reshape(-1)[0])
