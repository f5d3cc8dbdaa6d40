from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.runtime.ort_values import from_ort_value, pack, to_ort_value, unpack
from onnxopt.runtime.ports import bits, is_extension, is_float


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (0, 3), ()])
def test_pack_and_unpack_are_inverse(dtype: Any, shape: tuple[int, ...]) -> None:
    info = ml_dtypes.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max + 1, shape).astype(dtype)
    payload = pack(values)
    assert payload.nbytes == (values.size * bits(values.dtype) + 7) // 8
    restored = unpack(payload, values.dtype, values.size).reshape(shape)
    np.testing.assert_array_equal(restored.astype(np.int8), values.astype(np.int8))


def test_the_first_element_lies_in_the_low_bits() -> None:
    assert pack(np.array([1, 2, 3]).astype(ml_dtypes.uint4)).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_values_survive_the_way_to_onnxruntime_and_back(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.arange(int(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)
    restored = from_ort_value(to_ort_value(values))
    assert restored.dtype == values.dtype
    assert restored.shape == shape
    np.testing.assert_array_equal(restored.astype(np.float32), values.astype(np.float32))


def test_dtype_questions() -> None:
    assert is_float(np.dtype(ml_dtypes.bfloat16))
    assert is_float(np.dtype(np.float16))
    assert not is_float(np.dtype(ml_dtypes.int4))
    assert not is_float(np.dtype(object))
    assert is_extension(np.dtype(ml_dtypes.int4))
    assert not is_extension(np.dtype(np.float16))
    assert bits(np.dtype(ml_dtypes.float4_e2m1fn)) == 4
    assert bits(np.dtype(ml_dtypes.float8_e5m2)) == 8
    assert bits(np.dtype(np.int16)) == 16
