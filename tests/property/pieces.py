"""Random parts of a model: tensors of every type and storage, types, attributes of every kind, unknown fields."""

from __future__ import annotations

from random import Random
from typing import Any

from onnx import AttributeProto, GraphProto, SparseTensorProto, TensorProto, TypeProto, ValueInfoProto, helper

KINDS = tuple(value for name, value in TensorProto.DataType.items() if name != "UNDEFINED")
BITS = {
    TensorProto.BOOL: 8, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16, TensorProto.INT16: 16,
    TensorProto.UINT32: 32, TensorProto.INT32: 32, TensorProto.UINT64: 64, TensorProto.INT64: 64,
    TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64,
    TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128, TensorProto.INT4: 4, TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **({TensorProto.INT2: 2, TensorProto.UINT2: 2} if hasattr(TensorProto, "INT2") else {}),
}  # fmt: skip
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (2, 4), (2, 0, 3), (1, 5, 1))
# field 1023, three bytes: no version of onnx knows it
UNKNOWN = b"\xfa\x3f\x03new"
WORDS = ("", "a", "weight", "ein längerer Text", "\x00\x01", "名前", "a/b:0")


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def tensor(random: Random, name: str, kind: int | None = None, shape: tuple[int, ...] | None = None) -> TensorProto:
    """Any values in any of the fields that may hold them."""
    kind = random.choice(KINDS) if kind is None else kind
    shape = random.choice(SHAPES) if shape is None else shape
    proto = TensorProto(data_type=kind, dims=shape)
    if name or random.random() < 0.5:
        proto.name = name
    count = elements(shape)
    if kind == TensorProto.STRING:
        proto.string_data.extend(random.choice((b"", b"text", b"\xff\xfe", b"\x00")) for _ in range(count))
        return proto
    size = (count * BITS.get(kind, 8) + 7) // 8
    if random.random() < 0.5:
        proto.raw_data = bytes(random.randrange(2 if kind == TensorProto.BOOL else 256) for _ in range(size))
    else:
        _typed(random, proto, kind, count, size)
    return proto


