"""Tying layers of one shape."""

from __future__ import annotations

import numpy as np

from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model
from onnxopt.passbase import Context
from onnxopt.sharing.tying import tie
from tests.passes.quantizing import parse, weight

TEXT = "g (float[n, 32] x) => (float[n, 32] y) { a = MatMul(x, u) b = MatMul(a, v) c = MatMul(b, w) y = MatMul(c, z) }"


def model(scales: dict[str, float]) -> Model:
    base = weight(32, 32)
    return parse(
        TEXT, {name: base + np.float32(scale) * weight(32, 32, seed=ord(name)) for name, scale in scales.items()}
    )


def contents(found: Model) -> list[int]:
    weights = [node.inputs[1] for node in found.graph.nodes]
    return [weight.data.uid for weight in weights if isinstance(weight, Constant)]


def test_near_ones_are_tied_to_one_mean() -> None:
    found = model({"u": 0.0, "v": 0.01, "w": 0.02, "z": 3.0})
    before = [np.array(node.inputs[1].values, np.float64) for node in found.graph.nodes]
    changes = tie(found, Context(), Selection(), 0.1)
    assert len(changes) == 2
    uids = contents(found)
    assert len(set(uids[:3])) == 1
    assert uids[3] != uids[0]
    np.testing.assert_allclose(found.graph.nodes[0].inputs[1].values, np.mean(before[:3], axis=0), atol=0.01)


def test_what_the_outputs_do_not_allow_is_undone() -> None:
    found = model({"u": 0.0, "v": 0.01, "w": 2.0, "z": 3.0})
    before = contents(found)
    assert tie(found, Context(holds=lambda _model: False), Selection(), 0.1) == []
    assert contents(found) == before
    asked = []

    def compare(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        asked.append((most, reference))
        return 30.0

    assert len(tie(found, Context(compare=compare), Selection(), 0.1)) == 1
    assert len(asked) == 1


def test_other_shapes_operators_and_zeros_are_never_tied() -> None:
    found = parse(
        "g (float[n, 32] x) => (float[n, 32] y) { a = MatMul(x, u) b = Gemm(a, v) y = MatMul(b, w) }",
        {"u": weight(32, 32), "v": weight(32, 32), "w": np.zeros((32, 32), np.float32)},
    )
    assert tie(found, Context(), Selection(), 1.0) == []
