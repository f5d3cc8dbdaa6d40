"""The immutable content of one tensor, however the file stored it.

A `TensorData` is shared between the model, its snapshots and its clones: weights are never copied to move them about.
Its `uid` names the content object, so two graphs that hold the same uid hold the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxopt.errors import ModelError
from onnxopt.model.external import CHUNK, FileSlice
from onnxopt.model.protos import copy_without

_uids = itertools.count(1)
# Types whose raw_data is the little-endian array itself, one element after the other.
_PLAIN_KINDS = "fiubc"
# Large tensors are told apart by this many samples before they are read whole.
_SAMPLES, _SAMPLE_BYTES = 16, 1024
# Contents are compared in pieces that stay in a processor's cache while all the others are held against them, and whose
# memory the allocator uses again; a multiple of 8, for words are compared.
_COMPARED = 64 << 10

# types several of whose elements share a byte
PACKED_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


def stored_nbytes(dtype: np.dtype, size: int) -> int:
    """Bytes that `size` elements take in a file, sub-byte types packed."""
    bits = PACKED_BITS.get(dtype.name)
    return size * dtype.itemsize if bits is None else (size * bits + 7) // 8


class TensorData(LazyValues):
    """Dtype, shape and lazily read values of a tensor. Immutable; `array()` is read-only.

    Built by `from_proto`, `from_sparse`, `from_array` or `from_attribute`; the proto it came from is kept without its
    payload, so that an untouched tensor is written back field by field as it was read.
    """

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.uid = next(_uids)
        self.dtype = dtype
        self.shape = shape
        self.origin: TensorProto | None = None
        self.sparse: SparseTensorProto | None = None
        self.attribute: onnx.AttributeProto | None = None
        self._raw: bytes | FileSlice | None = None
        self._array: NDArray[Any] | None = None
        # an array over a mapped file lives as long as somebody uses it: its pages count as memory of this process
        self._mapped: weakref.ref[NDArray[Any]] | None = None
        self._digest: bytes | None = None
        self._fingerprint: bytes | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored dense values, sub-byte types packed."""
        return stored_nbytes(self.dtype, self.size)

    @property
    def stored_nbytes(self) -> int:
        """Bytes in a file: those of the indices and values where the tensor is sparse, else `nbytes`."""
        return self.nbytes if self.sparse is None else int(self.sparse.ByteSize())

    @classmethod
    def from_array(cls, array: NDArray[Any]) -> TensorData:
        """The content of an array. The array is not copied; it is shown read-only from here on."""
        values = np.asarray(array)
        if values.dtype.byteorder == ">":
            values = values.astype(values.dtype.newbyteorder("<"))
        data = cls(values.dtype, values.shape)
        data._array = _read_only(values)
        return data

    @classmethod
    def from_proto(cls, proto: TensorProto, read_external: Callable[[TensorProto], Any] | None = None) -> TensorData:
        """The content of a TensorProto, which is neither kept nor changed.

        Raises ModelError when the values lie in another file and `read_external` is None, or its type is unknown.
        """
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
        except KeyError as error:
            raise ModelError(
                f"tensor {proto.name!r} has the unknown element type {proto.data_type}",
                "convert the model with a newer onnx package, or upgrade onnx",
            ) from error
        data = cls(dtype, tuple(proto.dims))
        data.origin = copy_without(proto, "raw_data")
        if proto.data_location == TensorProto.EXTERNAL:
            if read_external is None:
                raise ModelError(
                    f"tensor {proto.name!r} keeps its values in another file, but the model has no folder",
                    "load the model from its path, or load its external data first",
                )
            data._raw = read_external(proto)
            data.origin.ClearField("external_data")
            data.origin.ClearField("data_location")
        elif proto.HasField("raw_data"):
            data._raw = proto.raw_data
        return data

    @classmethod
    def from_sparse(cls, proto: SparseTensorProto) -> TensorData:
        """The dense content of a SparseTensorProto, scattered on first use."""
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.values.data_type))
        data = cls(dtype, tuple(proto.dims))
        data.sparse = SparseTensorProto()
        data.sparse.CopyFrom(proto)
        return data

    @classmethod
    def from_attribute(cls, attribute: onnx.AttributeProto) -> TensorData:
        """The content of a Constant node's value_float, value_ints, value_string, ... attribute."""
        if attribute.name == "sparse_value":
            data = cls.from_sparse(attribute.sparse_tensor)
        else:
            value = helper.get_attribute_value(attribute)
            kind = {
                "value_float": np.float32,
                "value_floats": np.float32,
                "value_int": np.int64,
                "value_ints": np.int64,
            }
            data = cls.from_array(np.array(value, kind.get(attribute.name, np.object_)))
        data.attribute = onnx.AttributeProto()
        data.attribute.CopyFrom(attribute)
        return data

    def array(self) -> NDArray[Any]:
        """The values, read-only. Sub-byte and narrow float types come as ml_dtypes arrays, one element an item."""
        if self._array is not None:
            return self._array
        array = self._mapped() if self._mapped is not None else None
        if array is None:
            array = _read_only(self._decode())
            if isinstance(self._raw, FileSlice) and not array.flags.owndata:
                self._mapped = weakref.ref(array)
            else:
                self._array = array
        return array

    def load(self) -> NDArray[Any]:
        """The values (graphsurgeon's name for `array`)."""
        return self.array()

    def to_proto(self, name: str | None = None) -> TensorProto:
        """A dense TensorProto with the values inline. `name=None` keeps the name the proto came with."""
        if self.origin is None:
            proto = numpy_helper.from_array(_contiguous(self.array()))
        else:
            proto = TensorProto()
            proto.CopyFrom(self.origin)
            if self._raw is not None:
                proto.raw_data = bytes(self._raw)
        if name is not None:
            proto.name = name
        return proto

    def to_reference(self, location: str, name: str | None = None) -> TensorProto:
        """A TensorProto that says the values lie at `location`; type, dims, name and metadata are there."""
        proto = TensorProto()
        if self.origin is not None:
            proto.CopyFrom(self.origin)
            for field in ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data"):
                proto.ClearField(field)
        else:
            proto.data_type = helper.np_dtype_to_tensor_dtype(self.dtype)
            proto.dims.extend(self.shape)
        if name is not None:
            proto.name = name
        proto.data_location = TensorProto.EXTERNAL
        entry = proto.external_data.add()
        entry.key, entry.value = "location", location
        return proto

    def raw_bytes(self) -> bytes:
        """The values as the bytes of `raw_data`, a copy of what lies in a file; `chunks` for what may be large."""
        return self.to_raw_proto().raw_data if self._raw is None else bytes(self._raw)

    def place(self, folder: Path) -> tuple[str, int, int] | None:
        """(location below the folder, offset, length) of values that lie in a file there as they are, else None."""
        if not isinstance(self._raw, FileSlice) or len(self._raw) != self.nbytes:
            return None
        return self._raw.place(folder)

    def chunks(self, size: int = CHUNK) -> Iterator[Any]:
        """The bytes of `raw_data`, bytes-like, at most `size` at a time, none of them kept; not for strings.

        Raises ModelError when the file they lie in became shorter.
        """
        if isinstance(self._raw, FileSlice):
            yield from self._raw.chunks(size)
            return
        raw = self._memory()
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    def digest(self) -> bytes:
        """A hash of the content, computed once: equal for equal stored bytes of one element type and shape."""
        if self._digest is None:
            digest = hashlib.sha256()
            for chunk in self._content():
                digest.update(chunk)
            self._digest = digest.digest()
        return self._digest

    def fingerprint(self) -> bytes:
        """A hash that differs only where `digest` does, but reads no more than a few KiB of a large tensor."""
        if self._fingerprint is None:
            self._fingerprint = self._sampled() if self._is_large() else self.digest()
        return self._fingerprint

    def equal_to(self, others: Sequence[TensorData]) -> list[bool]:
        """Which of `others`, all of this element type and shape, hold the same stored bytes.

        Each content is read once, this one too, piece by piece, and no further than to where it differs. Nothing is
        hashed, and nothing copied but what lies in files.
        """
        equal = [self.uid == other.uid for other in others]
        open_ = {at: other._content(_COMPARED) for at, other in enumerate(others) if not equal[at]}
        for piece in self._content(_COMPARED) if open_ else ():
            open_ = {at: pieces for at, pieces in open_.items() if _same_bytes(piece, next(pieces, b""))}
            if not open_:
                break
        for at, pieces in open_.items():
            equal[at] = next(pieces, None) is None
        return equal

    def _is_large(self) -> bool:
        return self.sparse is None and self.dtype.kind != "O" and self.nbytes > _SAMPLES * _SAMPLE_BYTES

    def _sampled(self) -> bytes:
        raw = self._raw if isinstance(self._raw, FileSlice) else self._memory()
        last = len(raw) - _SAMPLE_BYTES
        digest = hashlib.sha256(len(raw).to_bytes(8, "little"))
        for number in range(_SAMPLES):
            start = last * number // (_SAMPLES - 1)
            part = raw[start : start + _SAMPLE_BYTES] if isinstance(raw, memoryview) else raw.read(start, _SAMPLE_BYTES)
            digest.update(part)
        return digest.digest()

    def _content(self, size: int = CHUNK) -> Iterator[Any]:
        """What makes the content up, bytes-like, comparable between contents of one element type and shape.

        size: bytes of a piece, but for strings and sparse tensors, which come whole.
        """
        if self.sparse is not None:
            bare = SparseTensorProto()
            bare.CopyFrom(self.sparse)
            bare.values.ClearField("name")
            return iter([bare.SerializeToString(deterministic=True)])
        if self.dtype.kind == "O":
            items = [item if isinstance(item, bytes) else str(item).encode() for item in self.array().reshape(-1)]
            return iter([b"".join(len(item).to_bytes(8, "little") + item for item in items)])
        return self.chunks(size)

    def _memory(self) -> memoryview:
        """The bytes of `raw_data` of what lies in memory, without a copy where the array is laid out like them."""
        if self._raw is None and self.dtype.name not in PACKED_BITS:
            flat: Any = _contiguous(self.array()).reshape(-1).view(np.uint8)
            return memoryview(flat)
        return memoryview(self.raw_bytes())

    def to_raw_proto(self) -> TensorProto:
        """A TensorProto whose values stand in `raw_data` whatever field they came in; not for strings."""
        return numpy_helper.from_array(_contiguous(self.array()))

    def _decode(self) -> NDArray[Any]:
        if self.sparse is not None:
            return _scatter(self.sparse, self.shape, self.dtype)
        if self._raw is not None and self.dtype.kind in _PLAIN_KINDS and self.dtype.isbuiltin:
            expected = self.size * self.dtype.itemsize
            if len(self._raw) != expected:
                name = self.origin.name if self.origin is not None else ""
                raise ModelError(
                    f"tensor {name!r} holds {len(self._raw)} bytes where its shape {list(self.shape)} needs {expected}",
                    "export the model again; the file is damaged",
                )
            raw = self._raw.view() if isinstance(self._raw, FileSlice) else self._raw
            return np.frombuffer(raw, self.dtype).reshape(self.shape)
        if self.origin is not None and self.origin.data_type == TensorProto.STRING:
            return _strings(self.origin.string_data, self.shape)
        return np.asarray(numpy_helper.to_array(self.to_proto())).reshape(self.shape)

    def __str__(self) -> str:
        return f"TensorData(dtype={self.dtype}, shape={self.shape})"


def _same_bytes(one: Any, other: Any) -> bool:
    """Whether two bytes-like objects are equal. Words of numpy: memoryviews compare item by item, 15 times as slow."""
    if len(one) != len(other):
        return False
    words = len(one) // 8
    if words and not np.array_equal(np.frombuffer(one, np.uint64, words), np.frombuffer(other, np.uint64, words)):
        return False
    return bytes(one[words * 8 :]) == bytes(other[words * 8 :])


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    # np.ascontiguousarray would turn a 0-d array into shape [1]
    return array if array.flags.c_contiguous else array.copy(order="C")


def _strings(items: Iterable[bytes], shape: tuple[int, ...]) -> NDArray[Any]:
    """Texts, and bytes where they are no UTF-8: the format allows any."""
    values = np.empty(int(np.prod(shape, dtype=np.int64)), np.object_)
    for at, item in enumerate(items):
        try:
            values[at] = item.decode("utf-8")
        except UnicodeDecodeError:
            values[at] = item
    return values.reshape(shape)


def _scatter(sparse: SparseTensorProto, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[Any]:
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices).astype(np.int64)
    dense = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), shape) if indices.size else indices.reshape(0)
    dense[indices] = values
    return dense.reshape(shape)
