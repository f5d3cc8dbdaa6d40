"""Networks with bodies: branches, loops and scans whose states and sequences can be cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from tests.graph.net import Net


def body(name: str, nodes: list[Any], inputs: list[Any], outputs: Sequence[str], **weights: Any) -> GraphProto:
    """A body with float outputs of unknown shape; inputs are (name, shape) or whole descriptions."""
    given = [
        helper.make_tensor_value_info(*item[:1], TensorProto.FLOAT, item[1]) if isinstance(item, tuple) else item
        for item in inputs
    ]
    made = [
        helper.make_tensor_value_info(out, TensorProto.BOOL if out.startswith("go") else TensorProto.FLOAT, None)
        for out in outputs
    ]
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in weights.items()]
    return helper.make_graph(nodes, name, given, made, constants)


def chosen() -> ModelProto:
    """An If whose branches apply an activation each to the same outer tensor."""
    n = Net(71)
    x = n.linear("x", 6, 20)
    bodies = [body(op, [helper.make_node(op, [x], [f"b_{op}"])], [], [f"b_{op}"]) for op in ("Relu", "Tanh")]
    condition = n.call("Greater", n.call("ReduceSum", "x", keepdims=0), n.value(np.float32(0)))
    y = n.call("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    return n.model(n.linear(y, 20, 3), ("N", 6), ("N", 3))


def _cell(n: Net, x: str, inner: int, hidden: int) -> tuple[list[Any], dict[str, Any]]:
    """h' = tanh(x W + h R), with a step's output y = relu(h' V)."""
    nodes = [
        helper.make_node("MatMul", [x, "w"], ["xw"], name="read"),
        helper.make_node("MatMul", ["h", "r"], ["hr"], name="recur"),
        helper.make_node("Add", ["xw", "hr"], ["sum"], name="sum"),
        helper.make_node("Tanh", ["sum"], ["h_next"], name="squash"),
        helper.make_node("MatMul", ["h_next", "v"], ["hv"], name="give"),
        helper.make_node("Relu", ["hv"], ["y_step"], name="step"),
    ]
    shapes = {"w": (inner, hidden), "r": (hidden, hidden), "v": (hidden, 11)}
    return nodes, {key: n.rng.standard_normal(shape) / np.sqrt(shape[0]) for key, shape in shapes.items()}


def looped() -> ModelProto:
    """A Loop that carries a state made outside, reads a tensor from outside and gives out each step."""
    n = Net(72)
    x, start = n.relu(n.linear("x", 6, 9)), n.call("Tanh", n.linear("x", 6, 12))
    nodes, weights = _cell(n, x, 9, 12)
    nodes.append(helper.make_node("Identity", ["go_in"], ["go"]))
    scalars = [helper.make_tensor_value_info("step", TensorProto.INT64, [])]
    scalars.append(helper.make_tensor_value_info("go_in", TensorProto.BOOL, []))
    inner = body("steps", nodes, [*scalars, ("h", ["N", 12])], ["go", "h_next", "y_step"], **weights)
    last, steps = n.calls("Loop", 2, n.value(np.int64(3)), n.value(np.bool_(True)), start, body=inner)
    y = n.call("Add", n.linear(last, 12, 4), n.call("ReduceMean", n.linear(steps, 11, 4), axes=[0], keepdims=0))
    return n.model(y, ("N", 6), ("N", 4))


def scanned() -> ModelProto:
    """A Scan over time with a constant initial state."""
    n = Net(73)
    x = n.relu(n.linear("x", 6, 9))
    nodes, weights = _cell(n, "x_step", 9, 12)
    inner = body("steps", nodes, [("h", [2, 12]), ("x_step", [2, 9])], ["h_next", "y_step"], **weights)
    last, steps = n.calls("Scan", 2, n.weights(2, 12), x, body=inner, num_scan_inputs=1)
    y = n.call("Add", n.linear(last, 12, 4), n.linear(steps, 11, 4))
    return n.model(y, (7, 2, 6), (7, 2, 4))


def scanned_aside() -> ModelProto:
    """A Scan whose sequences go along another axis, backwards, and whose last state nobody reads."""
    n = Net(74)
    x = n.relu(n.linear("x", 6, 9))
    nodes, weights = _cell(n, "x_step", 9, 12)
    inner = body("steps", nodes, [("h", [2, 12]), ("x_step", [2, 9])], ["h_next", "y_step"], **weights)
    axes = {"scan_input_axes": [1], "scan_output_axes": [-2], "scan_input_directions": [1]}
    _, steps = n.calls("Scan", 2, n.weights(2, 12), x, body=inner, num_scan_inputs=1, **axes)
    return n.model(n.linear(steps, 11, 4), (2, 7, 6), (2, 7, 4))


BODIES: dict[str, Callable[[], ModelProto]] = {
    build.__name__: build for build in (chosen, looped, scanned, scanned_aside)
}
