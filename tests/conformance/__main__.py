"""Run every pass, alone and all together, over all of onnx's backend test models.

    python -m tests.conformance [--every N] [--verbose] [PASS ...]

Each model is taken as it is and with its inputs frozen into initializers. Prints every fault and a table of verdicts;
the exit code is 1 if there is a fault. docs/conformance.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from onnxopt.passbase import Pass, lookup
from tests.conformance.corpus import Case, cases, frozen
from tests.conformance.judge import Tally, Verdict, judge

PASSES = (
    "dedup:min_bytes=0",
    "fold_constants",
    "fold_constants:weights=false",
    "eliminate_identity",
    "eliminate_identity:signed_zeros=false",
    "eliminate_common_subexpressions",
    "eliminate_dead_code:operator_sets=false",
    "flatten_if",
    "simplify_shapes",
    "fuse_consecutive",
    "eliminate_default_inputs",
    "inline_functions",
    "fuse_bn",
    "fuse_pad",
    "fuse_mul_add",
    "fuse_matmul_add",
    "recompose",
    "convert_opset",
    "convert_opset:opset=18",
    "prune",
)


def make(text: str) -> Pass:
    """A pass from its textual form, `name:option=value`."""
    name, *settings = text.split(":")
    return lookup(name).parse(dict(setting.split("=", 1) for setting in settings))


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("passes", nargs="*", default=PASSES, help="passes, each as name:option=value")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth model only")
    parser.add_argument("--verbose", action="store_true", help="print what passes refused, too")
    options = parser.parse_args(arguments)
    chosen = cases()[:: options.every]
    columns: dict[str, list[Pass]] = {text: [make(text)] for text in options.passes}
    if len(columns) > 1:
        columns["all together"] = [make(text) for text in options.passes]
    counts: dict[str, Counter[Verdict]] = {name: Counter() for name in columns}
    tally = Tally()
    for case in chosen:
        for variant in (case, frozen(case)):
            if variant is not None:
                _judge(variant, columns, counts, tally, options.verbose)
    print(f"{len(chosen)} models, as they are and frozen")
    print("rewritten models run: " + ", ".join(f"{count} by {name}" for name, count in tally.runs.items()))
    for row in _table(counts):
        print(row)
    return int(any(counter[verdict] for counter in counts.values() for verdict in Verdict if verdict.is_fault))


def _table(counts: dict[str, Counter[Verdict]]) -> list[str]:
    width = max(map(len, counts))
    rows = [" " * width + "".join(f"  {verdict.value:>5}" for verdict in Verdict)]
    for name, counter in counts.items():
        cells = "".join(f"  {counter[verdict]:{max(5, len(verdict.value))}}" for verdict in Verdict)
        rows.append(f"{name:{width}}{cells}")
    return rows


def _judge(
    case: Case, columns: dict[str, list[Pass]], counts: dict[str, Counter[Verdict]], tally: Tally, verbose: bool
) -> None:
    for name, passes in columns.items():
        verdict, detail = judge(case, passes, tally)
        counts[name][verdict] += 1
        if verdict.is_fault or (verbose and verdict is Verdict.REFUSED):
            print(f"{verdict.value}: {case.name} after {name}: {detail}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
