"""What splitting layers costs and gains: layer by layer beside plain singular vectors, and as whole models.

    python -m benchmarks.compression.lowrank --zoo DIR [NAME ...] [--part layers models] [--passes LIST ...]

layers: of layers spread over the model, each alone at half of the rank at which multiply-adds break even. A line each:
error of the layer's outputs on feeds that nothing was calibrated on, of plain singular vectors, of these with the mean
of the inputs put into the bias, and of the whitened ones, as shares of the outputs' variance; the whitened error that
was predicted from calibration and the one found on the calibration feeds. Inputs are those of the float model.

models: what pass lists make of the whole model: time of a run over the float model's, multiply-adds and bytes over
its, signal-to-noise ratio of the outputs on feeds not seen, the task's own metrics, and what the pass notes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench import Bench, Made, told_error, told_latency, told_scores
from benchmarks.pruning.cost import cost
from benchmarks.sparsity import outputs, prepared, relative_error
from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.feeds import Sample
from onnxopt.graph import infer, remove_dead
from onnxopt.graph.selection import Selection
from onnxopt.lowrank.forms import FACTORS, Splitter
from onnxopt.lowrank.inputs import Biases, Inputs, know
from onnxopt.lowrank.layers import Kind, Layer, find_layers
from onnxopt.model import Model, load
from onnxopt.runtime import Session

PASSES = ("lowrank:ratio=auto", "lowrank:ratio=0.1", "lowrank:ratio=0.2")
_STEP = 8

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Errors:
    """Of one layer: on held-out feeds, and the whitened one as predicted and as found on the calibration feeds."""

    plain: float
    mean: float
    whitened: float
    predicted: float
    achieved: float


class Layers:
    """The layers of one prepared model, and what they read on feeds."""

    def __init__(self, path: Path, samples: Sequence[dict[str, Any]], feeds: Sequence[dict[str, Any]]) -> None:
        self._path, self._calibration, self._held_out = path, samples, feeds
        self.model = load(path)
        infer(self.model)
        found, _ = find_layers(self.model, Selection(), tables=False)
        main = set(self.model.graph.nodes)
        self.layers = [layer for layer in found if self._fits(layer, main)]
        self._biases = Biases(self.model)

    def _fits(self, layer: Layer, main: set[Any]) -> bool:
        return layer.kind in (Kind.ROWS, Kind.CONV) and layer.node in main and self.rank(layer) >= _STEP

    @staticmethod
    def rank(layer: Layer) -> int:
        """Half of the rank at which multiply-adds break even, a multiple of 8."""
        outputs = layer.outputs // layer.groups
        return int(layer.inputs * outputs / (layer.inputs + outputs) / 2) // _STEP * _STEP

    def errors(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, Errors]]:
        """Of each layer, one by one."""
        every = [Sample(feed, None, f"sample {at}") for at, feed in enumerate(self._calibration)]

        def measure(model: Model, requests: Requests) -> Statistics:
            model.normalize()
            return collect(model, requests, every, threads=1)

        for layer, inputs in know(self.model, layers, self._biases, measure).items():
            yield layer, self._errors(layer, inputs)

    def _errors(self, layer: Layer, inputs: Inputs) -> Errors:
        rank = (self.rank(layer),)
        whole = layer.matrices()
        plain, best = (Splitter(layer, known.seconds(layer)) for known in (Inputs(), inputs))
        weights = [each.dense(FACTORS, each.factors(FACTORS, rank)) for each in (plain, best)]
        shifts = [self._shift(inputs, layer, whole - dense) for dense in weights]
        held_out = self._outputs(layer, self._held_out)
        changed = [self._outputs(layer, self._held_out, dense) for dense in weights]
        seen, found = (self._outputs(layer, self._calibration, dense) for dense in (None, weights[1]))
        return Errors(
            _error(held_out, changed[0], 0.0),
            _error(held_out, changed[0], shifts[0]),
            _error(held_out, changed[1], shifts[1]),
            best.error(FACTORS, rank),
            _error(seen, found, shifts[1]),
        )

    def _shift(self, inputs: Inputs, layer: Layer, lost: Array) -> Array | float:
        """What the bias makes good for, in units of the layer's outputs."""
        mean = inputs.means.get(layer.node)
        alpha = float(layer.node.attrs.get("alpha", 1.0))
        return 0.0 if mean is None else alpha * np.einsum("gnk,gk->gn", lost, mean).reshape(-1)

    def _outputs(self, layer: Layer, feeds: Sequence[dict[str, Any]], dense: Array | None = None) -> Array:
        """[rows, N] of what the layer gives on feeds, with other weights in it."""
        before = layer.weight.data
        if dense is not None:
            layer.weight.values = layer.stored(dense)
        clone = self.model.clone()
        layer.weight.values = before
        own = clone.tensors[id(layer.node.outputs[0])]
        clone.model.graph.outputs[:] = [own]
        remove_dead(clone.model)
        session = Session(clone.model, threads=1)
        given = {item.name for item in session.inputs}
        rows = []
        for feed in feeds:
            [value] = session.run({name: array for name, array in feed.items() if name in given}).values()
            rows.append(np.moveaxis(value, 1 if layer.kind is Kind.CONV else -1, -1).reshape(-1, layer.outputs))
        return np.concatenate(rows).astype(np.float64)


