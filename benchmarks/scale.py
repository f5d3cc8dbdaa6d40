"""Does a large model cost little more than its files?

    python -m benchmarks.scale [--gigabytes 4] [--verified 2] [--nodes 20000] [--rounds 2] [--folder DIR]

Three questions, each answered in a process of its own, on models made by this script in a temporary folder:

weights   A model with GIGABYTES of external data, half of it duplicates, is loaded, deduplicated and saved. Time
          against `cp` of the same bytes and `sync`, interleaved, the files dropped from the page cache before each.
          Holds when the peak of memory is below 700 MB and the time at most twice that of the copy.
verified  The same with VERIFIED gigabytes through `onnxopt.optimize`, which runs both models: the peak of memory,
          the larger of this process's and its worker's, over the bytes of the weights. Holds at 2.2 times.
nodes     Load, sort, remove dead code and save chains of NODES and twice as many nodes, the best of 5 interleaved
          runs. Holds below 6 s, when the second keeps a processor busy at most 2.3 times as long as the first, and
          detaching 8,000 consumers takes below 2 s.

Exit code 1 when one does not hold. Needs Linux, three times GIGABYTES of disk and no other load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

SIDE = 4096
WEIGHT = 4 * SIDE * SIDE
MEMORY_LIMIT, TIME_LIMIT, VERIFIED_LIMIT = 700 << 20, 2.0, 2.2
NODES_LIMIT, GROWTH_LIMIT, DETACH_LIMIT = 6.0, 2.3, 2.0
DETACHED, NODES_ROUNDS = 8000, 5

ENGINE = """
import sys
from onnxopt.model import load
from onnxopt.passbase import Context
from onnxopt.passes.dedup import Dedup
model = load(sys.argv[1])
result = Dedup().run(model, Context(evaluate=lambda proto, inputs: []))
model.save(sys.argv[2])
"""

VERIFIED = """
import sys
import onnxopt
result = onnxopt.optimize(sys.argv[1], "dedup", output=sys.argv[2], samples=2, latency_seconds=0)
"""

SMALL = """
import sys, time
from onnxopt import graph
from onnxopt.model import load
started, busy = time.perf_counter(), time.process_time()
model = load(sys.argv[1])
graph.sort_model(model)
graph.remove_dead(model)
model.save(sys.argv[2])
print(time.perf_counter() - started, time.process_time() - busy)
consumers = list(next(model.constants()).outputs)[: int(sys.argv[3])]
started = time.perf_counter()
for node in reversed(consumers):
    node.inputs.clear()
