"""What no pass touched is written as it was read, though every file is rebuilt from the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.errors import ModelError
from onnxopt.graph import remove_dead, sort_model
from onnxopt.model import Constant, Graph, Model, Node, Variable, exporter, load
from tests.conformance.corpus import cases
from tests.helpers import model, proto, run

ROOT = Path(__file__).parents[2]


def corpus() -> list[tuple[str, ModelProto]]:
    """Every tenth of onnx's backend models, and all models of models/."""
    taken = [(case.name, case.model) for case in cases()[::10]]
    return taken + [(path.stem, onnx.load(path)) for path in sorted((ROOT / "models").glob("*/*.onnx"))]


def insert_identities(target: Model) -> list[tuple[Graph, Node]]:
    """An Identity on every output of every body that a node of this body makes."""
    inserted: list[tuple[Graph, Node]] = []
    for number, body in enumerate(target.bodies()):
        made = {id(tensor) for node in body.nodes for tensor in node.outputs}
        for at, tensor in enumerate(dict.fromkeys(t for t in body.outputs if id(t) in made)):
            producer = tensor.inputs[0]
            inner = Variable(f"before_identity_{number}_{at}")
            position = next(i for i, other in enumerate(producer.outputs) if other is tensor)
            producer.outputs[position] = inner
            node = Node("Identity", f"identity_{number}_{at}", inputs=[inner], outputs=[tensor])
            body.nodes.append(node)
            inserted.append((body, node))
    return inserted


def remove_identities(inserted: list[tuple[Graph, Node]]) -> None:
    for body, node in reversed(inserted):
        inner, tensor = node.inputs[0], node.outputs[0]
        producer = inner.inputs[0]
        position = next(i for i, other in enumerate(producer.outputs) if other is inner)
        node.inputs.clear()
        node.outputs.clear()
        producer.outputs[position] = tensor
        body.nodes = [other for other in body.nodes if other is not node]


def test_a_model_edited_and_edited_back_is_the_same_file_to_the_byte() -> None:
    """The acceptance test of the model boundary."""
    edited = 0
    for name, source in corpus():
        raw = source.SerializeToString()
        target = load(source)
        inserted = insert_identities(target)
        edited += len(inserted)
        if inserted:
            assert target.to_proto().SerializeToString() != raw, f"{name}: the edit does not show"
        remove_identities(inserted)
        assert target.to_proto().SerializeToString() == raw, name
        assert source.SerializeToString() == raw, f"{name}: the given proto was changed"
    assert edited > 200


def test_snapshots_and_clones_are_the_same_file_too() -> None:
    for name, source in corpus()[::5]:
        raw = source.SerializeToString()
        target = load(source)
        snapshot = target.snapshot()
        assert target.clone().model.to_proto().SerializeToString() == raw, name
        insert_identities(target)
        target.restore(snapshot)
        assert target.to_proto().SerializeToString() == raw, name


def test_no_shortcut_every_node_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[str] = []
    original = exporter.Exporter.node

    def counted(self: exporter.Exporter, node: Node) -> onnx.NodeProto:
        exported.append(node.op)
        return original(self, node)

    monkeypatch.setattr(exporter.Exporter, "node", counted)
    target = load(ROOT / "models/digits_cnn/digits_cnn.onnx")
    target.to_proto()
    assert len(exported) == target.node_count() == 52


def test_no_shortcut_the_graph_and_the_carrier_show_in_the_file() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    target.graph.nodes[0].op = "Neg"
    target.carrier.producer_name = "another"
    written = target.to_proto()
    assert written.graph.node[0].op_type == "Neg"
    assert written.producer_name == "another"


def full_model() -> ModelProto:
    """A model in which everything is set that this version of onnx knows."""
    source = proto(
        """g (float[N,4] x, float[4] d) => (float[N,4] y) <float[4] d = {1, 2, 3, 4}, float[4] w = {1, 2, 3, 4}> {
            c = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
            t = Mul(x, w)  u = Add(t, c)  v = Add(u, d)  y = local.f(v)
        }
        <domain: "local", opset_import: ["": 17], doc_string: "function">
        f (x) => (y) { c = Constant<value = float {2}>() y = Mul(x, c) }""",
        imports='"local" : 1',
    )
    source.producer_name, source.producer_version, source.domain, source.model_version = "p", "1", "d", 7
    source.doc_string = "model"
    source.metadata_props.add(key="a", value="b")
    source.training_info.add().algorithm.name = "training"
    graph = source.graph
    graph.doc_string = "graph"
    graph.metadata_props.add(key="a", value="b")
    graph.value_info.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, ["N", 4]))
    graph.value_info[0].doc_string = "value"
    graph.value_info[0].metadata_props.add(key="a", value="b")
    graph.input[0].doc_string = "input"
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.initializer[0].doc_string = "weight"
    graph.initializer[0].metadata_props.add(key="a", value="b")
    graph.quantization_annotation.add(tensor_name="u").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    for node in graph.node:
        node.name, node.doc_string = f"node_{node.output[0]}", "node"
        node.metadata_props.add(key="a", value="b")
    source.functions[0].metadata_props.add(key="a", value="b")
    return source


