"""Where quantized operators may stand: one table of what onnxruntime's CPU provider runs on 8-bit codes.

A row says what the runtime makes of  DequantizeLinear -> operator -> QuantizeLinear  when it optimises a graph
(`selectors_actions/qdq_selectors.cc` and `qdq_selector_action_transformer.cc` of onnxruntime, and the optimised graphs
of 1.32, which a test reads for every row). An operator without a row has no integer kernel: Q and DQ nodes around it
only cost time and accuracy. Roles:

    LAYER    does the work; its weight becomes int8 and its input must be codes
    FOLDED   Relu or Clip right after a layer: absorbed when the codes of its output already imply it
    KERNEL   has an integer kernel with scales of its own at each input and output
    PASS     moves codes as they are: all its tensors share one bit-equal scale and zero-point
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from onnxopt.model import Constant, Node


class Role(Enum):
    """What a row's operator is to its neighbours. See the module."""

    LAYER = "layer"
    FOLDED = "folded"
    KERNEL = "kernel"
    PASS = "pass"


Condition = Callable[[Node], str | None]


def _always(_: Node) -> str | None:
    return None


@dataclass(frozen=True)
class Row:
    """One pattern.

    kernel: the node in the runtime's optimised graph. float_kernel: the node when the output is left float, None where
    the layer then stays float as a whole (its output must be codes). inputs: positions that carry codes, None = all.
    refuses: the reason why this node does not qualify, or None. source: what says so.
    """

    operator: str
    role: Role
    kernel: str
    source: str
    float_kernel: str | None = None
    inputs: tuple[int, ...] | None = (0,)
    refuses: Condition = _always

    def code_inputs(self, node: Node) -> list[object]:
        """The tensors of `node` that must be codes."""
        if self.inputs is None:
            return list(node.inputs)
        return [node.inputs[i] for i in self.inputs if i < len(node.inputs)]


def _gemm(node: Node) -> str | None:
    for name, wanted in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        default = 0 if name == "transA" else 1.0
        if node.attrs.get(name, default) != wanted:
            return f"{name} is {node.attrs[name]}, and the integer Gemm knows only {wanted:g}"
    return None


def _max_pool(node: Node) -> str | None:
    if len(node.outputs) > 1 and not node.outputs[1].is_empty():
        return "its index output has no integer form"
    return "it is column-major" if node.attrs.get("storage_order", 0) else None


def _average_pool(node: Node) -> str | None:
    return "the integer kernel has no dilations" if any(d != 1 for d in node.attrs.get("dilations", [])) else None


def _resize(node: Node) -> str | None:
    mode = node.attrs.get("mode", "nearest")
    if mode != "nearest":
        return f"mode {mode!r} computes new values; only 'nearest' moves codes"
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it fills in a value of its own outside of the input"
    return None


def _binary(node: Node) -> str | None:
    # A per-channel constant would lose accuracy at 8 bits with one scale; a single number is exact.
    constants = [tensor for tensor in node.inputs if isinstance(tensor, Constant)]
    if len(constants) == len(node.inputs):
        return "it has no variable input"
    if any(constant.data.size != 1 or constant.dtype != np.float32 for constant in constants):
        return "its constant operand is not a single number"
    return None


def _concat(node: Node) -> str | None:
    return "it joins constants" if any(isinstance(tensor, Constant) for tensor in node.inputs) else None


def _clip(node: Node) -> str | None:
    if any(not isinstance(bound, Constant) and not bound.is_empty() for bound in node.inputs[1:]):
        return "its bounds are computed"
    return None


def _indices(node: Node) -> str | None:
    return "it reads a table of constants" if isinstance(node.inputs[0], Constant) else None


_SELECTORS = "qdq_selectors.cc"
_PASSED = "qdq_selector_action_transformer.cc: DropQDQNodesRules; qdq_propagation.cc"

