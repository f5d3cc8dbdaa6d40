"""What storing zeros saves: bytes of file and zip, time and memory of loading, latency, and whether a bit changed.

    python -m benchmarks.compression.sparsify --zoo DIR [NAME ...] [--density 0.2]

Of each weight of at least 1,024 elements the largest are kept, whatever that does to the outputs: what is measured is
storage. Each form stands beside the dense file of the same values. Load times and latencies are ratios of interleaved
runs; memory is what a fresh process grows by. The first rows are single layers, which need no zoo.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.model import Model, load
from onnxopt.passbase import Context
from onnxopt.pipeline.grammar import parse
from onnxopt.pipeline.passes import evaluate
from onnxopt.pipeline.prepare import with_prepared
from onnxopt.runtime import Session
from onnxopt.runtime.latency import measure
from onnxopt.runtime.loads import LoadMeter

FORMS = ("sparsify", "sparsify:forms=sparse", "sparsify:forms=bitmask+sparse")
_LEAST_ELEMENTS = 1024


def layer(kind: str) -> Model:
    """A model of one layer, weights of 4 MB and more."""
    rng = np.random.default_rng(0)
    op, shape, given = "MatMul", [2048, 2048], [1, 2048]
    if kind == "conv 3x3 256-512":
        op, shape, given = "Conv", [512, 256, 3, 3], [1, 256, 14, 14]
    weight = numpy_helper.from_array(rng.normal(size=tuple(shape)).astype(np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, given)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(given))
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "layer", [x], [y], [weight])
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def keep_largest(model: Model, density: float) -> None:
    """Zero all but the largest weights of every float tensor that is not small."""
    for constant in model.constants():
        if constant.dtype.kind == "f" and constant.data.size >= _LEAST_ELEMENTS:
            size = np.abs(constant.values)
            kept = int(density * size.size)
            bound = np.partition(size.reshape(-1), -kept)[-kept] if kept else np.inf
            constant.values = np.where(size >= bound, constant.values, 0).astype(constant.dtype)


def zipped(path: Path) -> int:
    """Bytes of the file as zip stores it."""
    return len(zlib.compress(path.read_bytes(), 6))


def equal(one: Path, other: Path, feeds: Sequence[dict[str, Any]]) -> bool:
    """Whether the outputs are equal bit for bit, optimized."""
    sessions = Session(one), Session(other)
    outputs = ([session.run(feed) for session in sessions] for feed in feeds)
    return all(a[name].tobytes() == b[name].tobytes() for a, b in outputs for name in a)


def rows(name: str, model: Model, feeds: Sequence[dict[str, Any]], density: float, folder: Path) -> Iterator[str]:
    """One row a form."""
    keep_largest(model, density)
    dense = model.save(folder / "dense.onnx")
    for form in FORMS:
        clone = model.clone().model
        started = time.perf_counter()
        for step in with_prepared(parse(form)):
            step.pass_.run(clone, Context(evaluate=evaluate))
        seconds = time.perf_counter() - started
        clone.normalize()
        path = clone.save(folder / "stored.onnx")
        latency = measure(Session(dense), Session(path), list(feeds), seconds=2)
        with LoadMeter() as meter:
            loads = meter.measure(dense, path, seconds=2)
        memory = loads.memory
        figures = (
            f"{path.stat().st_size / dense.stat().st_size:.3f}",
            f"{zipped(path) / zipped(dense):.3f}",
            f"{loads.time.ratio:.2f}",
            "" if memory is None else f"{memory.candidate / max(1, memory.reference):.2f}",
            f"{latency.ratio:.2f} [{latency.low:.2f}, {latency.high:.2f}]",
            "equal" if equal(dense, path, feeds) else "DIFFERENT",
            f"{seconds:.1f} s",
        )
        yield f"| {name} | {form} | {' | '.join(figures)} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--density", type=float, default=0.2, help="share of the weights that are not zero")
    arguments = parser.parse_args()
    print("| model | pass | file | zip | load | memory | latency | outputs | pass took |\n|" + "---|" * 9, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind in ("matmul 2048x2048", "conv 3x3 256-512"):
            model = layer(kind)
            rng = np.random.default_rng(1)
            feed = {"x": rng.normal(size=tuple(model.graph.inputs[0].shape or ())).astype(np.float32)}
            for row in rows(kind, model, [feed], arguments.density, folder):
                print(row, flush=True)
        tasks = load_tasks(arguments.zoo, arguments.models)
        for name, path in found_models(tasks, arguments.names):
            feeds = list(itertools.islice(tasks.load(name).feeds(), 4))
            for row in rows(name, load(path), feeds, arguments.density, folder):
                print(row, flush=True)


if __name__ == "__main__":
    main()
