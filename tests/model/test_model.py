"""The graphs that passes see: scopes, constants, homes, snapshots, clones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from onnxopt.errors import ModelError, PassError
from onnxopt.model import Constant, Node, Variable, load
from tests.helpers import assert_equal, model, proto, run

IF = """g (bool c, float[2] x) => (float[2] y) {
    y = If(c) <
        then_branch = t () => (float[2] p) <float[2] w = {1, 2}> { s = Mul(x, w) p = Neg(s) },
        else_branch = e () => (float[2] q) <float[2] w = {3, 4}> { s = Add(x, w) q = Neg(s) }
    >
}"""


def both_ways(source: ModelProto, target: ModelProto) -> None:
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": np.array([1, -2], np.float32)}
        assert_equal(run(source, feeds), run(target, feeds))


def test_bodies_are_given_outer_first_with_parent_and_owner() -> None:
    target = model(IF)
    main, then, other = target.bodies()
    assert (main.name, then.name, other.name) == ("g", "t", "e")
    assert (main.parent, main.owner) == (None, None)
    assert then.parent is main
    assert then.owner is main.nodes[0]
    assert target.node_count() == 5


def test_equal_names_in_sibling_bodies_are_different_tensors() -> None:
    target = model(IF)
    _, then, other = target.bodies()
    assert then.initializers[0] is not other.initializers[0]
    assert then.nodes[0].outputs[0] is not other.nodes[0].outputs[0]
    assert then.nodes[0].inputs[0] is other.nodes[0].inputs[0] is target.graph.inputs[1]
    assert {id(node) for node in target.graph.inputs[1].outputs} == {id(then.nodes[0]), id(other.nodes[0])}


def test_a_new_constant_goes_to_the_body_that_encloses_its_uses() -> None:
    source = proto(IF)
    target = load(source)
    main, then, other = target.bodies()
    then.nodes[0].inputs[1] = Constant("w", np.array([1, 2], np.float32))
    shared = Constant("w", np.array([3, 4], np.float32))
    other.nodes[0].inputs[1] = shared
    written = target.to_proto()
    both_ways(source, written)
    then.nodes[0].inputs[1] = shared
    target.to_proto()
    assert shared in main.initializers
    assert shared not in other.initializers


def test_an_outer_tensor_is_not_captured_by_an_inner_name() -> None:
    source = proto(
        """g (bool c, float[2] x) => (float[2] y) {
            s = Exp(x)
            y = If(c) <
                then_branch = t () => (float[2] p) { s = Neg(x) p = Abs(s) },
                else_branch = e () => (float[2] q) { q = Abs(x) }
            >
        }"""
    )
    target = load(source)
    _, then, _ = target.bodies()
    then.nodes[1].inputs[0] = target.graph.nodes[0].outputs[0]
    feeds = {"c": np.array(True), "x": np.array([1, 2], np.float32)}
    assert np.allclose(run(target, feeds)["y"], np.exp([1, 2]))


def test_constants_are_read_only_and_replaced() -> None:
    target = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    constant = target.graph.initializers[0]
    with pytest.raises(ValueError, match="read-only"):
        constant.values[0] = 5
    constant.values = np.array([5, 6, 7], np.float64)
    assert (constant.shape, constant.dtype.name) == ((3,), "float64")
    written = target.to_proto().graph.initializer[0]
    assert numpy_helper.to_array(written).tolist() == [5, 6, 7]


def test_a_scalar_stays_a_scalar() -> None:
    target = model("g (float[2] x) => (float[2] y) <float w = {2}> { y = Mul(x, w) }")
    target.graph.nodes[0].inputs[1] = Constant("z", np.array(3, np.float32))
    assert list(target.to_proto().graph.initializer[0].dims) == []


def test_constant_nodes_and_their_kinds_are_shown_as_constants() -> None:
    target = model(
        """g (float[2] x) => (float[2] y) {
            a = Constant<value_float = 1.5>()  b = Constant<value_floats = [1.0, 2.0]>()
            c = Constant<value = float[2] {3, 4}>()
            s = Mul(x, a)  t = Add(s, b)  y = Add(t, c) }"""
    )
    assert [node.op for node in target.graph.nodes] == ["Mul", "Add", "Add"]
    assert [constant.dtype for constant in target.graph.initializers] == [np.float32] * 3
    assert [constant.shape for constant in target.graph.initializers] == [(), (2,), (2,)]


def test_overridable_initializers_are_variables() -> None:
    text = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }"
    target = model(text)
    assert [tensor.name for tensor in target.graph.inputs] == ["x", "w"]
    assert isinstance(target.graph.nodes[0].inputs[1], Variable)
    assert target.graph.initializers == []
    old = model(text, 8, 3)
    assert [tensor.name for tensor in old.graph.inputs] == ["x"]
    assert isinstance(old.graph.nodes[0].inputs[1], Constant)
    assert old.to_proto() == proto(text, 8, 3)


def test_a_new_initializer_of_ir_3_is_listed_as_an_input() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = Relu(x) }", 8, 3)
    target.graph.nodes[0].op = "Mul"
    target.graph.nodes[0].inputs.append(Constant("w", np.ones(2, np.float32)))
    written = target.to_proto()
    assert [info.name for info in written.graph.input] == ["x", "w"]
    onnx.checker.check_model(written)


def test_sparse_initializers() -> None:
    source = proto("g (float[2,3] x) => (float[2,3] y) { y = Add(x, w) }")
    sparse = source.graph.sparse_initializer.add(dims=[2, 3])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([5, 7], np.float16), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([[0, 1], [1, 2]], np.int64)))
    target = load(source)
    assert target.graph.initializers[0].values.tolist() == [[0, 5, 0], [0, 0, 7]]
    assert target.graph.initializers[0].dtype == np.float16
    assert target.to_proto() == source
    target.graph.initializers[0].values = np.ones((2, 3), np.float16)
    written = target.to_proto()
    assert not written.graph.sparse_initializer
    assert written.graph.initializer[0].name == "w"


def test_an_unsorted_file_resolves() -> None:
    source = proto("g (float[2] x) => (float[2] y) { a = Neg(x) y = Exp(a) }")
    nodes = list(source.graph.node)[::-1]
    source.graph.ClearField("node")
    source.graph.node.extend(nodes)
    target = load(source)
    assert target.graph.nodes[0].inputs[0] is target.graph.nodes[1].outputs[0]
    assert target.to_proto() == source


def test_two_tensors_of_one_name_are_refused() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    source.graph.node.append(source.graph.node[0])
    with pytest.raises(ModelError, match="'y'"):
        load(source)


def test_an_unknown_element_type_is_refused() -> None:
    source = proto("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    source.graph.initializer[0].data_type = 999
    with pytest.raises(ModelError, match="999"):
        load(source)


def test_nodes_and_tensors_are_equal_to_themselves_only() -> None:
    one, other = Variable("t"), Variable("t")
    assert one != other
    assert len({one, other}) == 2
    assert Node("Relu", "n") != Node("Relu", "n")
    assert Constant("c", np.ones(2)) != Constant("c", np.ones(2))


@pytest.mark.parametrize("name", ["cleanup", "toposort", "fold_constants", "copy"])
def test_what_graphsurgeon_does_badly_is_banned(name: str) -> None:
    with pytest.raises(PassError) as caught:
        getattr(model(IF).graph, name)()
    assert caught.value.remedy


def test_restoring_a_snapshot_shares_the_weights() -> None:
    target = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    digest, snapshot = target.digest(), target.snapshot()
    uid = target.graph.initializers[0].data.uid
    target.graph.initializers[0].values = np.zeros(2, np.float32)
    target.graph.nodes[0].attrs["k"] = 1
    target.opset = 18
    assert target.digest() != digest
    target.restore(snapshot)
    assert target.digest() == digest
    assert target.graph.initializers[0].data.uid == uid
    assert target.opset == 17


def test_a_clone_maps_every_variable_and_edits_do_not_cross() -> None:
    target = model(IF)
    clone = target.clone()
    for body, twin in zip(target.bodies(), clone.model.bodies(), strict=True):
        for node, other in zip(body.nodes, twin.nodes, strict=True):
            assert clone.tensors[id(node.outputs[0])] is other.outputs[0]
    before = target.digest()
    clone.model.graph.nodes[0].attrs["then_branch"].nodes.clear()
    assert target.digest() == before


def test_the_skeleton_leaves_large_weights_out() -> None:
    target = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    target.graph.nodes[0].inputs[1] = Constant("big", np.ones((1000, 2), np.float32))
    skeleton, tensors = target.skeleton()
    assert list(tensors) == ["big"]
    assert skeleton.ByteSize() < 500


def test_opset_and_metadata() -> None:
    source = proto(IF)
    source.opset_import[0].domain = "ai.onnx"
    source.metadata_props.add(key="a", value="b")
    target = load(source)
    assert (target.opset, target.opset_imports, target.metadata) == (17, {"": 17}, {"a": "b"})
    target.import_opset("com.microsoft", 1)
    target.opset = 18
    assert [(entry.domain, entry.version) for entry in target.to_proto().opset_import] == [
        ("ai.onnx", 18),
        ("com.microsoft", 1),
    ]
    assert source.opset_import[0].version == 17


def test_parameters_count_shared_content_once() -> None:
    target = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { s = Mul(x, w) y = Add(s, w) }")
    assert target.parameters() == 2


def test_a_constant_used_in_two_functions_is_refused() -> None:
    target = model(
        """g (float[2] x) => (float[2] y) { s = local.f(x) y = local.h(s) }
        <domain: "local", opset_import: ["": 17]> f (x) => (y) { y = Neg(x) }
        <domain: "local", opset_import: ["": 17]> h (x) => (y) { y = Neg(x) }""",
        imports='"local" : 1',
    )
    shared = Constant("c", np.ones(2, np.float32))
    for function in target.functions:
        function.nodes[0].op = "Add"
        function.nodes[0].inputs.append(shared)
    with pytest.raises(ModelError, match="two functions"):
        target.to_proto()
