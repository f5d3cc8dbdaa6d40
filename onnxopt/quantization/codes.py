"""Scale and zero-point of every tensor that carries codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxopt.model import Constant, Node, Variable
from onnxopt.numerics.affine import QParams
from onnxopt.quantization import qdq
from onnxopt.quantization.islands import Islands

Bounds = Callable[[Variable], tuple[float, float]]
# The format of tensors that share one: the tensors, and the lowest and highest of their bounds.
Formats = Callable[[Sequence[Variable], float, float], QParams]


def shared_params(island: Islands, bounds: Bounds, formats: Formats) -> dict[Variable, QParams]:
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
    groups: dict[Variable, list[Variable]] = {}
    for tensor in island.codes:
        groups.setdefault(find(tensor), []).append(tensor)
    params: dict[Variable, QParams] = {}
    for group in groups.values():
        low, high = zip(*(bounds(tensor) for tensor in group), strict=True)
        params |= dict.fromkeys(group, formats(group, min(low), max(high)))
    return {tensor: params[tensor] for tensor in island.codes}


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
