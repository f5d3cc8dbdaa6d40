"""Arrays to onnxruntime's values and back, for the element types that numpy lacks.

onnxruntime's Python binding refuses bfloat16, the 8-bit floats and the packed 2- and 4-bit types as arrays. They go
in and out as raw memory; packed types hold their first element in the lowest bits (onnx.proto, TensorProto).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from onnxopt.runtime.ports import Array, bits, dtype_of, is_extension


def to_ort_value(array: Array) -> Any:
    """An OrtValue for the array; it may point into the array's memory, so keep both alive together."""
    array = np.asarray(array, order="C")
    if not is_extension(array.dtype):
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    if bits(array.dtype) == array.dtype.itemsize * 8:
        raw = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    else:
        # The binding wants one item an element. onnxruntime reads only the start of it, where the payload is.
        raw = np.zeros(array.shape, np.uint8)
        payload = pack(array)
        raw.reshape(-1)[: payload.size] = payload
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element_type)


def from_ort_value(value: Any) -> Any:
    """What the value holds: an array, a list (sequence or map) or None (an empty optional)."""
    if not value.has_value():
        return None
    dtype = dtype_of(value.data_type()) if value.is_tensor() else None
    if dtype is None or not is_extension(dtype):
        return value.numpy() if value.is_tensor() else value._ortvalue.to_python_value()
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    payload = np.empty((count * bits(dtype) + 7) // 8, np.uint8)
    if payload.nbytes:
        ctypes.memmove(payload.ctypes.data, value.data_ptr(), payload.nbytes)
    return unpack(payload, dtype, count).reshape(shape)


def pack(array: Array) -> Array:
    """The tensor payload (uint8) of a 2- or 4-bit array."""
    width = bits(array.dtype)
    per_byte = 8 // width
    codes = array.reshape(-1).view(np.uint8) & ((1 << width) - 1)
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes
    columns = padded.reshape(-1, per_byte)
    packed: Array = np.zeros(len(columns), np.uint8)
    for position in range(per_byte):
        packed |= columns[:, position] << np.uint8(position * width)
    return packed


def unpack(payload: Array, dtype: np.dtype[Any], count: int) -> Array:
    """`count` elements of a payload (uint8), the inverse of pack; whole-byte types are only viewed."""
    width = bits(dtype)
    if width == dtype.itemsize * 8:
        return payload.view(dtype)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes = (payload[:, None] >> shifts & np.uint8((1 << width) - 1)).reshape(-1)[:count]
    if dtype.name.startswith("int"):
        sign = np.int8(1 << width - 1)
        return ((codes.view(np.int8) ^ sign) - sign).astype(dtype)
    if dtype.name.startswith("uint"):
        return codes.astype(dtype)
    return codes.view(dtype)
