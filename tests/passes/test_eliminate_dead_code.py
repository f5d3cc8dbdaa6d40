"""eliminate_dead_code: what no output depends on goes, what may do something besides stays."""

from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper

from onnxopt.model import load
from onnxopt.passes.eliminate_dead_code import EliminateDeadCode
from tests.helpers import apply, assert_equal, assert_valid, operators, proto, random_feeds, run


def test_nodes_initializers_functions_and_operator_sets() -> None:
    source = proto(
        """g (float[2] x, float[2] unused) => (float[2] y) <float w = {2}, float idle = {3}> {
        a = Mul(x, w) dead = Exp(a) deader = Log(dead) noise = RandomNormalLike(x) y = own.Used(a) }
        <domain: "own", opset_import: ["" : 17]> Used (p) => (q) { q = Relu(p) }
        <domain: "own", opset_import: ["" : 17, "own" : 1]> Idle (p) => (q) { q = own.Deeper(p) }
        <domain: "own", opset_import: ["" : 17]> Deeper (p) => (q) { q = Relu(p) }""",
        imports='"own" : 1, "other" : 3',
    )
    target = load(source)
    result = apply(EliminateDeadCode(), target)
    assert operators(target) == ["Mul", "Used"]
    assert [constant.name for constant in target.graph.initializers] == ["w"]
    assert [function.name for function in target.functions] == ["Used"]
    assert target.opset_imports == {"": 17, "own": 1}
    assert [change.where for change in result.changes] == ["dead", "deader", "noise", "idle", "Idle", "Deeper", "other"]
    assert [info.name for info in target.to_proto().graph.input] == ["x", "unused"]
    assert_valid(target)
    assert_equal(run(source, random_feeds(source)), run(target, random_feeds(source)))
    assert not apply(EliminateDeadCode(), target).changes


def test_operator_sets_stay_on_request() -> None:
    target = load(proto("g (float x) => (float y) { y = Neg(x) }", imports='"other" : 3'))
    assert not apply(EliminateDeadCode(operator_sets=False), target).changes
    assert target.opset_imports == {"": 17, "other": 3}


def test_custom_operators_stay_with_what_they_read() -> None:
    target = load(
        proto("g (float x) => (float y) { a = Exp(x) b = own.Log(a) y = Neg(x) }", imports='"own" : 1'),
    )
    result = apply(EliminateDeadCode(), target)
    assert operators(target) == ["Exp", "Log", "Neg"]
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("b", "what this operator does besides is not known")
    ]


def test_nodes_with_bodies_go_unless_a_custom_operator_is_within() -> None:
    text = """g (float x, bool b) => (float y) {{
        k = Exp(x)
        a = If (b) < then_branch = t () => (float p) {{ p = Neg(k) }},
                     else_branch = e () => (float r) {{ r = {}(x) }}>
        y = Neg(x) }}"""
    target = load(proto(text.format("Abs"), imports='"own" : 1'))
    apply(EliminateDeadCode(), target)
    assert operators(target) == ["Neg"]
    target = load(proto(text.format("own.Log"), imports='"own" : 1'))
    apply(EliminateDeadCode(), target)
    assert operators(target) == ["Exp", "If", "Neg"]


def test_a_call_of_a_function_goes_unless_a_custom_operator_is_within() -> None:
    text = """g (float x) => (float y) {{ a = own.F(x) y = Neg(x) }}
        <domain: "own", opset_import: ["" : 17, "far" : 1]> F (p) => (q) {{ q = {}(p) }}"""
    target = load(proto(text.format("Relu"), imports='"own" : 1, "far" : 1'))
    apply(EliminateDeadCode(), target)
    assert (operators(target), target.functions) == (["Neg"], [])
    target = load(proto(text.format("far.Log"), imports='"own" : 1, "far" : 1'))
    apply(EliminateDeadCode(), target)
    assert operators(target) == ["F", "Neg"]
    assert target.opset_imports == {"": 17, "own": 1, "far": 1}


def test_positions_of_outputs_stay() -> None:
    text = "g (float[2,4] x) => (int64[2,1] y) <int64[1] k = {1}> { v, y = TopK(x, k) d = Exp(v) }"
    source = proto(text)
    target = load(source)
    apply(EliminateDeadCode(), target)
    assert operators(target) == ["TopK"]
    assert_equal(run(source, random_feeds(source)), run(target, random_feeds(source)))


def test_what_a_quantization_annotation_names_stays() -> None:
    source = proto("g (float x) => (float y) { y = Neg(x) }")
    source.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "x_scale"))
    entry = source.graph.quantization_annotation.add(tensor_name="x")
    entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="x_scale")
    target = load(source)
    assert not apply(EliminateDeadCode(), target).changes
    assert target.to_proto() == source


def test_overridable_initializers_are_inputs() -> None:
    source = proto("g (float x, float w) => (float y) { y = Neg(x) }")
    source.graph.initializer.append(helper.make_tensor("w", 1, [], [2.0]))
    target = load(source)
    assert not apply(EliminateDeadCode(), target).changes
