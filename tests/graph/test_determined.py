import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from onnxopt.graph.determined import shape_determined
from onnxopt.model import load
from tests.helpers import model, proto, session


def determined(text: str, opset: int = 17, imports: str = "") -> set[str]:
    return {variable.name for variable in shape_determined(model(text, opset, imports=imports).graph)}


SAME = ["Relu(x)", "Transpose(x)", "Gather(x, i)", "ReduceSum(x, one)", "Reshape(x, flat)", "Squeeze(x)", "Shape(x)"]
SAME += [
    "ConstantOfShape(s)",
    "Reshape(x, s)",
    "Expand(x, s)",
    "Slice(x, one, s)",
    "Range(zero, r, step)",
    "Tile(x, s)",
]
DIFFERENT = ["NonZero(x)", "Unique(x)", "Compress(x, b)", "Reshape(x, i)", "Expand(x, i)", "Tile(x, i)", "TopK(x, k)"]
DIFFERENT += ["Slice(x, one, k)", "ReduceSum(x, k)", "ConstantOfShape(i)", "OneHot(i, k, two)", "Unsqueeze(x, i)"]
DIFFERENT += [
    "Range(zero, n, step)",
    "Pad(x, i)",
    "custom.Relu(x)",
    "RandomNormalLike(x)",
    "Split(x, i)",
    "Squeeze(x, k)",
]
TEXT = """g (float[a, b] x, int64[2] i, int64[1] k, bool[c] b, int64 n) => (float[d] y)
<int64[1] one = {1}, int64[1] flat = {-1}, int64 zero = {0}, int64 step = {1}, float[2] two = {0, 1}>
{ s = Shape(x)  r = Size(x)  y = """


@pytest.mark.parametrize(("call", "expected"), [*((c, True) for c in SAME), *((c, False) for c in DIFFERENT)])
def test_whether_the_shapes_of_inputs_decide(call: str, expected: bool) -> None:
    assert ("y" in determined(TEXT + call + " }", imports='"custom" : 1')) is expected


def test_inputs_are_and_what_follows_what_is_not_is_not() -> None:
    text = TEXT + "NonZero(x)  z = Relu(y)  v = Concat<axis = 0>(x, x)  w = Add(v, z) }"
    found = determined(text)
    assert {"x", "i", "v"} <= found
    assert not {"y", "z", "w"} & found


def test_values_that_follow_from_shapes_decide() -> None:
    """As exporters write a flattening: the shape is taken apart and put together again."""
    text = TEXT + "Slice(s, zeros, one)  c = Concat<axis = 0>(y, flat)  z = Reshape(x, c) }"
    found = determined(text.replace("int64 zero =", "int64[1] zeros = {0}, int64 zero ="))
    assert {"s", "r", "y", "c", "z"} <= found


def test_what_comes_out_of_bodies_is_not() -> None:
    text = """g (float[n] x, bool c) => (float[k] y) { y = If (c) <
    then_branch = t () => (float[k] p) { p = Identity(x) }, else_branch = e () => (float[k] q) { q = NonZero(x) }> }"""
    assert "y" not in determined(text)