def test_everything_that_can_be_set_survives_an_edit() -> None:
    source = full_model()
    target = load(source)
    remove_identities(insert_identities(target))
    assert target.to_proto().SerializeToString() == source.SerializeToString()


def test_fields_of_a_newer_onnx_survive() -> None:
    unknown = b"\xfa\x3f\x03new"  # field 1023, three bytes
    source = full_model()
    for part in (source.graph.node[0], source.graph.initializer[1], source.graph.value_info[0], source.graph, source):
        part.MergeFromString(unknown)
    raw = source.SerializeToString()
    assert raw.count(unknown) == 5
    assert load(source).to_proto().SerializeToString() == raw


def test_attribute_kinds() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = custom.Op(x) }", imports='"custom" : 1')
    node = source.graph.node[0]
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "t")
    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(tensor)
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, 2], np.int64)))
    body = source.graph.__class__()
    body.name = "body"
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    values = {
        "f": 1.5, "i": 3, "s": "text", "b": b"\xff\xfe", "t": tensor, "sp": sparse, "g": body, "tp": kind,
        "fs": [1.0, 2.0], "is": [1, 2], "ss": ["a", "b"], "ts": [tensor, tensor], "sps": [sparse], "gs": [body, body],
        "tps": [kind],
    }  # fmt: skip
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    node.attribute.append(helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.FLOATS))
    node.attribute[0].doc_string = "doc"
    target = load(source)
    remove_identities(insert_identities(target))
    assert target.to_proto().SerializeToString() == source.SerializeToString()
    attributes = target.graph.nodes[0].attrs
    assert (attributes["f"], attributes["i"], attributes["s"], attributes["b"]) == (1.5, 3, "text", b"\xff\xfe")
    attributes["is"].append(9)
    attributes["f"] = 2.5
    written = {attribute.name: attribute for attribute in target.to_proto().graph.node[0].attribute}
    assert list(written["is"].ints) == [1, 2, 9]
    assert written["f"].f == 2.5
    assert written["fs"] == {attribute.name: attribute for attribute in node.attribute}["fs"]


SUB_BYTE = [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.INT2, TensorProto.UINT2]
SMALL_FLOATS = [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.BFLOAT16]


@pytest.mark.parametrize("kind", SUB_BYTE + SMALL_FLOATS, ids=TensorProto.DataType.Name)
def test_narrow_types_survive_reading_and_replacing(kind: int) -> None:
    source = proto("g (float[3] x) => (float[3] y) { c = Cast<to = 1>(w) y = Add(x, c) }", 25, 13)
    source.graph.initializer.append(helper.make_tensor("w", kind, [3], [0, 1, 0]))
    target = load(source)
    constant = target.graph.initializers[0]
    assert constant.values.astype(np.float32).tolist() == [0, 1, 0]
    assert target.to_proto().SerializeToString() == source.SerializeToString()
    constant.values = constant.values[::-1].copy()
    written = target.to_proto().graph.initializer[0]
    assert written.data_type == kind
    assert written.dims == [3]
    constant.values = np.array([1, 0, 1]).astype(constant.dtype)
    again = load(target.to_proto()).graph.initializers[0]
    assert again.values.astype(np.float32).tolist() == [1, 0, 1]


def test_inputs_are_written_in_their_present_order() -> None:
    """Those of a Scan body are told apart by position; initializers listed among them stay behind their neighbour."""
    target = model(
        """g (float[3,2] x) => (float[3,2] y) {
            y = Scan <num_scan_inputs = 1, body = b (float[2] row) => (float[2] out) { out = Neg(row) }> (x)
        }"""
    )
    _, body = target.bodies()
    state = Variable("state", np.dtype(np.float32), [2])
    body.inputs.insert(0, state)
    assert [info.name for info in target.to_proto().graph.node[0].attribute[1].g.input] == ["state", "row"]
    body.inputs.reverse()
    assert [info.name for info in target.to_proto().graph.node[0].attribute[1].g.input] == ["row", "state"]


def test_initializers_listed_as_inputs_keep_their_places() -> None:
    source = proto(
        """g (float[2] v, float[2] x, float[2] w, float[2] z) => (float[2] y) {
            a = Add(x, w) b = Add(z, v) y = Add(a, b)
        }""",
        8,
        3,
    )
    source.graph.initializer.extend(numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("v", "w"))
    target = load(source)
    assert [tensor.name for tensor in target.graph.inputs] == ["x", "z"]
    target.graph.inputs.insert(1, Variable("new", np.dtype(np.float32), [2]))
    assert [info.name for info in target.to_proto().graph.input] == ["v", "x", "w", "new", "z"]
    target.graph.inputs.reverse()
    assert [info.name for info in target.to_proto().graph.input] == ["v", "z", "new", "x", "w"]


