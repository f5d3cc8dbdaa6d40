"""convert_opset: every rule bit for bit, what is kept, what is refused, and the table against onnx's schemas."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, defs, helper

from onnxopt.errors import PassError, UsageError
from onnxopt.model import load
from onnxopt.passbase import Effect
from onnxopt.passes.convert_opset import _RULES, NEWEST, OLDEST, ConvertOpset
from tests.helpers import apply, assert_equal, model, operators, proto, random_feeds, run, with_weights

# Operators whose new version takes every node of the version before as it is: more types, negative axes, new attributes
# and inputs with neutral defaults. Read off onnx's docs/Changelog.md, operator by operator.
COMPATIBLE = {
    8: "Max MaxPool Mean Min Sum",
    9: "Cast Constant Flatten Gemm Greater Less MatMul PRelu",
    10: "AveragePool Dropout MaxPool",
    11: """ArgMax ArgMin AveragePool Compress Concat Constant Conv ConvTranspose DepthToSpace Equal Flatten Gather Gemm
        Hardmax If LogSoftmax Loop LpPool MaxPool MaxUnpool NonMaxSuppression OneHot ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Scan Slice Softmax Split
        Squeeze TopK Unsqueeze""",
    12: "ArgMax ArgMin Clip Constant GatherND Max MaxPool Min Pow ReduceMax ReduceMin",
    13: """Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace DequantizeLinear Div Dropout Equal Erf Exp
        Expand Flatten Floor Gather GatherElements GatherND Gemm Greater Identity If IsNaN LRN Less Log Loop MatMul Max
        Mean MeanVarianceNormalization Min Mod Mul Neg NegativeLogLikelihoodLoss NonZero Pad Pow QuantizeLinear
        Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSumSquare Relu Reshape Resize ScatterElements ScatterND Shape Sigmoid Sign Size Slice
        SoftmaxCrossEntropyLoss SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose""",
    14: "Add CumSum Div GRU Identity LSTM Mul RNN Relu Reshape Sub",
    15: "BatchNormalization Pow Shape",
    16: "GreaterOrEqual Identity If LeakyRelu LessOrEqual Loop PRelu Scan ScatterElements ScatterND Where",
    18: "LpPool OptionalGetElement OptionalHasElement Pad Resize ScatterElements ScatterND",
    19: """AveragePool Cast CastLike Constant DequantizeLinear Equal Identity If Loop Pad QuantizeLinear Reshape Resize
        Scan Shape Size""",
    20: "ConstantOfShape IsInf IsNaN ReduceMax ReduceMin",
    21: """Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QLinearMatMul
        QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze""",
    22: """Acos Acosh Asin Asinh Atan Atanh AveragePool Bernoulli Conv ConvTranspose Cos Cosh DeformConv Det Dropout Elu
        EyeLike GRU GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample HardSigmoid HardSwish InstanceNormalization
        LSTM LpNormalization LpPool MaxPool MaxRoiPool MaxUnpool Mish Multinomial NegativeLogLikelihoodLoss RNN
        RandomNormal RandomNormalLike RandomUniform RandomUniformLike RoiAlign Round Selu Sin Sinh Softplus Softsign Tan
        ThresholdedRelu""",
    23: """Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear Reshape
        Scan Shape Size Squeeze Transpose Unsqueeze""",
}


def test_every_change_of_every_operator_is_accounted_for() -> None:
    history: dict[str, list[int]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, []).append(schema.since_version)
    changed = {
        (name, version)
        for name, versions in history.items()
        for version in sorted(versions)[1:]
        if OLDEST < version <= NEWEST
    }
    compatible = {(name, version) for version, names in COMPATIBLE.items() for name in names.split()}
    assert changed == compatible | set(_RULES)
    assert not compatible & set(_RULES)


def converted(source: ModelProto, target: int, feeds: dict[str, Any] | None = None) -> list[str]:
    """Operators after conversion, which must give the same bits and keep names and descriptions."""
    raw = source.SerializeToString()
    done = load(source)
    apply(ConvertOpset(opset=target), done)
    written = done.to_proto()
    onnx.checker.check_model(written)
    assert done.opset == target
    assert list(written.graph.output) == list(source.graph.output)
    assert list(written.graph.input) == list(source.graph.input)
    assert source.SerializeToString() == raw
    given = random_feeds(source) if feeds is None else feeds
    assert_equal(run(source, given), run(written, given))
    before = done.digest()
    assert not apply(ConvertOpset(opset=target), done).changes
    assert done.digest() == before
    return operators(done)


CASES = [
    (9, "float[1,2,3,1] x", "float[2,3] y", "y = Squeeze<axes = [0, 3]>(x)"),
    (9, "float[1,2,1] x", "float[2] y", "y = Squeeze(x)"),
    (12, "float[2,3] x", "float[1,2,3,1] y", "y = Unsqueeze<axes = [0, -1]>(x)"),
    (9, "float[2,3,4] x", "float[2,1,4] y", "y = ReduceSum<axes = [1]>(x)"),
    (12, "float[2,3,4] x", "float y", "y = ReduceSum<keepdims = 0>(x)"),
    (11, "float[2,3,4] x", "float[2,3,1] y", "y = ReduceMean<axes = [-1]>(x)"),
    (11, "float[2,3,4] x", "float[1,1,1] y", "y = ReduceMax(x)"),
    (9, "float[2,6] x", "float[2,2] y, float[2,4] z", "y, z = Split<axis = 1, split = [2, 4]>(x)"),
    (9, "float[2,6] x", "float[2,3] y, float[2,3] z", "y, z = Split<axis = 1>(x)"),
    (9, "float[2,6] x", "float[2,6] y", "y = Clip<min = -0.5, max = 0.25>(x)"),
    (9, "float[2,6] x", "float[2,6] y", "y = Clip<max = 0.25>(x)"),
    (9, "float[2,6] x", "float[2,6] y", "y = Clip(x)"),
    (9, "float[2,6] x", "float[1,2] y", "y = Slice<starts = [1, -4], ends = [1000, -2], axes = [0, 1]>(x)"),
    (9, "float[2,6] x", "float[1,5] y", "y = Slice<starts = [0, 1], ends = [1, 9]>(x)"),
    (9, "float[2,6] x", "float[2,3] y, int64[2,3] z", "y, z = TopK<k = 3>(x)"),
    (10, "float[2,3] x", "float[3,6] y", "y = Pad<pads = [1, 1, 0, 2], value = 1.5>(x)"),
    (9, "float[2,3] x", "float[3,6] y", 'y = Pad<pads = [1, 1, 0, 2], mode = "edge">(x)'),
    (9, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax(x)"),
    (11, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax<axis = -1>(x)"),
    (9, "float[2,3,1,1] x", "float[2,3,1,1] y", "y = Softmax(x)"),
    (9, "float[2,3,4] x", "float[2,3,4] y", "y = LogSoftmax<axis = 0>(x)"),
    (9, "float[2,3,4] x", "float[2,3,4] y", "y = Hardmax(x)"),
    (9, "float[2,3] x", "float[2,3] y", "y = Dropout<ratio = 0.7>(x)"),
    (7, "float[1,1,3,3] x", "float[1,1,H,W] y", "y = Upsample<scales = [1.0, 1.0, 2.0, 3.0]>(x)"),
    (7, "float[1,1,3,3] x", "float[1,1,H,W] y", "y = Upsample<scales = [1.0, 1.0, 1.7, 2.6]>(x)"),
    (7, "float[1,1,3,3] x", "float[1,1,H,W] y", 'y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 3.0]>(x)'),
    (9, "float[1,1,3,3] x", "float[1,1,H,W] y", "s = Constant<value = float[4] {1, 1, 2, 1.3}>() y = Upsample(x, s)"),
    (10, "float[1,1,7,7] x", "float[1,1,H,W] y", "s = Constant<value = float[4] {1, 1, 2, 1.3}>() y = Resize(x, s)"),
    (10, "float[1,1,7,7] x", "float[1,1,H,W] y", "s = Constant<value = float[4] {1, 1, 0.6, 0.3}>() y = Resize(x, s)"),
    (
        10,
        "float[1,1,7,7] x",
        "float[1,1,H,W] y",
        's = Constant<value = float[4] {1, 1, 0.6, 2}>() y = Resize<mode = "linear">(x, s)',
    ),
    (7, "float[1,2,3] x, float[2] s", "float[1,2,3] y", "y = BatchNormalization<spatial = 1>(x, s, s, s, s)"),
    (9, "float[4] x, int64[2] i, float[2] u", "float[4] y", "y = Scatter(x, i, u)"),
    (9, "float[2,3] x", "float[2,3] y", "y = MatMul(x, w) "),
]


@pytest.mark.parametrize("target", [13, 18])
@pytest.mark.parametrize(("opset", "inputs", "outputs", "body"), CASES, ids=lambda value: str(value)[:60])
def test_every_rule_keeps_the_bits(opset: int, inputs: str, outputs: str, body: str, target: int) -> None:
    source = proto(f"g ({inputs}) => ({outputs}) {{ {body} }}", opset, 4)
    source = with_weights(source, w=np.eye(3, dtype=np.float32)) if ", w)" in body else source
    feeds = random_feeds(source, seed=3)
    if "i" in feeds:
        feeds["i"] = np.array([0, 3])
    assert converted(source, target, feeds)


def test_rules_past_18() -> None:
    grid = 'y = GridSample<mode = "bicubic">(x, i)'
    source = proto(f"g (float[1,1,4,4] x, float[1,3,3,2] i) => (float[1,1,3,3] y) {{ {grid} }}", 16)
    assert converted(source, 21) == ["GridSample"]
    source = proto(
        "g (float[1,1,4,4] x) => (float[1,1,2,2] y) { b = Constant<value = int64[1] {0}>() y = RoiAlign(x, r, b) }", 12
    )
    assert converted(with_weights(source, r=np.array([[0, 0, 3, 3]], np.float32)), 17) == ["RoiAlign"]
    source = proto("g (float[1,8,1] x) => (float[1,5,2] y) { y = DFT<onesided = 1>(x) }", 17)
    assert converted(source, 21) == ["DFT"]
    source = proto("g (float[1,4,3] x) => (float[1,4,3] y) { y = GroupNormalization<num_groups = 2>(x, s, b) }", 18)
    source = with_weights(source, s=np.array([1, 2], np.float32), b=np.array([3, 4], np.float32))
    target = load(source)
    apply(ConvertOpset(opset=21), target)
    assert target.graph.nodes[0].inputs[1].values.tolist() == [1, 1, 2, 2]


def test_all_else_is_kept() -> None:
    source = proto("g (float[N,1,4] x) => (float[N,4] y) { y = Squeeze<axes = [1]>(x) }", 11, 7)
    source.metadata_props.add(key="author", value="somebody")
    source.doc_string, source.producer_name, source.model_version = "doc", "exporter", 3
    source.graph.doc_string = "graph"
    source.graph.metadata_props.add(key="k", value="v")
    node = source.graph.node[0]
    node.name, node.doc_string = "squeeze", "node"
    node.metadata_props.add(key="k", value="v")
    target = load(source)
    apply(ConvertOpset(), target)
    written = target.to_proto()
    written.opset_import[0].version = 11
    written.graph.node[0].input.pop()
    written.graph.node[0].attribute.append(helper.make_attribute("axes", [1]))
    written.graph.ClearField("initializer")
    assert written == source


def test_ir_version_rises_only_where_needed() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Relu(x) }"
    assert load(proto(text, 11, 6)).ir_version == 6
    for before, opset, target, after in ((6, 11, 13, 7), (8, 11, 13, 8), (3, 8, 13, 7), (9, 13, 13, 9)):
        done = model(text, opset, before)
        apply(ConvertOpset(opset=target), done)
        assert done.ir_version == after


def test_initializers_of_ir_3_do_not_become_inputs() -> None:
    source = proto("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }", 8, 3)
    target = load(source)
    apply(ConvertOpset(), target)
    written = target.to_proto()
    assert [info.name for info in written.graph.input] == ["x"]
    assert [constant.name for constant in load(written).graph.initializers] == ["w"]
    feeds = {"x": np.ones(2, np.float32)}
    assert_equal(run(source, feeds), run(written, feeds))


def test_bodies_and_functions_are_raised_along() -> None:
    source = proto(
        """g (bool c, float[1,2] x) => (float[2] y) {
            y = If(c) <
                then_branch = t () => (float[2] p) { p = Squeeze<axes = [0]>(x) },
                else_branch = e () => (float[2] q) { q = local.f(x) }
            >
        }
        <domain: "local", opset_import: ["": 11]>
        f (x) => (y) { y = Squeeze<axes = [0]>(x) }""",
        11,
        8,
        '"local" : 1',
    )
    for choice in (True, False):
        converted(source, 13, {"c": np.array(choice), "x": np.ones((1, 2), np.float32)})
    assert source.functions[0].opset_import[0].version == 11


def test_other_domains_and_newer_models_stay() -> None:
    text = "g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }"
    target = model(text, 11, imports='"com.microsoft" : 1')
    apply(ConvertOpset(), target)
    assert target.opset_imports == {"": 13, "com.microsoft": 1}
    newer = model("g (float[2] x) => (float[2] y) { y = Relu(x) }", 17)
    before = newer.digest()
    assert not apply(ConvertOpset(), newer).changes
    assert newer.digest() == before


@pytest.mark.parametrize(
    ("opset", "line", "reason"),
    [
        (6, "y = Relu(x)", "opset 6"),
        (9, "y, z = Dropout(x)", "mask"),
        (10, "y, z = Dropout(x)", "mask"),
        (8, "y = BatchNormalization<spatial = 0>(x, s, s, s, s)", "spatial"),
        (9, "y, a, b = BatchNormalization(x, s, s, s, s)", None),
        (10, "t = Neg(s) y = Resize(x, t)", "scales"),
        (10, "c = Constant<value = float[4] {1, 1, 2, 0.5}>() y = Resize(x, c)", "shrinks"),
    ],
)
def test_what_cannot_be_raised_is_refused_by_name(opset: int, line: str, reason: str | None) -> None:
    target = model(f"g (float[1,4,4,4] x, float[4] s) => (float[1,4,4,4] y) {{ {line} }}", opset, 4)
    options = ConvertOpset(opset=13 if reason else 14)
    with pytest.raises(PassError) as caught:
        apply(options, target)
    assert (reason or "training") in caught.value.cause
    assert caught.value.remedy


def test_options_and_effect() -> None:
    assert ConvertOpset().effect is Effect.EXACT
    assert ConvertOpset(opset=21).effect is Effect.ROUNDING
    with pytest.raises(UsageError):
        ConvertOpset(opset=NEWEST + 1)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 4, 2), (2, 3, 2)])
def test_a_normalization_over_several_axes_takes_tensors_without_elements(op: str, shape: tuple[int, ...]) -> None:
    dims = ",".join(f"d{index}" for index in range(len(shape)))
    source = proto(f"g (float[{dims}] x) => (float[{dims}] y) {{ y = {op} <axis = 1> (x) }}", opset=11)
    target = load(source)
    apply(ConvertOpset(), target)
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    assert_equal(run(source, feeds), run(target, feeds))
