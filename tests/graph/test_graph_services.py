"""Names, order, dead code, edits and shapes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxopt.errors import ModelError
from onnxopt.graph import Names, infer, insert_before, label, remove_dead, replace_uses, sort_model, sort_nodes
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Graph, Node, Variable, load
from tests.helpers import assert_equal, model, operators, proto, run

IF = """g (bool c, float[2] x) => (float[2] y) {
    a = Exp(x)  unused = Neg(a)
    y = If(c) <
        then_branch = t () => (float[2] p) { s = Abs(a)  dead = Neg(s)  p = Neg(s) },
        else_branch = e () => (float[2] q) <float[2] w = {3, 4}> { q = Neg(x) }
    >
}"""


def test_names_are_free_in_every_scope() -> None:
    names = Names(model(IF))
    assert names.tensor("new") == "new"
    assert [names.tensor(base) for base in ("new", "w", "s", "w")] == ["new_1", "w_1", "s_1", "w_2"]
    assert names.node("") == "_1"


def chain(count: int) -> Graph:
    tensors = [Variable(f"t{at}") for at in range(count + 1)]
    nodes = [Node("Neg", f"n{at}", inputs=[tensors[at]], outputs=[tensors[at + 1]]) for at in range(count)]
    return Graph("g", nodes=nodes[::-1], inputs=[tensors[0]], outputs=[tensors[-1]])


def test_a_reversed_chain_of_5000_nodes_is_sorted_quickly() -> None:
    body = chain(5000)
    start = time.perf_counter()
    sort_nodes(body)
    assert time.perf_counter() - start < 2
    assert [node.name for node in body.nodes] == [f"n{at}" for at in range(5000)]


def test_sorting_keeps_a_valid_order() -> None:
    target = model("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) b = Exp(x) z = Abs(b) y = Abs(a) }")
    before = target.digest()
    sort_model(target)
    assert target.digest() == before


def test_a_node_with_bodies_waits_for_what_they_read() -> None:
    target = model(IF)
    target.graph.nodes = target.graph.nodes[::-1]
    sort_model(target)
    assert operators(target).index("Exp") < operators(target).index("If")


def test_a_cycle_is_named() -> None:
    target = model("g (float[2] x) => (float[2] y) { a = Neg(x) y = Abs(a) }")
    target.graph.nodes[0].inputs[0] = target.graph.nodes[1].outputs[0]
    with pytest.raises(ModelError, match="cycle"):
        sort_nodes(target.graph)


def test_dead_code_goes_in_all_bodies() -> None:
    source = proto(IF)
    target = load(source)
    assert remove_dead(target) == 3  # two nodes and a weight
    assert operators(target) == ["Exp", "If"]
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": np.array([1, -2], np.float32)}
        assert_equal(run(source, feeds), run(target, feeds))


def test_a_dead_chain_of_thousands_goes_quickly() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    tensor = target.graph.inputs[0]
    for at in range(3000):
        following = Variable(f"t{at}")
        target.graph.nodes.append(Node("Neg", f"n{at}", inputs=[tensor], outputs=[following]))
        tensor = following
    start = time.perf_counter()
    assert remove_dead(target) == 3000
    assert time.perf_counter() - start < 2
    assert operators(target) == ["Neg"]


def test_unused_outputs_keep_their_position() -> None:
    text = "g (float[2,6] x) => (int64[2,3] z) <int64[1] k = {3}> { v, z = TopK(x, k) }"
    target = model(text)
    assert remove_dead(target) == 0
    assert [tensor.name for tensor in target.graph.nodes[0].outputs] == ["v", "z"]


def test_what_only_a_body_reads_is_alive() -> None:
    target = model(IF)
    remove_dead(target)
    assert any(node.op == "Exp" for node in target.graph.nodes)


def test_detaching_8000_consumers_is_quick() -> None:
    source = Variable("x")
    nodes = [Node("Neg", f"n{at}", inputs=[source], outputs=[Variable(f"t{at}")]) for at in range(8000)]
    start = time.perf_counter()
    for node in reversed(nodes):
        node.inputs.clear()
    assert time.perf_counter() - start < 5
    assert len(source.outputs) == 0


def test_replacing_uses_reaches_all_bodies_but_not_the_signature() -> None:
    target = model(IF)
    exp = target.graph.nodes[0].outputs[0]
    assert replace_uses(exp, target.graph.inputs[1], target) == 2
    _, then, _ = target.bodies()
    assert then.nodes[0].inputs[0] is target.graph.inputs[1]
    output = target.graph.outputs[0]
    assert replace_uses(output, exp, target) == 0
    assert target.graph.outputs[0] is output
    inner = then.outputs[0]
    assert replace_uses(inner, exp, target) == 1
    assert then.outputs[0] is exp


def test_inserting_and_labels() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    node = target.graph.nodes[0]
    new = Node("Abs", "", inputs=[target.graph.inputs[0]], outputs=[Variable("t")])
    insert_before(node, [new], target.graph)
    assert operators(target) == ["Abs", "Neg"]
    assert (label(new), label(node), label(Node("Op"))) == ("t", "y", "Op")


def test_shapes_are_filled_in_where_unknown() -> None:
    target = model(
        """g (bool c, float[N,2] x) => (float[N,2] y) {
            a = Exp(x)
            y = If(c) <
                then_branch = t () => (float[N,2] p) { s = Transpose(a) p = Transpose(s) },
                else_branch = e () => (float[N,2] q) { q = Neg(a) }
            >
        }"""
    )
    infer(target)
    _, then, _ = target.bodies()
    assert target.graph.nodes[0].outputs[0].shape == ["N", 2]
    assert then.nodes[0].outputs[0].shape == [2, "N"]
    before = proto("g (float[N,2] x) => (float[N,2] y) { a = Exp(x) y = Neg(a) }")
    other = load(before)
    infer(other)
    assert other.to_proto() == before  # knowing is not changing


def test_known_shapes_follow_from_the_inputs_alone() -> None:
    source = proto("g (float[N,2] x) => (float[3,2] y) { a = Exp(x) y = Neg(a) }")
    source.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, 2]))
    target = load(source)
    infer(target)
    assert target.graph.nodes[0].outputs[0].shape == [3, 2]
    facts = known(target)
    assert facts[id(target.graph.nodes[0].outputs[0])].shape == ("N", 2)
    assert facts[id(target.graph.outputs[0])].shape == ("N", 2)


def test_a_reshape_to_a_computed_shape_has_a_rank() -> None:
    target = model(
        """g (float[N,M,4] x, int64[3] s) => (float[A,B,C] y)
            <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { r = Reshape(x, s)  y = MatMul(r, w) }"""
    )
    facts = known(target)
    shape = facts[id(target.graph.outputs[0])].shape
    assert shape is not None
    assert (len(shape), shape[2]) == (3, 2)


def test_inference_that_fails_leaves_the_model_alone() -> None:
    target = model("g (float[2] x) => (float[3] y) { y = Reshape(x) }")
    before = target.digest()
    infer(target)
    assert target.digest() == before
    assert isinstance(known(target), dict)


def test_constants_survive_sorting_between_bodies() -> None:
    target = model(IF)
    target.graph.nodes[0].inputs[0] = Constant("k", np.ones(2, np.float32))
    sort_model(target)
    assert [constant.name for constant in load(target.to_proto()).graph.initializers] == ["k"]