OPERATORS = st.sampled_from(
    [
        "Relu({0})",
        "Add({0}, {1})",
        "Concat<axis = 0>({0}, {1})",
        "Transpose({0})",
        "Flatten({0})",
        "NonZero({0})",
        "Shape({0})",
        "Size({0})",
        "Reshape({0}, flat)",
        "Reshape({0}, {1})",
        "ConstantOfShape({0})",
        "Expand({0}, {1})",
        "Gather<axis = 0>({0}, {1})",
        "Slice({0}, zeros, {1})",
        "Slice({0}, {1}, end)",
        "Tile({0}, {1})",
        "Range(zero, {0}, step)",
        "OneHot({0}, three, two)",
        "OneHot(three, {0}, two)",
        "Unsqueeze({0}, zeros)",
        "Squeeze({0})",
        "Squeeze({0}, {1})",
        "ReduceSum<keepdims = 0>({0}, {1})",
        "ReduceMax<keepdims = 0>({0})",
        "Cast<to = 7>({0})",
        "Cast<to = 1>({0})",
        "Mul({0}, step)",
        "Unique({0})",
        "Abs({0})",
    ]
)
WEIGHTS = """int64[1] flat = {-1}, int64[1] zeros = {0}, int64[1] end = {9}, int64 zero = {0}, int64 step = {1},
int64[1] three = {3}, float[2] two = {0, 1}"""


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(OPERATORS, st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=8),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 99),
)
def test_equal_shapes_of_inputs_give_equal_shapes(
    steps: list[tuple[str, int, int]], shape: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    feeds = [
        {"x": np.rint(rng.standard_normal(shape) * 2).astype(np.float32), "i": rng.integers(0, 3, 2)} for _ in range(4)
    ]
    nodes: list[str] = []
    for step, first, second in steps:
        names = ["x", "i", *(f"t{at}" for at in range(len(nodes)))]
        longer = [*nodes, f"t{len(nodes)} = " + step.format(names[first % len(names)], names[second % len(names)])]
        if _shapes(_graph(longer), feeds[0]) is not None:  # else its operator does not take these
            nodes = longer
    told = determined(_graph(nodes))
    found = [shapes for feed in feeds if (shapes := _shapes(_graph(nodes), feed)) is not None]
    for at in range(len(nodes)):
        if f"t{at}" in told:
            assert len({shapes[at] for shapes in found}) == 1, nodes[at]


def _graph(nodes: list[str]) -> str:
    shown = "  ".join(f"y{at} = Cast<to = 1>(t{at})" for at in range(len(nodes)))
    outputs = ", ".join(f"float y{at}" for at in range(len(nodes)))
    return f"g (float[a, b] x, int64[c] i) => ({outputs}) <{WEIGHTS}> {{ {'  '.join(nodes)}  {shown} }}"


def _shapes(text: str, feeds: dict[str, Any]) -> list[tuple[int, ...]] | None:
    source = proto(text)
    for output in source.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        return [np.shape(value) for value in session(source).run(None, feeds)]
    except Exception:  # noqa: BLE001 the runtime raises a dozen classes
        return None


@pytest.mark.slow
def test_no_operator_of_the_standard_is_taken_for_one_it_is_not() -> None:
    """The standard's own examples, with other values of the same shapes."""
    rng = np.random.default_rng(0)
    tried = 0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            source, arrays = case.model, case.data_sets[0][0]
            if len(source.graph.node) != 1 or not all(isinstance(a, np.ndarray) and a.size for a in arrays):
                continue
            told = {variable.name for variable in shape_determined(load(source).graph)}
            feeds = dict(zip([info.name for info in source.graph.input], arrays, strict=True))
            usual = _any_shapes(source, feeds)
            for at in range(6 if told & usual.keys() else 0):
                other = _any_shapes(source, {name: _varied(rng, value, at) for name, value in feeds.items()})
                tried += bool(other)
                assert {k: v for k, v in (other or usual).items() if k in told} == {
                    k: v for k, v in usual.items() if k in told
                }, case.name
    assert tried > 3000


def _varied(rng: np.random.Generator, value: Any, at: int) -> Any:
    if value.dtype.kind in "iu" and at % 2:
        return np.asarray(value + rng.integers(-1, 2, value.shape)).astype(value.dtype)
    if value.dtype.kind == "f":
        return np.asarray(value * rng.uniform(0.5, 2) * (rng.random(value.shape) > 0.3)).astype(value.dtype)
    if value.dtype.kind == "b":
        return rng.random(value.shape) > 0.5
    if value.dtype.kind in "OUS" and at >= 3:
        return np.full_like(value, value.reshape(-1)[0])
    return rng.permutation(value.reshape(-1)).reshape(value.shape)


def _any_shapes(source: ModelProto, feeds: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By onnxruntime or, for what it lacks, by onnx's reference; of nothing where neither takes these feeds."""
    names = [output.name for output in source.graph.output]
    runners: list[Callable[[], Any]] = [lambda: session(source), lambda: ReferenceEvaluator(source)]
    for runner in runners:
        try:
            values = runner().run(None, feeds)
        except Exception:  # noqa: BLE001 both raise a dozen classes
            continue
        return {name: getattr(value, "shape", ()) for name, value in zip(names, values, strict=True)}
    return {}
