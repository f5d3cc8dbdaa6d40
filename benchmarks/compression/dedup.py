"""Does removing duplicates cost less than reading the file twice?

    python -m benchmarks.compression.dedup [--megabytes 500] [--rounds 5] [--peers PYTHON] [--external] [--folder DIR]

A chain of MatMuls of MEGABYTES, half of them duplicates, is written into a temporary folder, in one file or with
--external with its weights in a file beside it. Then, interleaved, each in a process of its own: reading the file from
the page cache, and loading it, removing duplicates and saving it, by `dedup` and by each tool that the interpreter of
--peers has. `pass` is the time of the pass alone, on a model that is loaded; `of read` the median over rounds of that
time over that of reading the file into new memory, `of copy` over that of reading it through one buffer that is used
again. Outputs are compared bit by bit with the original's.

Exit code 1 where `dedup` alone takes more than twice as long as reading, or changes an output. Needs no other load.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from benchmarks.children import Failed, Limits, run_child
from benchmarks.compression.dedup_foreign import TOOLS
from onnxopt.runtime import Session

SIDE = 1024
ALLOWED = 2.0
FOREIGN = Path(__file__).with_name("dedup_foreign.py")
OURS = "dedup"
_SECONDS, _MEMORY = 600.0, 20e9
_BUFFER = 1 << 20

READ = """
import json, sys, time
times = {"read": 0.0, "copy": 0.0}
for path in sys.argv[1:]:
    started = time.perf_counter()
    with open(path, "rb") as file:
        whole = file.read()
    times["read"] += time.perf_counter() - started
    del whole
    buffer = bytearray(BUFFER)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    times["copy"] += time.perf_counter() - started
print(json.dumps(times))
""".replace("BUFFER", str(_BUFFER))

ENGINE = """
import json, os, sys, time
from benchmarks.children import resident_peak
from onnxopt.model import load
from onnxopt.passbase import Context
from onnxopt.passes.dedup import Dedup
times = [time.perf_counter()]
model = load(sys.argv[1])
times.append(time.perf_counter())
result = Dedup().run(model, Context())
times.append(time.perf_counter())
model.save(sys.argv[2], external_data=sys.argv[3])
times.append(time.perf_counter())
took = dict(zip(("load", "run", "save"), (after - before for before, after in zip(times, times[1:]))))
took["peak"] = resident_peak(os.getpid())
print(json.dumps(took))
"""


@dataclass
class Figures:
    """Of one tool, by round: seconds of its steps and of reading the file. problem: why there is nothing, if so."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    size: int = 0
    equal: bool = True
    problem: str = ""

    def median(self, name: str) -> float:
        """Of a figure over the rounds."""
        return float(np.median([each[name] for each in self.rounds]))

    def ratio(self, name: str) -> float:
        """Median of the pass over reading, each of one round."""
        return float(np.median([each["run"] / each[name] for each in self.rounds]))


def duplicated(megabytes: float, seed: int = 0) -> ModelProto:
    """A chain of MatMuls, the second half of whose weights is the first half in another order."""
    rng = np.random.default_rng(seed)
    count = max(1, round(megabytes * 1e6 / (8 * SIDE * SIDE)))
    distinct = [(rng.random((SIDE, SIDE), np.float32) - 0.5) / 8 for _ in range(count)]
    weights = [*distinct, *(distinct[at] for at in rng.permutation(count))]
    nodes = [helper.make_node("MatMul", [f"t{n}", f"w{n}"], [f"t{n + 1}"]) for n in range(len(weights))]
    ends = [helper.make_tensor_value_info(f"t{n}", onnx.TensorProto.FLOAT, [1, SIDE]) for n in (0, len(weights))]
    tensors = [numpy_helper.from_array(array, f"w{n}") for n, array in enumerate(weights)]
    graph = helper.make_graph(nodes, "duplicates", ends[:1], ends[1:], tensors)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model


def write(folder: Path, megabytes: float, external: bool) -> Path:
    """The model as a file, its weights within it or beside it."""
    path = folder / "model.onnx"
    beside = {"save_as_external_data": True, "location": "model.bin"} if external else {}
    onnx.save(duplicated(megabytes), path, **beside)
    return path


def measured(path: Path, tool: str, args: argparse.Namespace) -> Figures:
    """All rounds of one tool, each with a reading of the file before it."""
    found = Figures()
    files = sorted(str(each) for each in path.parent.glob("model.*"))
    limits = Limits(_SECONDS, _MEMORY)
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            out = Path(folder) / "out.onnx"
            try:
                read = run_child([sys.executable, "-c", READ, *files], limits).told
                took = run_child(command(tool, path, out, args), limits).told
            except Failed as error:
                found.problem = str(error)
                return found
            figures: dict[str, Any] = {**read, **took}
            found.rounds.append({name: float(value) for name, value in figures.items()})
            found.size = sum(each.stat().st_size for each in Path(folder).iterdir())
            if len(found.rounds) == 1:
                found.equal = outputs(path) == outputs(out)
    return found


def command(tool: str, path: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """What a round of a tool runs."""
    if tool == OURS:
        return [sys.executable, "-c", ENGINE, str(path), str(out), "always" if args.external else "never"]
    return [str(args.peers), str(FOREIGN), tool, str(path), str(out)]


def outputs(path: Path) -> bytes:
    """Of a model on one made-up input, unoptimized."""
    feed = {"t0": np.random.default_rng(1).standard_normal((1, SIDE)).astype(np.float32)}
    values = Session(path, optimize=False, threads=1).run(feed).values()
    return b"".join(np.asarray(value).tobytes() for value in values)


def row(tool: str, figures: Figures, size: int) -> str:
    """A line of the table."""
    if figures.problem:
        return f"| {tool} | {figures.problem} | | | | | | | |"
    seconds = " | ".join(f"{figures.median(name):.3f}" for name in ("load", "run", "save"))
    ratios = f"{figures.ratio('read'):.2f} | {figures.ratio('copy'):.2f}"
    peak = f"{figures.median('peak') / size:.2f}"
    equal = "yes" if figures.equal else "NO"
    return f"| {tool} | {seconds} | {ratios} | {peak} | {figures.size / size:.3f} | {equal} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="an interpreter with onnx-ir, onnxoptimizer, onnxslim and onnxsim")
    parser.add_argument("--external", action="store_true", help="weights in a file beside the model")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="onnxopt-dedup-", dir=args.folder) as name:
        path = write(Path(name), args.megabytes, args.external)
        size = sum(each.stat().st_size for each in path.parent.iterdir())
        print("| tool | load s | pass s | save s | of read | of copy | peak of file | file | outputs equal |")
        print("|---|---|---|---|---|---|---|---|---|")
        ours = measured(path, OURS, args)
        print(row(OURS, ours, size), flush=True)
        for tool in TOOLS if args.peers is not None else ():
            print(row(tool, measured(path, tool, args), size), flush=True)
    held = not ours.problem and ours.equal and ours.ratio("read") <= ALLOWED
    print(f"\n{size / 1e6:.0f} MB, {args.rounds} rounds in {time.perf_counter() - started:.0f} s   ", end="")
    print("holds" if held else "DOES NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
