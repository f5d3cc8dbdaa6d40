"""fuse_bn: every layer it knows, by both judges, and what must stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto

from onnxopt.model import Model, load
from onnxopt.passes.fuse_bn import FuseBn
from tests.helpers import apply, assert_close, operators, proto, random_feeds, reference, run, with_weights


def parameters(channels: int, seed: int = 0, dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """scale, bias, mean and variance of a normalization, as s, b, m, v."""
    rng = np.random.default_rng(seed)
    arrays = {key: rng.standard_normal(channels) for key in ("s", "b", "m")}
    return {key: array.astype(dtype) for key, array in {**arrays, "v": rng.uniform(0.1, 2, channels)}.items()}


def weights(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def fused(source: ModelProto, relative: float = 1e-5, both: bool = True) -> Model:
    """The model after fusing, which must have worked, checked by the runtime and, with `both`, the reference."""
    target = load(source)
    result = apply(FuseBn(), target)
    assert result.changes, result.skipped
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds), relative)
    if both:
        assert_close(reference(source, feeds), reference(target, feeds), relative)
    onnx.checker.check_model(target.to_proto())
    assert not any(node.op == "BatchNormalization" for body in target.bodies() for node in body.nodes)
    return target


@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    rank=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    transposed=st.booleans(),
    epsilon=st.sampled_from([0.0, 1e-5, 1e-2]),
)
def test_convolutions(group: int, rank: int, bias: bool, transposed: bool, epsilon: float) -> None:
    op, kernel = ("ConvTranspose", (4, 6 // group)) if transposed else ("Conv", (8, 4 // group))
    if transposed and group == 4:
        kernel = (4, 2)
    channels = kernel[1] * group if transposed else kernel[0]
    dims = ",".join(["5"] * rank)
    added = ", c" if bias else ""
    source = proto(
        f"""g (float[1,4,{dims}] x) => (float[1,{channels},{",".join("D" * (i + 1) for i in range(rank))}] y) {{
            t = {op}<group = {group}>(x, w{added})
            y = BatchNormalization<epsilon = {epsilon:f}>(t, s, b, m, v)
        }}"""
    )
    given_weights = {"w": weights(*kernel, *[2] * rank), **({"c": weights(channels)} if bias else {})}
    # the reference ConvTranspose fails on groups
    target = fused(with_weights(source, **given_weights, **parameters(channels)), both=not transposed or group == 1)
    assert operators(target) == [op]
    assert target.graph.nodes[0].outputs[0].name == "y"


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("shape", [None, (), (1,), (6,), (1, 6), (3, 6), (1, 1), (3, 1)])
def test_gemm(transposed: int, shape: tuple[int, ...] | None) -> None:
    added = "" if shape is None else ", c"
    source = proto(
        f"""g (float[3,4] x) => (float[3,6] y) {{
            t = Gemm<alpha = 0.5, beta = 2.0, transB = {transposed}>(x, w{added})
            y = BatchNormalization(t, s, b, m, v) }}"""
    )
    arrays = {"w": weights(6, 4) if transposed else weights(4, 6), **parameters(6)}
    if shape is not None:
        arrays["c"] = weights(*shape)
    source = with_weights(source, **arrays)
    if shape == (3, 1):
        result = apply(FuseBn(), load(source))
        assert "by row" in result.skipped[0].reason
    else:
        assert operators(fused(source)) == ["Gemm"]


def test_matmul_of_rank_2_gets_a_bias() -> None:
    source = proto("g (float[N,4] x) => (float[N,6] y) { t = MatMul(x, w) y = BatchNormalization(t, s, b, m, v) }")
    assert operators(fused(with_weights(source, w=weights(4, 6), **parameters(6)))) == ["MatMul", "Add"]


def test_matmul_of_another_rank_stays() -> None:
    source = proto("g (float[2,6,4] x) => (float[2,6,6] y) { t = MatMul(x, w) y = BatchNormalization(t, s, b, m, v) }")
    result = apply(FuseBn(), load(with_weights(source, w=weights(4, 6), **parameters(6))))
    assert "rank 2" in result.skipped[0].reason


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), (1, 1, 1)])
def test_an_addend_per_channel_between_goes_along(shape: tuple[int, ...]) -> None:
    source = proto(
        "g (float[1,4,5,5] x) => (float[1,6,4,4] y) {"
        "t = Conv(x, w) u = Add(a, t) y = BatchNormalization(u, s, b, m, v) }"
    )
    target = fused(with_weights(source, w=weights(6, 4, 2, 2), a=weights(*shape), **parameters(6)))
    assert operators(target) == ["Conv"]


def test_an_addend_per_position_between_stays() -> None:
    source = proto(
        "g (float[1,4,5,5] x) => (float[1,6,4,4] y) {"
        "t = Conv(x, w) u = Add(a, t) y = BatchNormalization(u, s, b, m, v) }"
    )
    result = apply(FuseBn(), load(with_weights(source, w=weights(6, 4, 2, 2), a=weights(6, 1, 4), **parameters(6))))
    assert "per channel" in result.skipped[0].reason


def test_chains_and_bodies() -> None:
    source = proto(
        """g (bool c, float[1,4,5,5] x) => (float[1,6,4,4] y) {
            y = If(c) <
                then_branch = t () => (float[1,6,4,4] p) {
                    d = Conv(x, w)  e = BatchNormalization(d, s, b, m, v)  p = BatchNormalization(e, s, b, m, v) },
                else_branch = e () => (float[1,6,4,4] q) { q = Conv(x, w) }
            >
        }"""
    )
    source = with_weights(source, w=weights(6, 4, 2, 2), **parameters(6))
    target = load(source)
    assert len(apply(FuseBn(), target).changes) == 2
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": weights(1, 4, 5, 5)}
        assert_close(run(source, feeds), run(target, feeds))


def test_a_scale_of_zero_gives_weights_of_exactly_zero() -> None:
    source = proto(
        "g (float[1,4,5,5] x) => (float[1,6,4,4] y) { t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }"
    )
    arrays = parameters(6)
    arrays["s"][2] = 0
    target = fused(with_weights(source, w=weights(6, 4, 2, 2), **arrays))
    kernel, bias = (tensor.values for tensor in target.graph.nodes[0].inputs[1:])
    assert kernel[2].tobytes() == bytes(kernel[2].nbytes)  # no -0.0 either
    assert bias[2] == arrays["b"][2]


@pytest.mark.parametrize(("dtype", "name", "relative"), [(np.float64, "double", 1e-12), (np.float16, "float16", 5e-3)])
def test_other_float_types(dtype: Any, name: str, relative: float) -> None:
    source = proto(
        f"g ({name}[1,4,5,5] x) => ({name}[1,6,4,4] y) {{ t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }}"
    )
    source = with_weights(source, w=weights(6, 4, 2, 2, dtype=dtype), **parameters(6, dtype=dtype))
    target = load(source)
    assert apply(FuseBn(), target).changes
    assert target.graph.nodes[0].inputs[1].dtype == dtype
    assert target.graph.nodes[0].inputs[2].dtype == dtype
    feeds = random_feeds(source)
    assert_close(reference(source, feeds), reference(target, feeds), relative)


def test_weights_that_would_overflow_stay() -> None:
    source = proto(
        "g (float16[1,4,5,5] x) => (float16[1,6,4,4] y) { t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }"
    )
    arrays = parameters(6, dtype=np.float16)
    arrays["s"][:] = 60000
    result = apply(FuseBn(), load(with_weights(source, w=10 * weights(6, 4, 2, 2, dtype=np.float16), **arrays)))
    assert "float16" in result.skipped[0].reason


def test_shared_weights_are_copied() -> None:
    source = proto(
        """g (float[1,4,5,5] x) => (float[1,4,4,4] y, float[1,4,4,4] z) <float[4] W_bias = {1, 2, 3, 4}> {
            t = Conv(x, W)  y = BatchNormalization(t, s, b, m, v)  u = Conv(x, W, W_bias)  z = Relu(u) }"""
    )
    target = fused(with_weights(source, W=weights(4, 4, 2, 2), **parameters(4)))
    assert np.array_equal(next(c for c in target.graph.initializers if c.name == "W").values, weights(4, 4, 2, 2))
    names = [tensor.name for tensor in target.to_proto().graph.initializer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 17])
def test_opsets(opset: int) -> None:
    source = proto(
        "g (float[1,4,5,5] x) => (float[1,6,4,4] y) { t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }", opset
    )
    source = with_weights(source, w=weights(6, 4, 2, 2), **parameters(6))
    target = load(source)
    assert apply(FuseBn(), target).changes
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))


CONV = "t = Conv(x, w)"
BN = "y = BatchNormalization(t, s, b, m, v)"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{CONV} y, p, q = BatchNormalization<training_mode = 1>(t, s, b, m, v)", "", "training"),
        (f"{CONV} {BN} z = Relu(t)", ", float[1,6,4,4] z", "elsewhere"),
        (f"{CONV} {BN}", ", float[1,6,4,4] t", "elsewhere"),
        (f"n = Neg(w) t = Conv(x, n) {BN}", "", "not constant"),
        (f"{CONV} n = Neg(m) y = BatchNormalization(t, s, b, n, v)", "", "not constant"),
        (f"r = Conv(x, w) t = Relu(r) {BN}", "", "no layer"),
        (f"{CONV} n = Neg(v) y = BatchNormalization(t, s, b, m, n)", "", "not constant"),
    ],
)
def test_what_stays(body: str, outputs: str, reason: str) -> None:
    source = proto(f"g (float[1,4,5,5] x) => (float[1,6,4,4] y{outputs}) {{ {body} }}")
    target = load(with_weights(source, w=weights(6, 4, 2, 2), **parameters(6)))
    before = target.digest()
    result = apply(FuseBn(), target)
    assert not result.changes
    assert reason in result.skipped[0].reason
    assert target.digest() == before


def test_negative_variance_and_overridable_weights_stay() -> None:
    text = "(float[1,6,4,4] y) { t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }"
    arrays = parameters(6)
    arrays["v"][0] = -1
    source = with_weights(proto(f"g (float[1,4,5,5] x) => {text}"), w=weights(6, 4, 2, 2), **arrays)
    assert "not positive" in apply(FuseBn(), load(source)).skipped[0].reason
    source = proto(f"g (float[1,4,5,5] x, float[6,4,2,2] w) => {text}")
    result = apply(FuseBn(), load(with_weights(source, w=weights(6, 4, 2, 2), **parameters(6))))
    assert "not constant" in result.skipped[0].reason
