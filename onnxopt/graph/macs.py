"""Multiply-accumulates of layers, from the shapes of their tensors.

Counted is what the definition of an operator multiplies, not what a kernel may save: a padded border counts like the
rest, a Winograd convolution like a plain one, and recurrent operators run over all steps whatever their sequence
lengths say. Biases, activations and peepholes multiply no weights with each other and count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from onnxopt.model import Constant, Node, Variable

Shape = tuple[int, ...]
# The shape of a tensor, None where it is not known; scalars have the shape ().
ShapeOf = Callable[[Constant | Variable], Shape | None]


def layer_macs(node: Node, shape_of: ShapeOf) -> int | None:
    """Multiply-accumulates of one run of `node`: 0 for an operator not in LAYERS, None where a shape is not known.

    What a node's bodies hold is not counted: call it for their nodes.
    """
    count = _COUNTS.get(node.op) if node.kind[0] == "" else None
    return 0 if count is None else count(node, shape_of)


def static_shape(tensor: Constant | Variable) -> Shape | None:
    """The shape that the model states of a tensor, where all its dims are numbers: a `shape_of` for fixed inputs."""
    dims = [] if tensor.shape is None else list(tensor.shape)
    if tensor.shape is None or any(not isinstance(size, int) or size < 0 for size in dims):
        return None
    return tuple(int(size) for size in dims if isinstance(size, int))


def _shapes(node: Node, shape_of: ShapeOf, *ranks: int) -> list[Shape] | None:
    """Shapes of the first inputs, one a rank; None where one is absent, not known or of a lower rank."""
    tensors = node.inputs[: len(ranks)]
    found = [shape_of(tensor) for tensor in tensors if not tensor.is_empty()]
    known = [shape for shape, rank in zip(found, ranks, strict=False) if shape is not None and len(shape) >= rank]
    return known if len(known) == len(ranks) else None


def _conv(node: Node, shape_of: ShapeOf) -> int | None:
    """Each output element reads one filter: [out channels, in channels / group, kernel...]."""
    shapes = _shapes(node, shape_of, 2, 2)
    out = shape_of(node.outputs[0])
    return None if shapes is None or out is None else math.prod(out) * math.prod(shapes[1][1:])


def _conv_transpose(node: Node, shape_of: ShapeOf) -> int | None:
    """Each input element goes through one filter: [in channels, out channels / group, kernel...]."""
    shapes = _shapes(node, shape_of, 2, 2)
    return None if shapes is None else math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _matmul(node: Node, shape_of: ShapeOf) -> int | None:
    """Each output element is a sum over the last axis of the first operand."""
    shapes = _shapes(node, shape_of, 1, 1)
    if shapes is None:
        return None
    left, right = shapes
    batch = _broadcast(left[:-2], right[:-2])
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    return None if batch is None else math.prod(batch) * rows * columns * left[-1]


def _gemm(node: Node, shape_of: ShapeOf) -> int | None:
    """As MatMul, with operands that may be transposed."""
    shapes = _shapes(node, shape_of, 2, 2)
    if shapes is None:
        return None
    left, right = shapes
    columns = right[0] if node.attrs.get("transB", 0) else right[1]
    return math.prod(left) * columns


def _recurrent(node: Node, shape_of: ShapeOf) -> int | None:
    """Each step of each sequence goes through W and R: [directions, gates * hidden, inputs or hidden]."""
    shapes = _shapes(node, shape_of, 3, 3, 3)
    if shapes is None:
        return None
    inputs, weights, recurrence = shapes
    # steps and batch stand in either order
    return math.prod(inputs[:2]) * (math.prod(weights) + math.prod(recurrence))


def _einsum(node: Node, shape_of: ShapeOf) -> int | None:
    """Each choice of all indices multiplies the operands; one operand is only summed."""
    shapes = _shapes(node, shape_of, *[0] * len(node.inputs))
    if shapes is None:
        return None
    equation = str(node.attrs["equation"]).replace(" ", "")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.partition("->")[0].split(","), shapes, strict=True):
        for label, size in zip(_labels(term, len(shape)), shape, strict=True):
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    return math.prod(sizes.values()) * (len(shapes) - 1)


def _labels(term: str, rank: int) -> list[str]:
    """One name an axis; those under an ellipsis are numbered from the last, as they broadcast."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(f"...{hidden - at}" for at in range(hidden)), *after]


def _broadcast(left: Shape, right: Shape) -> Shape | None:
    """The shape that two shapes broadcast to, None where they do not."""
    rank = max(len(left), len(right))
    pairs = zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)
    found = tuple(b if a == 1 else a for a, b in pairs)
    fits = all(
        size in (1, all_) for shape in (left, right) for size, all_ in zip(shape[::-1], found[::-1], strict=False)
    )
    return found if fits else None


_COUNTS: Mapping[str, Callable[[Node, ShapeOf], int | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "RNN": _recurrent,
}
# Operators whose multiply-accumulates are counted.
LAYERS = frozenset(_COUNTS)
