"""Lossless pruning of recurrent cells, heads and bodies: what is dead, what only looks so, and why it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.graph.channels import frozen_reasons
from onnxopt.model import Model, load
from onnxopt.passes.prune import Prune
from tests.graph.net import Net
from tests.graph.oracle import cut, free_sets, maps_of, silenced
from tests.graph.test_channels import context, relative_error, removed_by
from tests.helpers import node_of, random_feeds, run

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CANDIDATE = {"LSTM": 3, "GRU": 2, "RNN": 0}
HIDDEN = 6
Weights = dict[str, np.ndarray]


def network(op: str, edit: Callable[[Weights], None], directions: int = 1, **attrs: Any) -> ModelProto:
    """A recurrent layer of 6 units, weights edited first: W, R, B and, if added, initial_h and initial_c."""
    n = Net(5)
    rows = GATES[op] * HIDDEN
    shapes = {"W": (directions, rows, 3), "R": (directions, rows, HIDDEN), "B": (directions, 2 * rows)}
    weights = {name: n.rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    edit(weights)
    states = [n.value(weights[name]) for name in ("initial_h", "initial_c") if name in weights]
    inputs = [n.value(weights[name]) for name in ("W", "R", "B")] + (["", *states] if states else [])
    if directions == 2:
        attrs["direction"] = "bidirectional"
    y = n.call(op, "x", *inputs, hidden_size=HIDDEN, **attrs)
    y = n.call("Reshape", n.call("Transpose", y, perm=[0, 2, 1, 3]), n.ints(0, 0, HIDDEN * directions))
    readers = weights.get("readers", n.rng.standard_normal((HIDDEN * directions, 4)).astype(np.float32))
    return n.model(n.call("MatMul", y, n.value(readers)), (5, 2, 3), (5, 2, 4))


def silence(op: str, *units: int) -> Callable[[Weights], None]:
    """Zero the candidate's rows of these units."""

    def edit(weights: Weights) -> None:
        for unit in units:
            row = CANDIDATE[op] * HIDDEN + unit
            weights["W"][:, row] = weights["R"][:, row] = 0
            weights["B"][:, row] = weights["B"][:, GATES[op] * HIDDEN + row] = 0

    return edit


def pruned(proto: ModelProto) -> tuple[Model, int]:
    """The model after pruning, which computes the same, and how many channels went."""
    model = load(proto)
    result = Prune(round_to=1).run(model, context())
    feeds = random_feeds(proto)
    assert relative_error(run(proto, feeds), run(model, feeds)) < 1e-5
    return model, removed_by(result)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op", GATES)
def test_units_without_a_candidate_are_dead(op: str, directions: int) -> None:
    model, count = pruned(network(op, silence(op, 1, 4), directions))
    node = node_of(model, op)
    assert count == 2
    assert node.attrs["hidden_size"] == 4
    assert [tensor.shape for tensor in node.inputs[1:]] == [
        (directions, GATES[op] * 4, 3),
        (directions, GATES[op] * 4, 4),
        (directions, GATES[op] * 8),
    ]


def test_linear_before_reset_changes_nothing() -> None:
    assert pruned(network("GRU", silence("GRU", 0), linear_before_reset=1))[1] == 1


def test_a_clip_and_coupled_gates_change_nothing() -> None:
    assert pruned(network("LSTM", silence("LSTM", 0), clip=2.0))[1] == 1


@pytest.mark.parametrize(("activations", "count"), [(["Sigmoid", "Relu", "Tanh"], 1), (["Tanh", "Sigmoid", "Tanh"], 0)])
def test_a_candidate_of_zero_must_stay_zero(activations: list[str], count: int) -> None:
    assert pruned(network("LSTM", silence("LSTM", 2), activations=activations))[1] == count


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_an_initial_state_must_be_zero(op: str, value: float) -> None:
    def edit(weights: Weights) -> None:
        silence(op, 3)(weights)
        for name in ("initial_h", "initial_c")[: 2 if op == "LSTM" else 1]:
            weights[name] = np.full((1, 2, HIDDEN), value, np.float32)

    model, count = pruned(network(op, edit))
    assert count == (value == 0)
    assert node_of(model, op).inputs[5].shape == (1, 2, HIDDEN - count)


