"""The inputs and outputs of a model as onnxruntime declares them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int | str | None, ...]

# Element types as onnxruntime spells them in "tensor(...)" (onnxruntime/core/framework/data_types.cc).
_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "int4": np.dtype(ml_dtypes.int4),
    "uint4": np.dtype(ml_dtypes.uint4),
    "int2": np.dtype(ml_dtypes.int2),
    "uint2": np.dtype(ml_dtypes.uint2),
    "bool": np.dtype(np.bool_),
    "string": np.dtype(object),
}

_ML_DTYPES = frozenset(dtype for dtype in _DTYPES.values() if dtype.type.__module__ == "ml_dtypes")


@dataclass(frozen=True)
class Port:
    """One input or output of a model.

    name: as in the file. dtype: element type (of the elements of a sequence or optional too; object for strings), None
    where it is not known (maps). shape: one entry per axis, an int where fixed, a str where named, None where
    unknown; None when the rank is not known. onnxruntime reports a scalar and a tensor of unknown rank alike, as a
    tensor without axes; both arrive here as (). kind: "tensor", "sequence", "optional", "map" or "sparse".
    required: False where the model has a default (an overridable initializer) or the type is optional.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: Shape | None
    kind: str = "tensor"
    required: bool = True

    def __str__(self) -> str:
        dtype = "?" if self.dtype is None else dtype_name(self.dtype)
        shape = "" if self.shape is None else shape_text(self.shape)
        prefix = "" if self.kind == "tensor" else f"{self.kind} of "
        return f"{self.name}: {prefix}{dtype}{shape}"


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name an ONNX user knows: "float32", "bfloat16", "string"."""
    return "string" if dtype.kind in "OUST" else str(dtype.name)


def shape_text(shape: Shape) -> str:
    """[1,3,H,?] as text."""
    return "[" + ",".join("?" if dim is None else str(dim) for dim in shape) + "]"


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for IEEE floats, bfloat16 and the 8-bit floats."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def is_extension(dtype: np.dtype[Any]) -> bool:
    """True for element types that numpy itself does not know and onnxruntime can't take as an array."""
    return dtype in _ML_DTYPES


def bits(dtype: np.dtype[Any]) -> int:
    """Bits of one element in a tensor's payload: 4 for int4, though numpy spends a byte on it."""
    found = re.match(r"(?:u?int|float)([24])(?!\d)", dtype.name)
    return int(found.group(1)) if found else dtype.itemsize * 8


def dtype_of(text: str) -> np.dtype[Any] | None:
    """The element type in onnxruntime's "tensor(float)" or "seq(tensor(float))"; None for one not known here."""
    found = re.search(r"tensor\((\w+)\)", text)
    return _DTYPES.get(found.group(1)) if found else None


def port(argument: Any, *, required: bool = True) -> Port:
    """A Port from onnxruntime's NodeArg, whose type reads "tensor(float)", "seq(tensor(int64))", "optional(...)"."""
    text = str(argument.type)
    kind = next((kind for word, kind in _KINDS if text.startswith(word)), "tensor")
    dtype = None if kind == "map" else dtype_of(text)
    shape = None if kind in ("sequence", "map") or "seq(" in text else _shape(argument.shape)
    return Port(str(argument.name), dtype, shape, kind, required and kind != "optional")


_KINDS = (("seq(", "sequence"), ("optional(", "optional"), ("map(", "map"), ("sparse_tensor(", "sparse"))


def _shape(dims: list[Any]) -> Shape:
    return tuple(dim if isinstance(dim, int) and dim >= 0 else (dim if isinstance(dim, str) else None) for dim in dims)
