"""What `simplify` leaves of models beside other simplifiers, whether outputs are right, and what it costs.

    python -m benchmarks.simplify --zoo DIR [NAME ...] [--peers PYTHON] [--part models time scale]

models: nodes of all bodies without Constant nodes; the largest difference of outputs over the largest output, bytes and
latency of ours. A peer's count stands in brackets where its result does not load, differs by more than 1e-4, or is
more than a tenth larger than the original: then it does not count. time: seconds in one process, and of whole
commands. scale: seconds for chains of 10,000 to 40,000 nodes. PYTHON: an interpreter with onnxslim, onnxsim,
onnxscript and onnxoptimizer.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from benchmarks.children import Failed, Limits, run_child
from benchmarks.simplify.foreign import TOOLS
from benchmarks.tasks import add_arguments, found_models, interpreter, load_tasks
from onnxopt.model import load
from onnxopt.runtime import Session
from onnxopt.runtime.latency import measure

_FOREIGN = Path(__file__).parent / "foreign.py"
_TOLERANCE = 1e-4
_GROWTH = 1.1
_LIMITS = Limits(600.0, 8e9)
_ROUNDS = 3
PARTS = ("models", "time", "scale")

Feeds = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Judged:
    """What a tool made. problem: why it does not count."""

    nodes: int
    difference: float
    problem: str = ""


def largest_difference(reference: Session, candidate: Session, feeds: Feeds) -> float:
    """Of float outputs over the largest value of each; infinite where shapes, types or other outputs differ."""
    worst = 0.0
    for feed in feeds:
        wanted, found = reference.run(feed), candidate.run(feed)
        for name, value in wanted.items():
            other = found.get(name)
            if other is None or other.shape != value.shape or other.dtype != value.dtype:
                return float("inf")
            if value.dtype.kind != "f":
                worst = max(worst, 0.0 if np.array_equal(value, other) else float("inf"))
            elif value.size:
                scale = max(float(np.abs(value).max()), 1e-30)
                worst = max(worst, float(np.abs(value.astype(np.float64) - other).max()) / scale)
    return worst


def judged(source: Path, made: Path, feeds: Feeds) -> Judged:
    """A result held against its original."""
    nodes = load(made).node_count()
    try:
        difference = largest_difference(Session(source), Session(made), feeds)
    except Exception as error:  # noqa: BLE001  whatever keeps a result from running is its problem
        return Judged(nodes, float("inf"), type(error).__name__)
    if not difference <= _TOLERANCE:
        return Judged(nodes, difference, "differs")
    grown = made.stat().st_size > _GROWTH * source.stat().st_size
    return Judged(nodes, difference, "grown" if grown else "")


def command(tool: str, peers: str, source: Path, out: Path) -> list[str]:
    """What runs a tool in a process of its own."""
    if tool == "ours":
        return [sys.executable, "-m", "benchmarks.simplify.ours", str(source), str(out)]
    return [peers, str(_FOREIGN), tool, str(source), str(out)]


def told(found: Judged | Failed) -> str:
    """A count, in brackets where it does not count."""
    if isinstance(found, Failed):
        return "failed"
    return f"({found.nodes}: {found.problem})" if found.problem else str(found.nodes)


def model_row(name: str, source: Path, feeds: Feeds, tools: Sequence[str], peers: str, folder: Path) -> str:
    """One row of the table of models."""
    results: dict[str, Judged | Failed] = {}
    for tool in tools:
        out = folder / f"{tool}.onnx"
        out.unlink(missing_ok=True)
        try:
            run_child(command(tool, peers, source, out), _LIMITS)
            results[tool] = judged(source, out, feeds)
        except Failed as error:
            results[tool] = error
    counts = [told(results[tool]) for tool in tools]
    ours = results["ours"]
    if isinstance(ours, Failed):
        return f"| {name} | {load(source).node_count()} | {' | '.join(counts)} | {ours} | | |"
    path = folder / "ours.onnx"
    latency = measure(Session(source), Session(path), list(feeds), seconds=2)
    size = path.stat().st_size / source.stat().st_size
    return (
        f"| {name} | {load(source).node_count()} | {' | '.join(counts)} | {ours.difference:.1e} | {size:.3f} | "
        f"{latency.ratio:.2f} [{latency.low:.2f}, {latency.high:.2f}] |"
    )


def time_row(name: str, source: Path, tools: Sequence[str], peers: str, folder: Path) -> str:
    """One row of the table of times: medians of interleaved rounds."""
    inside: dict[str, list[float]] = {tool: [] for tool in tools}
    whole: dict[str, list[float]] = {tool: [] for tool in (*tools, "command", "unproven")}
    for _ in range(_ROUNDS):
        for tool in tools:
            out = folder / f"{tool}.onnx"
            out.unlink(missing_ok=True)
            try:
                finished = run_child(command(tool, peers, source, out), _LIMITS)
            except Failed:
                continue
            inside[tool].append(float(str(finished.told["seconds"])))
            whole[tool].append(finished.seconds)
        for kind, words in (("command", []), ("unproven", ["--no-verify"])):
            out = folder / "command.onnx"
            out.unlink(missing_ok=True)
            line = [sys.executable, "-m", "onnxopt", "simplify", str(source), "-o", str(out), *words]
            started = time.perf_counter()
            run_child([*line, "--latency-seconds", "0"], _LIMITS)
            whole[kind].append(time.perf_counter() - started)
    cells = [_median(inside[tool]) for tool in tools] + [_median(each) for each in whole.values()]
    return f"| {name} | {' | '.join(cells)} |"


def _median(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.2f}" if times else "failed"


def chain(length: int, path: Path) -> None:
    """A chain of Relu, Identity, double Transpose and Add of zeros, with as many nodes."""
    nodes, last = [], "x"
    for at in range(length // 5):
        names = [f"t{at}_{part}" for part in range(5)]
        nodes += [
            helper.make_node("Relu", [last], [names[0]]),
            helper.make_node("Identity", [names[0]], [names[1]]),
            helper.make_node("Transpose", [names[1]], [names[2]], perm=[1, 0]),
            helper.make_node("Transpose", [names[2]], [names[3]], perm=[1, 0]),
            helper.make_node("Neg", [names[3]], [names[4]]),
        ]
        last = names[4]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def scale_row(length: int, tools: Sequence[str], peers: str, folder: Path) -> str:
    """One row of the table of chains."""
    source = folder / "chain.onnx"
    chain(length, source)
    cells = []
    for tool in tools:
        out = folder / f"{tool}.onnx"
        out.unlink(missing_ok=True)
        try:
            finished = run_child(command(tool, peers, source, out), _LIMITS)
            cells.append(f"{float(str(finished.told['seconds'])):.1f} s, {load(out).node_count():,} left")
        except Failed as error:
            cells.append(str(error)[:60])
    return f"| {length:,} | {' | '.join(cells)} |"


def table(columns: Sequence[str]) -> str:
    """The head of a table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--peers", type=interpreter, default="", metavar="PYTHON", help="has the other simplifiers")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, help="default all")
    arguments = parser.parse_args()
    tools = ["ours", *(TOOLS if arguments.peers else ())]
    tasks = load_tasks(arguments.zoo, arguments.models)
    models = list(found_models(tasks, arguments.names))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "models" in arguments.part:
            print(table(["model", "nodes", *tools, "difference", "file", "latency"]), flush=True)
            for name, path in models:
                feeds = list(itertools.islice(tasks.load(name).feeds(), 4))
                print(model_row(name, path, feeds, tools, arguments.peers, folder), flush=True)
        if "time" in arguments.part:
            whole = [f"{tool}, whole" for tool in tools]
            print(table(["model", *tools, *whole, "simplify", "--no-verify"]), flush=True)
            for name, path in models:
                print(time_row(name, path, tools, arguments.peers, folder), flush=True)
        if "scale" in arguments.part:
            print(table(["nodes", *tools]), flush=True)
            for length in (10_000, 20_000, 40_000):
                print(scale_row(length, tools, arguments.peers, folder), flush=True)


if __name__ == "__main__":
    main()
