"""Generated models, with everything the format knows, come back as they were: byte by byte, edited and edited back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from onnx import AttributeProto, ModelProto, TensorProto

from benchmarks.roundtrip import insert_and_remove
from onnxopt.model import Model, Node, load
from onnxopt.model.exporter import Exporter
from tests.property.pieces import UNKNOWN
from tests.property.protos import FEATURES, Maker, models, walk

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def raw(proto: Message) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def assert_fidelity(source: ModelProto, folder: Path) -> None:
    """Edited and edited back, restored, cloned, and through a file: the same bytes; the given proto stays as it is."""
    before = raw(source)
    model = load(source)
    digest = model.digest()
    written: list[Node] = []
    original = Exporter.node

    def counted(self: Exporter, node: Node) -> object:
        written.append(node)
        return original(self, node)

    insert_and_remove(model)
    with patch.object(Exporter, "node", counted):
        assert raw(model.to_proto()) == before
    assert len(written) == model.node_count(), "nodes were not written from the graph"
    assert model.digest() == digest
    snapshot = model.snapshot()
    assert raw(model.clone().model.to_proto()) == before
    damage(model)
    assert raw(model.to_proto()) != before
    model.restore(snapshot)
    assert raw(model.to_proto()) == before
    model.save(folder / "again.onnx")
    assert raw(load(folder / "again.onnx").to_proto()) == before
    assert raw(source) == before, "the given proto was changed"


def damage(model: Model) -> None:
    for body in model.bodies():
        for node in body.nodes:
            node.op, node.attrs["damaged"] = "Damaged", 1
        for constant in body.initializers:
            constant.name += "_damaged"


@settings(QUIET, max_examples=150)
@given(source=models())
def test_a_generated_model_comes_back_to_the_byte(source: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_fidelity(source, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(QUIET, max_examples=4000, derandomize=False)
@given(source=models())
def test_thousands_of_generated_models(source: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_fidelity(source, tmp_path_factory.getbasetemp())


def test_the_generator_makes_all_that_the_format_knows() -> None:
    """What the tests above claim to cover is in the models: fields, attribute kinds, element types, storage."""
    seen: Counter[str] = Counter()
    for seed in range(300):
        random = Random(seed)
        proto = Maker(seed, [feature for feature in FEATURES if random.random() < 0.6]).model()
        for message in walk(proto):
            of = message.DESCRIPTOR.name
            seen.update(f"{of}.{field.name}" for field, _ in message.ListFields())
            if isinstance(message, AttributeProto) and not message.ref_attr_name:
                seen[f"attribute {AttributeProto.AttributeType.Name(message.type)}"] += 1
            if isinstance(message, TensorProto):
                storage = "raw" if message.HasField("raw_data") else "typed"
                seen[f"{storage} {TensorProto.DataType.Name(message.data_type)}"] += 1
            if raw(message).endswith(UNKNOWN):
                seen[f"unknown in {of}"] += 1
    kinds = [f"attribute {name}" for name in AttributeProto.AttributeType.keys()]  # noqa: SIM118  no dict
    types = [name for name in TensorProto.DataType.keys() if name != "UNDEFINED"]  # noqa: SIM118
    stored = [f"typed {name}" for name in types] + [f"raw {name}" for name in types if name != "STRING"]
    parts = ("Model", "Graph", "Node", "Attribute", "Tensor", "ValueInfo", "Type", "Function", "SparseTensor")
    unknown = [f"unknown in {name}Proto" for name in (*parts, "OperatorSetId", "StringStringEntry")]
    fields = [
        "ModelProto.training_info", "ModelProto.functions", "ModelProto.metadata_props", "ModelProto.doc_string",
        "ModelProto.model_version", "ModelProto.domain", "ModelProto.producer_name", "GraphProto.metadata_props",
        "GraphProto.doc_string", "GraphProto.sparse_initializer", "GraphProto.quantization_annotation",
        "GraphProto.value_info", "NodeProto.metadata_props", "NodeProto.doc_string", "NodeProto.overload",
        "AttributeProto.doc_string", "AttributeProto.ref_attr_name", "TensorProto.metadata_props",
        "TensorProto.doc_string", "ValueInfoProto.metadata_props", "ValueInfoProto.doc_string",
        "FunctionProto.attribute", "FunctionProto.attribute_proto", "FunctionProto.overload",
        "FunctionProto.value_info", "FunctionProto.metadata_props", "FunctionProto.doc_string",
        "TypeProto.sequence_type", "TypeProto.optional_type", "TypeProto.map_type", "TypeProto.sparse_tensor_type",
        "TypeProto.denotation", "Dimension.denotation", "Dimension.dim_param", "Dimension.dim_value",
    ]  # fmt: skip
    assert [name for name in (*kinds, *stored, *unknown, *fields) if not seen[name]] == []
