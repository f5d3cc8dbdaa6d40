import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.graph.bounds import value_bounds
from tests.helpers import model, proto, run, session

INF = float("inf")


def bounds(text: str, opset: int = 17) -> dict[str, tuple[float, float]]:
    return {variable.name: found for variable, found in value_bounds(model(text, opset).graph).items()}


def chain(nodes: str, opset: int = 17, weights: str = "") -> tuple[float, float]:
    """The bounds of y."""
    return bounds(f"g (float[n, 4] x) => (float[n, 4] y) <{weights}> {{ {nodes} }}", opset).get("y", (-INF, INF))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Relu(x)", (0, INF)),
        ("y = Abs(x)", (0, INF)),
        ("y = Neg(x)", (-INF, INF)),
        ("y = Clip(x, l, h)", (-1, 6)),
        ("y = Clip(x, l)", (-1, INF)),
        ("y = Clip(x, , h)", (-INF, 6)),
        ("y = Clip(x, h, l)", (-INF, INF)),  # crossed: which wins is not for us to say
        ("y = Clip(x, x, h)", (-INF, INF)),
        ("a = Clip(x, l, h)  y = Relu(a)", (0, 6)),
        ("a = Relu(x)  y = Clip(a, l, h)", (0, 6)),
        ("a = Relu(x)  y = Clip(a, , l)", (-1, -1)),
        ("a = Relu(x)  y = Neg(a)", (-INF, INF)),
        ("a = Relu(x)  b = Clip(x, l, h)  y = Concat<axis = 1>(a, b)", (-1, INF)),
        ("a = Relu(x)  y = Concat<axis = 1>(a, x)", (-INF, INF)),
        ("a = Relu(x)  y = Concat<axis = 0>(a, w)", (-INF, INF)),
        ("a = Relu(x)  y, z = Split<axis = 1>(a)", (0, INF)),
        ("a = Relu(x)  z, y = Split<axis = 1>(a)", (0, INF)),
        ("a = Relu(x)  y = Transpose(a)", (0, INF)),
        ("a = Relu(x)  y = Pad(a, p, l)", (-INF, INF)),
        ("a = Relu(x)  y = local.f(a)", (-INF, INF)),
    ],
)
def test_bounds_of_chains(nodes: str, expected: tuple[float, float]) -> None:
    weights = "float l = {-1}, float h = {6}, float[1, 4] w = {1, 2, 3, 4}, int64[4] p = {0, 1, 0, 1}"
    if "local" in nodes:
        text = f"""g (float[n, 4] x) => (float[n, 4] y) {{ {nodes} }}
        <domain: "local", opset_import: ["" : 17]> f (u) => (v) {{ v = Neg(u) }}"""
        found = {variable.name: at for variable, at in value_bounds(model(text, imports='"local" : 1').graph).items()}
        assert "y" not in found
        return
    assert chain(nodes, weights=weights) == expected


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.0, 6.0), (-1e30, 1e-30)])
def test_bounds_of_a_clip_with_attributes(low: float, high: float) -> None:
    expected = (float(np.float32(low)), float(np.float32(high)))
    assert chain(f"y = Clip<min = {low!r}, max = {high!r}>(x)", opset=9) == expected
    assert chain(f"y = Clip<max = {high!r}>(x)", opset=9) == (-INF, expected[1])


def test_bounds_of_a_half_precision_clip_are_rounded_as_its_values_are() -> None:
    found = bounds("g (float16[n] x) => (float16[n] y) { y = Clip<min = 0.1, max = 0.3>(x) }", 9)
    assert found["y"] == (float(np.float16(0.1)), float(np.float16(0.3)))


def test_magnitudes_of_integers_have_no_bound() -> None:
    assert "y" not in bounds("g (int8[n] x) => (int8[n] y) { y = Abs(x) }")
    assert run(proto("g (int8[n] x) => (int8[n] y) { y = Abs(x) }"), {"x": np.array([-128], np.int8)})["y"][0] < 0


def test_indices_of_a_pool_have_no_bound() -> None:
    text = """g (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y, int64[1, 1, 2, 2] z) {
      a = Relu(x)  y, z = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a) }"""
    assert bounds(text).keys() == {"a", "y"}


POOL = "kernel_shape = [{0}, {0}], strides = [{1}, {1}], dilations = [{2}, {2}], ceil_mode = {4}"
POOLS = [
    (size, *rest)
    for size in (1, 2, 3, 5)
    for rest in itertools.product((1, 2, 3), (1, 2), (1, 2), (0, 1, 2), (0, 1))
    if rest[3] < rest[0]
]


