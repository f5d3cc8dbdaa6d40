"""fuse_mul_add: sums and products with channels go into the layer beside them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.model import load
from onnxopt.passes.fuse_mul_add import FuseMulAdd
from tests.helpers import apply, assert_close, assert_valid, operators, proto, run, with_weights

QUIET = settings(deadline=None, max_examples=120, derandomize=True)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "W": normal(6, 2, 3, 3),  # of a Conv in two groups
    "T": normal(4, 3, 2, 2, seed=1),  # of a ConvTranspose in two groups
    "M": normal(4, 6, seed=2),
    "b": normal(6, seed=3),
    "c": normal(6, 1, 1, seed=4),
    "c4": normal(1, 6, 1, 1, seed=5),
    "i": normal(4, 1, 1, seed=6),
    "r": normal(6, seed=7),
    "r4": normal(4, seed=8),
    "p": np.abs(normal(6, seed=11)) + 1,
    "rows": normal(5, 6, seed=9),
    "map": normal(6, 4, 4, seed=10),
    "zero": np.zeros((6, 1, 1), np.float32),
    "inf": np.full((6, 1, 1), np.inf, np.float32),
    "five": np.array(5, np.float32),
}
IMAGE = "g (float[1,4,6,6] x, float[5,4] m) => (float[a,b,c,d] y)"
MATRIX = "g (float[1,4,6,6] x, float[5,4] m) => (float[a,b] y)"
FUSED = {
    "Conv, product and sum": (IMAGE, "t = Conv<group = 2>(x, W, b) u = Mul(t, c) y = Add(u, c4)", ["Conv"]),
    "Conv without bias, sum first": (IMAGE, "t = Conv<group = 2>(x, W) u = Add(c, t) y = Div(u, c4)", ["Conv"]),
    "Conv, difference and number": (IMAGE, "t = Conv<group = 2>(x, W, b) u = Sub(t, c) y = Mul(u, five)", ["Conv"]),
    "Conv taken from": (IMAGE, "t = Conv<group = 2>(x, W, b) y = Sub(c, t)", ["Conv"]),
    "ConvTranspose": (IMAGE, "t = ConvTranspose<group = 2>(x, T) u = Mul(t, c) y = Add(u, c)", ["ConvTranspose"]),
    "Gemm": (MATRIX, "t = Gemm<alpha = 0.5, beta = 2.0>(m, M, b) u = Mul(t, r) y = Add(u, r)", ["Gemm"]),
    "MatMul": (MATRIX, "t = MatMul(m, M) y = Mul(t, r)", ["MatMul"]),
    "Conv, product, normalization, sum": (
        IMAGE, "t = Conv<group = 2>(x, W, b) u = Mul(t, c) v = BatchNormalization(u, r, b, r, p) y = Add(v, c)",
        ["Conv"]),
    "product before a Conv": (IMAGE, "t = Mul(x, i) y = Conv<group = 2, pads = [1, 1, 1, 1]>(t, W, b)", ["Conv"]),
    "quotient before a Conv": (IMAGE, "t = Div(x, five) y = Conv<group = 2>(t, W, b)", ["Conv"]),
    "product before a MatMul": (MATRIX, "t = Mul(m, r4) y = MatMul(t, M)", ["MatMul"]),
    "product before a Gemm": (MATRIX, "t = Mul(r4, m) y = Gemm<alpha = 3.0>(t, M, b)", ["Gemm"]),
}  # fmt: skip
KEPT = {
    "one number per position": (IMAGE, "t = Conv<group = 2>(x, W) y = Add(t, map)"),
    "divided by zeros": (IMAGE, "t = Conv<group = 2>(x, W) y = Div(t, zero)"),
    "a number by the layer": (IMAGE, "t = Conv<group = 2>(x, W) y = Div(c, t)"),
    "infinite factors": (IMAGE, "t = Conv<group = 2>(x, W) y = Mul(t, inf)"),
    "a result read twice": (IMAGE, "t = Conv<group = 2>(x, W) u = Mul(t, c) y = Add(u, t)"),
    "sum behind a MatMul": (MATRIX, "t = MatMul(m, M) y = Add(t, r)"),
    "one number per row": (MATRIX, "t = Gemm(m, M, b) y = Mul(t, rows)"),
    "an addend per row": (MATRIX, "t = Gemm(m, M, rows) y = Mul(t, r)"),
    "sum before a Conv": (IMAGE, "t = Sub(x, i) y = Conv<group = 2>(t, W)"),
    "a normalization in training": (
        IMAGE, "t = Conv<group = 2>(x, W) y, mean, var = BatchNormalization<training_mode = 1>(t, r, b, r, p)"),
    "weights read twice": (IMAGE, "s = Conv<group = 2>(x, W) t = Mul(s, c) u = Conv<group = 2>(x, W) y = Add(t, u)"),
}  # fmt: skip
FEEDS = {"x": normal(1, 4, 6, 6, seed=20), "m": normal(5, 4, seed=21)}


def source_of(head: str, body: str, opset: int = 17) -> ModelProto:
    words = set(re.findall(r"\w+", body))
    used = {name: values for name, values in WEIGHTS.items() if name in words}
    return with_weights(proto(f"{head} {{ {body} }}", opset), **used)


@pytest.mark.parametrize("opset", [9, 13, 21])
@pytest.mark.parametrize("kind", list(FUSED))
def test_they_go_into_the_layer(kind: str, opset: int) -> None:
    head, body, wanted = FUSED[kind]
    source = source_of(head, body, opset)
    target = load(source)
    assert apply(FuseMulAdd(), target).changes
    assert operators(target) == wanted
    assert_valid(target)
    assert_close(run(source, FEEDS), run(target, FEEDS))
    assert not apply(FuseMulAdd(), target).changes
    assert target.nbytes() <= load(source).nbytes() + 24  # a bias at most


@pytest.mark.parametrize("kind", list(KEPT))
def test_others_stay(kind: str) -> None:
    target = load(source_of(*KEPT[kind]))
    before = target.digest()
    assert not apply(FuseMulAdd(), target).changes
    assert target.digest() == before


def test_reasons() -> None:
    result = apply(FuseMulAdd(), load(source_of(*KEPT["weights read twice"])))
    assert [skip.reason for skip in result.skipped] == ["the weights of Conv s are read elsewhere too"]
    result = apply(FuseMulAdd(), load(source_of(*KEPT["a result read twice"])))
    assert [skip.reason for skip in result.skipped] == ["the result of Conv t is used elsewhere too"]
    result = apply(FuseMulAdd(), load(source_of(*KEPT["infinite factors"])))
    assert [skip.reason for skip in result.skipped] == ["what follows Conv t is not finite"]


def test_a_product_that_spreads_the_input_stays() -> None:
    source = with_weights(
        proto("g (float[1,1,6,6] x) => (float[a,b,c,d] y) { t = Mul(x, i) y = Conv(t, V) }"),
        i=normal(4, 1, 1),
        V=normal(2, 4, 3, 3),
    )
    target = load(source)
    assert not apply(FuseMulAdd(), target).changes


STEP = st.tuples(st.sampled_from(["Mul", "Add", "Sub", "Div"]), st.booleans(), st.sampled_from("s1c4"))


@QUIET
@given(
    op=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]),
    steps=st.lists(STEP, max_size=3),
    group=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    biased=st.booleans(),
)
def test_chains_behind_layers(
    op: str, steps: list[tuple[str, bool, str]], group: int, transposed: bool, biased: bool
) -> None:
    rng = np.random.default_rng(len(steps) + 10 * group)
    conv = "Conv" in op
    shapes = {
        "Conv": (6, 4 // group, 3, 3),
        "ConvTranspose": (4, 6 // group, 3, 3),
        "Gemm": (6, 4) if transposed else (4, 6),
        "MatMul": (4, 6),
    }
    constant = {"s": (), "1": (1,), "c": (6, 1, 1) if conv else (6,), "4": (1, 6, 1, 1) if conv else (1, 6)}
    arrays = {"w": rng.standard_normal(shapes[op]).astype(np.float32)}
    inputs = ["x", "w"]
    if biased and op != "MatMul":
        arrays["b"] = rng.standard_normal(6).astype(np.float32)
        inputs.append("b")
    attrs = {"group": group} if conv else {"transB": int(transposed), "alpha": 1.5} if op == "Gemm" else {}
    nodes = [helper.make_node(op, inputs, ["t0"], **attrs)]
    for at, (step, first, kind) in enumerate(steps):
        arrays[f"k{at}"] = rng.uniform(0.5, 2, constant[kind]).astype(np.float32)
        pair = [f"k{at}", f"t{at}"] if first and step != "Div" else [f"t{at}", f"k{at}"]
        nodes.append(helper.make_node(step, pair, [f"t{at + 1}"]))
    nodes.append(helper.make_node("Tanh", [f"t{len(steps)}"], ["y"]))
    shape = [2, 4, 5, 5] if conv else [3, 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    target = load(source)
    apply(FuseMulAdd(), target)
    if op != "MatMul":
        assert operators(target) == [op, "Tanh"]
    given_ = {"x": rng.standard_normal(shape).astype(np.float32)}
    assert_close(run(source, given_), run(target, given_), 1e-5)


def test_float16_that_would_overflow_stays() -> None:
    source = with_weights(
        proto("g (float16[1,1,4,4] x) => (float16[a,b,c,d] y) { t = Conv(x, W) y = Mul(t, k) }"),
        W=np.full((1, 1, 1, 1), 1000, np.float16),
        k=np.array(100, np.float16),
    )
    assert not apply(FuseMulAdd(), load(source)).changes
