"""eliminate_default_inputs: inputs that hold what is assumed without them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from onnxopt.model import load
from onnxopt.passes.eliminate_default_inputs import EliminateDefaultInputs
from tests.helpers import apply, assert_equal, node_of, operators, proto, run


def recurrent(op: str, states: str, before: str = "", gates: int = 3) -> ModelProto:
    source = proto(
        f"""g (float[n,b,4] x, float[1,b,3] h) => (float[n,1,b,3] y)
        <float zero = {{0}}, int64[1] one = {{1}}, int64[1] v0 = {{0}}, int64[1] v1 = {{1}}, int64[1] v2 = {{2}},
         int64[1] three = {{3}}> {{ {before} y = {op}<hidden_size = 3>(x, W, R, , {states}) }}"""
    )
    rng = np.random.default_rng(0)
    for name, width in (("W", 4), ("R", 3)):
        values = rng.standard_normal((1, 3 * gates, width)).astype(np.float32)
        source.graph.initializer.append(numpy_helper.from_array(values, name))
    source.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 2, 3), np.float32), "zeros"))
    source.graph.initializer.append(numpy_helper.from_array(np.full((1, 2, 3), -0.0, np.float32), "minus"))
    return source


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal((5, 2, 4)).astype(np.float32),
        "h": rng.standard_normal((1, 2, 3)).astype(np.float32),
    }


SHAPE = "s = Shape(x) b = Slice(s, v1, v2, v0) t = Concat<axis = 0>(one, b, three)"
ZEROS = {
    "a constant": ("GRU", ", zeros", "", 3),
    "ConstantOfShape": ("GRU", ", z", f"{SHAPE} z = ConstantOfShape(t)", 3),
    "Expand": ("RNN", ", z", f"{SHAPE} z = Expand(zero, t)", 1),
    "a slice of zeros": (
        "GRU", ", z", "s = Shape(x) b = Slice(s, v1, v2, v0) t = Concat<axis = 0>(three, b, three) "
        "k = Expand(zero, t) z = Slice(k, v1, v2, v0)", 3),
    "both states of an LSTM": ("LSTM", ", zeros, zeros", "", 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ZEROS))
def test_states_of_zeros_go(kind: str) -> None:
    source = recurrent(*ZEROS[kind])
    target = load(source)
    assert apply(EliminateDefaultInputs(), target).changes
    assert operators(target) == [ZEROS[kind][0]]
    assert len(target.graph.nodes[0].inputs) == 3
    assert_equal(run(source, feeds()), run(target, feeds()))
    assert not apply(EliminateDefaultInputs(), target).changes


def test_one_state_of_two() -> None:
    source = recurrent("LSTM", ", zeros, h", gates=4)
    target = load(source)
    apply(EliminateDefaultInputs(), target)
    assert [tensor.name for tensor in target.graph.nodes[0].inputs] == ["x", "W", "R", "", "", "", "h"]
    assert_equal(run(source, feeds()), run(target, feeds()))


@pytest.mark.parametrize("states", [", h", ", minus"])
def test_other_states_stay(states: str) -> None:
    target = load(recurrent("GRU", states))
    before = target.digest()
    assert not apply(EliminateDefaultInputs(), target).changes
    assert target.digest() == before


def test_all_outputs_of_a_recurrent_layer_stay() -> None:
    source = recurrent("LSTM", ", zeros, zeros", gates=4)
    source.graph.node[0].output.extend(["", "c"])
    source.graph.output.append(source.graph.input[1])
    source.graph.output[1].name = "c"
    target = load(source)
    apply(EliminateDefaultInputs(), target)
    assert [tensor.name for tensor in target.graph.nodes[0].outputs] == ["y", "", "c"]
    assert_equal(run(source, feeds()), run(target, feeds()))


def test_steps_of_one_and_fills_of_zero() -> None:
    source = proto(
        """g (float[4,3] x) => (float[a,b] y) <int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2},
        int64[4] pads = {1, 0, 0, 2}, float zero = {0}, float one = {1}> {
        a = Slice(x, v1, v2, v0, v1) b = Slice(x, v0, v2, v0, v2) c = Concat<axis = 0>(a, b)
        d = Pad(c, pads, zero) y = Pad(d, pads, one) }"""
    )
    target = load(source)
    assert len(apply(EliminateDefaultInputs(), target).changes) == 2
    assert [len(node.inputs) for node in target.graph.nodes] == [4, 5, 2, 2, 3]
    given = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
    assert_equal(run(source, given), run(target, given))
    assert node_of(target, "Concat").inputs[0].inputs[0].name == ""
