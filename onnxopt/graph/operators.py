"""The operator table: what rewriting may assume about an operator. Data; operators that are not listed are unknown.

Purity is allow-listed: a pure operator gives the same outputs for the same inputs and does nothing else. Random
operators, operators that hold bodies, sequences and custom operators are not pure here, so they are never computed
ahead of time, merged or dropped on a guess. Dropout and BatchNormalization are pure outside of training only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxopt.model import Constant, Graph, Node


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    pure: same inputs, same outputs, no other effect. foldable: pure, and computing it ahead of time loses nothing that
    the runtime or a later reader needs (quantization operators mark where integers are meant). shrinks: its outputs
    hold at most as many elements as its first input times that input's rank, whatever its shape inference knows.
    moves: every element of its first output is an element of an input or a fill value, not rounded on the way.
    """

    pure: bool
    foldable: bool
    shrinks: bool = False
    moves: bool = False


_FOLDABLE = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress
Concat ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DFT DepthToSpace Det Div Dropout Einsum Elu Equal Erf Exp
Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity
InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
LpPool MatMul Max MaxPool Mean MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Neg NonMaxSuppression NonZero
Not OneHot Or PRelu Pad Pow RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding
Round STFT Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique
Unsqueeze Upsample Where Xor
"""
# Integer arithmetic stands for quantized weights; recurrent operators and string operators are dear or rare.
_PURE_ONLY = """
Attention ConvInteger DeformConv DequantizeLinear DynamicQuantizeLinear GRU LSTM MatMulInteger MaxRoiPool MaxUnpool
NegativeLogLikelihoodLoss QLinearConv QLinearMatMul QuantizeLinear RNN RegexFullMatch SoftmaxCrossEntropyLoss
StringConcat StringNormalizer StringSplit TfIdfVectorizer
"""
_SHRINKING = frozenset({"Compress", "NonZero", "Unique", "NonMaxSuppression"})

_MOVING = """
CenterCropPad Compress Concat ConstantOfShape DepthToSpace Expand Flatten Gather GatherElements GatherND Identity OneHot
Pad Reshape ReverseSequence Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unique Unsqueeze Where
"""

_TABLE: dict[tuple[str, str], Operator] = {
    **{("", op): Operator(True, True, op in _SHRINKING, op in _MOVING.split()) for op in _FOLDABLE.split()},
    **{("", op): Operator(True, False) for op in _PURE_ONLY.split()},
}


def info(node: Node) -> Operator | None:
    """The table's row for this node's operator; None where nothing is known of it."""
    return _TABLE.get(node.kind)


def is_pure(node: Node) -> bool:
    """Whether this node, with these attributes and inputs, is pure."""
    row = info(node)
    return row is not None and row.pure and not is_training(node)


def is_foldable(node: Node) -> bool:
    """Whether this node may be computed ahead of time once its inputs are known."""
    row = info(node)
    return row is not None and row.foldable and not is_training(node)


def is_training(node: Node) -> bool:
    """Whether a BatchNormalization or Dropout node is, or may be, in training mode.

    BatchNormalization says so by `training_mode` (opset 14 on) or by having more outputs than one (before). Dropout by
    its third input (opset 12 on); before, by nothing: `is_test` is gone since opset 7.
    """
    if node.kind == ("", "BatchNormalization"):
        more = any(not tensor.is_empty() for tensor in node.outputs[1:])
        return more or node.attrs.get("training_mode", 0) != 0 or node.attrs.get("is_test", 1) == 0
    if node.kind != ("", "Dropout"):
        return False
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None or mode.is_empty():
        return bool(node.attrs.get("is_test", 1) == 0)
    return not isinstance(mode, Constant) or bool(np.any(mode.values))


def opset_of(body: Graph) -> int:
    """The version of the default operator set that applies to a body; 1 where none is imported."""
    imports = (body.function or body).import_domains or []
    return next((int(entry.version) for entry in imports if entry.domain in ("", "ai.onnx")), 1)
