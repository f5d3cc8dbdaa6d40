"""A small classifier, its feeds, and passes that break it in every way a pass can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt import api
from onnxopt.pipeline import Result

BREAKING = Path(__file__).with_name("breaking_passes.py")
SIZE, HIDDEN, CLASSES = 12, 40, 4
# paths of a model and of its feeds
Example = tuple[Path, Path]


def bad(name: str) -> str:
    """How a pass of breaking_passes.py is asked for."""
    return f"{BREAKING}:{name}"


def run(example: Example, passes: Any, **settings: Any) -> Result:
    """Optimize an example on its feeds, without timing, unless the settings say otherwise."""
    model, data = example
    settings = {"feeds": data, "latency_seconds": 0, **settings}
    return api.optimize(model, passes, **settings)


def classifier(seed: int = 0) -> ModelProto:
    """logits = W2 relu(W1 x), float32, batch axis "batch"; W1 is above 1 KiB, one Identity can go."""
    rng = np.random.default_rng(seed)
    w1 = rng.standard_normal((SIZE, HIDDEN)).astype(np.float32)
    w2 = rng.standard_normal((HIDDEN, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Identity", ["h"], ["same"], name="same"),
        helper.make_node("Relu", ["same"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["logits"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(model: ModelProto, count: int = 30, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs and the labels that the model itself gives them."""
    x = np.random.default_rng(seed).standard_normal((count, SIZE)).astype(np.float32)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    logits = np.maximum(x @ weights["w1"], 0) @ weights["w2"]
    return {"x": x, "labels": logits.argmax(-1).astype(np.int64)}


def write_example(folder: Path) -> tuple[Path, Path]:
    """net.onnx and data.npz in the folder."""
    model = classifier()
    onnx.save(model, folder / "net.onnx")
    data = feeds(model)
    np.savez(folder / "data.npz", x=data["x"], labels=data["labels"])
    return folder / "net.onnx", folder / "data.npz"
