"""Extremes that can't change any more are not asked for; the figures stay what they are."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, collect
from onnxopt.feeds import Sample
from onnxopt.model import Model, load
from tests.calibration.conftest import Made
from tests.calibration.truth import Exposed, check, everything, same, tensor, tensors
from tests.helpers import model, proto, with_weights

pytestmark = pytest.mark.usefixtures("many")


def feeds(*arrays: Any) -> list[Sample]:
    return [Sample({"x": np.asarray(a, np.float32)}, None, f"sample {i}") for i, a in enumerate(arrays)]


CONV = """g (float[n, 8, h, w] x) => (float[n, 16, i, j] y) <float zero = {0}, float six = {6}, float low = {-0.5}> {
  a = Conv<pads = [1, 1, 1, 1]>(x, w)  b = CLIP  c = MaxPool<kernel_shape = [2, 2]>(b)
  d = Concat<axis = 1>(b, b)  e = Conv(d, v)  f = Relu(e)  s, t = Split<axis = 1>(f)  u = Relu(s)
  y = Mul(t, t) }"""


def convolutional(clip: str, opset: int = 17) -> Model:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 8, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((16, 32, 1, 1)).astype(np.float32),
    }
    return load(with_weights(proto(CONV.replace("CLIP", clip), opset), **weights))


CLIPS = [("Clip(a, zero, six)", 17), ("Clip(a, low, six)", 13), ("Clip<min = 0.0, max = 6.0>(a)", 10), ("Relu(a)", 17)]


@pytest.mark.parametrize("elements", [40, None])
@pytest.mark.parametrize(("clip", "opset"), CLIPS)
def test_nothing_changes(clip: str, opset: int, elements: int | None, made: Made) -> None:
    """Small values first, so that bounds are reached late and at different times; more shapes than one."""
    the_model = convolutional(clip, opset)
    wanted = tensors(the_model, "a b c d e f s t u y")
    requests = Requests(wanted, histograms=wanted, channel_means=((wanted[0], 1), (wanted[3], 1)))
    rng = np.random.default_rng(1)
    scales = [0.01, 0.01, 3, 0.01, 1, 0.1, 0.1, 3, 0.1, 0.1, 0.1, 9, 1, 1, 1, 1, 0.5]
    sizes = [(1, 7, 9), (1, 7, 9), (1, 7, 9), (2, 7, 9), (1, 9, 7)]
    arrays = [rng.standard_normal((sizes[at % 5][0], 8, *sizes[at % 5][1:])) * s for at, s in enumerate(scales)]
    samples = feeds(*arrays)
    found = collect(the_model, requests, samples, elements=elements)
    check(found, requests, Exposed(the_model, wanted, samples), elements=elements, channels_first=lambda v: True)
    assert any(not asked["b"].low and asked["a"].low for asked in made.asked)  # b's minimum was left out in the end
    for seed in range(3):
        same(found, collect(the_model, requests, random.Random(seed).sample(samples, len(samples)), elements=elements))


def test_what_has_no_bound_is_always_asked_for(made: Made) -> None:
    the_model = model("g (float[n] x) => (float[n] y) { a = Relu(x)  b = Sigmoid(x)  y = Neg(a) }")
    wanted = tensors(the_model, "a b y")
    samples = feeds(*np.linspace(-1, 20, 60).reshape(20, 3))
    requests = Requests(wanted, extremes=wanted[:1])
    found = collect(the_model, requests, samples)
    check(found, requests, Exposed(the_model, wanted, samples))
    assert all(asked["a"].low and asked["a"].high for asked in made.asked if asked["a"].low or asked["a"].high)


def test_a_saving_too_small_makes_no_session(many: Any, made: Made) -> None:
    many(1000)
    the_model = model("g (float[n] x) => (float[n] y) { a = Relu(x)  y = Neg(a) }")
    collect(the_model, Requests(tensors(the_model, "a y")), feeds(*[[-1, 2]] * 40))
    assert len(made.asked) == 1


@pytest.mark.parametrize("first", range(12))
def test_a_late_extreme_is_seen(first: int) -> None:
    """The bound is reached from the start; the other side grows in any run."""
    the_model = model(
        "g (float[n] x) => (float[n] y) <float l = {-1}, float h = {1}> { a = Clip(x, l, h)  y = Relu(x) }"
    )
    wanted = tensors(the_model, "a y")
    arrays = [[-5.0, 0.1]] * 12
    arrays[first] = [7.0, 0.5]
    samples = feeds(*arrays)
    requests = Requests(wanted)
    check(collect(the_model, requests, samples), requests, Exposed(the_model, wanted, samples))


def test_tensors_whose_shape_depends_on_values_are_never_left_out() -> None:
    """NonZero's count: what was not asked for would not be counted either."""
    text = """g (float[n] x) => (float[k] y) {
      p = Relu(x)  i = NonZero(p)  t = Transpose(i)  y = GatherND(p, t)  a = Relu(y) }"""
    the_model = model(text)
    wanted = tensors(the_model, "p y a")
    rng = np.random.default_rng(0)
    samples = feeds(*(rng.standard_normal(6) for _ in range(40)))
    requests = everything(wanted)
    check(collect(the_model, requests, samples), requests, Exposed(the_model, wanted, samples))


def test_other_shapes_after_extremes_were_left_out() -> None:
    the_model = convolutional("Clip(a, zero, six)")
    b = tensor(the_model, "b")
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((1, 8, 7, 9)) * 9 for _ in range(9)] + [np.zeros((1, 8, 5, 5))] * 3
    samples = feeds(*arrays, *arrays[:1])
    requests = Requests((b,), histograms=(b,))
    found = collect(the_model, requests, samples, elements=30)
    check(found, requests, Exposed(the_model, (b,), samples), elements=30, channels_first=lambda v: True)