ROWS: tuple[Row, ...] = (
    Row("Conv", Role.LAYER, "QLinearConv", f"{_SELECTORS}: ConvNodeGroupSelector"),
    Row("MatMul", Role.LAYER, "QLinearMatMul", f"{_SELECTORS}: MatMulNodeGroupSelector", "MatMulIntegerToFloat"),
    Row("Gemm", Role.LAYER, "QGemm", f"{_SELECTORS}: GemmNodeGroupSelector", "QGemm", refuses=_gemm),
    Row("Relu", Role.FOLDED, "", "relu_quant_fusion.cc: zero-point is the lowest code"),
    Row("Clip", Role.FOLDED, "", "relu_quant_fusion.cc: codes lie within the bounds", refuses=_clip),
    Row("Add", Role.KERNEL, "QLinearAdd", f"{_SELECTORS}: BinaryNodeGroupSelector", inputs=None, refuses=_binary),
    Row("Mul", Role.KERNEL, "QLinearMul", f"{_SELECTORS}: BinaryNodeGroupSelector", inputs=None, refuses=_binary),
    Row(
        "Concat", Role.KERNEL, "QLinearConcat", f"{_SELECTORS}: VariadicNodeGroupSelector", inputs=None, refuses=_concat
    ),
    Row("Sigmoid", Role.KERNEL, "QLinearSigmoid", f"{_SELECTORS}: UnaryNodeGroupSelector"),
    Row("LeakyRelu", Role.KERNEL, "QLinearLeakyRelu", f"{_SELECTORS}: UnaryNodeGroupSelector"),
    Row("GlobalAveragePool", Role.KERNEL, "QLinearGlobalAveragePool", f"{_SELECTORS}: UnaryNodeGroupSelector"),
    Row(
        "AveragePool", Role.KERNEL, "QLinearAveragePool", f"{_SELECTORS}: UnaryNodeGroupSelector", refuses=_average_pool
    ),
    Row("Softmax", Role.KERNEL, "QLinearSoftmax", f"{_SELECTORS}: UnaryNodeGroupSelector"),
    Row("MaxPool", Role.PASS, "MaxPool", _PASSED, refuses=_max_pool),
    Row("Resize", Role.PASS, "Resize", _PASSED, refuses=_resize),
    Row("Reshape", Role.PASS, "Reshape", _PASSED),
    Row("Transpose", Role.PASS, "Transpose", _PASSED),
    Row("Flatten", Role.PASS, "Flatten", _PASSED),
    Row("Squeeze", Role.PASS, "Squeeze", _PASSED),
    Row("Unsqueeze", Role.PASS, "Unsqueeze", _PASSED),
    Row("Slice", Role.PASS, "Slice", _PASSED),
    Row("Gather", Role.PASS, "Gather", _PASSED, refuses=_indices),
    Row("Split", Role.PASS, "Split", f"{_SELECTORS}: SplitNodeGroupSelector"),
    Row("Expand", Role.PASS, "Expand", _PASSED),
    Row("Tile", Role.PASS, "Tile", _PASSED),
    Row("DepthToSpace", Role.PASS, "DepthToSpace", _PASSED),
)

# Gates and probabilities keep at most 256 levels as codes, and what they multiply inherits the error: no Q and DQ of
# their own. Where the next operator is a layer, its input is codes anyway and the integer kernel comes for free.
LEFT_FLOAT = frozenset({"Softmax", "Sigmoid"})
# A Sigmoid that gates its own input (SiLU) is near 1 where that is large: its error is at most half a step of the
# product's codes.
GATES_ON_CODES = LEFT_FLOAT - {"Sigmoid"}

_TABLE = {row.operator: row for row in ROWS}


def row(node: Node) -> Row | None:
    """The table's row for this node's operator, whatever its conditions say."""
    return _TABLE.get(node.op) if node.kind[0] == "" else None


def island_row(node: Node, left_float: frozenset[str] = LEFT_FLOAT) -> Row | None:
    """The row of a node that may carry codes between layers: role KERNEL or PASS, all conditions met.

    left_float: operators that shall not. Of Sigmoids at most those do that gate their own input.
    """
    found = row(node)
    if found is None or found.role not in (Role.KERNEL, Role.PASS) or node.op in left_float:
        return None
    if node.op == "Sigmoid" and not _gates_its_input(node):
        return None
    return None if found.refuses(node) else found


def _gates_its_input(sigmoid: Node) -> bool:
    """Whether all that reads a Sigmoid are products with the Sigmoid's own input."""
    gated, gate = sigmoid.inputs[0], sigmoid.outputs[0]
    readers = list(gate.outputs)
    return bool(readers) and all(
        node.kind == ("", "Mul") and {id(tensor) for tensor in node.inputs} == {id(gated), id(gate)} for node in readers
    )