@pytest.mark.parametrize("op", GATES)
def test_units_with_the_same_weights_are_merged(op: str) -> None:
    def edit(weights: Weights) -> None:
        for gate in range(GATES[op]):
            for name in ("W", "R"):
                weights[name][:, gate * HIDDEN + 5] = weights[name][:, gate * HIDDEN + 2]
            for half in (0, GATES[op] * HIDDEN):
                weights["B"][:, half + gate * HIDDEN + 5] = weights["B"][:, half + gate * HIDDEN + 2]

    model, count = pruned(network(op, edit, 2))
    assert count == 1
    assert node_of(model, op).attrs["hidden_size"] == 5


@pytest.mark.parametrize("op", GATES)
def test_a_unit_that_only_reads_itself_is_unread(op: str) -> None:
    def edit(weights: Weights) -> None:
        own = weights["R"][:, 4::HIDDEN, 4].copy()
        weights["R"][:, :, 4] = 0
        weights["R"][:, 4::HIDDEN, 4] = own
        weights["readers"] = np.random.default_rng(0).standard_normal((HIDDEN, 4)).astype(np.float32)
        weights["readers"][4] = 0

    assert pruned(network(op, edit))[1] == 1


def test_a_state_from_outside_keeps_its_units() -> None:
    n = Net(6)
    y, h = n.calls("GRU", 2, "x", n.weights(1, 18, 3), n.weights(1, 18, 6), "", "", "x0", hidden_size=6)
    proto = n.model(n.linear(n.call("Squeeze", y, n.ints(1)), 6, 4), (5, 2, 3), (5, 2, 4))
    proto.graph.input.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, (1, 2, 6)))
    assert not free_sets(maps_of(load(proto)))
    reasons = {skip.reason for skip in Prune().run(load(proto), context()).skipped}
    assert "an initial state of GRU can't be cut" in reasons
    assert h


def test_constants_read_by_a_cell_fold_into_its_bias() -> None:
    n = Net(7)
    x = n.call("Add", n.call("MatMul", "x", n.weights(3, 8)), n.weights(8))
    y = n.call("LSTM", x, n.weights(1, 24, 8), n.weights(1, 24, 6), hidden_size=6)
    proto = n.model(n.linear(n.call("Squeeze", y, n.ints(1)), 6, 4), (5, 2, 3), (5, 2, 4))
    weights = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights[:, 2:5] = 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "c0"))
    model, count = pruned(proto)
    assert count == 3
    assert node_of(model, "LSTM").inputs[3].shape == (1, 48)


def attention(mask: Callable[[Net], str]) -> ModelProto:
    """Four heads with a mask added to the scores."""
    n = Net(8)
    parts = [n.call("Reshape", n.linear("x", 6, 24), n.ints(0, 0, 4, 6)) for _ in range(3)]
    q, k, v = (n.call("Transpose", part, perm=[0, 2, 1, 3]) for part in parts)
    scores = n.call("MatMul", q, n.call("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = n.call("MatMul", n.call("Softmax", n.call("Add", scores, mask(n)), axis=-1), v)
    mixed = n.call("Reshape", n.call("Transpose", mixed, perm=[0, 2, 1, 3]), n.ints(0, 0, 24))
    return n.model(n.linear(mixed, 24, 3), (2, 5, 6), (2, 5, 3))


def test_a_constant_bias_of_each_head_is_cut_with_it() -> None:
    proto = attention(lambda n: n.weights(1, 4, 5, 5))
    chosen = free_sets(maps_of(load(proto), "outer"))
    assert len(chosen) == 4
    model, _ = cut(proto, chosen[1:3], "outer")
    feeds = random_feeds(proto)
    assert relative_error(run(silenced(proto, chosen[1:3], "outer"), feeds), run(model, feeds)) < 1e-4
    assert any(constant.shape == (1, 2, 5, 5) for constant in model.constants())


def test_a_mask_of_each_head_from_outside_keeps_the_heads() -> None:
    proto = attention(lambda _: "mask")
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, (2, 4, 5, 5)))
    maps = maps_of(load(proto), "outer")
    assert not free_sets(maps)
    assert ("n14_Add", "Add joins it with a tensor that can't be cut") in frozen_reasons(maps)


