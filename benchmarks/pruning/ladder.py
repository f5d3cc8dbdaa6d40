"""Parts `ladder`, `speed` and `order`: what it costs to remove MACs, how fast it is, what recovery gains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.bench import Made, told_error, told_latency, told_scores
from benchmarks.children import Failed
from benchmarks.pruning.bench import RECOVERIES, Bench
from benchmarks.pruning.cost import cost
from benchmarks.pruning.errors import Errors

LARGEST_LATENCY = 0.85
_WIDTH = 22


def ladder(bench: Bench) -> Iterator[str]:
    """A line for each recipe at each level, the rival's at the MACs of ours."""
    arrow = "up" if bench.task.higher_is_better else "down"
    size = bench.path.stat().st_size / 1e6
    told = f"{bench.cost.macs / 1e6:.1f} M MACs, {bench.cost.parameters / 1e6:.2f} M parameters, {size:.1f} MB"
    yield f"{bench.name}: {bench.task.primary} {arrow}, {told}"
    if bench.cost.idle:
        yield f"  {bench.cost.told_idle()}"
    yield f"  {'float':{_WIDTH}} {told_scores(bench.scores(bench.path))}"
    for level in bench.args.levels:
        yield f"  {level:.0%} fewer MACs:"
        for recovery in RECOVERIES:
            yield _line(bench, level, f"ours, {recovery}", _ours(bench, level, recovery))
        for recovered in (False, True):
            name = "onnxsim, recovered" if recovered else "onnxsim, raw"
            yield _line(bench, level, name, _rival(bench, level, recovered))


@dataclass(frozen=True)
class Recipe:
    """What a recipe made and how, or why it made nothing."""

    made: Made | None
    told: str = ""
    error: str = ""


def _ours(bench: Bench, level: float, recovery: str) -> Recipe:
    try:
        return Recipe(bench.make(bench.ours(level, recovery)))
    except Failed as error:
        return Recipe(None, error=told_error(error))


def _rival(bench: Bench, level: float, recovered: bool) -> Recipe:
    try:
        found = bench.rival.level(bench.target(level)).best(recovered)
    except Failed as error:
        return Recipe(None, error=told_error(error))
    return Recipe(Made(found.path, found.seconds, 0), found.told())


def _line(bench: Bench, level: float, name: str, recipe: Recipe) -> str:
    """Everything measured of a recipe, or why there is nothing."""
    record = {"part": "ladder", "level": level, "recipe": name}
    if recipe.made is None:
        bench.log({**record, "error": recipe.error})
        return f"    {name:{_WIDTH}} {recipe.error}"
    try:
        found = bench.figures(recipe.made.path)
    except Exception as error:  # noqa: BLE001  one failing result must not end the table
        bench.log({**record, "error": told_error(error)})
        return f"    {name:{_WIDTH}} {told_error(error)}"
    bench.log(
        {
            **record,
            "told": recipe.told,
            "error_total": found.errors.total,
            "error_primary": found.errors.primary,
            "error_worst": found.errors.worst,
            "macs": found.macs,
            "parameters": found.parameters,
            "bytes": found.bytes,
            "latency": found.latency.ratio,
            "low": found.latency.low,
            "high": found.latency.high,
            "scores": found.scores,
            "seconds": recipe.made.seconds,
            "notes": recipe.made.notes,
        }
    )
    how = f" | {recipe.told}" if recipe.told else ""
    return f"    {name:{_WIDTH}} {found.told()} | {recipe.made.seconds:.1f} s{how}"


def speed(bench: Bench) -> Iterator[str]:
    """The interleaved latency of ours at the highest level, held against LARGEST_LATENCY."""
    level = max(bench.args.levels)
    try:
        path = bench.make(bench.ours(level, "least squares")).path
        macs = cost(path, bench.feed).macs / bench.cost.macs
        found = bench.latency(path)
    except Exception as error:  # noqa: BLE001  one failing model must not end the part
        yield f"{bench.name}: {told_error(error)}"
        return
    bench.log({"part": "speed", "macs": macs, "latency": found.ratio, "low": found.low, "high": found.high})
    verdict = "yes" if found.ratio <= LARGEST_LATENCY else "NO"
    yield f"{bench.name}: {macs:.3f} MACs, latency {told_latency(found)}; at most {LARGEST_LATENCY}: {verdict}"


def order(bench: Bench) -> Iterator[str]:
    """Whether each recovery comes nearer than the one that does less, on feeds that none of them saw."""
    for level in bench.args.levels:
        try:
            found = {name: bench.errors(_made(bench, level, name)) for name in reversed(RECOVERIES)}
        except Exception as error:  # noqa: BLE001  one failing model must not end the part
            yield f"{bench.name} at {level:.0%}: {told_error(error)}"
            continue
        bench.log({"part": "order", "level": level, "errors": {name: each.total for name, each in found.items()}})
        told = " >= ".join(f"{name} {each.total:.4f}" for name, each in found.items())
        yield f"{bench.name} at {level:.0%}: {told}: {'yes' if ordered(list(found.values())) else 'NO'}"


def _made(bench: Bench, level: float, recovery: str) -> Path:
    return bench.make(bench.ours(level, recovery)).path


def ordered(found: list[Errors]) -> bool:
    """Whether no error is larger than the one before it."""
    return all(one.total >= other.total for one, other in pairwise(found))