def test_pools_never_give_what_was_not_put_in() -> None:
    """Where a window can lie in the padding alone, the runtime gives the lowest float: no bound is told then."""
    loose = 0
    for size, kernel, stride, dilation, pad, ceil in POOLS:
        attrs = POOL.format(kernel, stride, dilation, pad, ceil) + f", pads = [{', '.join([str(pad)] * 4)}]"
        text = f"g (float[1, 1, {size}, {size}] x) => (float[a, b, c, d] y) {{ a = Relu(x)  y = MaxPool<{attrs}>(a) }}"
        told = bounds(text).get("y", (-INF, INF))
        values = _values(text, {"x": np.full((1, 1, size, size), 2, np.float32)}, False)
        if values is None:  # nothing would be left
            continue
        loose += told[0] == -INF
        assert values[0].size == 0 or told[0] <= values[0].min()
    assert 0 < loose < len(POOLS) / 3


STEPS = st.sampled_from(
    [
        "Relu({0})",
        "Clip({0}, l, h)",
        "Clip({0}, l)",
        "Clip({0}, , h)",
        "Clip({0}, h)",
        "Clip({0}, , l)",
        "Clip({0}, h, l)",
        "Abs({0})",
        "Neg({0})",
        "Add({0}, {1})",
        "Mul({0}, h)",
        "Concat<axis = 1>({0}, {1})",
        "Transpose<perm = [0, 1, 3, 2]>({0})",
        "MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({0})",
        "MaxPool<kernel_shape = [2, 2], dilations = [2, 2], pads = [1, 1, 1, 1]>({0})",
        "AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({0})",
        "GlobalMaxPool({0})",
        "Slice({0}, one, end, axes, one)",
        "Tile({0}, twice)",
        "Gather<axis = 2>({0}, picks)",
        "Reshape({0}, flat)",
        "Squeeze({0}, one)",
        "Unsqueeze({0}, one)",
        "Flatten({0})",
        "DepthToSpace<blocksize = 2>({0})",
        "SpaceToDepth<blocksize = 2>({0})",
        "Expand({0}, wide)",
        "Identity({0})",
        "Pad({0}, pads, far)",
        "Sigmoid({0})",
    ]
)
WEIGHTS = """float l = {-0.7}, float h = {0.9}, float far = {-9}, int64[1] one = {1}, int64[1] end = {9},
int64[1] axes = {3}, int64[4] twice = {1, 1, 1, 2}, int64[2] picks = {1, 0}, int64[4] flat = {1, -1, 2, 2},
int64[4] wide = {2, 1, 1, 1}, int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 1}"""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=7), st.integers(0, 99))
def test_values_lie_within_their_bounds(steps: list[tuple[str, int, int]], seed: int) -> None:
    feeds = {"x": np.random.default_rng(seed).standard_normal((1, 4, 4, 4)).astype(np.float32)}
    nodes: list[str] = []
    for step, first, second in steps:
        names = ["x", *(f"t{at}" for at in range(len(nodes)))]
        longer = [*nodes, f"t{len(nodes)} = " + step.format(names[first % len(names)], names[second % len(names)])]
        if _values(_graph(longer), feeds, False) is not None:  # else its operator does not take this shape
            nodes = longer
    told = bounds(_graph(nodes))
    for optimize in (False, True):
        for at, value in enumerate(_values(_graph(nodes), feeds, optimize) or []):
            low, high = told.get(f"t{at}", (-INF, INF))
            assert value.size == 0 or (low <= value.min() and value.max() <= high), nodes[at]


def _graph(nodes: list[str]) -> str:
    outputs = ", ".join(f"float y{at}" for at in range(len(nodes)))
    shown = "  ".join(f"y{at} = Identity(t{at})" for at in range(len(nodes)))
    return f"g (float[1, 4, 4, 4] x) => ({outputs}) <{WEIGHTS}> {{ {'  '.join(nodes)}  {shown} }}"


def _values(text: str, feeds: dict[str, Any], optimize: bool) -> list[Any] | None:
    source = proto(text)
    for output in source.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        found: list[Any] = session(source, optimize).run(None, feeds)
    except Exception:  # noqa: BLE001 the runtime raises a dozen classes
        return None
    return found
