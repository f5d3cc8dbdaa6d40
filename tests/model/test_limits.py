from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from onnxopt.errors import LimitError, ModelError, UsageError
from onnxopt.model import Limits, load
from onnxopt.model.limits import DEEPEST, DEFAULT, OFF, STRICT, check_limits
from tests.helpers import proto

RELU = "g (float[2] x) => (float[2] y) { y = Relu(x) }"


def weight(tensor: TensorProto) -> ModelProto:
    made = proto("g (float[2] x) => (float[2] y) { y = Add(x, w) }")
    tensor.name = "w"
    made.graph.initializer.append(tensor)
    return made


def chain(length: int, calls: int = 2) -> ModelProto:
    """Functions each of which calls the next `calls` times: calls ** length nodes in the end."""
    made = proto("g (float[2] x) => (float[2] y) { y = d.f0(x) }", imports='"d" : 1')
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    for at in range(length):
        op, domain = (f"f{at + 1}", "d") if at < length - 1 else ("Neg", "")
        nodes = [helper.make_node(op, [f"t{step}"], [f"t{step + 1}"], domain=domain) for step in range(calls)]
        made.functions.append(helper.make_function("d", f"f{at}", ["t0"], [f"t{calls}"], nodes, imports))
    return made


def nested(depth: int) -> ModelProto:
    """Ifs within Ifs, put together in place: protobuf would refuse to copy the deepest."""
    made = proto("g (bool c, float[1] x) => (float[1] y) { y = Neg(x) }")
    graph = made.graph
    for _ in range(depth):
        graph.node[0].op_type = "If"
        graph.node[0].input[:] = ["c"]
        for name in ("else_branch", "then_branch"):
            attribute = graph.node[0].attribute.add(name=name, type=onnx.AttributeProto.GRAPH)
            attribute.g.name = "body"
            attribute.g.node.append(helper.make_node("Neg", ["x"], ["y"]))
            attribute.g.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
        graph = graph.node[0].attribute[1].g
    return made


FLOATS = numpy_helper.from_array(np.ones(2, np.float32))


def changed(**fields: object) -> TensorProto:
    """A tensor of two floats, with fields replaced."""
    tensor = TensorProto()
    tensor.CopyFrom(FLOATS)
    for name, value in fields.items():
        if isinstance(value, (int, bytes)):
            setattr(tensor, name, value)
        else:
            tensor.ClearField(name)
            getattr(tensor, name).extend(value)
    return tensor


NONSENSE = {
    "negative dim": (changed(dims=[-2]), "negative dim -2"),
    "two negative dims": (changed(dims=[-1, -2]), "negative dim -1"),
    "raw too short": (changed(raw_data=b"1234"), "4 bytes"),
    "raw too long": (changed(raw_data=b"123456789"), "9 bytes"),
    "no data": (changed(raw_data=b""), "0 entries in float_data"),
    "huge dims": (changed(dims=[1 << 31, 1 << 31]), "8 bytes"),
    "dims that overflow to the truth": (changed(dims=[1 << 32, 1 << 32, 2]), "8 bytes"),
    "typed too short": (changed(raw_data=b"", float_data=[1.0]), "1 entries in float_data"),
    "wrong typed field": (changed(raw_data=b"", int32_data=[1, 2]), "keeps values in int32_data"),
    "raw and typed": (changed(int64_data=[1, 2]), "keeps values in int64_data"),
    "unknown type": (changed(data_type=99), "unknown element type 99"),
    "undefined type": (changed(data_type=0), "unknown element type 0"),
    "raw strings": (changed(data_type=TensorProto.STRING), "strings outside"),
    "few strings": (changed(data_type=TensorProto.STRING, raw_data=b""), ""),
    "external without a folder": (changed(raw_data=b"", data_location=TensorProto.EXTERNAL), "no folder"),
    "external left over": (changed(), ""),
}
NONSENSE["few strings"][0].ClearField("raw_data")
NONSENSE["few strings"] = (NONSENSE["few strings"][0], "0 strings")
del NONSENSE["external left over"]


@pytest.mark.parametrize(("tensor", "reason"), NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("limits", ["default", "off"])
def test_tensors_that_contradict_themselves_are_refused_whatever_the_limits(
    tensor: TensorProto, reason: str, limits: str
) -> None:
    with pytest.raises(ModelError) as caught:
        load(weight(tensor), limits)
    assert reason in caught.value.cause
    assert "'w'" in caught.value.cause


GOOD: dict[str, TensorProto] = {
    "raw": FLOATS,
    "typed": changed(raw_data=b"", float_data=[1, 2]),
    "empty": changed(raw_data=b"", dims=[0, 1 << 40]),
    "scalar": helper.make_tensor("w", TensorProto.FLOAT, [], [1]),
    "complex": helper.make_tensor("w", TensorProto.COMPLEX64, [2], [1 + 2j, 3]),
    "strings": helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b""]),
    "bool": helper.make_tensor("w", TensorProto.BOOL, [3], [True, False, True]),
    "float16": helper.make_tensor("w", TensorProto.FLOAT16, [3], [1, 2, 3]),
    "bfloat16": helper.make_tensor("w", TensorProto.BFLOAT16, [3], [1, 2, 3]),
    "uint32": helper.make_tensor("w", TensorProto.UINT32, [2], [1, 2]),
    "float8": helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [3], [1, 2, 3]),
    "odd int4": helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]),
    "odd uint4 raw": numpy_helper.from_array(
        numpy_helper.to_array(helper.make_tensor("w", TensorProto.UINT4, [5], [1] * 5))
    ),
}


