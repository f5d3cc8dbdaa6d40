"""Tensors whose shape follows from the shapes of the model's inputs, whatever values these hold."""

from __future__ import annotations

from onnxopt.graph import operators
from onnxopt.model import Constant, Graph, Node, Variable

# Inputs whose values decide the shape of the outputs; of every other operator in the table only their shapes do.
_VALUES: dict[str, tuple[int, ...]] = {
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
# The values of their data decide how much comes out.
_COUNTING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "StringNormalizer", "StringSplit", "Unique"})


def shape_determined(graph: Graph) -> set[Variable]:
    """Tensors of the main graph, whose nodes are in order, that have one shape for each choice of input shapes.

    What comes out of bodies, of functions and of operators that the operator table does not know is left out.
    """
    shaped: set[Variable] = set(graph.inputs)
    valued: set[Variable] = set()  # even the values follow from the shapes of the inputs
    for node in graph.nodes:
        inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
        outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
        if not operators.is_pure(node) or node.op in _COUNTING or any(True for _ in node.graphs()):
            continue
        if not all(_known(tensor, shaped) for tensor in inputs):
            continue
        if all(_known(tensor, valued) for tensor in inputs) or node.op in ("Shape", "Size"):
            valued.update(outputs)
        if all(_known(tensor, valued) for tensor in _deciding(node)):
            shaped.update(outputs)
    return shaped


def _deciding(node: Node) -> list[Variable | Constant]:
    if node.op.startswith("Reduce"):
        positions: tuple[int, ...] = (1,)
    else:
        positions = _VALUES.get(node.op, ())
    return [node.inputs[at] for at in positions if at < len(node.inputs) and not node.inputs[at].is_empty()]


def _known(tensor: Variable | Constant, among: set[Variable]) -> bool:
    return isinstance(tensor, Constant) or tensor in among
