from __future__ import annotations

from typing import Any

import pytest
from onnx import helper, parser

from onnxopt.errors import PassError
from onnxopt.model import load
from onnxopt.pipeline.structure import check_structure, checker_complaint, difference, signature
from tests.pipeline.builders import classifier

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4] x, int64[2] shape) => (float[N, 2, 2] y, float[?, 4] z) {
  y = Reshape(x, shape)
  z = Relu(x)
}
"""


def changed(edit: str, into: str) -> str | None:
    assert edit in NET
    return difference(
        signature(load(parser.parse_model(NET))), signature(load(parser.parse_model(NET.replace(edit, into))))
    )


def test_the_same_text_has_no_difference() -> None:
    assert changed("Relu", "Relu") is None
    assert changed("Relu", "Neg") is None


@pytest.mark.parametrize(
    ("edit", "into", "words"),
    [
        ("float[N, 4] x,", "float[M, 4] x,", "input 'x' changed from float[N,4] to float[M,4]"),
        ("float[N, 4] x,", "float[1, 4] x,", "input 'x' changed from float[N,4] to float[1,4]"),
        ("float[N, 4] x,", "float16[N, 4] x,", "input 'x' changed from float[N,4] to float16[N,4]"),
        ("float[N, 4] x,", "float[N, 4] x, bool b,", "the number of inputs went from 2 to 3"),
        ("float[?, 4] z", "float[N, 4] z", "output 'z' changed from float[?,4] to float[N,4]"),
        ("float[?, 4] z", "float z", "output 'z' changed from float[?,4] to float[]"),
        (", float[?, 4] z)", ")", "the number of outputs went from 2 to 1"),
        ("(float[N, 2, 2] y, float[?, 4] z)", "(float[?, 4] z, float[N, 2, 2] y)", "output 'y' became 'z'"),
    ],
)
def test_every_difference_is_found(edit: str, into: str, words: str) -> None:
    assert changed(edit, into) == words


def test_weights_listed_as_inputs_do_not_belong_to_the_signature() -> None:
    proto = classifier()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    assert [name for name, _, _ in signature(load(proto)).inputs] == ["x"]


def test_the_checker_needs_no_weights() -> None:
    model = load(classifier())
    assert checker_complaint(model) is None
    _, values = model.skeleton()
    assert list(values) == ["w1"]
    model.graph.nodes[2].op = "Reluu"
    complaint = checker_complaint(model)
    assert complaint is not None
    assert "Reluu" in complaint


def test_the_checker_sees_inside_bodies() -> None:
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (bool c, float[4] x) => (float[4] y) {
          y = If(c) <then_branch = one () => (float[4] a) { a = Relu(x) },
                     else_branch = two () => (float[4] b) { b = Neg(x) }>
        }
        """
    )
    model = load(proto)
    assert checker_complaint(model) is None
    inner: Any = next(body for body in model.bodies() if body.name == "two")
    inner.nodes[0].op = "Negg"
    assert "Negg" in (checker_complaint(model) or "")


def test_a_broken_structure_raises_with_what_is_wrong() -> None:
    wanted = signature(load(classifier()))
    check_structure(load(classifier()), wanted)
    model = load(classifier())
    model.graph.nodes.pop(0)
    with pytest.raises(PassError, match="invalid model"):
        check_structure(model, wanted)
    check_structure(model, wanted, checker=False)
