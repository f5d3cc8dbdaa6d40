from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from onnxopt.errors import UsageError
from onnxopt.graph.part import part_of
from onnxopt.model import Model, load
from tests.helpers import model, proto, run, with_weights

CHAIN = """agraph (float[N,3] x, float[N,4] other) => (float[N,4] y, float[N,4] z) {
    h = MatMul(x, w)
    r = Relu(h)
    y = Mul(r, v)
    z = Add(r, other)
}"""
W, V = np.arange(12, dtype=np.float32).reshape(3, 4) - 5, np.arange(4, dtype=np.float32)


def chain() -> Model:
    return load(with_weights(proto(CHAIN), w=W, v=V))


def names(given: Model) -> tuple[list[str], list[str], list[str], list[str]]:
    graph = given.to_proto().graph
    return (
        [info.name for info in graph.input],
        [info.name for info in graph.output],
        [node.output[0] for node in graph.node],
        [tensor.name for tensor in graph.initializer],
    )


def test_outputs_alone_keep_what_they_depend_on() -> None:
    before = chain()
    part = part_of(before, None, ["y"])
    assert names(part) == (["x"], ["y"], ["h", "r", "y"], ["w", "v"])
    onnx.checker.check_model(part.to_proto(), full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    whole = run(before, {"x": x, "other": np.zeros((2, 4), np.float32)})
    assert run(part, {"x": x})["y"].tobytes() == whole["y"].tobytes()


def test_a_cut_between_inner_tensors_computes_the_same() -> None:
    before = chain()
    part = part_of(before, ["h"], ["r", "y"])
    assert names(part) == (["h"], ["r", "y"], ["r", "y"], ["v"])
    kind = part.to_proto().graph.input[0].type.tensor_type
    assert (kind.elem_type, kind.shape.dim[0].dim_param, kind.shape.dim[1].dim_value) == (1, "N", 4)
    onnx.checker.check_model(part.to_proto(), full_check=True)
    h = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    found = run(part, {"h": h})
    assert found["r"].tobytes() == np.maximum(h, 0).tobytes()
    assert found["y"].tobytes() == (np.maximum(h, 0) * V).tobytes()


def test_the_order_is_the_one_given() -> None:
    part = part_of(chain(), ["other", "x"], ["z", "h"])
    assert names(part)[:2] == (["other", "x"], ["z", "h"])


def test_inputs_alone_keep_the_models_outputs() -> None:
    assert names(part_of(chain(), ["other", "r"], None))[:3] == (["other", "r"], ["y", "z"], ["y", "z"])


def test_what_a_body_reads_from_outside_is_kept() -> None:
    text = """agraph (bool c, float[N] x) => (float[N] y) {
        k = Neg(x)
        u = Abs(x)
        y = If(c) <then_branch = a () => (float[N] t) { t = Relu(k) },
                   else_branch = b () => (float[N] e) { e = Abs(k) }>
    }"""
    part = part_of(model(text), ["c", "k"], ["y"])
    assert names(part) == (["c", "k"], ["y"], ["y"], [])
    k = np.array([-1, 2], np.float32)
    assert run(part, {"c": np.array(True), "k": k})["y"].tolist() == [0, 2]
    with pytest.raises(UsageError) as caught:
        part_of(model(text), None, ["t"])
    assert "within the body of a If" in caught.value.remedy


def test_a_node_that_also_makes_a_wanted_output_keeps_its_number_of_outputs() -> None:
    text = "agraph (float[4] x) => (float[2] a, float[2] b) { a, b = Split<axis=0>(x) \n c = Add(a, b) }"
    source = proto(text)
    source.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, [2]))
    part = part_of(load(source), ["a", "x"], ["b", "c"])
    x = np.arange(4, dtype=np.float32)
    found = run(part, {"a": np.array([10, 20], np.float32), "x": x})
    assert (found["b"].tolist(), found["c"].tolist()) == ([2, 3], [12, 23])


def test_defaults_functions_and_ir_3() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    agraph (float[2] x, float[2] d) => (float[2] y, float[2] z) { y = my.one(x, d) z = my.two(x) }
    <domain: "my", opset_import: ["" : 17]> one (a, b) => (c) { c = Add(a, b) }
    <domain: "my", opset_import: ["" : 17]> two (a) => (c) { c = Neg(a) }"""
    source = with_weights(onnx.parser.parse_model(text), d=np.ones(2, np.float32))
    with_default = part_of(load(source), ["x"], ["y"]).to_proto()
    assert [info.name for info in with_default.graph.input] == ["x", "d"]
    assert [function.name for function in with_default.functions] == ["one"]
    assert run(with_default, {"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 1]
    without = part_of(load(source), None, ["z"]).to_proto()
    assert (len(without.graph.initializer), [function.name for function in without.functions]) == (0, ["two"])
    old = with_weights(proto(CHAIN, opset=8, ir_version=3), w=W, v=V)
    for name, values in (("w", W), ("v", V)):
        old.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, values.shape))
    part = part_of(load(old), ["h"], ["y"])
    assert (sorted(names(part)[0]), *names(part)[1:]) == (["h", "v"], ["y"], ["r", "y"], ["v"])
    onnx.checker.check_model(part.to_proto())


@pytest.mark.parametrize(
    ("inputs", "outputs", "cause", "remedy"),
    [
        (None, ["yy"], "output 'yy': the main graph has no such tensor", "did you mean 'y'?"),
        (["w"], ["y"], "input 'w' is a constant", "that is computed"),
        (["h", "h"], ["y"], "input 'h' is named twice", "once"),
        ([], ["y"], "no input is named", "leave --inputs out"),
        (["h"], ["h"], "output 'h' is an input too", "computed"),
        (["z"], ["y"], "input 'z': none of the outputs depends on it", "leave it out"),
        (["h"], ["y", "z"], "depend on 'other' too", "add to --inputs: other"),
    ],
)
def test_every_refusal_says_what_and_what_to_do(
    inputs: Sequence[str] | None, outputs: Sequence[str], cause: str, remedy: str
) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        part_of(chain(), inputs, outputs)
    assert remedy in caught.value.remedy


def test_the_name_of_a_node_is_told_from_that_of_a_tensor() -> None:
    with pytest.raises(UsageError) as caught:
        part_of(model("agraph (float[2] x) => (float[2] y) { [relu] y = Relu(x) }"), None, ["relu"])
    assert caught.value.remedy == "it is the name of a node, whose outputs are called: y"
