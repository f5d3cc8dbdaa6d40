"""What int8 leaves alone by name, what it leaves float until outputs hold, and biases chosen layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxopt
from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.passbase import Context, PassResult
from onnxopt.passes.int8 import Int8
from onnxopt.pipeline import VerdictError
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.passes.quantizing import Array, integer_weights, nodes, normal, parse, samples, weight

CHAIN = """g (float[n, 8, 12, 12] x) => (float[n, 8, 12, 12] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)  r = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(r, w2, b2)  s = Relu(c)
  d = Conv<pads = [1, 1, 1, 1]>(s, w3, b3)  t = Add(d, s)
  e = Conv<pads = [1, 1, 1, 1]>(t, w4, b4)  y = Tanh(e) }"""
NAMES = ("first", "relu1", "second", "relu2", "third", "add", "fourth", "tanh")


def initializers(spoiled: str = "") -> dict[str, Array]:
    """Weights of CHAIN; the spoiled one has a few inputs a thousand times as large as the rest of a channel."""
    found: dict[str, Array] = {}
    for at in range(1, 5):
        w = weight(8, 8, 3, 3, seed=at)
        if spoiled == f"w{at}":
            w[:, 0, 0, 0] *= 400
        found |= {f"w{at}": w, f"b{at}": 0.1 * normal(8, seed=10 + at)}
    return found


def chain(spoiled: str = "") -> Model:
    model = parse(CHAIN, initializers(spoiled))
    for node, name in zip(model.graph.nodes, NAMES, strict=True):
        node.name = name
    return model


FEEDS = [{"x": normal(2, 8, 12, 12, seed=seed)} for seed in range(6)]


def noise(exact: Array, found: Array) -> float:
    return float(np.square(exact.astype(np.float64) - found).sum() / np.square(exact.astype(np.float64)).sum())


def decibels(reference: Model) -> Callable[..., float]:
    """A stand-in for the pipeline's comparison."""
    exact = [Session(reference).run(feed)["y"] for feed in FEEDS]

    def compare(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        model.normalize()
        session = Session(model)
        chosen = list(zip(FEEDS, exact, strict=True))[:most]
        left = float(np.mean([noise(y, session.run(feed)["y"]) for feed, y in chosen]))
        return -10 * float(np.log10(left)) if left else float("inf")

    return compare


def run(model: Model, holds: Callable[[Model], bool] | None = None, **options: Any) -> PassResult:
    quantizer = Int8(**{"all_layers": True, **options})
    statistics = collect(model, quantizer.needs(model), samples(FEEDS))

    def measure(measured: Model, requests: Requests) -> Statistics:
        measured.normalize()
        return collect(measured, requests, samples(FEEDS))

    context = Context(
        statistics=statistics,
        target=resolve("x86"),
        compare=decibels(model.clone().model),
        holds=holds,
        measure=measure,
    )
    result = quantizer.run(model, context)
    model.normalize()
    return result


def quantized(model: Model) -> set[str]:
    return {node.name for node, *_ in integer_weights(model)}


# by name


def test_excluded_nodes_stay_as_they_are() -> None:
    model = chain()
    result = run(model, exclude=("second", "add"))
    assert quantized(model) == {"first", "third", "fourth"}
    assert ("second", "excluded by 'second'") in [(skip.node, skip.reason) for skip in result.skipped]
    [second] = [node for node in model.graph.nodes if node.name == "second"]
    assert np.array_equal(second.inputs[1].values, initializers()["w2"])
    [add] = nodes(model, "Add")
    assert not any(reader.op == "QuantizeLinear" and add.outputs[0].name in NAMES for reader in add.outputs[0].outputs)
    assert not any("add" in change.where for change in result.changes)


def test_only_named_layers_are_quantized() -> None:
    model = chain()
    result = run(model, only=("f*",))
    assert quantized(model) == {"first", "fourth"}
    assert ("third", "not among only=f*") in [(skip.node, skip.reason) for skip in result.skipped]


def test_a_name_that_no_node_has_is_refused() -> None:
    with pytest.raises(UsageError, match="no node is called 'fist'") as caught:
        run(chain(), exclude=("fist",))
    assert "first" in caught.value.remedy


# until outputs hold


def test_the_layer_that_costs_most_is_left_float_until_outputs_reach_the_aim() -> None:
    compare = decibels(chain("w3"))

    def scored(**options: Any) -> float:
        model = chain("w3")
        run(model, **options)
        return compare(model)

    layers = ("first", "second", "third", "fourth")
    alone = {name: scored(only=(name,), islands=False, storage=False) for name in layers}
    worst = min(alone, key=lambda name: alone[name])
    aim = scored(exclude=(worst,)) - 0.1
    assert scored() < aim
    model = chain("w3")
    result = run(model, aim=aim)
    assert quantized(model) == set(layers) - {worst}
    assert compare(model) >= aim
    assert any(note.endswith(f"worst first: {worst}") for note in result.notes)
    assert any(skip.node == worst and "dB by it alone" in skip.reason for skip in result.skipped)


def test_nothing_is_left_float_where_the_aim_is_reached() -> None:
    model = chain()
    result = run(model, aim=10.0)
    assert quantized(model) == {"first", "second", "third", "fourth"}
    assert not any("float so that" in note for note in result.notes)


def test_an_aim_out_of_reach_is_said() -> None:
    model = chain()
    model.graph.nodes[-1].op = "Sign"  # whose outputs jump by a step for the smallest error
    result = run(model, aim=10.0, holds=lambda _: False)
    assert len(quantized(model)) == 4
    assert any("fails with all layers and weights float too" in note for note in result.notes)


def test_weights_return_to_floats_where_no_layer_is_to_blame() -> None:
    """A recurrent layer, which only stores its weights, costs most."""
    text = """g (float[t, n, 16] x) => (float[t, 1, n, 40] y, float[n, 8] z) {
      y = LSTM<hidden_size = 40>(x, w, r)  s = ReduceMean<axes = [0], keepdims = 0>(x)  h = Gemm(s, v)  z = Exp(h) }"""
    spoiled = weight(1, 160, 16, seed=1)
    spoiled[:, :, 0] *= 3000
    values = {"w": spoiled, "r": weight(1, 160, 40, seed=2), "v": weight(16, 8, seed=3)}
    feeds = [{"x": normal(5, 2, 16, seed=seed)} for seed in range(4)]
    for feed in feeds:
        feed["x"][:, :, 0] /= 3000
    exact = [Session(parse(text, values)).run(feed)["y"] for feed in feeds]

    def holds(model: Model) -> bool:
        model.normalize()
        found = [Session(model).run(feed)["y"] for feed in feeds]
        return all(noise(y, got) < 1e-6 for y, got in zip(exact, found, strict=True))

    def compare(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        return 60.0 if holds(model) else 20.0

    model = parse(text, values)
    quantizer = Int8(all_layers=True)
    statistics = collect(model, quantizer.needs(model), samples(feeds))
    context = Context(statistics=statistics, target=resolve("x86"), compare=compare, holds=holds)
    result = quantizer.run(model, context)
    assert any("weights are stored as floats" in note for note in result.notes)
    assert not any(change.kind == "stored" for change in result.changes)
    assert quantized(model)
    assert holds(model)


def test_budgets_are_asked_and_no_more_layers_stay_float_than_needed() -> None:
    asked: list[int] = []

    def holds(model: Model) -> bool:
        asked.append(len(quantized(model)))
        return asked[-1] <= 2

    model = chain("w3")
    run(model, holds=holds)
    assert len(quantized(model)) == 2
    assert asked[0] == 4
    assert len(asked) <= 5


def test_without_fallback_budgets_are_not_asked() -> None:
    def holds(_model: Model) -> bool:
        raise AssertionError("not to be asked")

    model = chain("w3")
    run(model, holds=holds, fallback=False)
    assert len(quantized(model)) == 4


def test_a_budget_on_the_command_holds_by_leaving_layers_float(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    chain("w3").save(path)
    feeds = [{"x": normal(2, 8, 12, 12, seed=seed)} for seed in range(20)]

    def optimized(passes: str) -> onnxopt.Result:
        return onnxopt.optimize(path, passes=passes, feeds=feeds, min_sqnr="25dB", latency_seconds=0)

    result = optimized("int8:all_layers=true")
    assert any("left float so that" in note for record in result.report.passes for note in record.notes)
    with pytest.raises(VerdictError):
        optimized("int8:all_layers=true:fallback=false")


# biases layer by layer


def shifted(model: Model, reference: Model) -> float:
    """Mean error of the last convolution's output, squared, over channels."""
    exact, found = (
        np.concatenate([np.arctanh(np.clip(Session(each).run(feed)["y"], -0.9999, 0.9999)) for feed in FEEDS])
        for each in (reference, model)
    )
    return float(np.square((exact - found).mean(axis=(0, 2, 3))).sum())


def test_biases_chosen_in_order_leave_smaller_mean_errors_or_are_left_alone() -> None:
    reference = chain("w2")
    plain, ordered = chain("w2"), chain("w2")
    compare = decibels(reference)
    run(plain)
    result = run(ordered, sequential_bias=True)
    assert compare(ordered) >= compare(plain)
    if any("no closer" in note for note in result.notes):
        assert [c.values.tobytes() for c in ordered.constants()] == [c.values.tobytes() for c in plain.constants()]
    else:
        assert shifted(ordered, reference) < shifted(plain, reference)


def test_biases_that_bring_outputs_no_closer_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.quantization import static

    def spoil(_work: object, each: Any, _measure: object) -> None:
        each.codes.values = each.codes.values + np.int32(10**6)

    plain, ordered = chain(), chain()
    run(plain)
    monkeypatch.setattr(static._Work, "_correct_measured", spoil)
    result = run(ordered, sequential_bias=True)
    assert any("no closer" in note for note in result.notes)
    assert [c.values.tobytes() for c in ordered.constants()] == [c.values.tobytes() for c in plain.constants()]
