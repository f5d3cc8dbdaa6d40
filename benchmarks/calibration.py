"""What gathering statistics costs: time beside inference and onnxruntime's calibrators, memory, search, many nodes.

    python -m benchmarks.calibration --zoo DIR [--models DIR] [NAME ...] [--samples 128] [--rounds 3] [--only PART ...]

Parts (default all):
    time    wall time beside plain inference of the same feeds, interleaved, on as many threads (--threads): range
            statistics, histograms, all that int8 asks for. Told as a ratio a sample and seconds that do not grow with
            the samples, from two runs over --samples and a quarter of them; and as the ratio in all. Inference is
            that of the optimized model, its session made ahead. --rivals adds onnxruntime's calibrators.
    memory  peak resident memory of a process of its own, at 32 and --many (512) samples, over plain inference in one
    parts   4 shards, shuffled, merged, and samples joined by fours, against one run: bits that differ, largest
            relative difference of sums
    search  all calibrators over histograms of all float tensors
    nodes   whole static quantization of a chain of 3,000 tiny nodes through the command line
Feeds repeat where a task has fewer. Names default to the three models that most differ: a light and a heavy
convolutional network and a transformer.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics as numbers
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.calibration import CALIBRATORS, Requests, Statistics, calibrated_ranges, collect
from onnxopt.calibration.storage import Provenance, SavedStatistics, merge
from onnxopt.feeds import Sample
from onnxopt.model import Constant, Model, Node, Variable, load
from onnxopt.passbase import Context, lookup
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session

NAMES = ["efficientnet_lite0_ts", "ppocrv4_det", "minilm_l6_ts"]
PARTS = ("time", "memory", "parts", "search", "nodes")


def prepared(path: Path) -> tuple[Model, Requests]:
    """The model as int8 sees it, and what int8 asks for."""
    model = load(path)
    int8 = lookup("int8")
    for name in int8.prepare:
        lookup(name)().run(model, Context(evaluate=evaluate))
        model.normalize()
    requests = int8().needs(model)
    assert requests is not None
    return model, requests


def samples_of(task: Any, count: int) -> list[Sample]:
    """Calibration feeds of the task, again from the start where there are too few."""
    feeds = list(itertools.islice(task.calib_feeds(), count))
    chosen = itertools.islice(itertools.cycle(feeds), count)
    return [Sample(feed, None, f"calibration sample {i}") for i, feed in enumerate(chosen)]


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def time_part(name: str, path: Path, task: Any, args: argparse.Namespace) -> Iterator[str]:
    """Ratios to plain inference, medians over rounds of plain, ours, plain."""
    model, asked = prepared(path)
    samples = samples_of(task, args.samples)
    plain = Session(path, threads=args.threads)

    def infer(chosen: list[Sample]) -> None:
        for sample in chosen:
            plain.run(sample.inputs)

    wanted = {"ranges": Requests(asked.ranges), "histograms": Requests(asked.ranges, histograms=asked.ranges)}
    kinds: dict[str, Callable[[list[Sample]], object]] = {
        kind: partial(collect, model, requests, threads=args.threads)
        for kind, requests in {**wanted, "int8": asked}.items()
    }
    if args.rivals:
        kinds |= rivals(path)
    infer(samples)
    yield f"{name}: {len(samples)} samples, {args.threads} thread(s)"
    for kind, action in kinds.items():
        ratios, slopes, fixed = [], [], []
        for _ in range(args.rounds):
            before = timed(partial(infer, samples))
            whole = timed(partial(action, samples))
            part = timed(partial(action, samples[: len(samples) // 4]))
            plain_seconds = (before + timed(partial(infer, samples))) / 2
            slope = (whole - part) / (1 - (len(samples) // 4) / len(samples))
            ratios.append(whole / plain_seconds)
            slopes.append(slope / plain_seconds)
            fixed.append(whole - slope)
        yield (
            f"  {kind:22} {numbers.median(slopes):5.2f}x [{min(slopes):.2f}, {max(slopes):.2f}] a sample"
            f" + {numbers.median(fixed):4.1f} s; in all {numbers.median(ratios):.2f}x"
            f" of {plain_seconds / len(samples) * 1e3:.1f} ms"
        )


def rivals(path: Path) -> dict[str, Callable[[list[Sample]], object]]:
    """onnxruntime's calibrators, for the operators that its static quantization takes by default."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, samples: list[Sample]) -> None:
            self.feeds = iter([sample.inputs for sample in samples])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    def run(method: Any, samples: list[Sample]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrator = create_calibrator(
                path, None, augmented_model_path=str(Path(folder, "augmented.onnx")), calibrate_method=method
            )
            calibrator.collect_data(Reader(samples))
            calibrator.compute_data()

    return {
        f"onnxruntime {method.name}": partial(run, method)
        for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
    }


def memory_part(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Peak resident memory of processes that do one thing."""
    peaks: dict[tuple[str, int], int] = {}
    for kind in ("plain", "ranges", "int8"):
        for count in (32, args.many):
            command = [sys.executable, "-m", "benchmarks.calibration", "--zoo", str(args.zoo), name]
            command += [word for folder in args.models for word in ("--models", str(folder))]
            command += ["--child", kind, "--samples", str(count), "--threads", str(args.threads)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[kind, count] = int(out.split()[-1])
    for kind in ("ranges", "int8"):
        told = ", ".join(
            f"{count} samples {(peaks[kind, count] - peaks['plain', count]) / 1e6:+.0f} MB" for count in (32, args.many)
        )
        yield f"{name}: {kind} over plain inference ({peaks['plain', 32] / 1e6:.0f} MB): {told}"


def child(path: Path, task: Any, args: argparse.Namespace) -> None:
    """Do one thing to as many samples, and print the peak memory in bytes."""
    feeds = samples_of(task, min(args.samples, 16))
    stream = itertools.islice(itertools.cycle(feeds), args.samples)
    model, asked = prepared(path)
    if args.child == "plain":
        session = Session(path, threads=args.threads)
        for sample in stream:
            session.run(sample.inputs)
    else:
        collect(model, Requests(asked.ranges) if args.child == "ranges" else asked, stream, threads=args.threads)
    print(peak_bytes())


def peak_bytes() -> int:
    """Peak resident memory of this process. The rusage figure would start from that of the parent process."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parts_part(name: str, path: Path, task: Any, args: argparse.Namespace) -> Iterator[str]:
    """Four shards of shuffled samples, and samples joined by fours, against one run in order."""
    model, asked = prepared(path)
    asked |= Requests(extremes=asked.ranges, moments=asked.ranges, grams=tuple(_small_layers(model)))
    samples = samples_of(task, min(args.samples, 16))
    order = np.random.default_rng(0).permutation(len(samples))

    def saved(chosen: list[Sample], shard: tuple[int, int] | None, batch: int = 1) -> SavedStatistics:
        origin = Provenance(name, "", "", "", None, sum(s.digest() for s in chosen) % (1 << 128), shard)
        found = collect(model, asked, chosen, threads=args.threads, batch=batch)
        return SavedStatistics.of(model, asked, found, origin)

    whole = saved(samples, None)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for part in range(4):
            paths.append(Path(folder, f"{part}.npz"))
            saved([samples[at] for at in order[part::4]], (part, 4)).save(paths[-1])
        merged = merge(paths)
    yield f"{name}: shuffled and sharded: {difference(whole, merged)}"
    joined = saved(samples, None, batch=4)
    if joined.runs < whole.runs:
        yield f"{name}: {whole.runs} samples in {joined.runs} runs: {difference(whole, joined)}"
    else:
        yield f"{name}: its samples can't be joined"


def _small_layers(model: Model) -> Iterator[Node]:
    """The first layers whose Gram matrix takes little memory."""
    layers = [node for node in model.graph.nodes if node.op in ("Conv", "MatMul", "Gemm")]
    weights = [(node, node.inputs[1]) for node in layers if isinstance(node.inputs[1], Constant)]
    yield from [node for node, weight in weights if weight.data.size <= 1 << 18][:12]


def difference(whole: SavedStatistics, other: SavedStatistics) -> str:
    """Extremes, counts and bins that differ in a bit; of sums the largest difference, over each and the largest."""
    exact: dict[str, list[int]] = {}
    sums: dict[str, list[float]] = {}
    for (kind, key), tally in whole.tallies.items():
        if kind == "extremes":  # of runs, which batches make fewer
            continue
        theirs = other.tallies[kind, key].arrays()
        for name, mine in tally.arrays().items():
            if name.endswith("_low"):
                continue
            apart = np.abs(np.subtract(mine, theirs[name], dtype=np.float64))
            size = np.abs(np.asarray(mine, np.float64))
            if f"{name}_low" not in theirs:
                exact.setdefault(name, []).append(int((apart != 0).sum()))
            elif mine.size and size.max() > 0:
                each = apart[size > 0] / size[size > 0]
                sums.setdefault(kind, []).append(float(each.max(initial=0.0)))
                sums.setdefault(f"{kind} of the largest", []).append(float(apart.max() / size.max()))
    told = [f"{sum(found)} {name}" for name, found in exact.items() if sum(found)] or ["nothing exact"]
    told_sums = [f"{kind} {max(found):.1e}" for kind, found in sums.items() if max(found)] or ["no sum"]
    return f"{len(whole.tallies)} tallies; differ: {', '.join(told)}; {', '.join(told_sums)}"


def search_part(name: str, path: Path, task: Any, args: argparse.Namespace) -> Iterator[str]:
    """All calibrators, symmetric and not, over all float tensors."""
    model, _ = prepared(path)
    tensors = tuple(_float_tensors(model, task))
    requests = Requests(tensors, extremes=tensors, histograms=tensors)
    found: Statistics = collect(model, requests, samples_of(task, 4), threads=args.threads)
    for name_of in CALIBRATORS:
        seconds = timed(partial(calibrated_ranges, found, tensors, name_of))
        both = seconds + timed(partial(calibrated_ranges, found, tensors, name_of, symmetric=True))
        yield f"{name}: {name_of:15} {len(tensors)} tensors, {seconds:.2f} s, with symmetric ranges {both:.2f} s"


def _float_tensors(model: Model, task: Any) -> Iterator[Variable]:
    """What the main graph computes in float32, told by a run."""
    clone = model.clone()
    owned = [tensor for node in model.graph.nodes for tensor in node.outputs if not tensor.is_empty()]
    outputs = clone.model.graph.outputs
    copies = {tensor: clone.tensors[id(tensor)] for tensor in owned}
    outputs[:] = list(copies.values())
    values = Session(clone.model, optimize=False).run(next(iter(task.calib_feeds())))
    for tensor, copy in copies.items():
        if getattr(values[copy.name], "dtype", None) == np.float32:
            yield tensor


def nodes_part(count: int = 3000) -> Iterator[str]:
    """Static quantization of many tiny nodes, with everything the command does: proofs, comparison, writing."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for number in range(count // 2):
        last = f"t{number}" if number else "x"
        weights.append(numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32) / 3, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"], name=f"matmul{number}"))
        nodes.append(helper.make_node("Relu", [f"m{number}"], [f"t{number + 1}"], name=f"relu{number}"))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", f"t{count // 2}")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chain.onnx")
        onnx.save(model, path)
        np.savez(Path(folder, "feeds.npz"), x=np.abs(rng.standard_normal((64, 8))).astype(np.float32))
        command = [sys.executable, "-m", "onnxopt", str(path), "--data", str(Path(folder, "feeds.npz"))]
        command += ["--passes", "int8:all_layers=true", "--max-abs", "1e9", "--latency-seconds", "0"]
        seconds = timed(lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True))
        yield f"chain of {count} nodes: int8 through the command line, verified and written, {seconds:.1f} s"


def main() -> int:
    """Print the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--many", type=int, default=512, help="samples of the second memory measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rivals", action="store_true", help="time onnxruntime's calibrators too")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tasks = load_tasks(args.zoo, args.models)
    models = list(found_models(tasks, args.names or NAMES))
    if args.child:
        child(models[0][1], tasks.load(models[0][0]), args)
        return 0
    for part in args.only:
        if part == "nodes":
            print(*nodes_part(), sep="\n", flush=True)
            continue
        for name, path in models:
            if part == "memory":
                print(*memory_part(name, args), sep="\n", flush=True)
                continue
            run = {"time": time_part, "parts": parts_part, "search": search_part}[part]
            for line in run(name, path, tasks.load(name), args):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