def _error(exact: Array, found: Array, shift: Array | float) -> float:
    """Squared error over the variance of each output, all outputs together."""
    power = float(np.square(exact - exact.mean(axis=0)).sum())
    return float(np.square(found + shift - exact).sum()) / power if power else math.nan


def layer_lines(path: Path, task: Any, arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each of some layers, and the ratio of whitened to plain error over all of these."""
    samples = list(itertools.islice(task.calib_feeds(), arguments.samples))
    feeds = list(itertools.islice(task.feeds(), arguments.feeds))
    bench = Layers(path, samples, feeds)
    chosen = bench.layers
    if len(chosen) > arguments.layers:
        at = np.unique(np.rint(np.linspace(0, len(chosen) - 1, arguments.layers)).astype(int))
        chosen = [chosen[each] for each in at]
    ratios, apart = [], []
    for layer, found in bench.errors(chosen):
        ratios.append(found.whitened / found.plain)
        apart.append(found.achieved / found.predicted - 1)
        size = f"{layer.outputs // layer.groups}x{layer.inputs}"
        yield (
            f"  {layer.name[-44:]:44} {size:>10} r {bench.rank(layer):4} | plain {found.plain:.4f}"
            f" mean {found.mean:.4f} whitened {found.whitened:.4f} ({ratios[-1]:.2f}x)"
            f" | predicted {found.predicted:.4f} achieved {found.achieved:.4f} ({apart[-1]:+.1%})"
        )
    if ratios:
        middle = math.exp(float(np.mean(np.log(ratios))))
        off = np.abs(apart)
        yield (
            f"  {len(ratios)} layers: whitened {middle:.2f}x of plain, {min(ratios):.2f} to {max(ratios):.2f};"
            f" achieved {np.median(off):.1%} from predicted in the median, {off.max():.1%} at most"
        )


class WholeBench(Bench):
    """A model, and what pass lists make of it; a quarter of the samples chooses."""

    parted = ("parted",)

    def _make(self, recipe: str) -> Made:
        return self.make_ours(recipe)


def model_lines(bench: WholeBench, passes: Sequence[str]) -> Iterator[str]:
    """A line for each pass list, and the notes of the pass."""
    feeds = [sample.inputs for sample in bench.evaluation]
    exact, whole = outputs(bench.path, feeds), cost(bench.path, feeds[0])
    yield f"  {'float':28} | {told_scores(bench.scores(bench.path))}"
    for text in passes:
        try:
            made = bench.make(text)
            after = cost(made.path, feeds[0])
            error = relative_error(exact, outputs(made.path, feeds))
            quality = "same" if error == 0 else f"{-20 * math.log10(error):.1f} dB"
            yield (
                f"  {text:28} | {told_latency(bench.latency(made.path))} | {after.macs / max(1, whole.macs):.3f} MACs,"
                f" {made.path.stat().st_size / bench.path.stat().st_size:.3f} bytes | {quality}"
                f" | {told_scores(bench.scores(made.path))} | {made.seconds:.0f} s"
            )
            yield from (f"      {note}" for note in made.notes)
        except Exception as error:  # noqa: BLE001  one failing list must not end the table
            yield f"  {text:28} | {told_error(error)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--part", nargs="*", default=["layers", "models"], choices=["layers", "models"])
    parser.add_argument("--passes", nargs="*", default=list(PASSES), help="pass lists for whole models")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--feeds", type=int, default=32, help="feeds on which errors are measured")
    parser.add_argument("--layers", type=int, default=12, help="layers looked at, spread over the model")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each result")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a pass list may take")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a pass list may take")
    arguments = parser.parse_args()
    arguments.log = None
    tasks = load_tasks(arguments.zoo, arguments.models)
    for name, path in found_models(tasks, arguments.names):
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{name}:", flush=True)
            if "layers" in arguments.part:
                ready = Path(temporary) / "ready.onnx"
                prepared(path, ready)
                for line in layer_lines(ready, tasks.load(name), arguments):
                    print(line, flush=True)
            if "models" in arguments.part:
                for line in model_lines(WholeBench(tasks, name, path, arguments, Path(temporary)), arguments.passes):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
