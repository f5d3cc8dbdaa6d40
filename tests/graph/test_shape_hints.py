"""Lengths that follow from computed target shapes, weights and bodies."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper

from onnxopt.graph import infer
from onnxopt.model import load
from tests.graph.net import Net
from tests.graph.topologies_bodies import looped
from tests.helpers import proto as parse


def shapes(source: ModelProto) -> dict[str, Any]:
    """Name -> shape of every tensor that nodes make, after inference."""
    model = load(source)
    infer(model)
    return {t.name: None if t.shape is None else list(t.shape) for node in model.graph.nodes for t in node.outputs}


def numbers(source: ModelProto, name: str) -> list[int | None]:
    return [length if isinstance(length, int) else None for length in shapes(source)[name]]


def test_the_rest_of_a_computed_target_is_what_the_other_lengths_leave() -> None:
    n = Net(opset=17)
    lengths = n.call("Shape", "x")
    parts = [n.call("Unsqueeze", n.call("Gather", lengths, n.value(at)), n.ints(0)) for at in (0, 1)]
    y = n.call("Reshape", n.call("MatMul", "x", n.weights(6, 24)), n.call("Concat", *parts, n.ints(-1, 8), axis=0))
    assert numbers(n.model(y, ("N", "S", 6), (None,) * 4), y) == [None, None, 3, 8]


def test_a_rest_that_may_hold_an_open_length_is_not_guessed() -> None:
    n = Net()
    batch = n.call("Slice", n.call("Shape", "x"), n.ints(0), n.ints(1), n.ints(0))
    y = n.call("Reshape", n.call("MatMul", "x", n.weights(6, 24)), n.call("Concat", batch, n.ints(-1, 8), axis=0))
    assert numbers(n.model(y, ("N", "S", 6), (None,) * 3), y) == [None, None, 8]


def test_a_mask_expanded_to_what_is_there_keeps_its_ones() -> None:
    text = """
        g (float[N, 1, 1, S] m, int64[1] n) => (float[a, b, c, d] y)
        <int64[1] minus = {-1}, int64[4] minuses = {-1, -1, -1, -1}, int64[4] ones = {1, 1, 1, 1}> {
            wanted = Concat <axis = 0> (n, minus, n, n)
            open = Equal (wanted, minuses)
            target = Where (open, ones, wanted)
            e = Expand (m, target)
            y = Identity (e)
        }
    """
    assert numbers(parse(text), "e") == [None, 1, None, None]


def test_what_weights_multiply_is_as_long_as_they_have_rows() -> None:
    n = Net()
    x = n.call("Reshape", n.call("Transpose", "x", perm=[0, 2, 1, 3]), n.call("Concat", "t", n.ints(-1), axis=0))
    proto = n.model(n.call("MatMul", x, n.weights(12, 4)), ("N", 3, "S", 4), (None, None, 4))
    proto.graph.input.append(helper.make_tensor_value_info("t", TensorProto.INT64, (2,)))
    assert numbers(proto, x) == [None, None, 12]


def test_open_lengths_that_the_file_states_are_filled_in_and_numbers_are_kept() -> None:
    text = """
        g (float[N, 6] x) => (float[a, b] y)
        <int64[2] target = {-1, 3}, float[a, b] r, float[c, 7] i> {
            r = Reshape (x, target)
            i = Identity (r)
            y = Identity (i)
        }
    """
    found = shapes(parse(text))
    assert found["r"] == ["a", 3]
    assert found["i"] == ["c", 7]


def test_a_state_of_a_loop_is_as_long_as_before() -> None:
    found = shapes(looped())
    last, steps = next(node for node in looped().graph.node if node.op_type == "Loop").output
    assert [length if isinstance(length, int) else None for length in found[last]] == [None, 12]
    assert [length if isinstance(length, int) else None for length in found[steps]] == [None, None, 11]


@pytest.mark.parametrize(
    ("op", "expected"), [("FastGelu", [None, 5, 6]), ("QuickGelu", [None, 5, 6]), ("FusedMatMul", [None, 5, 5])]
)
def test_operators_of_the_runtime_are_known(op: str, expected: list[int | None]) -> None:
    n = Net()
    attrs = {"transB": 1} if op == "FusedMatMul" else {}
    y = n.call(op, *["x"] * (1 + bool(attrs)), domain="com.microsoft", **attrs)
    assert numbers(n.model(n.call("Relu", y), ("N", 5, 6), (None,) * 3), y) == expected
