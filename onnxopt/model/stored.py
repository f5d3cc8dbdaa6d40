"""Whether what a tensor says of itself and the values stored with it agree. No values are copied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

from onnxopt.errors import ModelError
from onnxopt.model.tensor_data import stored_nbytes

_DAMAGED = "export the model again; the file is damaged or made to do harm"
_INLINE = "load its external data with onnx.load, save the model again, and use that"
_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_TYPE = TensorProto.DataType
# element type -> (field that holds it when it is not raw, elements of the field for each element of the tensor)
_FIELD: dict[int, tuple[str, float]] = {
    _TYPE.FLOAT: ("float_data", 1),
    _TYPE.COMPLEX64: ("float_data", 2),
    _TYPE.DOUBLE: ("double_data", 1),
    _TYPE.COMPLEX128: ("double_data", 2),
    _TYPE.INT64: ("int64_data", 1),
    _TYPE.UINT32: ("uint64_data", 1),
    _TYPE.UINT64: ("uint64_data", 1),
    _TYPE.STRING: ("string_data", 1),
}
_INDEX_TYPES = {_TYPE.INT8, _TYPE.INT16, _TYPE.INT32, _TYPE.INT64}


def elements(dims: Any, where: str) -> int:
    """Product of dims, exact. Raises ModelError for a negative one."""
    for dim in dims:
        if dim < 0:
            raise ModelError(f"{where} has the negative dim {dim}", _DAMAGED)
    return math.prod(dims)


def check_tensor(tensor: TensorProto, where: str, *, external: bool) -> int:
    """Bytes of the tensor's values, sub-byte types packed; strings count as the bytes they hold.

    external: whether its values may lie in another file. Raises ModelError where the type is unknown, a dim negative,
    or the number of values stored is another than dims say.
    """
    dtype = _dtype(tensor, where)
    size = elements(tensor.dims, where)
    if tensor.data_type == _TYPE.STRING:
        return _check_strings(tensor, size, where)
    nbytes = stored_nbytes(dtype, size)
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        _check_external(tensor, nbytes, where, external)
        return nbytes
    raw = tensor.HasField("raw_data") and len(tensor.raw_data) > 0
    name, factor = _FIELD.get(tensor.data_type, ("int32_data", stored_nbytes(dtype, 8) / 8 if _is_packed(dtype) else 1))
    _refuse_other_fields(tensor, None if raw else name, where)
    if raw:
        found, wanted, unit = len(tensor.raw_data), nbytes, "bytes"
    else:
        found, wanted, unit = len(getattr(tensor, name)), math.ceil(size * factor), f"entries in {name}"
    if found != wanted:
        raise ModelError(f"{where} holds {found:,} {unit} where its dims {list(tensor.dims)} need {wanted:,}", _DAMAGED)
    return nbytes


def _dtype(tensor: TensorProto, where: str) -> np.dtype:
    try:
        dtype: np.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{where} has the unknown element type {tensor.data_type}",
            "convert the model with a newer onnx package, or upgrade onnx",
        ) from error
    return dtype


def _is_packed(dtype: np.dtype) -> bool:
    return stored_nbytes(dtype, 8) < 8


def _check_strings(tensor: TensorProto, size: int, where: str) -> int:
    if tensor.HasField("raw_data") or tensor.data_location == TensorProto.EXTERNAL:
        raise ModelError(f"{where} holds strings outside string_data", _DAMAGED)
    _refuse_other_fields(tensor, "string_data", where)
    if len(tensor.string_data) != size:
        raise ModelError(
            f"{where} holds {len(tensor.string_data):,} strings where its dims {list(tensor.dims)} need {size:,}",
            _DAMAGED,
        )
    return sum(map(len, tensor.string_data))


def _refuse_other_fields(tensor: TensorProto, allowed: str | None, where: str) -> None:
    for name in _TYPED:
        if name != allowed and len(getattr(tensor, name)):
            kind = _TYPE.Name(tensor.data_type).lower()
            raise ModelError(f"{where} is of type {kind} and keeps values in {name}", _DAMAGED)


def _check_external(tensor: TensorProto, nbytes: int, where: str, allowed: bool) -> None:
    if not allowed:
        raise ModelError(f"{where} keeps its values in another file, which only weights may", _INLINE)
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    _refuse_other_fields(tensor, None, where)
    for entry in tensor.external_data:
        if entry.key == "length" and entry.value.isdecimal() and int(entry.value) not in (0, nbytes):
            raise ModelError(
                f"{where} takes {int(entry.value)} bytes where its dims {list(tensor.dims)} need {nbytes}",
                _DAMAGED,
            )


def check_sparse(sparse: SparseTensorProto, where: str) -> tuple[int, int]:
    """(bytes stored, bytes when filled) of a sparse tensor. Raises ModelError where its parts contradict each other."""
    filled = elements(sparse.dims, where)
    held = check_tensor(sparse.values, f"the values of {where}", external=False)
    held += check_tensor(sparse.indices, f"the indices of {where}", external=False)
    if sparse.indices.data_type not in _INDEX_TYPES:
        raise ModelError(f"the indices of {where} are of type {sparse.indices.data_type}, no integer", _DAMAGED)
    count = math.prod(sparse.values.dims)
    if list(sparse.indices.dims) not in ([count], [count, len(sparse.dims)]):
        raise ModelError(
            f"{where} has {count:,} values and indices of dims {list(sparse.indices.dims)}, which don't fit", _DAMAGED
        )
    return held, stored_nbytes(_dtype(sparse.values, where), filled)


def check_indices(sparse: SparseTensorProto, where: str) -> None:
    """Raise ModelError where an index of a sparse tensor, checked already, lies outside its dims."""
    indices = numpy_helper.to_array(sparse.indices)
    if not indices.size:
        return
    ends = np.array(list(sparse.dims) if indices.ndim == 2 else [math.prod(sparse.dims)], np.int64)
    if indices.min() < 0 or (indices.reshape(len(indices), -1) >= ends).any():
        raise ModelError(f"{where} has an index outside its dims {list(sparse.dims)}", _DAMAGED)
