from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt.errors import UsageError
from onnxopt.graph.input_shapes import with_input_shapes
from onnxopt.model import Model, load
from tests.helpers import model, proto, run, with_weights

CONV = """agraph (float[N,3,H,W] x) => (float[N,4,H,W] y) {
    h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    y = Relu(h)
}"""
W = np.ones((4, 3, 3, 3), np.float32)


def conv() -> Model:
    source = with_weights(proto(CONV), w=W)
    source.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, ["N", 4, 7, 7]))  # stale
    return load(source)


def dims(given: Model | onnx.ModelProto, name: str) -> list[Any] | None:
    graph = (given.to_proto() if isinstance(given, Model) else given).graph
    found = [info for info in (*graph.input, *graph.output, *graph.value_info) if info.name == name]
    assert len(found) == 1, name
    kind = found[0].type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else None) for dim in kind.shape.dim]


def test_numbers_reach_inner_tensors_and_outputs_and_the_original_stays() -> None:
    before = conv()
    raw = before.to_proto().SerializeToString()
    changed = with_input_shapes(before, {"x": (1, 3, 8, 6)})
    assert dims(changed, "x") == [1, 3, 8, 6]
    assert dims(changed, "h") == [1, 4, 8, 6]
    assert dims(changed, "y") == [1, 4, 8, 6]
    assert before.to_proto().SerializeToString() == raw
    onnx.checker.check_model(changed.to_proto(), full_check=True)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 6)).astype(np.float32)
    assert run(changed, {"x": x})["y"].tobytes() == run(before, {"x": x})["y"].tobytes()


def test_symbols_are_renamed_kept_and_opened() -> None:
    changed = with_input_shapes(conv(), {"x": ("batch", 3, None, 6)})
    assert dims(changed, "x") == ["batch", 3, "H", 6]
    assert dims(changed, "y") == ["batch", 4, "H", 6]
    opened = with_input_shapes(with_input_shapes(conv(), {"x": (1, 3, 8, 6)}), {"x": (None, 3, 8, "w")})
    assert dims(opened, "x") == [None, 3, 8, "w"]
    assert dims(opened, "y") == [None, 4, 8, None]


def test_other_inputs_follow_a_symbol_unless_it_gets_two_meanings() -> None:
    text = "agraph (int64[B,S] ids, int64[B,S] mask, float[B] c) => (int64[B,S] y, float[B] z) "
    text += "{ y = Add(ids, mask) \n z = Neg(c) }"
    both = with_input_shapes(model(text), {"ids": (1, 128)})
    assert [dims(both, name) for name in ("mask", "c", "y", "z")] == [[1, 128], [1], [1, 128], [1]]
    parted = with_input_shapes(model(text), {"ids": (2, 128), "c": (3,)})
    assert [dims(parted, name) for name in ("ids", "mask", "c", "z")] == [[2, 128], ["B", 128], [3], [3]]


def test_bodies_are_described_anew() -> None:
    source = proto("""agraph (bool c, float[N] x) => (float[N] y) {
        y = If(c) <then_branch = a () => (float[N] t) { s = Neg(x) t = Relu(s) },
                   else_branch = b () => (float[N] e) { e = Abs(x) }>
    }""")
    branch = source.graph.node[0].attribute[0].g
    branch.value_info.append(onnx.helper.make_tensor_value_info("s", 1, [9]))
    changed = with_input_shapes(load(source), {"x": (4,)})
    inner = changed.to_proto().graph.node[0].attribute[0].g
    assert [info.type.tensor_type.shape.dim[0].dim_value for info in (inner.value_info[0], inner.output[0])] == [4, 4]
    assert dims(changed, "y") == [4]
    onnx.checker.check_model(changed.to_proto(), full_check=True)


