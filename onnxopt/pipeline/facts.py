"""Facts about a model for the report: sizes, counts, versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from onnxopt.encoding import parameters
from onnxopt.feeds import Split
from onnxopt.model import Model
from onnxopt.model import files as model_files
from onnxopt.model.files import tensors_of
from onnxopt.report import FeedFacts, ModelFacts
from onnxopt.report.quantities import samples

_CHUNK = 1 << 22


def facts(model: Model, path: Path | None = None) -> ModelFacts:
    """Facts about a model; with `path`, about the file there, of which `model` is the content.

    How small it compresses is not among them: that takes a while, see `onnxopt.pipeline.footprint`.
    """
    if path is not None:
        size = sum(file.stat().st_size for file in (path, *sidecars(path)))
        sha256 = _digest(_read(path))
    elif model.nbytes() <= model_files.INLINE_LIMIT:
        raw = model.to_proto().SerializeToString()
        size, sha256 = len(raw), hashlib.sha256(raw).hexdigest()
    else:
        size, sha256 = file_bytes(model), None
    return ModelFacts(
        path=str(path) if path is not None else None,
        sha256=sha256,
        file_bytes=size,
        compressed_bytes=None,
        parameters=parameters(model),
        nodes=model.node_count(),
        opset=model.opset,
        ir_version=model.ir_version,
    )


def file_bytes(model: Model) -> int:
    """Bytes of the file that the model would make; above 2 GB an estimate without the padding of its sidecar."""
    if model.nbytes() <= model_files.INLINE_LIMIT:
        return int(model.to_proto().ByteSize())
    return int(model.skeleton()[0].ByteSize()) + model.nbytes()


def feed_facts(split: Split, *, whole: bool = False) -> FeedFacts:
    """What the feeds are and how many serve which purpose. whole: all of them evaluate, and nothing else."""
    fit, select = (0, 0) if whole else (len(split.fit), len(split.select))
    counts = f"{samples(fit)} to fit, {select} to select, {len(split.evaluate)} to evaluate"
    if whole:
        counts = f"{samples(len(split.evaluate))} to evaluate"
    return FeedFacts(
        note="; ".join(filter(None, (split.note, counts))),
        synthetic=split.evaluate_synthetic if whole else split.synthetic,
        fit=fit,
        select=select,
        evaluate=len(split.evaluate),
        fingerprint=split.evaluate.fingerprint,
    )


def versions() -> dict[str, str]:
    """Versions of what has a say in the result."""
    return {
        "onnxopt": metadata.version("onnxopt"),
        "onnx": str(onnx.__version__),
        "onnxruntime": str(onnxruntime.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def sidecars(path: Path) -> list[Path]:
    """The files beside a model that hold its external data."""
    proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    names = {
        entry.value
        for tensor in tensors_of(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [file for name in sorted(names) if (file := path.parent / name).is_file()]


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _digest(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