def _typed(random: Random, proto: TensorProto, kind: int, count: int, size: int) -> None:
    special = (0.0, -0.0, 1.5, float("inf"), float("nan"), -3e-41)
    if kind in (TensorProto.FLOAT, TensorProto.COMPLEX64):
        proto.float_data.extend(random.choice(special) for _ in range(size // 4))
    elif kind in (TensorProto.DOUBLE, TensorProto.COMPLEX128):
        proto.double_data.extend(random.choice(special) for _ in range(size // 8))
    elif kind == TensorProto.INT64:
        proto.int64_data.extend(random.choice((0, -1, 2**63 - 1, -(2**63))) for _ in range(count))
    elif kind in (TensorProto.UINT32, TensorProto.UINT64):
        proto.uint64_data.extend(random.choice((0, 1, 2**32 - 1)) for _ in range(count))
    elif BITS.get(kind, 8) < 8:
        proto.int32_data.extend(random.randrange(256) for _ in range(size))
    else:
        top = {TensorProto.BOOL: 1, TensorProto.INT8: 127, TensorProto.UINT8: 255, TensorProto.INT16: 32767}
        limit = top.get(kind, 2**31 - 1 if kind == TensorProto.INT32 else 2 ** BITS.get(kind, 8) - 1)
        proto.int32_data.extend(random.randrange(limit + 1) for _ in range(count))


def sparse(random: Random, name: str, kind: int | None = None, shape: tuple[int, ...] = (2, 4)) -> SparseTensorProto:
    """Linear or per-axis indices, of any integer type and in any field."""
    proto = SparseTensorProto(dims=shape)
    # onnxruntime leaves a tensor without values undefined instead of zero
    count = random.randrange(3) if kind is None else random.randrange(1, 3)
    places = sorted(random.sample(range(elements(shape)), count))
    number_kinds = [each for each in KINDS if each not in (TensorProto.STRING, TensorProto.BOOL)]
    kind = random.choice(number_kinds) if kind is None else kind
    proto.values.CopyFrom(tensor(random, name, kind, (count,)))
    rows = [[place // shape[1], place % shape[1]] for place in places]
    per_axis = random.random() < 0.5
    index_kind, field = random.choice(
        ((TensorProto.INT64, "int64_data"), (TensorProto.INT32, "int32_data"), (TensorProto.INT16, "int32_data"),
         (TensorProto.INT8, "int32_data"))
    )  # fmt: skip
    proto.indices.data_type = index_kind
    proto.indices.dims.extend((count, 2) if per_axis else (count,))
    flat = [index for row in rows for index in row] if per_axis else places
    if random.random() < 0.5:
        proto.indices.raw_data = b"".join(i.to_bytes(BITS[index_kind] // 8, "little") for i in flat)
    else:
        getattr(proto.indices, field).extend(flat)
    return proto


def type_proto(random: Random, depth: int = 2) -> TypeProto:
    """A tensor, sparse tensor, sequence, map or optional type; shapes with every kind of dim, or none."""
    proto = TypeProto()
    choice = random.randrange(6) if depth else 0
    if choice == 1:
        proto.sequence_type.elem_type.CopyFrom(type_proto(random, depth - 1))
    elif choice == 2:
        proto.optional_type.elem_type.CopyFrom(type_proto(random, depth - 1))
    elif choice == 3:
        proto.map_type.key_type = random.choice((TensorProto.INT64, TensorProto.STRING))
        proto.map_type.value_type.CopyFrom(type_proto(random, depth - 1))
    else:
        plain = proto.sparse_tensor_type if choice == 4 else proto.tensor_type
        if random.random() < 0.9:
            plain.elem_type = random.choice(KINDS)
        if random.random() < 0.8:
            shape(random, plain)
    if random.random() < 0.2:
        proto.denotation = "IMAGE"
    return proto


def shape(random: Random, plain: Any) -> None:
    """Dims by number, by name, negative, empty, or open."""
    plain.shape.SetInParent()
    for _ in range(random.randrange(4)):
        dim = plain.shape.dim.add()
        choice = random.randrange(6)
        if choice < 2:
            dim.dim_value = random.choice((0, 1, 7))
        elif choice == 2:
            dim.dim_value = -1
        elif choice < 5:
            dim.dim_param = random.choice(("N", "batch size", ""))
        if random.random() < 0.2:
            dim.denotation = "DATA_BATCH"


def value_info(random: Random, name: str) -> ValueInfoProto:
    """A described value, or only its name."""
    proto = ValueInfoProto(name=name)
    if random.random() < 0.8:
        proto.type.CopyFrom(type_proto(random))
    return proto


def attributes(random: Random, body: GraphProto) -> list[AttributeProto]:
    """One attribute of each kind, each list kind also empty, some with docs."""
    empty = GraphProto(name="empty body")
    values: list[tuple[int, str, Any]] = [
        (AttributeProto.FLOAT, "f", random.choice((0.0, -0.0, 1e-45, float("nan")))),
        (AttributeProto.INT, "i", random.choice((0, -1, 2**63 - 1))),
        (AttributeProto.STRING, "s", random.choice((b"", b"text", b"\xff\xfe"))),
        (AttributeProto.TENSOR, "t", tensor(random, "")),
        (AttributeProto.GRAPH, "g", body),
        (AttributeProto.SPARSE_TENSOR, "sparse_tensor", sparse(random, "")),
        (AttributeProto.TYPE_PROTO, "tp", type_proto(random)),
        (AttributeProto.FLOATS, "floats", [float("nan"), -0.0]),
        (AttributeProto.INTS, "ints", [1, -2]),
        (AttributeProto.STRINGS, "strings", [b"a", b"\xff"]),
        (AttributeProto.TENSORS, "tensors", [tensor(random, "x"), tensor(random, "")]),
        (AttributeProto.GRAPHS, "graphs", [empty, empty]),
        (AttributeProto.SPARSE_TENSORS, "sparse_tensors", [sparse(random, "x")]),
        (AttributeProto.TYPE_PROTOS, "type_protos", [type_proto(random)]),
    ]
    found = []
    for kind, field, value in random.sample(values, random.randrange(1, len(values) + 1)):
        proto = AttributeProto(name=f"of_{field}", type=kind)
        if not isinstance(value, list):
            (
                getattr(proto, field).CopyFrom
                if hasattr(value, "CopyFrom")
                else lambda v, p=proto, f=field: setattr(p, f, v)
            )(value)
        elif random.random() < 0.7:
            getattr(proto, field).extend(value)
        if random.random() < 0.2:
            proto.doc_string = random.choice(WORDS)
        found.append(proto)
    if random.random() < 0.3:
        # files of IR 1 give attributes no type
        found.append(AttributeProto(name="untyped", i=3))
    return found


def constant_attribute(random: Random) -> AttributeProto:
    """The attribute of a Constant node in one of its eight forms."""
    made = random.choice(
        (
            lambda: helper.make_attribute("value_float", 1.5),
            lambda: helper.make_attribute("value_int", -3),
            lambda: helper.make_attribute("value_string", b"\xffx"),
            lambda: helper.make_attribute("value_floats", [1.0, -0.0]),
            lambda: helper.make_attribute("value_ints", [], attr_type=AttributeProto.INTS),
            lambda: helper.make_attribute("value_strings", [b"a", b"\xff"]),
            lambda: helper.make_attribute("sparse_value", sparse(random, "", TensorProto.FLOAT)),
            lambda: helper.make_attribute("value", tensor(random, random.choice(("", "inner name")))),
        )
    )()
    if random.random() < 0.3:
        made.doc_string = "constant"
    return made
