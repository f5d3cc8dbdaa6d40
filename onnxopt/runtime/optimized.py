"""What onnxruntime makes of a model: the graph that its optimizers leave, which is the one that runs."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from onnx import ModelProto, TensorProto

from onnxopt.model import Model, TensorData
from onnxopt.runtime.session import Session

_WEIGHTS = "weights"


def optimized_graph(model: Model, *, threads: int = 1) -> Model:
    """The model as onnxruntime optimizes it on this machine, for its nodes and names alone.

    Values of its tensors from 1 KiB on are not kept, and must not be asked for: they are written nowhere, so this takes
    less than loading the model does, whatever its size. Raises ModelError where onnxruntime can't load it.
    """
    with tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _swallow(folder / _WEIGHTS)
        Session(model, threads=threads, optimized_path=folder / "optimized.onnx", optimized_weights=_WEIGHTS)
        proto = ModelProto.FromString((folder / "optimized.onnx").read_bytes())
    return Model.from_proto(proto, read_tensor=partial(TensorData.from_proto, read_external=_nothing))


def _swallow(path: Path) -> None:
    """Let what is written to the path vanish, where the platform has a place for that."""
    if os.name == "posix":
        path.symlink_to(os.devnull)


def _nothing(_: TensorProto) -> bytes:
    return b""
