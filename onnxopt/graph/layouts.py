"""Which tensors of the main graph have their channels on axis 1, and which the runtime keeps in its blocked layout."""

from __future__ import annotations

from onnxopt.model import Graph, Node, Variable

# These work on [N, C, positions...].
_SPATIAL = frozenset(
    {
        "AveragePool",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "DeformConv",
        "DepthToSpace",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GlobalMaxPool",
        "GroupNormalization",
        "InstanceNormalization",
        "LRN",
        "LpPool",
        "MaxPool",
        "MaxUnpool",
        "SpaceToDepth",
    }
)
# The axes of what comes out mean something else than those of what goes in.
_REARRANGING = frozenset(
    {
        "Einsum",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "OneHot",
        "RMSNormalization",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# What onnxruntime computes blocked behind a convolution (optimizer/nchwc_transformer.cc).
_BLOCKED = frozenset(
    {
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Clip",
        "Concat",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "LeakyRelu",
        "MaxPool",
        "Mul",
        "Relu",
        "Sigmoid",
        "Sum",
        "Tanh",
    }
)


def channels_first(graph: Graph) -> set[Variable]:
    """Tensors that spatial operators read or write, and what other operators make of those axis by axis."""
    found: set[Variable] = set()
    for node in graph.nodes:
        if node.kind == ("", node.op) and node.op in _SPATIAL:
            found.update(tensor for tensor in node.inputs[:1] if isinstance(tensor, Variable))
    for node in graph.nodes:
        if _axis_by_axis(node) and (node.op in _SPATIAL or any(tensor in found for tensor in node.inputs)):
            found.update(node.outputs[:1] if node.op != "Split" else node.outputs)
    return found


def _axis_by_axis(node: Node) -> bool:
    rearranges = node.op in _REARRANGING or node.op.startswith("Reduce")
    return node.kind[0] == "" and not rearranges and not any(True for _ in node.graphs())


def blocked(graph: Graph) -> set[Variable]:
    """Tensors that the runtime most likely keeps blocked: Conv's, and what follows by operators that take them so."""
    found: set[Variable] = set()
    for node in graph.nodes:
        if node.kind[0] != "":
            continue
        if node.op == "Conv" or (node.op in _BLOCKED and any(tensor in found for tensor in node.inputs)):
            found.update(node.outputs[:1])
    return found
