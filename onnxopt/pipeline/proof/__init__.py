"""The proof of a quantized result: kernels that run, products that saturate, noise of each layer, memory.

kernels    what the runtime's optimized graph holds          pairs    16-bit sums that overflow on x86 without VNNI
noise      each layer's tensor against the original's        memory   of a fresh process that loads each model
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from onnxopt.encoding import Opened
from onnxopt.errors import OnnxoptError
from onnxopt.feeds import Feeds
from onnxopt.model import Model
from onnxopt.model import files as model_files
from onnxopt.pipeline.passes import evaluate
from onnxopt.pipeline.prepare import quantized_nodes
from onnxopt.pipeline.proof.kernels import kernel_figures
from onnxopt.pipeline.proof.noise import layer_figures
from onnxopt.pipeline.proof.pairs import saturation_figures
from onnxopt.pipeline.settings import Progress, silent
from onnxopt.report import MemoryFigures, QuantizationFigures
from onnxopt.runtime.memory import loaded_bytes
from onnxopt.runtime.optimized import optimized_graph

__all__ = ["PROOF_FEEDS", "prove"]

# Inner tensors are looked at on so many feeds, a few runs of each model more.
PROOF_FEEDS = 4
# Below so many bytes of weights, what a process grows by is the runtime's own.
SMALL = 1 << 20
Part = TypeVar("Part")


def prove(
    reference: Model,
    result: Model,
    feeds: Feeds,
    *,
    files: tuple[Path | None, Path | None] = (None, None),
    threads: int = 1,
    saturates: bool = True,
    progress: Progress = silent,
) -> QuantizationFigures | None:
    """What is known of `result` as a quantized model; None where it holds no quantized node.

    files: where reference and result lie, None for what is not written. saturates: whether the processors that the
    result is for add products in 16 bits. A part that fails is left out and told in the notes; a proof fails no run.
    """
    if not quantized_nodes(result):
        return None
    notes: list[str] = []
    samples = list(feeds.take(PROOF_FEEDS))

    def part(what: str, make: Callable[[], Part]) -> Part | None:
        progress(f"proving the result: {what}", 0, 0)
        try:
            return make()
        except OnnxoptError as error:
            notes.append(f"{what}: {error.cause}")
            return None

    kernels = part("kernels", lambda: kernel_figures(result, optimized_graph(result, threads=threads)))
    shown = _shown(result)
    risks = part("saturation", lambda: saturation_figures(shown, samples, threads)) if saturates else None
    layers, unmeasured = part("layers", lambda: layer_figures(reference, shown, samples, threads)) or ((), 0)
    memory = part("memory", lambda: _memory((reference, result), files, threads))
    return QuantizationFigures(
        kernels=kernels,
        saturation=risks,
        layers=layers,
        samples=len(samples),
        unmeasured=unmeasured,
        memory=memory,
        notes=tuple(notes),
    )


def _shown(model: Model) -> Model:
    """The model with its stored forms shown as weights."""
    clone = model.clone().model
    return clone if Opened(clone, evaluate) else model


def _memory(models: tuple[Model, Model], files: tuple[Path | None, Path | None], threads: int) -> MemoryFigures | None:
    """None where the platform does not tell, for small models, and where one above 2 GB is not written anywhere."""
    if models[0].nbytes() < SMALL:
        return None
    found = []
    for model, path in zip(models, files, strict=True):
        with _on_disk(model, path) as file:
            found.append(None if file is None else loaded_bytes(file, threads=threads))
    before, after = found
    return None if before is None or after is None else MemoryFigures(before, after)


@contextmanager
def _on_disk(model: Model, path: Path | None) -> Iterator[Path | None]:
    if path is not None:
        yield path
    elif model.nbytes() > model_files.INLINE_LIMIT:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="onnxopt-", ignore_cleanup_errors=True) as folder:
            yield model.save(Path(folder) / "model.onnx")
