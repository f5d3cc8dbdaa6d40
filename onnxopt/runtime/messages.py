"""What onnxruntime says when it refuses a model or an input, as one line of cause and one of remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxopt.errors import ModelError, PassError, did_you_mean
from onnxopt.runtime.ports import Port, dtype_name, shape_text

# (what the message says, what to do): the first that matches gives the remedy.
_LOAD_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"not a registered function/op|No Op registered|is not a registered",
        "the installed onnxruntime has no such operator: remove the custom operator, inline it as a local function, "
        "or upgrade onnxruntime",
    ),
    (
        r"[Oo]pset \d+ is under development|Unsupported model IR version|Current official support",
        "upgrade onnxruntime, or export the model for an older opset",
    ),
    (
        r"Could not find an implementation|NOT_IMPLEMENTED",
        "the CPU kernels of onnxruntime lack this operator for these types: use another element type, or upgrade "
        "onnxruntime",
    ),
    (r"protobuf|No graph was found", "the file is no ONNX model or is cut off: export or download it again"),
    (r"[Ff]ile doesn't exist|NO_SUCHFILE|No such file", "check the path and that external data lies beside the model"),
    (r"external data|External initializer", "keep the external data files beside the model"),
    (r"bad_alloc|[Ff]ailed to allocate|out of memory", "free memory, or use a smaller model"),
    (r"ShapeInferenceError|TypeInferenceError|Type Error", "the model contradicts itself there: correct the export"),
)
_GENERIC_LOAD = "check the model with onnx.checker.check_model and export it again"
_NODE = (
    r"[Nn]ode \(([^()\s]+)\)",
    r"node with name '([^']+)'",
    r"Name: ?'([^']+)'",
    r"[Nn]ode:\s?\[?([\w./:-]+)",
    r'In Node, \("([^"]+)"',
)


def one_line(message: str, limit: int = 300) -> str:
    """The message without onnxruntime's status prefix, source paths and line breaks, cut to `limit` characters."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message.strip())
    text = re.sub(r"/onnxruntime_src/\S+ .*?\)(?: const)? (?=[A-Z])", "", text, count=1)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def node_of(message: str) -> str | None:
    """The name of the node that the message blames, if it names one."""
    found = (re.search(pattern, message) for pattern in _NODE)
    return next((match.group(1) for match in found if match), None)


def load_error(what: str, error: BaseException) -> ModelError:
    """The ModelError for a model that onnxruntime refuses to load. what: the file, or how to call the model."""
    message = str(error)
    node = node_of(message)
    where = f" at node {node!r}" if node else ""
    remedy = next((text for pattern, text in _LOAD_REMEDIES if re.search(pattern, message)), _GENERIC_LOAD)
    return ModelError(f"{what}: onnxruntime can't load it{where}: {one_line(message)}", remedy)


def run_error(
    what: str, ports: Sequence[Port], inputs: Mapping[str, Any], outputs: Sequence[str], error: BaseException
) -> PassError:
    """The PassError for a failed run; names the input at fault where one is, else the node."""
    trouble = input_trouble(ports, inputs)
    if trouble is not None:
        return PassError(f"{what}: {trouble[0]}", trouble[1])
    message = str(error)
    if "Invalid output name" in message:
        wanted = message.rpartition(":")[2].strip()
        return PassError(f"{what}: it has no output {wanted!r}", did_you_mean(wanted, outputs))
    node = node_of(message)
    where = f" at node {node!r}" if node else ""
    fed = ", ".join(f"{name} {_describe(value)}" for name, value in inputs.items())
    return PassError(
        f"{what}: the run failed{where}: {one_line(message)} (inputs: {one_line(fed)})",
        "feed inputs that the original model accepts; when it accepts these, the rewrite is at fault",
    )


def input_trouble(ports: Sequence[Port], inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(cause, remedy) for the first input that doesn't fit its port, or None."""
    known = {port.name: port for port in ports}
    for name in inputs:
        if name not in known:
            return f"it has no input {name!r}", did_you_mean(name, known)
    for name, port in known.items():
        if port.required and name not in inputs:
            return f"input {name!r} is missing", f"feed a value for {port}"
        value = inputs.get(name)
        trouble = tensor_trouble(port, value) if isinstance(value, np.ndarray) and port.kind == "tensor" else None
        if trouble is not None:
            return f"input {name!r}: {trouble[0]}", trouble[1]
    return None


def tensor_trouble(port: Port, array: np.ndarray[Any, Any]) -> tuple[str, str] | None:
    """(cause, remedy) when the array's dtype, rank or a fixed dimension differs from the port's, or None.

    A port without axes is either a scalar or of unknown rank, which onnxruntime doesn't tell apart; any rank fits.
    """
    if port.dtype is not None and not same_dtype(port.dtype, array.dtype):
        expected, got = dtype_name(port.dtype), dtype_name(array.dtype)
        convert = "astype(str)" if expected == "string" else f"astype({expected!r})"
        return f"expected {expected}, got {got}", f"convert it with array.{convert}"
    if not port.shape:
        return None
    wanted, got_shape = shape_text(port.shape), shape_text(array.shape)
    if len(port.shape) != array.ndim:
        add = " (a batch axis may be missing: array[None])" if len(port.shape) == array.ndim + 1 else ""
        return (
            f"expected rank {len(port.shape)} {wanted}, got rank {array.ndim} {got_shape}",
            f"reshape it to {wanted}{add}",
        )
    for axis, (dim, size) in enumerate(zip(port.shape, array.shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            return f"expected {dim} at axis {axis} of {wanted}, got {size} in {got_shape}", f"reshape it to {wanted}"
    return None


def same_dtype(expected: np.dtype[Any], got: np.dtype[Any]) -> bool:
    """True when an array of `got` can be fed as `expected` without any conversion of values."""
    if expected.kind == "O":
        return got.kind in "OUST"
    return got.newbyteorder("=") == expected


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{dtype_name(value.dtype)}{shape_text(value.shape)}"
    return type(value).__name__
