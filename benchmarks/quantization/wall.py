"""Part `wall`: how long the whole int8 command takes, beside plain inference of the samples it is given."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from benchmarks.children import Failed, run_child
from benchmarks.ours import feeds_in
from benchmarks.quantization.bench import Bench
from onnxopt.feeds import Sample
from onnxopt.model import load
from onnxopt.runtime import Session

RATIO, SECONDS = 3.0, 3.0


def wall(bench: Bench) -> Iterator[str]:
    """One line: of models with a Conv, since only for those is a bound given."""
    if all(node.op != "Conv" for body in load(bench.path).bodies() for node in body.nodes):
        yield f"{bench.name}: has no Conv"
        return
    folder = bench.wall_feeds(bench.args.wall_samples)
    samples = list(feeds_in(folder, bench.path))
    session = Session(bench.path)
    before = _inference(session, samples)
    out = bench.folder / f"{bench.name}.wall.onnx"
    command = [sys.executable, "-m", "onnxopt", str(bench.path), "--passes", "int8", "--data", str(folder)]
    command += ["--no-verify", "--latency-seconds", "0", "--force", "--quiet", "--output", str(out)]
    try:
        seconds = run_child(command, bench.limits).seconds
    except Failed as error:
        yield f"{bench.name}: {error}"
        return
    plain = (before + _inference(session, samples)) / 2
    bound = RATIO * plain + SECONDS
    bench.log({"part": "wall", "seconds": seconds, "inference": plain, "samples": len(samples)})
    yield (
        f"{bench.name}: {seconds:.1f} s with {len(samples)} samples, inference of them {plain:.1f} s;"
        f" bound {RATIO:.0f}x and {SECONDS:.0f} s, {bound:.1f} s: {'yes' if seconds <= bound else 'NO'}"
    )


def _inference(session: Session, samples: list[Sample]) -> float:
    started = time.perf_counter()
    for sample in samples:
        session.run(sample.inputs)
    return time.perf_counter() - started
