"""Part `table`: what the task measures, bytes, latency and seconds of ours and of other tools, and the bounds."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import told_error, told_latency, told_scores
from benchmarks.quantization import bounds
from benchmarks.quantization.bench import Bench
from benchmarks.quantization.bounds import Figures
from benchmarks.quantization.recipes import HISTOGRAMS


def table(bench: Bench) -> Iterator[str]:
    """One line a recipe as it is measured, then the bounds of each of ours."""
    before = bench.scores(bench.path)
    arrow = "up" if bench.task.higher_is_better else "down"
    yield f"{bench.name}: {bench.task.primary} {arrow}, {bench.path.stat().st_size / 1e6:.1f} MB"
    yield f"  {'float':22} {told_scores(before)}"
    ours: list[Figures] = []
    peers: list[Figures] = []
    for recipe in [*bench.args.ours, *bench.args.peers, "onnxsim"]:
        try:
            figures, line = measured(bench, recipe)
        except Exception as error:  # noqa: BLE001  one failing recipe must not end the table
            yield f"  {recipe:22} {told_error(error)}"
            bench.log({"recipe": recipe, "error": told_error(error)})
            continue
        yield f"  {recipe:22} {line}"
        if recipe in bench.args.ours:
            ours.append(figures)
        elif recipe in bench.args.peers:
            peers.append(figures)
    for result in ours:
        for verdict in held(bench, result, before, peers):
            yield f"    {result.recipe}: {verdict}"


def measured(bench: Bench, recipe: str) -> tuple[Figures, str]:
    """One recipe, and its line."""
    made = bench.make(recipe)
    scores = bench.scores(made.path)
    size = made.path.stat().st_size / bench.path.stat().st_size
    latency = bench.latency(made.path)
    few = f", {bench.args.histogram_samples} samples" if recipe in HISTOGRAMS else ""
    line = (
        f"{told_scores(scores)} | {size:.3f} bytes | {told_latency(latency)}"
        f" | {made.seconds:.1f} s, {made.peak / 1e6:.0f} MB{few}"
    )
    figures = Figures(recipe, scores, size, latency.ratio)
    record = {"recipe": recipe, "scores": scores, "bytes": size, "latency": latency.ratio, "low": latency.low}
    bench.log({**record, "high": latency.high, "seconds": made.seconds, "peak": made.peak, "notes": made.notes})
    return figures, line


def held(bench: Bench, result: Figures, before: dict[str, float], peers: list[Figures]) -> Iterator[str]:
    """The bounds of one result."""
    yield from bounds.verdicts(bench.name, result, before, peers, bench.task.higher_is_better)
    fastest = min(peers, key=lambda peer: peer.latency, default=None)
    if fastest is None:
        yield "no peer to time it against"
        return
    found = bench.latency(bench.make(result.recipe).path, bench.make(fastest.recipe).path)
    yield bounds.beside_fastest(bench.name, fastest.recipe, found.ratio, found.low, found.high)
