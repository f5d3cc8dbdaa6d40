"""Where the outputs of a model tell most of what changed in it.

A probability near 0 or 1 hardly moves, whatever became of the network before it, and beside boxes of hundreds of pixels
a score of 0.5 is nothing. The class that is chosen says less still. So errors are measured in front of a final Softmax,
Sigmoid or ArgMax, and of what a final Concat joins in each tensor by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from onnxopt.model import Model, Variable

_PASSING = frozenset({"Identity"})
_SATURATING = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
# what makes few values of many: a class of scores
_DECIDING = frozenset({"ArgMax", "ArgMin", "Cast", "TopK"})


def judged_outputs(model: Model) -> list[Variable]:
    """The tensors of the main graph to compare in place of the outputs: each float output, followed back."""
    found: dict[Variable, None] = {}
    for output in model.graph.outputs:
        if isinstance(output, Variable):
            found.update(dict.fromkeys(_behind(output)))
    floats = [tensor for tensor in found if is_float(tensor)]
    return floats if floats else [output for output in model.graph.outputs if isinstance(output, Variable)]


def _behind(tensor: Variable) -> Iterator[Variable]:
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.kind[0] != "":
        yield tensor
    elif node.op in _PASSING or node.op in _SATURATING or (node.op in _DECIDING and not is_float(tensor)):
        source = node.inputs[0]
        yield from _behind(source) if isinstance(source, Variable) and source.inputs else (tensor,)
    elif node.op == "Concat" and all(isinstance(part, Variable) and part.inputs for part in node.inputs):
        for part in node.inputs:
            yield from _behind(part)
    else:
        yield tensor


def judged_error(closeness: float, outputs: list[Variable]) -> float:
    """Squared error over variance from what a comparison tells: dB, or without floats the share of equal elements."""
    if any(is_float(tensor) for tensor in outputs):
        return float(10 ** (-closeness / 10))
    return 1.0 - closeness


def is_float(tensor: Variable) -> bool:
    """Also where the type is not known."""
    return tensor.dtype is None or np.dtype(tensor.dtype).kind in "fV"


@contextmanager
def judged(model: Model, outputs: list[Variable]) -> Iterator[None]:
    """The model with these tensors for its outputs, until the end of the block."""
    own = list(model.graph.outputs)
    model.graph.outputs[:] = outputs
    try:
        yield
    finally:
        model.graph.outputs[:] = own
