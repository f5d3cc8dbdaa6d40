"""What zeroing half of the weights costs, by each criterion of ours and of onnxsim.

    python -m benchmarks.sparsity --zoo DIR [NAME ...] [--onnxsim PYTHON]

Everybody starts from the model with constants folded and BatchNormalization fused, and sees the same samples. A line
each: the relative error of all float outputs together on feeds that nobody has seen, sqrt(sum |y - y'|^2 / sum |y|^2);
the task's own metrics; the share of zeros among the weights of Conv, Gemm and MatMul; seconds.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench import told_error, told_scores
from benchmarks.children import Failed, Limits, run_child
from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.calibration import collect
from onnxopt.feeds import Sample
from onnxopt.model import Constant, load
from onnxopt.passbase import Context, lookup
from onnxopt.pipeline.grammar import parse
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session

OURS = (
    "criterion=magnitude:bias=false",
    "criterion=magnitude",
    "criterion=wanda:bias=false",
    "criterion=wanda",
    "criterion=sparsegpt:bias=false",
    "criterion=sparsegpt",
    "criterion=least_squares",
    "",
    "depthwise=true",
    "scope=global",
)
PEERS = ("magnitude", "wanda", "sparsegpt")
_FOREIGN = Path(__file__).parent / "quantization" / "foreign.py"

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Bench:
    """One model: its task, the prepared file, samples, and outputs of the float model on feeds not among these."""

    task: Any
    ready: Path
    samples: Sequence[dict[str, Any]]
    feeds: Sequence[dict[str, Any]]
    exact: Sequence[Arrays]

    def line(self, path: Path, seconds: float) -> str:
        """The figures of one result."""
        scores = {key: value for key, value in self.task.run(path).items() if key != "seconds"}
        error = relative_error(self.exact, outputs(path, self.feeds))
        return f"error {error:.4f} | {told_scores(scores)} | {zeros(path):.1%} zero | {seconds:.1f} s"


def outputs(path: Path, feeds: Sequence[dict[str, Any]]) -> list[Arrays]:
    """Float outputs of a model on feeds."""
    session = Session(path)
    return [[value for value in session.run(feed).values() if value.dtype.kind == "f"] for feed in feeds]


def relative_error(exact: Sequence[Arrays], found: Sequence[Arrays]) -> float:
    """Root of the squared error over the power, of all outputs together; NaN where there is no float output."""
    pairs = [pair for arrays in zip(exact, found, strict=True) for pair in zip(*arrays, strict=True)]
    error = sum(float(np.square(other.astype(np.float64) - one).sum()) for one, other in pairs)
    power = sum(float(np.square(one.astype(np.float64)).sum()) for one, _ in pairs)
    return float(np.sqrt(error / power)) if power else float("nan")


def zeros(path: Path) -> float:
    """Share of zeros among the constant weights of Conv, Gemm and MatMul."""
    nodes = [node for body in load(path).bodies() for node in body.nodes if node.op in ("Conv", "Gemm", "MatMul")]
    weights = {id(node.inputs[1]): node.inputs[1] for node in nodes if isinstance(node.inputs[1], Constant)}
    held = [weight.values for weight in weights.values() if weight.dtype.kind == "f"]
    return sum(int((values == 0).sum()) for values in held) / max(1, sum(values.size for values in held))


def has_depthwise(path: Path) -> bool:
    """Whether a convolution has one input channel a group."""
    convolutions = [node for body in load(path).bodies() for node in body.nodes if node.op == "Conv"]
    return any(node.attrs.get("group", 1) > 1 and node.inputs[1].shape[1] == 1 for node in convolutions)


def prepared(path: Path, out: Path) -> None:
    """The model that everybody starts from."""
    model = load(path)
    for step in ("fold_constants", "fuse_bn"):
        lookup(step)().run(model, Context(evaluate=evaluate))
    model.normalize()
    model.save(out)


def ours(bench: Bench, text: str, out: Path) -> float:
    """Run one pass; returns its seconds, those of gathering statistics included."""
    model, pass_ = load(bench.ready), parse(text)[0].pass_
    started = time.perf_counter()
    wanted = pass_.needs(model)
    samples = [Sample(feed, None, f"sample {at}") for at, feed in enumerate(bench.samples)]
    statistics = collect(model, wanted, samples) if wanted else None
    pass_.run(model, Context(statistics=statistics, evaluate=evaluate))
    seconds = time.perf_counter() - started
    model.normalize()
    model.save(out)
    return seconds


def theirs(bench: Bench, recipe: str, interpreter: str, folder: Path, out: Path, limits: Limits) -> float:
    """Run one recipe of `foreign.py`; returns its seconds."""
    words = [str(bench.ready), str(folder), str(out), str(len(bench.samples))]
    told = run_child([interpreter, str(_FOREIGN), recipe, *words], limits).told
    seconds = told.get("seconds")
    if not isinstance(seconds, float) or not out.is_file():
        raise Failed("failed: made no file")
    return seconds


def lines(bench: Bench, asked: str, folder: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """One line for each criterion. asked: a share, or N:M."""
    form = f"pattern={asked.replace(':', 'of')}" if ":" in asked else f"sparsity={asked}"
    out = folder / "result.onnx"
    for options in OURS:
        if (":" in asked and "scope" in options) or ("depthwise" in options and not has_depthwise(bench.ready)):
            continue
        text = ":".join(filter(None, ["prune_weights", form, options]))
        yield f"  {text:60} {bench.line(out, ours(bench, text, out))}"
    for criterion in PEERS if arguments.onnxsim else ():
        recipe = f"onnxsim-{criterion}-{asked}"
        out.unlink(missing_ok=True)
        try:
            seconds = theirs(bench, recipe, arguments.onnxsim, folder, out, Limits(arguments.timeout, 8e9))
            yield f"  {recipe:60} {bench.line(out, seconds)}"
        except Exception as error:  # noqa: BLE001  one failing peer must not end the table
            yield f"  {recipe:60} {told_error(error)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--onnxsim", metavar="PYTHON", help="an interpreter that has onnxsim")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--feeds", type=int, default=32, help="feeds on which outputs are compared")
    parser.add_argument("--asked", nargs="*", default=["0.5", "2:4"], help="shares, or N:M")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a peer may take")
    arguments = parser.parse_args()
    tasks = load_tasks(arguments.zoo, arguments.models)
    for name, path in found_models(tasks, arguments.names):
        task = tasks.load(name)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            ready = folder / "ready.onnx"
            prepared(path, ready)
            samples = list(itertools.islice(task.calib_feeds(), arguments.samples))
            for at, sample in enumerate(samples):
                np.savez(folder / f"{at:05d}.npz", **sample)
            feeds = list(itertools.islice(task.feeds(), arguments.feeds))
            bench = Bench(task, ready, samples, feeds, outputs(ready, feeds))
            for asked in arguments.asked:
                print(f"{name}, {asked}:", flush=True)
                print(f"  {'float':60} {bench.line(ready, 0.0)}", flush=True)
                for line in lines(bench, asked, folder, arguments):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