def test_an_unsorted_constant_stays_until_the_body_is_sorted() -> None:
    source = proto(
        "g (float[2] x) => (float[2] y) { y = Add(x, c) c = Constant <value_floats = [1.0, 2.0]> () }", ir_version=8
    )
    target = load(source)
    assert target.to_proto().SerializeToString() == source.SerializeToString()
    sort_model(target)
    assert [node.op_type for node in target.to_proto().graph.node] == ["Constant", "Add"]


def test_an_annotation_goes_with_its_tensor_only() -> None:
    source = proto("g (float[2] x) => (float[2] y) { a = Neg(x) y = Neg(x) }")
    for name in ("a", "y", "nobody"):
        source.graph.quantization_annotation.add(tensor_name=name)
    target = load(source)
    assert remove_dead(target) == 1
    assert [entry.tensor_name for entry in target.to_proto().graph.quantization_annotation] == ["y", "nobody"]


def test_strings_need_not_be_utf_8() -> None:
    source = proto("g (string[2] x) => (string[2] y) { y = Identity(w) }")
    source.graph.initializer.append(helper.make_tensor("w", TensorProto.STRING, [2], [b"\xff\xfe", b"a"]))
    target = load(source)
    constant = target.graph.initializers[0]
    assert constant.values.tolist() == [b"\xff\xfe", "a"]
    constant.values = constant.values[::-1].copy()
    assert list(target.to_proto().graph.initializer[0].string_data) == [b"a", b"\xff\xfe"]


def test_bodies_of_files_before_ir_4_get_new_constants_as_nodes() -> None:
    """Their initializers would have to be inputs, and a body's inputs are counted."""
    source = proto(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) < then_branch = t () => (float[2] p) { p = Neg(x) },
                        else_branch = e () => (float[2] q) { q = Abs(x) } >
        }""",
        11,
        3,
    )
    target = load(source)
    _, then, _ = target.bodies()
    then.nodes[0].op = "Add"
    then.nodes[0].inputs.append(Constant("one", np.ones(2, np.float32)))
    found = run(target, {"c": np.array(True), "x": np.zeros(2, np.float32)})
    assert found["y"].tolist() == [1, 1]


def test_a_sparse_initializer_that_is_an_input_may_be_overridden() -> None:
    source = proto("g (float[2] x, float[2] s) => (float[2] y) { y = Add(x, s) }")
    sparse = source.graph.sparse_initializer.add(dims=[2])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([3], np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([1], np.int64)))
    target = load(source)
    assert [tensor.name for tensor in target.graph.inputs] == ["x", "s"]
    assert not target.graph.initializers
    assert target.to_proto().SerializeToString() == source.SerializeToString()
    zeros = np.zeros(2, np.float32)
    assert run(target, {"x": zeros})["y"].tolist() == [0, 3]
    assert run(target, {"x": zeros, "s": zeros})["y"].tolist() == [0, 0]


def test_the_sign_of_a_zero_is_a_change_of_an_attribute() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = LeakyRelu <alpha = 0.0> (x) }")
    target.graph.nodes[0].attrs["alpha"] = -0.0
    assert str(target.to_proto().graph.node[0].attribute[0].f) == "-0.0"


def test_outputs_listed_twice_keep_their_own_descriptions() -> None:
    source = proto("g (float[2] x) => (float[2] y, float[2] y) { y = Neg(x) }")
    source.graph.output[1].doc_string = "again"
    assert load(source).to_proto().SerializeToString() == source.SerializeToString()
    target = load(source)
    target.graph.outputs.append(target.graph.outputs[0])
    assert [info.doc_string for info in target.to_proto().graph.output] == ["", "again", ""]


def test_an_empty_list_of_graphs_stays_one() -> None:
    source = proto("g (float[2] x) => (float[2] y) { y = custom.Op(x) }", imports='"custom" : 1')
    source.graph.node[0].attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS, doc_string="")
    assert load(source).to_proto().SerializeToString() == source.SerializeToString()


def test_what_has_no_meaning_is_refused_by_name() -> None:
    """Neither can be shown to passes, and neither onnx's checker nor, for attributes, the runtime takes it."""
    twice = proto("g (float[2] x) => (float[2] y) { [n] y = LeakyRelu <alpha = 0.5> (x) }")
    twice.graph.node[0].attribute.append(helper.make_attribute("alpha", 0.25))
    with pytest.raises(ModelError, match=r"LeakyRelu 'n' in graph 'g' has two attributes 'alpha'"):
        load(twice)
    same = proto("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    same.graph.initializer.append(same.graph.initializer[0])
    with pytest.raises(ModelError, match=r"two tensors are named 'w' in graph 'g'"):
        load(same)
    for each in (twice, same):
        with pytest.raises(onnx.checker.ValidationError):
            onnx.checker.check_model(each)
