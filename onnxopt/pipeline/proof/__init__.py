"""The proof of a quantized result: kernels that run, products that saturate, noise of each layer.

kernels    what the runtime's optimized graph holds          pairs    16-bit sums that overflow on x86 without VNNI
noise      each layer's tensor against the original's
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from onnxopt.encoding import Opened
from onnxopt.errors import OnnxoptError
from onnxopt.feeds import Feeds
from onnxopt.model import Model
from onnxopt.pipeline.passes import evaluate
from onnxopt.pipeline.prepare import quantized_nodes
from onnxopt.pipeline.proof.kernels import kernel_figures
from onnxopt.pipeline.proof.noise import layer_figures
from onnxopt.pipeline.proof.pairs import saturation_figures
from onnxopt.pipeline.settings import Progress, silent
from onnxopt.report import MemoryFigures, QuantizationFigures
from onnxopt.runtime.optimized import optimized_graph

__all__ = ["PROOF_FEEDS", "prove"]

# Inner tensors are looked at on so many feeds, a few runs of each model more.
PROOF_FEEDS = 4
Part = TypeVar("Part")


def prove(
    reference: Model,
    result: Model,
    feeds: Feeds,
    *,
    memory: MemoryFigures | None = None,
    threads: int = 1,
    saturates: bool = True,
    progress: Progress = silent,
) -> QuantizationFigures | None:
    """What is known of `result` as a quantized model; None where it holds no quantized node.

    memory: what is known of it already. saturates: whether the processors that the result is for add products in 16
    bits. A part that fails is left out and told in the notes; a proof fails no run.
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
