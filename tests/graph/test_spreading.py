"""Where NaN of a bounded tensor is sure to show."""

from typing import Any

import numpy as np
import pytest

from onnxopt.graph.spreading import shows_in
from onnxopt.model import Model, Variable
from tests.helpers import model, run

HEAD = "g (float[1, 4, 6, 6] x, float[4, 4, 1, 1] p, float[4, 4, 3, 3] q, float lo, float hi) => (float[a, b, c, d] z)"


def tensor(target: Model, name: str) -> Variable:
    found: Variable = next(t for node in target.graph.nodes for t in node.outputs if t.name == name)
    return found


SHOWN = [
    "t = Relu(x)  z = Conv(t, p)",
    "t = Relu(x)  a = Conv(t, p)  b = Relu(a)  z = Conv<pads = [1, 1, 1, 1]>(b, q)",
    "t = Clip(x, lo, hi)  a = Conv(t, p)  b = Clip(a, lo, hi)  z = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, q)",
    "t = Relu(x)  a = Add(t, x)  z = GlobalAveragePool(a)",
    "t = Relu(x)  a = Concat<axis = 1>(x, t)  z = Transpose(a)",
]
HIDDEN = [
    "t = Neg(x)  z = Conv(t, p)",
    "t = Relu(x)  a = Clip(t, lo, hi)  z = Conv(a, p)",
    "t = Relu(x)  z = Conv<strides = [2, 2]>(t, p)",
    "t = Relu(x)  z = Conv<strides = [2, 2]>(t, q)",
    "t = Relu(x)  z = Conv<dilations = [2, 2]>(t, q)",
    "t = Relu(x)  a = MaxPool<kernel_shape = [2, 2]>(t)  z = Conv(a, p)",
    "t = Relu(x)  a = Abs(t)  z = Conv(a, p)",
]


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_shown(text: str) -> None:
    target = model(f"{HEAD} {{ {text} }}")
    assert shows_in(tensor(target, "t"), {tensor(target, "z")})
    assert not shows_in(tensor(target, "t"), set())


@pytest.mark.parametrize("text", HIDDEN)
def test_what_may_be_hidden(text: str) -> None:
    target = model(f"{HEAD} {{ {text} }}")
    assert not shows_in(tensor(target, "t"), {tensor(target, "z")})


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("text", SHOWN)
def test_the_runtime_shows_nan_from_every_place(text: str, optimize: bool) -> None:
    target = model(f"{HEAD} {{ {text} }}")
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray[Any, Any]] = {
        "x": rng.standard_normal((1, 4, 6, 6)).astype(np.float32),
        "p": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "q": rng.standard_normal((4, 4, 3, 3)).astype(np.float32),
        "lo": np.array(0, np.float32),
        "hi": np.array(6, np.float32),
    }
    for at in range(0, 144, 5):
        spoilt = feeds["x"].copy()
        spoilt.reshape(-1)[at] = np.nan
        assert np.isnan(run(target, {**feeds, "x": spoilt}, optimize)["z"]).any()
