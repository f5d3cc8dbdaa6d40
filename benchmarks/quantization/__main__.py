"""Quantizing passes beside other tools, on models with frozen evaluation tasks.

    python -m benchmarks.quantization --zoo DIR [--models DIR] [NAME ...] [--only PART ...] [--ours PASSES] ...

Parts (default: table and levels):
    table     each recipe: all figures of the task, bytes and latency over the float model's (median of interleaved
              runs, one thread, with its interval), seconds to make it (preprocessing included) and peak memory; then
              each of ours against the bounds, and timed directly against the fastest peer
    levels    ours at every optimization level of onnxruntime: loads, SQNR to itself unoptimized and to float, each
              operator on the same codes, integer kernels beside quantized layers
    wall      the whole int8 command, --no-verify, beside plain inference of all samples that it is given (it calibrates
              on three fifths of them); models with a Conv
    weights   passes that only store weights in fewer bits (--weights, default those that are installed): bytes, SQNR,
              task, latency
    rounding  output error of 4-bit weights (--rounding) beside rounding to nearest at equal block size, by Gram
              matrices

Recipes. --ours: a pass list as the command line takes it, run with what prepares it, repeatable. --peers: onnxruntime's
static quantization with recommended (u8s8) and default settings and each calibrator, 7 bit, dynamic quantization; NNCF
with fast and full bias correction under --nncf PYTHON, an interpreter that has it; onnxsim likewise, as what becomes of
the float model. All are given the same calibration samples; the calibrators that hold every value of every tensor at
most --histogram-samples of them. Peers start from the model at operator set 13 or newer after onnxruntime's
preprocessing. What takes more than --memory or --timeout is left out and says so. --log FILE appends JSON lines.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.quantization.bench import Bench
from benchmarks.quantization.levels import levels
from benchmarks.quantization.recipes import PEERS
from benchmarks.quantization.rounding import rounding
from benchmarks.quantization.table import table
from benchmarks.quantization.wall import wall
from benchmarks.quantization.weights import weights
from benchmarks.tasks import add_arguments, found_models, interpreter, load_tasks

PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {
    "table": table,
    "levels": levels,
    "wall": wall,
    "weights": weights,
    "rounding": rounding,
}


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", default=["table", "levels"], choices=list(PARTS), metavar="PART")
    parser.add_argument("--ours", action="append", metavar="PASSES", help="default int8")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--nncf", type=interpreter, metavar="PYTHON", help="an interpreter that has NNCF")
    parser.add_argument("--onnxsim", type=interpreter, metavar="PYTHON", help="an interpreter that has onnxsim")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--histogram-samples", type=int, default=16, help="for calibrators that hold all values")
    parser.add_argument("--wall-samples", type=int, default=128)
    parser.add_argument("--feeds", type=int, default=32, help="evaluation feeds that outputs are compared on")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a pair")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a recipe may take")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a recipe may take")
    parser.add_argument("--weights", action="append", metavar="PASSES", help="of part weights")
    parser.add_argument("--rounding", default="int4", metavar="PASSES", help="of part rounding")
    parser.add_argument("--block", type=int, default=32, help="of rounding to nearest alone")
    parser.add_argument("--largest-gram", type=int, default=2048, help="inputs of an output, in part rounding")
    parser.add_argument("--each", action="store_true", help="part rounding: a line a layer")
    parser.add_argument("--keep", type=Path, help="folder for feeds and models")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append results as JSON lines")
    args = parser.parse_args()
    args.ours = args.ours or ["int8"]
    args.peers = [peer for peer in PEERS if peer != "nncf-transformer"] if args.peers is None else args.peers
    return args


def main() -> int:
    """Print the parts asked for, model by model."""
    args = arguments()
    tasks = load_tasks(args.zoo, args.models)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in found_models(tasks, args.names):
            bench = Bench(tasks, name, path.absolute(), args, folder)
            for part in args.only:
                for line in PARTS[part](bench):
                    print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
