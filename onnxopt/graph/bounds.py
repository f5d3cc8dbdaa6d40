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
        return (0.0, np.inf) if not _is_integer(node.outputs[0]) else _OPEN  # the lowest integer has no magnitude
    if node.op == "MaxPool":
        return (low, high) if _sees_input(node) else _OPEN
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
        dtype = node.outputs[0].dtype
        half = dtype is not None and np.dtype(dtype) == np.float16
        return float(np.float16(node.attrs[name]) if half else np.float32(node.attrs[name]))
    if position >= len(node.inputs) or node.inputs[position].is_empty():
        return absent
    bound = node.inputs[position]
    if not isinstance(bound, Constant) or bound.data.size != 1:
        return None
    return float(bound.values.reshape(-1)[0])


def _sees_input(node: Node) -> bool:
    """Whether no window of a MaxPool lies in the padding alone, where the maximum is that of nothing."""
    padded = any(node.attrs.get("pads", ())) or str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME")
    spread = any(step != 1 for step in node.attrs.get("dilations", ()))
    return not (padded and spread)


def _is_integer(tensor: Variable) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iu"
