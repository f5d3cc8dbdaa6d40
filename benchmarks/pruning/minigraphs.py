"""Part `minigraphs`: one small graph for each topology, channels that are constant, and a multilayer perceptron.

FILE is a script with GRAPHS and EXTRA (name -> a function that gives a ModelProto) and feed(model, seed).
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.bench import told_error
from benchmarks.children import Failed, Limits, run_child
from benchmarks.pruning.bench import RECOVERIES, make_rival
from benchmarks.pruning.cost import cost, parameters
from benchmarks.pruning.errors import errors, outputs
from onnxopt.model import load

LARGEST_SHARE = 0.55
LARGEST_ERROR = 1e-4
HALF = "prune:ratio=0.5:of=parameters:round_to=1"
# Hidden units cost the same each, so half of the MACs are half of them.
HALF_UNITS = "prune:ratio=0.5:of=macs:round_to=1"
CONSTANT = "constant_channels"
_FEEDS = 64
_HELD_OUT = 32
_WIDTH = 18

Feed = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A graph on disk, a folder of feeds that calibrate, and feeds that are held out."""

    name: str
    path: Path
    calibration: Path
    held_out: list[Feed]


def minigraphs(args: Namespace, folder: Path) -> Iterator[str]:
    """A line a graph."""
    module = _module(args.minigraphs)
    for name, build in module.GRAPHS.items():
        model = build()
        feeds = [module.feed(model, seed) for seed in range(_FEEDS + _HELD_OUT)]
        yield f"{name:{_WIDTH}} {_told_share(args, _case(name, model, feeds, folder))}"
    model = module.EXTRA[CONSTANT]()
    feeds = [module.feed(model, seed) for seed in range(_FEEDS + _HELD_OUT)]
    yield f"{CONSTANT:{_WIDTH}} {_told_constant(args, _case(CONSTANT, model, feeds, folder))}"
    yield from _perceptron_lines(args, _case("perceptron", perceptron(), perceptron_feeds(_FEEDS + _HELD_OUT), folder))


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("minigraphs", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"no script {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _case(name: str, model: ModelProto, feeds: list[Feed], folder: Path) -> Case:
    place = folder / f"mini.{name}"
    (place / "feeds").mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.onnx"
    onnx.save(model, path)
    for number, feed in enumerate(feeds[:_FEEDS]):
        np.savez(place / "feeds" / f"{number:03d}.npz", **dict(feed))
    return Case(name, path, place / "feeds", feeds[_FEEDS:])


def _made(args: Namespace, case: Case, text: str) -> Path:
    """What a pass list makes of a case. Raises Failed."""
    out = case.path.with_suffix(".ours.onnx")
    out.unlink(missing_ok=True)
    words = [text, str(case.path), str(case.calibration), str(out), str(_FEEDS), args.target, "parted"]
    run_child([sys.executable, "-m", "benchmarks.ours", *words], Limits(args.timeout, args.memory * 1e9))
    if not out.is_file():
        raise Failed("failed: made no file")
    return out


def _error(case: Case, path: Path) -> float:
    return errors(outputs(case.path, case.held_out), outputs(path, case.held_out)).total


def _told_share(args: Namespace, case: Case) -> str:
    """Share of float parameters that half of them leaves."""
    try:
        path = _made(args, case, HALF)
        share = parameters(load(path)) / parameters(load(case.path))
        error = _error(case, path)
    except Exception as problem:  # noqa: BLE001  one failing graph must not end the part
        return told_error(problem)
    verdict = "yes" if share <= LARGEST_SHARE else "NO"
    return f"{share:.3f} of the parameters, error {error:.3f}; at most {LARGEST_SHARE}: {verdict}"


def _told_constant(args: Namespace, case: Case) -> str:
    """The largest difference over the largest output, where half of the channels are constant."""
    try:
        path = _made(args, case, "prune")
        share = parameters(load(path)) / parameters(load(case.path))
        pairs = zip(outputs(case.path, case.held_out), outputs(path, case.held_out), strict=True)
        found = max(_largest(before, after) for before, after in pairs)
    except Exception as problem:  # noqa: BLE001  one failing graph must not end the part
        return told_error(problem)
    verdict = "yes" if found < LARGEST_ERROR else "NO"
    return f"{share:.3f} of the parameters, difference {found:.1e} of the scale; below {LARGEST_ERROR:.0e}: {verdict}"


def _largest(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    return max(float(np.abs(after[n] - y).max() / np.abs(y).max()) for n, y in before.items())


def _perceptron_lines(args: Namespace, case: Case) -> Iterator[str]:
    """Half of the hidden units removed: ours with each recovery, the rival's best without and with its own."""
    for recovery, more in RECOVERIES.items():
        try:
            path = _made(args, case, HALF_UNITS + more)
            yield f"{case.name:{_WIDTH}} ours, {recovery}: error {_error(case, path):.4f}, {_units(path)} units"
        except Exception as problem:  # noqa: BLE001  one failing recipe must not end the part
            yield f"{case.name:{_WIDTH}} ours, {recovery}: {told_error(problem)}"
    feed = case.held_out[0]
    before = outputs(case.path, case.held_out)
    try:
        rival = make_rival(
            args,
            case.path,
            case.calibration,
            case.path.with_suffix(".rival"),
            lambda path: cost(path, feed).macs,
            lambda path: errors(before, outputs(path, case.held_out)),
        )
    except Failed as problem:
        yield f"{case.name:{_WIDTH}} onnxsim: {problem}"
        return
    for recovered in (False, True):
        name = "recovered" if recovered else "raw"
        try:
            found = rival.level(cost(case.path, feed).macs // 2).best(recovered)
            told = f"error {found.errors.total:.4f}, {_units(found.path)} units ({found.told()})"
        except Failed as problem:
            told = told_error(problem)
        yield f"{case.name:{_WIDTH}} onnxsim, {name}: {told}"
    rival.server.stop()


def _units(path: Path) -> int:
    """Hidden units of a perceptron, by what each takes."""
    return (parameters(load(path)) - CLASSES) // (INPUTS + 1 + CLASSES)


INPUTS, HIDDEN, CLASSES = 64, 256, 10
_FACTORS = 16
_STEPS, _BATCH, _RATE = 400, 256, 3e-3


def correlated(count: int, seed: int) -> Any:
    """Inputs [count, 64]: 16 factors mixed, with a tenth of noise, as the features of natural data are correlated."""
    mixing = np.random.default_rng(0).standard_normal((_FACTORS, INPUTS)) / _FACTORS**0.5
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, _FACTORS)) @ mixing + 0.1 * rng.standard_normal((count, INPUTS))
    return values.astype(np.float32)


def perceptron_feeds(count: int) -> list[Feed]:
    """Feeds of 32 rows each."""
    rows = correlated(32 * count, 2).reshape(count, 32, INPUTS)
    return [{"x": row} for row in rows]


def perceptron() -> ModelProto:
    """64-256-10 with Relu, trained by Adam to tell which output of a wider random network is largest. Seeded."""
    rng = np.random.default_rng(1)
    teacher = [rng.standard_normal((INPUTS, 512)) / INPUTS**0.5, rng.standard_normal((512, CLASSES)) / 512**0.5]
    shapes = [(INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
    weights = [rng.standard_normal(shape) * (2 / shape[0]) ** 0.5 for shape in shapes]
    weights[1], weights[3] = 0 * weights[1], 0 * weights[3]
    moments = [(np.zeros(shape), np.zeros(shape)) for shape in shapes]
    for step in range(1, _STEPS + 1):
        x = correlated(_BATCH, 1000 + step)
        labels = (np.maximum(x @ teacher[0], 0) @ teacher[1]).argmax(1)
        for at, slope in enumerate(_slopes(weights, x, labels)):
            first, second = moments[at]
            moments[at] = (0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2)
            first, second = moments[at][0] / (1 - 0.9**step), moments[at][1] / (1 - 0.999**step)
            weights[at] = weights[at] - _RATE * first / (np.sqrt(second) + 1e-8)
    return _network([weight.astype(np.float32) for weight in weights])


def _slopes(weights: list[Any], x: Any, labels: Any) -> list[Any]:
    """Of the cross entropy, for each weight."""
    hidden = np.maximum(x @ weights[0] + weights[1], 0)
    scores = hidden @ weights[2] + weights[3]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    wrong = chances / len(labels)
    back = (wrong @ weights[2].T) * (hidden > 0)
    return [x.T @ back, back.sum(0), hidden.T @ wrong, wrong.sum(0)]


def _network(weights: list[Any]) -> ModelProto:
    names = ["w1", "b1", "w2", "b2"]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"], "hidden"),
        helper.make_node("Relu", ["a"], ["h"], "relu"),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["y"], "out"),
    ]
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])]
        for name, width in (("x", INPUTS), ("y", CLASSES))
    ]
    tensors = [numpy_helper.from_array(weight, name) for name, weight in zip(names, weights, strict=True)]
    graph = helper.make_graph(nodes, "perceptron", ports[0], ports[1], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
