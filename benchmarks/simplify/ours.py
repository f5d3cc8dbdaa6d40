"""`simplify` as the command runs it, in a process of its own.

    python -m benchmarks.simplify.ours SOURCE OUT

Prints as JSON the seconds of reading and rewriting, imports, proofs and writing not.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from onnxopt.model import load
from onnxopt.passbase import Context
from onnxopt.pipeline.grammar import parse
from onnxopt.pipeline.passes import evaluate
from onnxopt.pipeline.prepare import with_prepared


def main() -> None:
    """The command."""
    steps = with_prepared(parse("simplify"))
    started = time.perf_counter()
    model = load(Path(sys.argv[1]))
    for step in steps:
        step.pass_.run(model, Context(evaluate=evaluate))
        model.normalize()
    seconds = time.perf_counter() - started
    model.save(Path(sys.argv[2]))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
