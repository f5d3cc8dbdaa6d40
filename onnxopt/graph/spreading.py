"""Where NaN shows: tensors that hold NaN whenever another one does."""

from __future__ import annotations

from collections.abc import Collection

from onnxopt.model import Node, Variable

# NaN anywhere in an input becomes NaN somewhere in the output.
_SPREADING = frozenset(
    {
        "Add",
        "BatchNormalization",
        "Concat",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
        "Identity",
        "MatMul",
        "Mul",
        "Reshape",
        "Sub",
        "Transpose",
    }
)
# A kernel of these may take NaN for a number. What stands behind one of them then never holds NaN, and where it does,
# the next of the same kind lets it through too.
_BOUNDING = frozenset({"Clip", "Relu"})
_FARTHEST = 64


def shows_in(tensor: Variable, goals: Collection[Variable]) -> bool:
    """Whether NaN in `tensor`, computed by a Clip or Relu, is sure to be NaN in one of `goals` as well.

    False where that is not seen within a few dozen nodes.
    """
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is None or producer.kind[0] != "" or producer.op not in _BOUNDING:
        return False
    pending, seen = [tensor], {tensor}
    while pending and len(seen) <= _FARTHEST:
        current = pending.pop(0)
        for node in current.outputs:
            if not _spreads(node, current, producer.op) or node.outputs[0] in seen:
                continue
            if node.outputs[0] in goals:
                return True
            seen.add(node.outputs[0])
            pending.append(node.outputs[0])
    return False


def _spreads(node: Node, tensor: Variable, through: str) -> bool:
    if node.kind[0] != "" or not node.outputs or (node.op != through and node.op not in _SPREADING):
        return False
    if node.op == "Conv":
        return node.inputs[0] is tensor and _sees_everything(node)
    return node.op not in ("BatchNormalization", through) or node.inputs[0] is tensor


def _sees_everything(node: Node) -> bool:
    """Whether the kernel passes over every position, whatever the size: none is stepped over, or cut off at the end."""
    kernel = list(node.attrs.get("kernel_shape") or list(node.inputs[1].shape or ())[2:])
    rank = len(kernel)
    strides = list(node.attrs.get("strides") or [1] * rank)
    pads = list(node.attrs.get("pads") or [0] * (2 * rank))
    if not kernel or any(step != 1 for step in node.attrs.get("dilations") or []) or min(pads) < 0:
        return False
    same = str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME")
    return all(
        step == 1 or (size >= step and (same or end >= step - 1))
        for size, step, end in zip(kernel, strides, pads[rank:], strict=True)
    )
