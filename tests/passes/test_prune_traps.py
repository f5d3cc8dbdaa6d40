"""Constructs that look as if a channel could go, or go that way, and are not what they seem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from onnxopt.model import Model, load
from onnxopt.passes.prune import Prune
from tests.graph.test_channels import context, relative_error
from tests.graph.topologies import Net
from tests.helpers import random_feeds, run

SMALL = (2, 3, 4, 4)


def dead(proto: ModelProto, *names: str, rows: tuple[int, ...] = (1,)) -> ModelProto:
    """The proto with these rows of these initializers zeroed."""
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            array = numpy_helper.to_array(tensor).copy()
            array[list(rows)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def same_after_pruning(proto: ModelProto) -> tuple[Model, Any]:
    model = load(proto)
    result = Prune(round_to=1).run(model, context())
    feeds = random_feeds(proto)
    assert relative_error(run(proto, feeds), run(model, feeds)) < 1e-5
    return model, result


def finished(n: Net, x: str, channels: int, shape: tuple[Any, ...] = ("a", "b", "c", "d")) -> ModelProto:
    return n.model(n.call("Conv", x, n.weights(2, channels, 1, 1)), SMALL, shape)


def conv(n: Net, channels: int) -> str:
    return n.call("Conv", "x", n.weights(channels, 3, 1, 1), n.weights(channels))


def test_a_constant_image_of_equal_values_is_added_at_its_value() -> None:
    n = Net(1)
    x = n.call("Add", conv(n, 4), n.value(np.full((1, 1, 4, 4), 3, np.float32)))
    _, result = same_after_pruning(dead(finished(n, x, 4), "c0"))
    assert result.changes


@pytest.mark.parametrize("op", ["MaxPool", "Dropout"])
def test_indices_and_masks_cover_all_channels(op: str) -> None:
    n = Net(2)
    attrs: dict[str, Any] = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    x, other = n.calls(op, 2, conv(n, 4), **attrs)
    proto = dead(finished(n, x, 4), "c0", "c1")
    kind = TensorProto.INT64 if op == "MaxPool" else TensorProto.BOOL
    proto.graph.output.append(helper.make_tensor_value_info(other, kind, None))
    assert not same_after_pruning(proto)[1].changes


def test_squeeze_of_all_ones_does_not_take_a_channel_that_became_one() -> None:
    n = Net(3)
    x = n.call("Squeeze", n.call("GlobalAveragePool", conv(n, 2)))
    proto = dead(n.model(n.call("MatMul", x, n.weights(2, 5)), SMALL, (2, 5)), "c0", "c1")
    _, result = same_after_pruning(proto)
    assert result.changes


def test_one_target_shape_of_two_reshapes_is_rewritten_for_each() -> None:
    n = Net(4)
    target = n.ints(2, 8, 16)
    parts = []
    for _ in range(2):
        x = n.call("Transpose", n.call("Reshape", conv(n, 8), target), perm=[0, 2, 1])
        parts.append(n.call("MatMul", x, n.weights(8, 5)))
    proto = n.model(n.call("Add", *parts), SMALL, (2, 16, 5))
    names = [tensor.name for tensor in proto.graph.initializer]
    dead(dead(proto, names[1], names[2], rows=(1, 5)), names[4], names[5], rows=(2,))
    _, result = same_after_pruning(proto)
    assert sum(change.count for change in result.changes) == 3


@pytest.mark.parametrize("how", ["Split", "Gather", "Transpose", "Slice"])
def test_two_parts_of_one_channel_are_not_equal(how: str) -> None:
    n = Net(5)
    x = n.call("Conv", "x", n.weights(4, 3, 1, 1))
    if how == "Split":
        one, other = n.calls("Split", 2, x, axis=2)
    elif how == "Gather":
        one, other = (n.call("Gather", x, n.ints(a, b), axis=2) for a, b in ((0, 1), (2, 3)))
    elif how == "Transpose":
        one, other = n.call("Identity", x), n.call("Transpose", x, perm=[0, 1, 3, 2])
    else:
        one, other = (n.call("Slice", x, n.ints(a), n.ints(a + 2), n.ints(2)) for a in (0, 2))
    proto = finished(n, n.call("Concat", one, other, axis=1), 8)
    weights = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights[3] = weights[1]
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "c0"))
    _, result = same_after_pruning(proto)
    assert sum(change.count for change in result.changes) == 1


def test_sums_of_integers_take_no_factors() -> None:
    n = Net(6)
    first = n.value(np.array([[2, 3, 1], [4, 6, 2]], np.int32))
    whole = n.call("Cast", n.call("Mul", "x", n.value(np.float32(20))), to=TensorProto.INT32)
    x = n.call("MatMul", whole, first)
    y = n.call("Cast", n.call("MatMul", x, n.value(np.array([[1], [2], [3]], np.int32))), to=TensorProto.FLOAT)
    assert not same_after_pruning(n.model(y, (2, 2), (2, 1)))[1].changes


def test_an_attribute_that_the_caller_of_a_function_sets_freezes_its_node() -> None:
    weights = [np.random.default_rng(i).standard_normal((4, c, 1, 1)).astype(np.float32) for i, c in ((0, 3), (1, 4))]
    weights[0][1] = 0
    constants = [helper.make_node("Constant", [], [f"w{i}"], value=numpy_helper.from_array(weights[i])) for i in (0, 1)]
    transpose = helper.make_node("Transpose", ["t"], ["u"])
    transpose.attribute.append(AttributeProto(name="perm", ref_attr_name="order", type=AttributeProto.INTS))
    nodes = [
        *constants,
        helper.make_node("Conv", ["x", "w0"], ["t"]),
        transpose,
        helper.make_node("Conv", ["u", "w1"], ["y"]),
    ]
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("local", "F", ["x"], ["y"], nodes, [opset], ["order"])
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", SMALL), ("y", None))
    ]
    call = helper.make_node("F", ["x"], ["y"], domain="local", order=[0, 1, 3, 2])
    graph = helper.make_graph([call], "g", info[:1], info[1:])
    imports = [opset, helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    _, result = same_after_pruning(proto)
    assert not result.changes


def test_what_a_local_function_is_given_stays_and_the_report_says_why() -> None:
    n = Net(11)
    x = n.call("Twice", conv(n, 4), domain="local")
    proto = dead(finished(n, x, 4), "c0", "c1")
    opset = helper.make_opsetid("", 17)
    nodes = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], nodes, [opset]))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    _, result = same_after_pruning(proto)
    assert not result.changes
    assert "calls of the local function Twice are not followed" in {skip.reason for skip in result.skipped}


def test_a_resize_that_fills_in_a_value_makes_zero_that_value() -> None:
    n = Net(8)
    data = conv(n, 4)
    region = n.value(np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], np.float32))
    scales = n.value(np.array([1, 1, 2, 2], np.float32))
    mode = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 5.0}
    x = n.call("Resize", data, region, scales, **mode)
    assert not same_after_pruning(dead(finished(n, x, 4), "c0", "c1"))[1].changes


def test_a_zero_that_copies_the_cut_length_to_another_axis_freezes_it() -> None:
    n = Net(9)
    x = n.call("Conv", "x", n.weights(4, 3, 1))
    x = n.call("Transpose", n.call("Reshape", x, n.ints(12, 0)), perm=[1, 0])
    proto = n.model(n.call("MatMul", x, n.weights(12, 5)), (2, 3, 6), (4, 5))
    assert not same_after_pruning(dead(proto, "c0", rows=(2, 3)))[1].changes


def test_channels_of_doubles_that_differ_by_the_rounding_of_floats_are_different() -> None:
    n = Net(10)
    first = np.random.default_rng(0).standard_normal((4, 6))
    first[1] = first[0] * (1 + 3e-7 * (np.arange(6) % 2))
    x = n.call("MatMul", n.call("Cast", "x", to=TensorProto.DOUBLE), n.value(first.T.copy()))
    y = n.call("Cast", n.call("MatMul", x, n.value(np.array([[1.0], [-1.0], [0.5], [0.25]]))), to=TensorProto.FLOAT)
    assert not same_after_pruning(n.model(y, (2, 6), (2, 1)))[1].changes
