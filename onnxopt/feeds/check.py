"""Do the values of a feed fit the inputs of the model? No value is ever cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxopt.errors import FeedError, did_you_mean
from onnxopt.runtime.messages import tensor_trouble
from onnxopt.runtime.ports import Array, Port, is_extension, is_float


def to_inputs(values: Mapping[str, Any], ports: Sequence[Port]) -> dict[str, Any]:
    """The values as arrays (lists of arrays for sequences), without converting any element."""
    by_name = {port.name: port for port in ports}
    return {name: _to_value(value, by_name.get(name)) for name, value in values.items()}


def _to_value(value: Any, port: Port | None) -> Any:
    if value is None or isinstance(value, Mapping):
        return value
    is_list = isinstance(value, (list, tuple))
    if is_list and port is not None and (port.kind == "sequence" or (port.kind == "optional" and port.shape is None)):
        return [_to_value(item, None) for item in value]
    array: Array = np.asarray(value)
    # numpy's files know no bfloat16 and give it back as raw bytes of the same width.
    if port is not None and port.dtype is not None and array.dtype.kind == "V" and is_extension(port.dtype):
        same_width = array.dtype.itemsize == port.dtype.itemsize
        return array.view(port.dtype) if same_width else array
    return array


def check_inputs(inputs: Mapping[str, Any], ports: Sequence[Port], source: str, *, reject_nan: bool = False) -> None:
    """Raise FeedError, naming source and tensor, for an unknown, missing, wrongly typed or wrongly shaped input.

    Infinities and NaN are values like others, unless reject_nan is set: then a NaN is an error.
    """
    known = {port.name: port for port in ports}
    for name in inputs:
        if name not in known:
            raise FeedError(
                f"{source}: the model has no input {name!r}; its inputs are {_list(ports)}",
                f"rename or leave out {name!r}; {did_you_mean(name, known)}",
            )
    missing = [port for port in ports if port.required and port.name not in inputs]
    if missing:
        raise FeedError(
            f"{source}: no value for {_list(missing)}; found {', '.join(map(repr, inputs)) or 'nothing'}",
            "give an array for every input of the model",
        )
    for name, value in inputs.items():
        _check_value(known[name], value, f"{source}: input {name!r}")
        if reject_nan and _has_nan(value):
            raise FeedError(f"{source}: input {name!r} holds NaN", "repair or leave out this sample")


def _check_value(port: Port, value: Any, where: str) -> None:
    if value is None:
        if port.kind != "optional":
            raise FeedError(f"{where}: expected {port}, got None", "give an array")
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_array(Port(port.name, port.dtype, None), item, f"{where}, element {index}")
        return
    if port.kind in ("sequence", "map"):
        raise FeedError(f"{where}: expected {port}, got {type(value).__name__}", f"give a {_python_name(port)}")
    if isinstance(value, np.ndarray):
        _check_array(port, value, where)


def _check_array(port: Port, array: Array, where: str) -> None:
    trouble = tensor_trouble(port, array)
    if trouble is not None:
        raise FeedError(f"{where}: {trouble[0]}", trouble[1])


def _python_name(port: Port) -> str:
    return "list of arrays" if port.kind == "sequence" else "dict"


def _has_nan(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_nan(item) for item in value)
    return isinstance(value, np.ndarray) and is_float(value.dtype) and bool(np.isnan(value).any())


def _list(ports: Sequence[Port]) -> str:
    return ", ".join(map(str, ports)) or "none"
