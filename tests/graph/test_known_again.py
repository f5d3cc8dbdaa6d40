"""What is known of tensors when a model is asked again, and lists of nodes that are written once."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxopt.graph import NodeEdits
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Model, Node, Variable


def _model() -> Model:
    """y = Reshape(Add(x, c), t), c and t in Constant nodes, c of 4 KiB."""
    table, target = np.ones((4, 256), np.float32), np.array([0, 16, -1], np.int64)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(table)),
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(target)),
        helper.make_node("Add", ["x", "c"], ["s"]),
        helper.make_node("Reshape", ["s", "t"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y])
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_values_of_targets_count_and_weights_need_not_be_there() -> None:
    model = _model()
    facts = known(model)
    assert facts[id(model.graph.outputs[0])] == Fact(np.dtype(np.float32), (4, 16, 16))


def test_a_changed_model_is_inferred_anew_and_an_unchanged_one_answers_the_same() -> None:
    model = _model()
    assert known(model) == known(model)
    reshape = model.graph.nodes[-1]
    reshape.inputs[1].values = np.array([0, 8, -1], np.int64)
    assert known(model)[id(model.graph.outputs[0])].shape == (4, 8, 32)
    model.graph.inputs[0].shape = [4, 256]
    assert known(model, {"x": [1, 1]})[id(model.graph.inputs[0])].shape == (1, 1)
    assert known(model)[id(model.graph.inputs[0])].shape == (4, 256)


def test_new_objects_of_an_unchanged_model_are_told_of() -> None:
    model = _model()
    before = known(model)
    model.restore(model.snapshot())
    after = known(model)
    output = model.graph.outputs[0]
    assert after[id(output)].shape == (4, 16, 16)
    assert len(after) == len(before)


def test_node_edits_keep_places() -> None:
    model = _model()
    body, add = model.graph, model.graph.nodes[0]
    edits = NodeEdits(body)
    result = add.outputs[0]
    fresh = [Node("Relu", name, inputs=[body.inputs[0]], outputs=[Variable(name)]) for name in ("a", "b")]
    edits.insert_before(add, fresh)
    edits.remove(add)
    assert fresh[0] in edits
    assert add not in edits
    assert body.nodes[0] is add
    edits.write()
    assert [node.op for node in body.nodes] == ["Relu", "Relu", "Reshape"]
    assert not result.inputs
    edits.write()
    assert len(body.nodes) == 3
