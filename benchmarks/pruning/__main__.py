"""Structured pruning of ours beside onnxsim's at equal multiply-accumulates (MACs), without fine-tuning.

    python -m benchmarks.pruning --zoo DIR [--models DIR] [NAME ...] [--part PART ...] [--onnxsim PYTHON] ...

Parts (default: ladder):
    ladder     at each of --levels fewer MACs: the error of the outputs on held-out feeds, sqrt(sum (y - y0)^2 / sum
               y0^2) over all float outputs; MACs, float parameters, bytes and latency over the float model's
               (interleaved, one thread, with its interval); the task; seconds to make it. Ours with least squares, with
               the mean of what is removed folded, and raw; onnxsim's best by that error, raw and with its recovery, at
               the MACs of ours
    speed      latency at the highest level, and whether it is low enough
    order      whether each recovery of ours comes nearer than the one that does less
    minigraphs half of the parameters of each graph of --minigraphs FILE removed; constant channels; half of the hidden
               units of a multilayer perceptron, beside onnxsim's

onnxsim runs under --onnxsim PYTHON, an interpreter that has it (and sympy, which onnxruntime's optimizer for
transformers wants, without which onnxsim finds no attention heads). Its methods, L1, L2 and Wanda by layer and over the
whole model, attention heads and blocks, are tried each on what onnxsim or onnxruntime simplify the model to, their
argument searched for the MACs wanted; the nearest is recovered in all ways, the next in one. What it came to stays in
--keep and is not made again for the same --samples, --feeds and --methods. MACs are those of one run on the task's
first feed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench import told_error
from benchmarks.pruning.bench import Bench
from benchmarks.pruning.ladder import ladder, order, speed
from benchmarks.pruning.minigraphs import minigraphs
from benchmarks.pruning.rival import METHODS
from benchmarks.tasks import add_arguments, found_models, interpreter, load_tasks

PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {"ladder": ladder, "speed": speed, "order": order}


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--part", nargs="+", default=["ladder"], choices=[*PARTS, "minigraphs"], metavar="PART")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="shares of the MACs to remove")
    parser.add_argument(
        "--ours", default="prune:ratio={ratio}:of=macs", metavar="PASSES", help="with {ratio}, options of prune last"
    )
    parser.add_argument("--onnxsim", type=interpreter, metavar="PYTHON", help="an interpreter that has onnxsim")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="of onnxsim; default all")
    parser.add_argument("--minigraphs", type=Path, metavar="FILE", help="script of part minigraphs")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--feeds", type=int, default=32, help="evaluation feeds that outputs are compared on")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a pair")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a recipe may take")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a recipe may take")
    parser.add_argument("--keep", type=Path, help="folder for feeds, models and what onnxsim came to")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append results as JSON lines")
    args = parser.parse_args()
    if "minigraphs" in args.part and args.minigraphs is None:
        parser.error("part minigraphs needs --minigraphs FILE")
    return args


def main() -> int:
    """Print the parts asked for, model by model."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if "minigraphs" in args.part:
            for line in minigraphs(args, folder):
                print(line, flush=True)
        parts = [PARTS[part] for part in args.part if part in PARTS]
        if not parts:
            return 0
        tasks = load_tasks(args.zoo, args.models)
        for name, path in found_models(tasks, args.names):
            bench = Bench(tasks, name, path.absolute(), args, folder)
            try:
                for line in (line for part in parts for line in part(bench)):
                    print(line, flush=True)
            except Exception as error:  # noqa: BLE001  one model that can't be run must not end the rest
                print(f"{name}: {told_error(error)}", flush=True)
            finally:
                bench.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