def test_the_shape_of_a_tensor_that_is_cut_is_not_given_to_another() -> None:
    """Reshape takes the shape of a convolution's output: its channels stay, whatever becomes of the reshaped."""
    n = Net(9)
    x = n.call("Conv", "x", n.weights(6, 4, 1, 1))
    y = n.call("Reshape", n.call("Concat", "x", "x", "x", axis=1), n.call("Shape", n.call("Concat", x, x, axis=1)))
    both = n.call("Add", n.conv(x, 6, 2, 1), n.conv(y, 12, 2, 1))
    proto = n.model(both, (2, 4, 3, 3), (2, 2, 3, 3))
    assert not free_sets(maps_of(load(proto)))


@pytest.mark.parametrize("split", ["outer", "inner"])
def test_one_target_of_two_reshapes_is_rewritten_for_the_one_that_is_cut(split: Any) -> None:
    n = Net(10)
    batch = n.call("Slice", n.call("Shape", "x"), n.ints(0), n.ints(1), n.ints(0))
    target = n.call("Concat", batch, n.ints(5), n.ints(4), n.ints(3), axis=0)
    parts = [n.call("Reshape", n.linear("x", 6, 12), target) for _ in range(2)]
    flat = [n.call("Reshape", part, n.ints(0, 0, -1)) for part in parts]
    proto = n.model(n.call("Add", *(n.linear(part, 12, 3) for part in flat)), ("N", 5, 6), ("N", 5, 3))
    chosen = free_sets(maps_of(load(proto), split))[:2]
    model, _ = cut(proto, chosen, split)
    feeds = random_feeds(proto)
    assert relative_error(run(silenced(proto, chosen, split), feeds), run(model, feeds)) < 1e-4


def test_states_that_change_places_go_together() -> None:
    n = Net(11)
    one, other = n.linear("x", 6, 8), n.linear("x", 6, 8)
    nodes = [
        helper.make_node("Tanh", ["b"], ["a_next"]),
        helper.make_node("Relu", ["a"], ["b_next"]),
        helper.make_node("Identity", ["go_in"], ["go"]),
    ]
    given = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in "ab"),
    ]
    made = [helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    made += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("a_next", "b_next")]
    body = helper.make_graph(nodes, "body", given, made)
    a, b = n.calls("Loop", 2, n.value(np.int64(3)), n.value(np.bool_(True)), one, other, body=body)
    proto = n.model(n.call("Add", n.linear(a, 8, 3), n.linear(b, 8, 3)), ("N", 6), ("N", 3))
    chosen = free_sets(maps_of(load(proto)))
    assert len(chosen) == 8
    model, _ = cut(proto, chosen[:3])
    feeds = random_feeds(proto)
    assert relative_error(run(silenced(proto, chosen[:3]), feeds), run(model, feeds)) < 1e-4


def test_a_state_that_starts_as_an_input_stays() -> None:
    n = Net(12)
    nodes = [
        helper.make_node("MatMul", ["h", "r"], ["h_next"]),
        helper.make_node("Identity", ["go_in"], ["go"]),
    ]
    given = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 6]),
    ]
    made = [
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h_next", TensorProto.FLOAT, ["N", 6]),
    ]
    weights = numpy_helper.from_array(np.eye(6, dtype=np.float32), "r")
    body = helper.make_graph(nodes, "body", given, made, [weights])
    h = n.call("Loop", n.value(np.int64(3)), n.value(np.bool_(True)), "x", body=body)
    proto = n.model(n.linear(h, 6, 3), ("N", 6), ("N", 3))
    assert not free_sets(maps_of(load(proto)))
    reasons = {skip.reason for skip in Prune().run(load(proto), context()).skipped}
    assert "it is carried by Loop with what can't be cut" in reasons
