"""infer_shapes: what is written, and what is left as it is."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxopt.model import load
from onnxopt.passbase import Effect
from onnxopt.passes.infer_shapes import InferShapes
from tests.helpers import apply, model, proto, with_weights


def described(target: onnx.GraphProto) -> dict[str, list[int | str | None]]:
    """Name -> dims of every value_info."""
    return {
        info.name: [dim.dim_value or dim.dim_param or None for dim in info.type.tensor_type.shape.dim]
        for info in target.value_info
    }


def test_types_and_shapes_are_written() -> None:
    source = proto(
        "g (float[N, 3, 8, 8] x) => (float[N, 4] y) { a = Conv(x, w) b = GlobalAveragePool(a) y = Flatten(b) }"
    )
    target = load(with_weights(source, w=np.zeros((4, 3, 3, 3), np.float32)))
    assert InferShapes().effect is Effect.EXACT
    [change] = apply(InferShapes(), target).changes
    assert change.count == 2
    written = target.to_proto()
    assert described(written.graph) == {"a": ["N", 4, 6, 6], "b": ["N", 4, 1, 1]}
    onnx.checker.check_model(written, full_check=True)
    assert not apply(InferShapes(), target).changes
    again = load(written)
    assert not apply(InferShapes(), again).changes
    assert again.to_proto().SerializeToString(deterministic=True) == written.SerializeToString(deterministic=True)


def test_present_descriptions_stay_and_unknown_lengths_stay_open() -> None:
    source = proto("g (float[N, 4] x) => (int64[2, M] y) { a = Relu(x) i = NonZero(a) y = Identity(i) }")
    own = helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", 4])
    own.doc_string = "kept"
    source.graph.value_info.append(own)
    target = load(source)
    apply(InferShapes(), target)
    written = target.to_proto()
    assert described(written.graph) == {"a": ["rows", 4], "i": [2, None]}
    assert written.graph.value_info[0].doc_string == "kept"


def test_bodies_are_described_and_functions_are_left() -> None:
    target = model(
        """g (float[2, 4] x, bool c) => (float[2, 4] y) {
        y = If (c) <then_branch = t () => (float[2, 4] p) { q = Relu(x) p = Neg(q) },
                    else_branch = e () => (float[2, 4] r) { r = Identity(x) }> }"""
    )
    apply(InferShapes(), target)
    [node] = target.to_proto().graph.node
    bodies = {attribute.name: attribute.g for attribute in node.attribute}
    assert described(bodies["then_branch"]) == {"q": [2, 4]}
    assert described(bodies["else_branch"]) == {}