def test_what_inference_cannot_tell_keeps_no_stale_number() -> None:
    source = proto("agraph (float[2] x) => (float[2] y) { h = my.Op(x) \n y = my.Op(h) }", imports='"my" : 1')
    source.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, [2]))
    changed = with_input_shapes(load(source), {"x": (5,)})
    assert dims(changed, "h") is None
    assert dims(changed, "y") == [None]
    assert changed.to_proto().graph.value_info[0].type.tensor_type.elem_type == 1


def test_the_same_dims_change_nothing() -> None:
    before = conv()
    after = with_input_shapes(before, {"x": (None, 3, "H", None)})
    assert after.to_proto().SerializeToString() == before.to_proto().SerializeToString()


def test_an_input_without_a_shape_gets_one() -> None:
    source = proto("agraph (float x) => (float y) { y = Relu(x) }")
    for info in (source.graph.input[0], source.graph.output[0]):
        info.type.tensor_type.ClearField("shape")
    changed = with_input_shapes(load(source), {"x": (2, "n")})
    assert dims(changed, "x") == [2, "n"]
    assert dims(changed, "y") == [2, "n"]


def test_ir_3_keeps_its_weights_among_the_inputs() -> None:
    source = with_weights(proto(CONV, ir_version=3, opset=8), w=W)
    source.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [4, 3, 3, 3]))
    changed = with_input_shapes(load(source), {"x": (1, 3, 8, 6)})
    assert dims(changed, "w") == [4, 3, 3, 3]
    assert dims(changed, "y") == [1, 4, 8, 6]
    with pytest.raises(UsageError, match="'w' is a weight"):
        with_input_shapes(load(source), {"w": (1, 3, 3, 3)})


@pytest.mark.parametrize(
    ("shapes", "cause", "remedy"),
    [
        ({"image": (1,)}, "no input 'image'", "known: x"),
        ({"x": (1, 3, 8)}, r"4 axes \[N,3,H,W\], not 3", "x:N,3,H,W"),
    ],
)
def test_what_does_not_fit_is_named(shapes: Any, cause: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        with_input_shapes(conv(), shapes)
    assert remedy in caught.value.remedy


def test_dims_that_contradict_the_graph_name_the_node() -> None:
    source = with_weights(
        proto("agraph (float[N,3] x) => (float[N,4] y) { [dense] y = MatMul(x, w) }"), w=W[:, :, 0, 0].T
    )
    with pytest.raises(UsageError, match=r"can't compute with x \[2,5\].*MatMul.*dense") as caught:
        with_input_shapes(load(source), {"x": (2, 5)})
    assert "x [N,3]" in caught.value.remedy


def test_defaults_and_sequences_are_refused() -> None:
    source = with_weights(
        proto("agraph (float[2] x, float[2] d) => (float[2] y) { y = Add(x, d) }"), d=np.ones(2, np.float32)
    )
    with pytest.raises(UsageError, match="default value"):
        with_input_shapes(load(source), {"d": (3,)})
    text = "agraph (seq(float[2]) s, int64 i) => (float[2] y) { y = SequenceAt(s, i) }"
    with pytest.raises(UsageError, match="no tensor"):
        with_input_shapes(model(text), {"s": (3,)})


def test_a_loop_keeps_what_the_runtime_wants_to_know_of_its_body() -> None:
    source = proto("""agraph (float[N] x, int64 trips, bool go) => (float[N] y) {
        y = Loop(trips, go, x) <body = b (int64 i, bool c, float[N] s) => (bool d, float[N] t) {
            d = Identity(c)
            t = Neg(s)
        }>
    }""")
    changed = with_input_shapes(load(source), {"x": (3,)})
    inner = changed.to_proto().graph.node[0].attribute[0].g
    assert inner.input[0].type.tensor_type.HasField("shape")
    assert inner.input[2].type.tensor_type.shape.dim[0].dim_value == 3
    feeds = {"x": np.ones(3, np.float32), "trips": np.array(3), "go": np.array(True)}
    assert run(changed, feeds)["y"].tolist() == [-1, -1, -1]
