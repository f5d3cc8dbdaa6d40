"""Tensors in every stored form, and models that read them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxopt.encoding import Form, MaskedPalette, Palette, Sparse, find_mask
from onnxopt.model import Constant, Model, load

Array = npt.NDArray[Any]
SHAPE = (48, 64)
LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
FORMS = ("whole", "rows", "columns", "vectors", "mask", "masked palette", "masked rows", "masked vectors", "sparse")


def form(kind: str, bits: int = 4, dtype: npt.DTypeLike = np.float32, seed: int = 0) -> Form:
    """A form of a tensor [48, 64]."""
    rng = np.random.default_rng(seed)
    entries = 1 << bits
    codebook = rng.normal(size=(6, entries, 4)).astype(dtype)
    codes = rng.integers(0, entries, SHAPE).astype(np.uint8)
    if kind.startswith("masked"):  # 3, or 1 of two, is the common index
        codes[rng.random(SHAPE) < 0.85] = min(3, entries - 1)
        return MaskedPalette.of(_palette(kind.removeprefix("masked "), codebook, codes))
    if kind not in ("mask", "sparse"):
        return _palette(kind, codebook, codes)
    values = rng.normal(size=SHAPE).astype(dtype)
    values[rng.random(SHAPE) < 0.85] = 0
    values[0, 0] = -0.0
    return Sparse(values) if kind == "sparse" else find_mask(values)


def _palette(kind: str, codebook: Array, codes: Array) -> Palette:
    if kind == "vectors":
        return Palette(SHAPE, 0, codebook, codes[:, :16].copy())
    groups, axis = {"whole": (1, 0), "palette": (1, 0), "rows": (6, 0), "columns": (4, 1)}[kind]
    return Palette(SHAPE, axis, codebook[:groups, :, :1].copy(), codes)


def model_of(weight: Array, opset: int = 17, ir_version: int = 8) -> Model:
    """x [1, 48] -> MatMul -> Relu -> y [1, 64]; narrow floats are cast to float32 first."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"], "product"), helper.make_node("Relu", ["h"], ["y"])]
    if weight.dtype != np.float32:
        nodes[0].input[1] = "wide"
        nodes.insert(0, helper.make_node("Cast", ["W"], ["wide"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[1]])],
        [numpy_helper.from_array(weight, "W")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(proto)
    return load(proto)


def constant(model: Model, name: str = "W") -> Constant:
    """The constant of this name."""
    return next(each for each in model.constants() if each.name == name)


def run(model: Model, level: Any, inputs: dict[str, Array]) -> list[Array]:
    """Outputs at one optimization level. Unoptimized, weights are not packed: packing adds in another order."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    packs = level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "0" if packs else "1")
    proto = model.to_proto()
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def feed(seed: int = 5) -> dict[str, Array]:
    """An input for `model_of`."""
    return {"x": np.random.default_rng(seed).normal(size=(1, SHAPE[0])).astype(np.float32)}


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have one type, one shape and the same bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


NARROW: tuple[npt.DTypeLike, ...] = (np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32)
