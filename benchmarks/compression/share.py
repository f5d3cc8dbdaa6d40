"""What a few values a tensor cost, beside as many levels evenly spread.

    python -m benchmarks.compression.share --zoo DIR [NAME ...]

Everybody starts from the model with constants folded and BatchNormalization fused, and sees the same samples. A line
each: the file and its zip as shares of the float file; the error of layers, as the geometric mean over all whose
second moments are affordable of sqrt(E|(W - W') x|^2 / E|W x|^2) without the mean of x, and that of all float outputs
together, both on feeds that nobody has seen; the task's own metrics; CPU seconds for statistics and for the pass.

Levels evenly spread reach from the smallest to the largest of the weights that share a codebook in the line below.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench import told_scores
from benchmarks.sparsity import Arrays, outputs, relative_error
from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.calibration import Requests, collect
from onnxopt.calibration.moments import affordable
from onnxopt.encoding import Opened
from onnxopt.feeds import Sample
from onnxopt.graph.selection import Selection
from onnxopt.model import Model, load
from onnxopt.passbase import Context, lookup
from onnxopt.passes.share import Share
from onnxopt.pipeline.grammar import parse
from onnxopt.pipeline.passes import evaluate
from onnxopt.quantization.layer_weights import has_gram
from onnxopt.quantization.storage import Stored, find_weights
from onnxopt.sharing.codebooks import Form, group_count
from onnxopt.sharing.weights import find_shareable

PASSES = ("share:fine=0", "share", "share:bits=8")
LEVELS = (16, 256)
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bench:
    """One model: its task, the float file, the prepared one, samples; feeds not among these with the float outputs.

    seconds: name of a node -> covariance of what its weight multiplies on these feeds.
    """

    task: Any
    source: Path
    ready: Path
    samples: Sequence[dict[str, Any]]
    feeds: Sequence[dict[str, Any]]
    exact: Sequence[Arrays]
    seconds: dict[str, Wide]

    def line(self, path: Path) -> str:
        """The figures of one result."""
        scores = {key: value for key, value in self.task.run(path).items() if key != "seconds"}
        error = relative_error(self.exact, outputs(path, self.feeds))
        dense = self.source.stat().st_size
        sizes = f"file {path.stat().st_size / dense:.3f} zip {zipped(path) / dense:.3f}"
        return f"{sizes} | layers {self.layers(path):.4f} outputs {error:.4f} | {told_scores(scores)}"

    def layers(self, path: Path) -> float:
        """The mean error of layers."""
        model = load(path)
        Opened(model, evaluate)
        stored, errors = weights(model), []
        for name, found in weights(load(self.ready)).items():
            if name in self.seconds:
                exact, other = (
                    each.view.matrix(each.weight.values).astype(np.float64) for each in (found, stored[name])
                )
                errors.append(layer_error(exact, other, self.seconds[name]))
        return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-9))))) if errors else float("nan")


def layer_error(exact: Wide, other: Wide, seconds: Wide) -> float:
    """sqrt(E|(W - W') x|^2 / E|W x|^2) for covariances [parts, K, K]."""
    rows = (each.reshape(len(seconds), -1, each.shape[1]) for each in (exact - other, exact))
    error, power = (float(np.sum(np.matmul(each, seconds) * each)) for each in rows)
    return float(np.sqrt(error / power)) if power > 0 else 0.0


def weights(model: Model) -> dict[str, Stored]:
    """Name of a node -> its weight, for layers of rows."""
    found = (each for each in find_weights(model) if each.body is model.graph and has_gram(each))
    return {each.node.name: each for each in found}


def zipped(path: Path) -> int:
    """Bytes of the file in a zip archive."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "model.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            out.write(path, "model.onnx")
        return archive.stat().st_size


def prepared(path: Path, out: Path) -> None:
    """The model that everybody starts from."""
    model = load(path)
    for step in Share.prepare:
        lookup(step)().run(model, Context(evaluate=evaluate))
    model.normalize()
    model.save(out)


def evenly(ready: Path, levels: int, out: Path) -> None:
    """Round every weight that `share` would share to levels evenly spread over what shares a codebook."""
    model = load(ready)
    for found in find_shareable(model, Selection(), False)[0]:
        values = found.constant.values
        if not found.readers or values.nbytes <= 4 * levels + values.size:
            continue
        axis = found.axis
        turned = np.moveaxis(values.astype(np.float64), axis, 0)
        rows = turned.reshape(group_count(found, Form(levels)), -1)
        low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
        step = np.where(high > low, high - low, 1.0) / (levels - 1)
        rounded = (np.rint((rows - low) / step) * step + low).reshape(turned.shape)
        for constant in found.constants:
            constant.values = np.ascontiguousarray(np.moveaxis(rounded, 0, axis)).astype(values.dtype)
    model.save(out)


def ours(bench: Bench, text: str, out: Path) -> tuple[float, float]:
    """Run the pass; returns CPU seconds of statistics and of the pass."""
    model, pass_ = load(bench.ready), parse(text)[0].pass_
    started = time.process_time()
    wanted = pass_.needs(model)
    samples = [Sample(feed, None, f"sample {at}") for at, feed in enumerate(bench.samples)]
    statistics = collect(model, wanted, samples) if wanted else None
    gathered = time.process_time()
    pass_.run(model, Context(statistics=statistics, evaluate=evaluate))
    ended = time.process_time()
    model.normalize()
    model.save(out)
    return gathered - started, ended - gathered


def lines(bench: Bench, passes: Sequence[str], folder: Path) -> Iterator[str]:
    """One line for the float model, for levels evenly spread, and for each pass list."""
    out = folder / "result.onnx"
    yield f"  {'float':28} {bench.line(bench.ready)}"
    for levels in LEVELS:
        evenly(bench.ready, levels, out)
        yield f"  {f'{levels} levels':28} {bench.line(out)}"
    for text in passes:
        gathering, sharing = ours(bench, text, out)
        yield f"  {text:28} {bench.line(out)} | {gathering:.1f} + {sharing:.1f} s"


def made(task: Any, path: Path, folder: Path, arguments: argparse.Namespace) -> Bench:
    """Everything that lines of one model share."""
    ready = folder / "ready.onnx"
    prepared(path, ready)
    samples = list(itertools.islice(task.calib_feeds(), arguments.samples))
    feeds = list(itertools.islice(task.feeds(), arguments.feeds))
    model = load(ready)
    nodes = affordable(found.node for found in weights(model).values() if found.weight.data.size >= 512)
    unseen = [Sample(feed, None, f"feed {at}") for at, feed in enumerate(feeds)]
    statistics = collect(model, Requests(grams=tuple(nodes)), unseen) if nodes else None
    seconds = {
        node.name: gram.covariance
        for node in nodes
        if statistics is not None and (gram := statistics.gram(node)) is not None
    }
    return Bench(task, path, ready, samples, feeds, outputs(ready, feeds), seconds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--feeds", type=int, default=32, help="feeds on which errors are measured")
    parser.add_argument("--passes", nargs="*", default=list(PASSES), help="pass lists of one pass each")
    arguments = parser.parse_args()
    tasks = load_tasks(arguments.zoo, arguments.models)
    for name, path in found_models(tasks, arguments.names):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bench = made(tasks.load(name), path, folder, arguments)
            print(f"{name}:", flush=True)
            for line in lines(bench, arguments.passes, folder):
                print(line, flush=True)


if __name__ == "__main__":
    main()
