"""The second fit: kept where the outputs come closer on feeds not fitted to, taken back where not."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.lowrank import engine, refit
from onnxopt.model import Model
from onnxopt.numerics import lowrank
from tests.lowrank.nets import apart, split, together
from tests.passes.quantizing import Array, normal, parse, weight


def deep() -> Model:
    text = """g (float[n, 96] x) => (float[n, 96] y) {
        a = MatMul(x, w) b = Add(a, c) h = Relu(b) y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(h, v, e) }"""
    return parse(text, {"w": weight(96, 96), "v": weight(96, 96, seed=5), "c": normal(96), "e": normal(96)})


FEEDS = [{"x": together(400, 96, seed=seed)} for seed in range(6)]


def test_a_second_layer_makes_good_for_the_first() -> None:
    found = {}
    for how in (False, True):
        model = deep()
        result = split(model, FEEDS, ratio=0.6, refit=how)
        found[how] = apart(model, deep(), FEEDS[-1:])
    assert len(result.changes) == 2
    assert found[True] < found[False]
    assert any(note.endswith("came closer by a fit to what they now read") for note in result.notes)


def test_steps_that_help_nobody_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = deep(), deep()
    split(plain, FEEDS, ratio=0.6, refit=False)
    own = lowrank.refitted

    def worse(crossed: Array, inner: Array, start: Array, rows: float) -> Array:
        return own(crossed, inner, start, rows) + 1.0

    monkeypatch.setattr(refit, "refitted", worse)
    result = split(model, FEEDS, ratio=0.6)
    assert any(note.startswith("0 of 2") for note in result.notes)
    assert apart(model, plain, FEEDS) < 1e-6
    assert len(model.graph.initializers) == len(plain.graph.initializers)


def test_all_trials_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    before = model.digest()
    monkeypatch.setattr(engine._Run, "_choose", lambda *_: [])
    split(model, FEEDS, ratio=0.5)
    assert model.digest() == before
    assert np.isfinite(model.graph.initializers[0].values).all()
