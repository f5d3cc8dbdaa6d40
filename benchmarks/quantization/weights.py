"""Part `weights`: passes that store weights in fewer bits and leave activations alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import told_error, told_latency, told_scores
from benchmarks.quantization import bounds
from benchmarks.quantization.bench import Bench
from onnxopt.model import Variable, load
from onnxopt.passbase import names
from onnxopt.runtime import Session
from onnxopt.verification import RecordedOutputs, compare

PASSES = ("int8_weights", "int4", "fp16", "bf16", "fp8")


def weights(bench: Bench) -> Iterator[str]:
    """One line a pass list: --weights, or those of PASSES that are installed."""
    yield f"{bench.name}:"
    known = names()
    wanted = bench.args.weights or [name for name in PASSES if name in known]
    if not wanted:
        yield f"  none of {', '.join(PASSES)} is installed"
    for text in wanted:
        try:
            stored, line = measured(bench, text)
        except Exception as error:  # noqa: BLE001  one failing pass must not end the part
            yield f"  {text:22} {told_error(error)}"
            continue
        yield f"  {text:22} {line}"
        for verdict in bounds.storage_verdicts(bench.name, stored):
            yield f"    {text}: {verdict}"


def measured(bench: Bench, text: str) -> tuple[bounds.Stored, str]:
    """Bytes, the worst output's SQNR and cosine on the evaluation feeds, the task, latency, Casts behind Casts."""
    path = bench.make(text).path
    size = path.stat().st_size / bench.path.stat().st_size
    found = compare(RecordedOutputs(Session(bench.path), bench.evaluation), Session(path))
    cosine = min((o.cosine for o in found.outputs.values() if o.cosine is not None), default=None)
    close = "" if found.min_sqnr_db is None else f"{found.min_sqnr_db:.1f} dB, cosine {cosine:.5f}"
    latency = bench.latency(path)
    scores = bench.scores(path)
    chains = cast_chains(path)
    record = {"part": "weights", "recipe": text, "bytes": size, "sqnr_db": found.min_sqnr_db, "cosine": cosine}
    bench.log({**record, "latency": latency.ratio, "scores": scores, "cast_chains": chains})
    line = (
        f"{size:.3f} bytes | {close or f'{found.quality:.4f} of the answers equal'} | {told_scores(scores)}"
        f" | {told_latency(latency)} | {chains} Cast behind Cast"
    )
    return bounds.Stored(text, scores, size, found.min_sqnr_db, chains), line


def cast_chains(path: Path) -> int:
    """How many Cast nodes read what a Cast made."""
    nodes = [node for body in load(path).bodies() for node in body.nodes if node.op == "Cast"]
    sources = [node.inputs[0] for node in nodes if isinstance(node.inputs[0], Variable)]
    return sum(bool(tensor.inputs) and tensor.inputs[0].op == "Cast" for tensor in sources)
