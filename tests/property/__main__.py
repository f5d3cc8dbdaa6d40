"""Random whole graphs through the passes that promise to keep what a model computes.

    python -m tests.property [--graphs N] [--first SEED]

Four kinds in turn: networks, graphs that move elements about, graphs with everything that the format knows, and
operators of onnx's tests stitched together. `simplify` rewrites each as a whole; exact passes must keep every bit,
rounding ones 1e-4 of the largest output, signature and metadata stay, onnx's checker and onnxruntime take the result,
and a second run changes nothing. Every mismatch is printed with its seed; the exit code is 1 if there is one.
onnxruntime may end a process on a model that no pass has touched: graphs run in children, and such seeds are counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

from onnxopt.errors import PassError
from onnxopt.model import load
from onnxopt.passbase import Effect
from onnxopt.pipeline.grammar import parse
from tests.helpers import apply, assert_close, assert_equal, assert_valid, run
from tests.property.protos import RUNNABLE, Maker
from tests.property.stitched import Stitcher
from tests.property.test_passes_generated import assert_unharmed, expected
from tests.property.test_simplify_random import check_moves, check_network

ROOT = Path(__file__).parents[2]
KINDS = ("network", "moves", "format", "stitched")
_BATCH = 250


def check(seed: int) -> str:
    """One graph; what became of it. Raises AssertionError for a mismatch."""
    kind = KINDS[seed % len(KINDS)]
    random = Random(seed)
    print(f"start {seed}", flush=True)
    if kind == "network":
        check_network(seed, random.randint(3, 16))
    elif kind == "moves":
        check_moves(seed, random.randint(4, 32))
    elif kind == "format":
        source = Maker(seed, [feature for feature in RUNNABLE if random.random() < 0.6]).model()
        expected(source)
        print(f"passes {seed}", flush=True)
        assert_unharmed(source)
    else:
        return check_stitched(seed)
    return "judged"


def check_stitched(seed: int) -> str:
    """A stitched graph: exact passes alone, then all of `simplify`."""
    stitched = Stitcher(seed)
    with np.errstate(all="ignore"):
        try:
            wanted, again = (run(stitched.model, stitched.feeds) for _ in range(2))
            assert_equal(wanted, again)
        except Exception:  # noqa: BLE001  whatever the reason, there is nothing to judge by
            return "unjudged"
        print(f"passes {seed}", flush=True)
        steps = parse("simplify")
        for passes in ([step for step in steps if step.pass_.effect is Effect.EXACT], steps):
            target = load(stitched.model)
            for step in passes:
                apply(step.pass_, target)
            assert_valid(target)
            found = run(target, stitched.feeds)
            if passes is steps:
                assert_close(wanted, found, 1e-4)
            else:
                assert_equal(wanted, found)
            assert dict(target.metadata) == {"made": "stitched"}
            digest = target.digest()
            for step in passes:
                apply(step.pass_, target)
            assert target.digest() == digest, "a second run changes something"
    return "judged"


def batch(first: int, last: int) -> None:
    """Graphs of these seeds in this process, a line for each."""
    warnings.simplefilter("ignore")
    for seed in range(first, last):
        try:
            word = check(seed)
        except PassError as error:
            word = f"refused {error.cause}"
        except Exception as error:  # noqa: BLE001  every mismatch is told, and the next graph looked at
            word = f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"done {seed} {word}", flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--graphs", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the seed of the first one")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    seed, end = arguments.first, arguments.first + arguments.graphs
    while seed < end:
        last = min(end, seed + _BATCH)
        call = f"from tests.property.__main__ import batch; batch({seed}, {last})"
        done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
        for stage, at, *word in lines:
            if stage == "done":
                counts[f"{KINDS[int(at) % len(KINDS)]}: {word[0].split()[0]}"] += 1
                if word[0].startswith(("FAULT", "refused")):
                    print(f"seed {at} ({KINDS[int(at) % len(KINDS)]}): {word[0]}", flush=True)
        if lines and lines[-1][0] != "done" and done.returncode:
            stage, where = lines[-1][:2]
            fault = stage == "passes"
            counts[f"{KINDS[int(where) % len(KINDS)]}: {'FAULT' if fault else 'ended by the runtime'}"] += 1
            print(f"seed {where}: the process ended, code {done.returncode}, {done.stderr[-300:]}", flush=True)
            seed = int(where) + 1
        elif done.returncode or not lines:
            print(done.stderr[-2000:], flush=True)
            return 1
        else:
            seed = last
    for key, number in sorted(counts.items()):
        print(f"{number:6}  {key}", flush=True)
    return int(any(key.endswith("FAULT") for key in counts))


if __name__ == "__main__":
    sys.exit(main())
