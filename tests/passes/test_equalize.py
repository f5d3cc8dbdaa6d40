"""Equalization: which pairs of layers, by what, and that nothing is computed differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import checker

from onnxopt.model import Model, load
from onnxopt.passbase import Context, Effect, PassResult
from onnxopt.passes.equalize import Equalize
from onnxopt.quantization.balance import equalizing_factors, input_ranges
from tests.helpers import assert_valid, random_feeds, run
from tests.passes.quantizing import Array, nodes, normal, parse, weight
from tests.passes.test_smooth import smoothed
from tests.property.test_prune_random import damage, network

C = 8
UNEVEN = np.exp2(np.arange(C, dtype=np.float32) - 4)
IMAGE = {"x": normal(2, 3, 6, 6)}


def equalized(model: Model, feed: Mapping[str, Array]) -> PassResult:
    """Run the pass on `model` in place; outputs are the same bits before and after."""
    before = run(model, feed)
    result = Equalize().run(model, Context())
    model.normalize()
    assert_valid(model)
    for name, values in run(model, feed).items():
        np.testing.assert_array_equal(values, before[name])
    return result


def value(model: Model, name: str) -> Array:
    return next(constant.values for constant in model.constants() if constant.name == name)


def pair(between: str, extra: Mapping[str, Array] | None = None, opset: int = 17) -> Model:
    """Conv -> between (a to t) -> Conv, the channels between of very different ranges."""
    text = f"""g (float[n, 3, 6, 6] x) => (float[n, 4, h, w2] y) {{
      a = Conv<pads = [1, 1, 1, 1]>(x, v, b) {between} y = Conv(t, w, d) }}"""
    values = {
        "v": weight(C, 3, 3, 3) * UNEVEN[:, None, None, None],
        "b": normal(C) * UNEVEN,
        "w": weight(4, C, 3, 3) / UNEVEN[None, :, None, None],
        "d": normal(4),
    }
    return parse(text, {**values, **(extra or {})}, opset)


BETWEEN: dict[str, tuple[str, dict[str, Array]]] = {
    "nothing": ("t = Identity(a)", {}),
    "relu": ("t = Relu(a)", {}),
    "leaky relu": ("t = LeakyRelu<alpha = 0.1>(a)", {}),
    "prelu of one slope": ("t = PRelu(a, p)", {"p": np.array([0.2], np.float32)}),
    "prelu by channel": ("t = PRelu(a, p)", {"p": normal(C, 1, 1)}),
    "pooling": ("r = Relu(a) t = MaxPool<kernel_shape = [2, 2]>(r)", {}),
    "padding": ("t = Pad(a, by)", {"by": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "one factor": ("r = Mul(a, p) t = Neg(r)", {"p": np.array(3, np.float32)}),
    "addend by channel": ("r = Add(p, a) t = Relu(r)", {"p": normal(C, 1, 1)}),
    "depthwise": (
        "r = Relu(a) e = Conv<group = 8, pads = [1, 1, 1, 1]>(r, dw, db) t = Relu(e)",
        {"dw": weight(C, 1, 3, 3) * UNEVEN[::-1, None, None, None], "db": normal(C)},
    ),
    "grouped": (
        "r = Relu(a) e = Conv<group = 2>(r, gw) t = Relu(e)",
        {"gw": weight(C, C // 2, 1, 1)},
    ),
    "transposed": ("e = ConvTranspose<group = 2>(a, gw, gb) t = Relu(e)", {"gw": weight(C, 4, 2, 2), "gb": normal(C)}),
    "two layers": ("p = Conv(x, v2) q = Conv<pads = [0, 0, 0, 0]>(x, v3) r = Add(p, q) u = Relu(r) t = Identity(u)",
                   {"v2": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None], "v3": weight(C, 3, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", BETWEEN)
def test_pairs_get_equal_ranges(case: str) -> None:
    model = pair(*BETWEEN[case])
    behind = input_ranges(nodes(model, "Conv")[-1])
    result = equalized(model, IMAGE)
    assert "y" in [change.where for change in result.changes]
    after = input_ranges(nodes(model, "Conv")[-1])
    assert np.ptp(np.log2(after)) < np.ptp(np.log2(behind)) - 2
    if case in ("relu", "prelu by channel"):
        made = np.abs(value(model, "v")).max(axis=(1, 2, 3))
        assert np.abs(np.log2(made / after)).max() <= 1.0001  # powers of two: sqrt 2 on either side


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_every_operator_set(opset: int) -> None:
    assert equalized(pair("t = Relu(a)", opset=opset), IMAGE).changes


@pytest.mark.parametrize(
    ("between", "extra", "reason"),
    [
        ("t = Clip(a, low, six)", {"low": np.float32(0), "six": np.float32(6)}, "no factor passes Clip t"),
        ("t = HardSwish(a)", {}, "no factor passes HardSwish t"),
        ("s = Sigmoid(a) t = Mul(a, s)", {}, "a is used elsewhere too"),
        ("r = Relu(a) m = ReduceMax<keepdims = 1>(r) t = Add(r, m)", {}, "r is used elsewhere too"),
        ("m = ReduceMax<keepdims = 1>(a) t = Add(a, m)", {}, "a is used elsewhere too"),
        (
            "t = BatchNormalization(a, p, p, p, p)",
            {"p": np.ones(C, np.float32)},
            "BatchNormalization t makes its input",
        ),
        ("t = Mul(a, p)", {"p": normal(C, 1, 1)}, "Mul t makes its input, no weights of a layer"),
        ("t = Pad(a, by, one)", {"by": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)}, "adds other values"),
        ("t = Pad(a, by)", {"by": np.array([0, 1, 0, 0, 0, -1, 0, 0])}, "t adds channels"),
        ("t = Concat<axis = 1>(a)", {}, "no factor passes Concat t"),
    ],
)
def test_what_no_factor_passes_is_left_alone(between: str, extra: dict[str, Any], reason: str) -> None:
    model = pair(between, {name: np.asarray(values) for name, values in extra.items()})
    before = model.digest()
    result = equalized(model, IMAGE)
    assert any(skip.node == "y" and reason in skip.reason for skip in result.skipped), result.skipped
    assert model.digest() == before


def test_a_residual_keeps_its_channels() -> None:
    text = """g (float[n, 3, 6, 6] x) => (float y) {
      a = Conv(x, v) r = Relu(a) e = Conv(r, w) s = Add(r, e) y = Conv(s, u) }"""
    values = {"v": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None], "w": weight(C, C, 1, 1), "u": weight(4, C, 1, 1)}
    result = equalized(parse(text, values), IMAGE)
    assert not result.changes
    assert {skip.node: skip.reason for skip in result.skipped} == {
        "a": "x is computed outside of this graph",
        "e": "r is read by s too",
        "y": "r is used elsewhere too",
    }


def test_matmul_and_gemm_are_pairs_too() -> None:
    text = """g (float[n, 6] x) => (float[n, 5] y) {
      a = MatMul(x, v) b = Add(a, c) r = Relu(b) s = Gemm<transB = 1>(r, w, d) y = MatMul(s, u) }"""
    values = {
        "v": weight(6, C) * UNEVEN,
        "c": normal(C) * UNEVEN,
        "w": weight(7, C) / UNEVEN,
        "d": normal(7),
        "u": weight(7, 5),
    }
    result = equalized(parse(text, values), {"x": normal(4, 6)})
    assert "s" in {change.where for change in result.changes}
    assert result.changes[0].detail.startswith("with a by 2^")


def test_branches_that_read_one_tensor_are_equalized_together() -> None:
    text = """g (float[n, 3, 6, 6] x) => (float y, float z) {
      a = Conv(x, v) r = Relu(a) i = Shape(r) y = Conv(r, w) z = Conv<group = 8>(r, u) }"""
    values = {
        "v": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None],
        "w": weight(4, C, 1, 1),
        "u": weight(C, 1, 3, 3),
    }
    result = equalized(parse(text, values), IMAGE)
    assert [change.where for change in result.changes] == ["y, z"]


def test_a_chain_converges_and_a_second_run_changes_nothing() -> None:
    model = pair(*BETWEEN["depthwise"])
    assert equalized(model, IMAGE).changes
    before = model.digest()
    again = equalized(model, IMAGE)
    assert not again.changes
    assert model.digest() == before
    assert "ranges before and behind its input are equal already" in {skip.reason for skip in again.skipped}


def test_shared_weights() -> None:
    text = """g (float[n, 32, 6, 6] x) => (float y) {
      a = Conv(x, w) r = Relu(a) b = Conv(r, w) s = Relu(b) y = Conv(s, u) }"""
    spread = np.exp2(np.arange(32) % 7 - 3.0).astype(np.float32)[:, None, None, None]
    model = parse(text, {"w": weight(32, 32, 3, 3) * spread, "u": weight(4, 32, 1, 1)})
    before = model.digest()
    result = equalized(model, {"x": normal(1, 32, 6, 6)})
    assert not result.changes
    assert model.digest() == before
    assert {skip.reason for skip in result.skipped} >= {"its weight w is used elsewhere too"}
    small = parse(text.replace("32", "8"), {"w": weight(8, 8, 3, 3) * spread[:8], "u": weight(4, 8, 1, 1)})
    assert equalized(small, {"x": normal(1, 8, 6, 6)}).changes


def test_weights_that_are_outputs_keep_their_values() -> None:
    text = """g (float[n, 3, 6, 6] x) => (float y, float[8, 3, 1, 1] v, float[8] b) {
      a = Conv(x, v, b) r = Relu(a) y = Conv(r, w) }"""
    values = {"v": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None], "b": normal(C), "w": weight(4, C, 1, 1)}
    assert equalized(parse(text, values), IMAGE).changes


def test_pairs_within_a_branch_and_across_its_border() -> None:
    text = """g (float[n, 3, 6, 6] x, bool which) => (float y) {
      o = Conv(x, v)
      y = If (which) < then_branch = f () => (float p) { a = Conv(x, v2) r = Relu(a) p = Conv(r, w) },
                       else_branch = e () => (float q) { s = Relu(o) q = Conv(s, w2) }> }"""
    values = {
        "v": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None],
        "v2": weight(C, 3, 1, 1) * UNEVEN[:, None, None, None],
        "w": weight(4, C, 1, 1),
        "w2": weight(4, C, 1, 1),
    }
    for which in (True, False):
        result = equalized(parse(text, values), {**IMAGE, "which": np.array(which)})
        assert [change.where for change in result.changes] == ["p"]
        assert ("q", "o is used elsewhere too") in [(skip.node, skip.reason) for skip in result.skipped]


def test_functions_are_left_alone() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "f" : 1]>
      g (float[n, 8] x) => (float[n, 8] y) { y = f.two(x) }
      <domain: "f", opset_import: ["" : 17]>
      two (x) => (y) { w = Constant<value = float[8, 8] {WEIGHT}>() a = MatMul(x, w) y = MatMul(a, w) }"""
    numbers = ", ".join(f"{number:.3f}" for number in normal(64))
    model = load(onnx.parser.parse_model(text.replace("WEIGHT", numbers)))
    result = Equalize().run(model, Context())
    assert not result.changes
    assert {skip.reason for skip in result.skipped} == {"it is in a local function, which several callers share"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_left_alone(bad: float) -> None:
    for name in ("v", "w", "b"):
        model = pair("t = Relu(a)")
        values = value(model, name).copy()
        values.reshape(-1)[3] = bad
        next(constant for constant in model.constants() if constant.name == name).values = values
        before = model.digest()
        result = Equalize().run(model, Context())
        assert not result.changes
        assert model.digest() == before
        assert "y" in {skip.node for skip in result.skipped}


def test_dead_channels_are_not_scaled() -> None:
    model = pair("t = Relu(a)")
    for name, at in (("v", np.s_[2]), ("w", np.s_[:, 5])):
        values = value(model, name).copy()
        values[at] = 0
        next(constant for constant in model.constants() if constant.name == name).values = values
    before = value(model, "b")
    assert equalized(model, IMAGE).changes
    after = value(model, "b")
    assert {2, 5} <= set(np.flatnonzero(after == before)) != set(range(C))


def test_factors_by_the_formula() -> None:
    found = equalizing_factors(np.array([8.0, 1.0, 0.0, 3.0, np.inf]), np.array([0.5, 1.0, 1.0, 0.0, 1.0]))
    assert found.tolist() == [4, 1, 1, 1, 1]
    assert Equalize().effect is Effect.ROUNDING


# random networks


def check_random(seed: int, steps: int) -> int:
    """Both passes on one random network; how many pairs were equalized."""
    proto = network(seed, steps)
    damage(proto, seed + 1)
    feeds = random_feeds(proto, seed)
    model = load(proto)
    changed = len(equalized(model, feeds).changes)
    checker.check_model(model.to_proto(), full_check=True)
    smoothed(load(proto), [feeds], alpha=0.5 if seed % 2 else None)
    return changed


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_random_networks_compute_the_same(seed: int, steps: int) -> None:
    check_random(seed, steps)


def test_random_networks_are_changed_at_all() -> None:
    counts = [check_random(seed, 6) for seed in range(20)]
    assert sum(count > 0 for count in counts) >= 5


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(2, 20))
def test_many_random_networks_compute_the_same(seed: int, steps: int) -> None:
    check_random(seed, steps)