@pytest.mark.parametrize("tensor", GOOD.values(), ids=GOOD)
def test_every_way_to_store_values_is_accepted(tensor: TensorProto) -> None:
    before = weight(tensor)
    assert load(before, "strict").to_proto() == before


@pytest.mark.parametrize("where", ["attribute", "body", "function"])
def test_tensors_are_found_everywhere(where: str) -> None:
    node = helper.make_node("ConstantOfShape", ["s"], ["y"], value=changed(raw_data=b"1"))
    made = proto(RELU, imports='"d" : 1')
    if where == "attribute":
        made.graph.node.append(node)
    elif where == "body":
        body = helper.make_graph([node], "body", [], [])
        made.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    else:
        made.functions.append(helper.make_function("d", "f", ["s"], ["y"], [node], [helper.make_opsetid("", 17)]))
    with pytest.raises(ModelError, match="1 bytes where its dims"):
        load(made)


def sparse(dims: list[int], indices: object, values: int = 2) -> ModelProto:
    made = proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    array = np.asarray(indices, np.int64)
    made.graph.sparse_initializer.add(
        values=numpy_helper.from_array(np.ones(values, np.float32), "s"),
        indices=numpy_helper.from_array(array),
        dims=dims,
    )
    return made


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (sparse([-4], [0, 1]), "negative dim"),
        (sparse([4], [0, 4]), "outside its dims"),
        (sparse([4], [-1, 0]), "outside its dims"),
        (sparse([2, 2], [[0, 0], [1, 2]]), "outside its dims"),
        (sparse([4], [0, 1, 2]), "don't fit"),
        (sparse([2, 2], [[0], [1]]), "don't fit"),
    ],
)
def test_sparse_tensors_that_make_no_sense(made: ModelProto, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        load(made, "off")


def test_sparse_tensors_may_not_fill_memory() -> None:
    assert load(sparse([2, 2], [[0, 0], [1, 1]])).graph.initializers[0].values.sum() == 2
    for dims in ([1 << 28], [1 << 31, 1 << 31]):
        with pytest.raises(LimitError, match="bytes when filled"):
            load(sparse(dims, [0, 1]))
    load(sparse([1 << 27], [0, 1]))  # 512 MiB, not filled here
    load(sparse([1 << 28], [0, 1]), "off")


def test_functions_are_counted_as_what_they_stand_for_and_never_expanded() -> None:
    started = time.perf_counter()
    with pytest.raises(LimitError, match=r"33,554,432 nodes once its functions are expanded; the limit is 5,000,000"):
        load(chain(25))
    with pytest.raises(LimitError, match="more than 4,611,686,018,427,387,904 nodes"):
        load(chain(2000))
    assert time.perf_counter() - started < 2
    load(chain(25), "off")
    exact = chain(10)  # 2 ** 10 nodes
    check_limits(exact, replace(DEFAULT, nodes=1024))
    with pytest.raises(LimitError, match="1,024 nodes"):
        check_limits(exact, replace(DEFAULT, nodes=1023))


def test_a_long_chain_of_single_calls_is_fine() -> None:
    started = time.perf_counter()
    check_limits(chain(3000, 1), DEFAULT)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("limits", ["default", "off"])
def test_functions_that_call_each_other_in_a_circle_are_refused(length: int, limits: str) -> None:
    made = chain(length)
    made.functions[-1].node[0].op_type = "f0"
    made.functions[-1].node[0].domain = "d"
    with pytest.raises(ModelError, match="calls itself"):
        load(made, limits)


def test_overloads_are_functions_of_their_own() -> None:
    made = chain(2, 1)
    made.functions[1].name, made.functions[1].overload = "f0", "other"
    made.functions[0].node[0].op_type, made.functions[0].node[0].overload = "f0", "other"
    check_limits(made, DEFAULT)


def test_nodes_of_bodies_count() -> None:
    made = nested(3)
    check_limits(made, replace(DEFAULT, nodes=7))
    with pytest.raises(LimitError, match="7 nodes"):
        check_limits(made, replace(DEFAULT, nodes=6))


@pytest.mark.parametrize("depth", [1, 30, DEEPEST])
def test_bodies_within_bodies_round_trip(depth: int) -> None:
    made = nested(depth)
    target = load(made)
    assert target.node_count() == 2 * depth + 1
    assert target.clone().model.to_proto().SerializeToString() == made.SerializeToString()


@pytest.mark.parametrize("depth", [DEEPEST + 1, 90, 200, 2000])
@pytest.mark.parametrize("limits", ["default", "strict", "off"])
def test_too_many_bodies_within_bodies_are_refused(depth: int, limits: str) -> None:
    with pytest.raises(LimitError, match="nests bodies more than"):
        load(nested(depth), limits)


def test_strict_takes_fewer() -> None:
    load(nested(STRICT.depth), "strict")
    with pytest.raises(LimitError, match="more than 8 deep") as caught:
        load(nested(STRICT.depth + 1), "strict")
    assert "--limits off" in caught.value.remedy


@pytest.mark.parametrize("version", [-1, -(1 << 63), 1 << 31, (1 << 63) - 1])
@pytest.mark.parametrize("where", ["opset", "function", "ir"])
def test_versions_without_meaning(version: int, where: str) -> None:
    made = chain(1)
    if where == "opset":
        made.opset_import[0].version = version
    elif where == "function":
        made.functions[0].opset_import[0].version = version
    else:
        made.ir_version = version
    with pytest.raises(ModelError, match=f"version {version} "):
        load(made)


@pytest.mark.parametrize(
    "old", ["Relu", "the_node", "the_input", "the_output", "the_graph", "the_text", "the_producer"]
)
def test_text_that_is_no_utf8(old: str) -> None:
    made = proto("the_graph (float[2] the_input) => (float[2] the_output) { the_output = Relu(the_input) }")
    made.graph.node[0].name, made.graph.node[0].doc_string, made.producer_name = "the_node", "the_text", "the_producer"
    raw = made.SerializeToString()
    load(ModelProto.FromString(raw))
    broken = ModelProto.FromString(raw.replace(old.encode(), b"\xff" * len(old)))
    with pytest.raises(ModelError, match="is no UTF-8"):
        load(broken)


LIMITED: list[tuple[Limits, Callable[[], ModelProto], str]] = [
    (replace(DEFAULT, tensor_bytes=7), lambda: weight(FLOATS), "has 8 bytes; the limit is 7"),
    (replace(DEFAULT, total_bytes=7), lambda: weight(FLOATS), "8 bytes of tensors; the limit is 7"),
    (replace(DEFAULT, functions=1), lambda: chain(2), "2 local functions; the limit is 1"),
    (replace(DEFAULT, nodes=0), lambda: proto(RELU), "has 1 nodes"),
]


@pytest.mark.parametrize(("limits", "make", "reason"), LIMITED)
def test_each_limit(limits: Limits, make: Callable[[], ModelProto], reason: str) -> None:
    with pytest.raises(LimitError) as caught:
        load(make(), limits)
    assert reason in caught.value.cause
    assert "--limits off" in caught.value.remedy
    load(make(), DEFAULT)
    load(make(), "off")


def test_tensors_add_up() -> None:
    made = weight(FLOATS)
    made.graph.node.append(helper.make_node("Constant", [], ["c"], value=FLOATS))
    check_limits(made, replace(DEFAULT, total_bytes=16))
    with pytest.raises(LimitError, match="16 bytes of tensors"):
        check_limits(made, replace(DEFAULT, total_bytes=15))


def test_what_is_computed_may_be_larger_where_more_is_held() -> None:
    assert DEFAULT.computed(0) == DEFAULT.computed_bytes == 512 << 20
    assert DEFAULT.computed(1 << 30) == 64 << 30
    assert OFF.computed(1 << 40) is None


def test_names_of_limits() -> None:
    assert Limits.of("strict") is STRICT
    assert Limits.of(OFF) is OFF
    with pytest.raises(UsageError) as caught:
        load(proto(RELU), "strikt")
    assert "strict" in caught.value.remedy


def test_depth_is_told_for_a_file(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "deep.onnx"
    path.write_bytes(deep_bytes(200))
    with pytest.raises(ModelError, match="nested deeper than protobuf reads"):
        load(path)


def deep_bytes(depth: int) -> bytes:
    """A model file of nested bodies, written by hand: protobuf refuses to write it."""
    raw = b""
    for _ in range(depth):
        raw = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, raw)))
    return b"\x08\x08" + field(8, b"\x10\x11") + field(7, raw)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    length, rest = b"", len(content)
    while rest > 0x7F:
        length += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return bytes([number << 3 | 2]) + length + bytes([rest]) + content


def test_the_handwritten_file_is_what_it_says() -> None:
    made = ModelProto.FromString(deep_bytes(20))
    depth, graph = 0, made.graph
    while graph.node and graph.node[0].attribute:
        inner: GraphProto = graph.node[0].attribute[0].g
        depth, graph = depth + 1, inner
    assert depth == 20