print(time.perf_counter() - started)
"""


def large_model(folder: Path, gigabytes: float) -> Path:
    """A chain of MatMuls of 64 MB each, its weights in one file beside it, every second equal to the one before."""
    count = 2 * max(1, round(gigabytes * 2**30 / WEIGHT / 2))
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    with (folder / "weights.bin").open("wb") as file:
        for number in range(count):
            if number % 2 == 0:
                block = ((rng.random((SIDE, SIDE), np.float32) - 0.5) / SIDE**0.5).tobytes()
            file.write(block)
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[SIDE, SIDE])
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": "weights.bin", "offset": str(number * WEIGHT), "length": str(WEIGHT)}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"t{number}", tensor.name], [f"t{number + 1}"]))
    return _written(folder / "model.onnx", nodes, weights, [1, SIDE])


def chain(folder: Path, count: int) -> Path:
    """Relu and Add, one after the other; all Adds read one constant."""
    nodes = [
        helper.make_node("Add" if n % 2 else "Relu", [f"t{n}", *(["c"] if n % 2 else [])], [f"t{n + 1}"], name=f"n{n}")
        for n in range(count)
    ]
    return _written(folder / f"chain{count}.onnx", nodes, [numpy_helper.from_array(np.ones(4, np.float32), "c")], [4])


def _written(path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto], shape: list[int]) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("t0", f"t{len(nodes)}")]
    graph = helper.make_graph(nodes, "scale", ends[:1], ends[1:], weights)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of the files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` of the folder followed by `sync` takes."""
    drop_from_cache(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def in_child(script: str, *arguments: object) -> tuple[float, int, str]:
    """(seconds, largest memory of the process and its children, what it printed) of a script in a fresh interpreter."""
    started = time.perf_counter()
    words = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the child ended with {child.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss << 10, said


def weights(folder: Path, gigabytes: float, rounds: int) -> bool:
    """Load, deduplicate and save against cp and sync."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    large_model(source, gigabytes)
    copies, runs, peaks = [], [], []
    for _ in range(rounds):
        copies.append(copy(source, target))
        target.mkdir()
        drop_from_cache(source)
        seconds, peak, _ = in_child(ENGINE, source / "model.onnx", target / "out.onnx")
        runs.append(seconds)
        peaks.append(peak)
        kept = sum(file.stat().st_size for file in target.iterdir())
        shutil.rmtree(target)
        print(f"  cp and sync {copies[-1]:6.1f} s   load, dedup, save {seconds:6.1f} s   peak {peak / 2**20:.0f} MB")
    ratio = float(np.median(np.divide(runs, copies)))
    size = (source / "weights.bin").stat().st_size
    held = max(peaks) < MEMORY_LIMIT and ratio <= TIME_LIMIT
    print(f"weights   {size / 1e9:.2f} GB -> {kept / 1e9:.2f} GB   {ratio:.2f}x of cp   {_held(held)}")
    shutil.rmtree(source)
    return held


def verified(folder: Path, gigabytes: float) -> bool:
    """The whole pipeline on synthetic inputs."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    large_model(source, gigabytes)
    seconds, peak, _ = in_child(VERIFIED, source / "model.onnx", target / "out.onnx")
    size = (source / "weights.bin").stat().st_size
    held = peak <= VERIFIED_LIMIT * size
    print(f"verified  {size / 1e9:.2f} GB in {seconds:.1f} s   peak {peak / size:.2f}x of the weights   {_held(held)}")
    shutil.rmtree(source)
    shutil.rmtree(target)
    return held


def nodes(folder: Path, count: int) -> bool:
    """Chains of many small nodes."""
    sizes = (count, 2 * count)
    paths = [chain(folder, number) for number in sizes]
    runs = [[_timed_nodes(folder, path) for path in paths] for _ in range(NODES_ROUNDS)]
    took = np.min(runs, axis=0)  # what else runs on the machine only adds time
    for number, (whole, busy, detach) in zip(sizes, took, strict=True):
        print(
            f"  {number} nodes: load, sort, dead code, save {whole:.2f} s ({busy:.2f} s busy)   detach {detach:.2f} s"
        )
    growth = took[1, 1] / took[0, 1]
    held = bool(took[0, 0] < NODES_LIMIT and growth <= GROWTH_LIMIT and took[:, 2].max() < DETACH_LIMIT)
    print(f"nodes     twice as many take {growth:.2f} times as long   {_held(held)}")
    return held


def _timed_nodes(folder: Path, path: Path) -> list[float]:
    _, _, said = in_child(SMALL, path, folder / "out.onnx", DETACHED)
    return [float(word) for word in said.split()]


def _held(held: bool) -> str:
    return "holds" if held else "DOES NOT HOLD"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4, help="weights of the engine run; 0 leaves it out")
    parser.add_argument("--verified", type=float, default=2, help="weights of the verified run; 0 leaves it out")
    parser.add_argument("--nodes", type=int, default=20_000, help="0 leaves it out")
    parser.add_argument("--rounds", type=int, default=2, help="copies and runs to compare")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxopt-scale-", dir=given.folder) as name:
        folder = Path(name)
        questions: list[tuple[float, Callable[[], bool]]] = [
            (given.nodes, lambda: nodes(folder, given.nodes)),
            (given.gigabytes, lambda: weights(folder, given.gigabytes, given.rounds)),
            (given.verified, lambda: verified(folder, given.verified)),
        ]
        answers = [ask() for size, ask in questions if size]
    return 0 if all(answers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
