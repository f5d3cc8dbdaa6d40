"""Smoothing: what is divided, by what, where the division goes, and that nothing is computed differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxopt
from onnxopt.calibration import collect
from onnxopt.model import Model, load
from onnxopt.numerics.affine import sqnr_db
from onnxopt.passbase import Context, Effect, PassResult
from onnxopt.passes.int8 import Int8
from onnxopt.passes.int8_dynamic import Int8Dynamic
from onnxopt.passes.smooth import Smooth
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.pipeline.prepare import with_prepared
from onnxopt.quantization.balance import outlier_factors, smoothing_factors
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.helpers import assert_valid
from tests.passes.quantizing import Array, nodes, normal, parse, quantize, samples, weight

K = 16
# channels 3 and 7 are outliers
PEAKS = np.where(np.isin(np.arange(K), (3, 7)), 40.0, 1.0).astype(np.float32)


def smoothed(model: Model, feeds: Iterable[Mapping[str, Array]], **options: Any) -> PassResult:
    """Run the pass on `model` in place; outputs are the same bits before and after."""
    feeds = list(feeds)
    before = [Session(model, optimize=False).run(feed) for feed in feeds]
    the_pass = Smooth(**options)
    statistics = collect(model, the_pass.needs(model), samples(feeds))
    result = the_pass.run(model, Context(statistics=statistics))
    model.normalize()
    assert_valid(model)
    for feed, wanted in zip(feeds, before, strict=True):
        found = Session(model, optimize=False).run(feed)
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    return result


def powers(model: Model, before: Model, name: str) -> Array:
    """What each row of a weight [inputs, outputs] was multiplied by."""
    new, old = (next(c for c in each.constants() if c.name == name).values for each in (model, before))
    return np.asarray((new / old)[:, 0])


# where the division goes; x is [n, t, 8] or an image [n, 3, 4, 4]

HEADS = {"heads": np.array([0, 0, 4, 4]), "whole": np.array([0, 0, 16])}
FOLDED: dict[str, tuple[str, dict[str, Array], str]] = {
    "matmul": ("t = MatMul(x, v)", {"v": weight(8, K) * PEAKS}, "t"),
    "matmul and bias": ("p = MatMul(x, v) t = Add(c, p)", {"v": weight(8, K) * PEAKS, "c": normal(K)}, "p"),
    "one number added": ("p = MatMul(x, v) t = Sub(p, c)", {"v": weight(8, K) * PEAKS, "c": normal(1)}, "p"),
    "one number multiplied": ("p = MatMul(x, v) t = Mul(c, p)", {"v": weight(8, K) * PEAKS, "c": normal(1)}, "p"),
    "divided": ("p = Sigmoid(u) t = Div(p, c)", {"c": 1 / PEAKS, "v": weight(8, K)}, "t"),
    "gamma and beta": (
        "p = Tanh(u) q = Mul(p, c) t = Add(q, b)",
        {"c": PEAKS, "b": normal(K), "v": weight(8, K)},
        "q",
    ),
    "normalization": (
        "t = LayerNormalization(u, c, b)",
        {"c": PEAKS, "b": normal(K), "v": weight(8, K)},
        "t",
    ),
    "normalization without bias": ("t = LayerNormalization(u, c)", {"c": PEAKS, "v": weight(8, K)}, "t"),
    "homogeneous": (
        "p = MatMul(x, v) q = Relu(p) r = LeakyRelu(q) s = PRelu(r, c) a = Identity(s) t = Neg(a)",
        {"v": weight(8, K) * PEAKS, "c": normal(K)},
        "p",
    ),
    "gate": ("p = MatMul(x, v) q = Sigmoid(u) t = Mul(q, p)", {"v": weight(8, K) * PEAKS, "w2": weight(8, K)}, "p"),
    "sum of two layers": (
        "p = MatMul(x, v) q = MatMul(x, v2) t = Add(p, q)",
        {"v": weight(8, K) * PEAKS, "v2": weight(8, K, seed=2) * PEAKS},
        "p",
    ),
    "attention": (
        """p = MatMul(x, v) q = Add(p, c) r = Reshape(q, heads) h = Transpose<perm = [0, 2, 1, 3]>(r)
           k = Transpose<perm = [0, 1, 3, 2]>(h2) l = MatMul(h2, k) a = Softmax(l)
           m = MatMul(a, h) n1 = Transpose<perm = [0, 2, 1, 3]>(m) t = Reshape(n1, whole)""",
        {"v": weight(8, K) * PEAKS, "c": normal(K), **HEADS},
        "p",
    ),
}


def chain(body: str, values: Mapping[str, Array], opset: int = 17) -> Model:
    """x -> body -> t -> MatMul(w) -> y."""
    text = f"g (float[2, 5, 8] x) => (float[2, 5, 6] y) {{ {body} y = MatMul(t, w) }}"
    for name, line in (
        ("h2", "r2 = Reshape(u, heads) h2 = Transpose<perm = [0, 2, 1, 3]>(r2)"),
        ("u", f"u = MatMul(x, {'w2' if 'w2' in values else 'v2' if 'v2' in values else 'v3'})"),
    ):
        if f"{name})" in body or f"({name}" in body or (name == "u" and "h2" in body):
            text = text.replace("{ ", f"{{ {line} ", 1)
    return parse(text, {"v3": weight(8, K, seed=3), "w": weight(K, 6), **values}, opset)


FEEDS = [{"x": normal(2, 5, 8, seed=seed)} for seed in range(4)]


@pytest.mark.parametrize("case", FOLDED)
def test_constants_take_the_division_in(case: str) -> None:
    body, values, where = FOLDED[case]
    model, before = chain(body, values), chain(body, values)
    result = smoothed(model, FEEDS)
    assert len(nodes(model, "Mul")) == len(nodes(before, "Mul"))
    [change] = [change for change in result.changes if change.where == "y"]
    assert change.kind == "smoothed"
    assert f"into {where}" in change.detail
    factors = powers(model, before, "w")
    assert set(np.argsort(factors)[-2:]) == {3, 7}
    assert factors[[3, 7]].min() > 2
    assert np.array_equal(np.exp2(np.rint(np.log2(factors))), factors)


GELU = "p = MatMul(x, v) q = Div(p, c) e = Erf(q) f = Add(e, one) g2 = Mul(p, f) t = Mul(g2, half)"
GELU_VALUES = {
    "v": weight(8, K) * PEAKS,
    "c": np.array(1.41, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}
STEEP = np.broadcast_to(np.array([40, 1, 1, 1, 1, 1, 1, 1], np.float32), (2, 5, 8)).copy()
INSERTED: dict[str, tuple[str, dict[str, Array], str]] = {
    "gelu": (GELU, GELU_VALUES, "p is used elsewhere too"),
    "clip": (
        "p = Tanh(u) q = Mul(p, c) t = Clip(q, , six)",
        {"c": PEAKS, "six": np.array(60, np.float32)},
        "no factor passes Clip t",
    ),
    "another reader": (
        "t = LayerNormalization(u, c) o = ReduceMax<keepdims = 0>(t)",
        {"c": PEAKS},
        "t is read by o too",
    ),
    "heads of unknown width": (
        "p = Tanh(u) q = Mul(p, c) r = Reshape(q, flat) t = Reshape(r, whole)",
        {"c": PEAKS, "flat": np.array([-1]), "whole": np.array([2, 5, 16])},
        "Reshape t mixes the channels",
    ),
    "addend by row": (
        "p = Tanh(u) q = Mul(p, c) t = Add(q, r)",
        {"c": PEAKS, "r": normal(5, 1)},
        "no value of its own for each channel",
    ),
    "computed addend": (
        "p = MatMul(x, v) o = ReduceSum(x) t = Add(p, o)",
        {"v": weight(8, K) * PEAKS},
        "no factor passes ReduceSum o",
    ),
    "one gamma": (
        "n1 = LayerNormalization(x, one) t = Concat<axis = -1>(n1, k)",
        {"one": normal(8), "k": STEEP},
        "Concat t",
    ),
}


@pytest.mark.parametrize("case", INSERTED)
def test_a_mul_divides_where_no_constant_can(case: str) -> None:
    body, values, reason = INSERTED[case]
    model, before = chain(body, values), chain(body, values)
    result = smoothed(model, FEEDS)
    [change] = [change for change in result.changes if change.where == "y"]
    assert reason in change.detail
    assert ", by a Mul: " in change.detail
    assert len(nodes(model, "Mul")) == len(nodes(before, "Mul")) + 1
    left = chain(body, values)
    result = smoothed(left, FEEDS, insert=False)
    assert any(skip.node == "y" and reason in skip.reason for skip in result.skipped)
    assert np.array_equal(powers(left, before, "w"), np.ones(K))


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, v) t = Clip(p, , six)",
        "p = MatMul(x, v) a = Add(p, c) b = Clip(a, , six) q = MatMul(x, v2) t = Add(q, b)",
        "p = MatMul(x, v) a = Clip(p, , six) r = Reshape(a, heads) s = Reshape(r, whole) t = Mul(s, half)",
    ],
)
def test_no_mul_is_put_between_integer_kernels(body: str) -> None:
    peaked = weight(8, K) * PEAKS
    values = {"v": peaked, "v2": peaked, "c": normal(K), "six": np.array(60, np.float32), **HEADS}
    model = chain(body, {**values, "half": np.array(0.5, np.float32)})
    result = smoothed(model, FEEDS)
    [skip] = [skip for skip in result.skipped if skip.node == "y"]
    assert skip.reason.endswith(", and a Mul would stand between integer kernels")


def test_layers_that_read_one_tensor_share_factors_and_others_read_it_as_it_was() -> None:
    text = """g (float[n, t, 16] x) => (float q, float k, float v, float[n, t, 16] r) {
      s = LayerNormalization(x, c, b)  q = MatMul(s, w1)  k = MatMul(s, w2)  v = MatMul(s, w3)  r = Add(s, x) }"""
    values = {"c": PEAKS, "b": normal(K), **{f"w{i}": weight(K, 8, seed=i) for i in (1, 2, 3)}}
    model, before = parse(text, values), parse(text, values)
    result = smoothed(model, [{"x": normal(2, 5, K, seed=seed)} for seed in range(3)])
    factors = [powers(model, before, f"w{i}") for i in (1, 2, 3)]
    assert (factors[0] == factors[1]).all()
    assert (factors[0] == factors[2]).all()
    assert factors[0].max() > 1
    [mul] = nodes(model, "Mul")
    assert {node.outputs[0].name for node in mul.outputs[0].outputs} == {"q", "k", "v"}
    assert [change.where for change in result.changes] == ["q, k, v"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [(), (K,), (1, K), (1,), (4, K)])
def test_gemm_before_and_behind(transposed: int, bias: tuple[int, ...]) -> None:
    shape = (K, 8) if transposed else (8, K)
    first = weight(8, K) * PEAKS
    text = f"""g (float[4, 8] x) => (float[4, 6] y) {{
      t = Gemm<transB = {transposed}, alpha = 0.5, beta = 2.0>(x, v, c)
      y = Gemm<transB = {transposed}>(t, w, d) }}"""
    values = {
        "v": first.T.copy() if transposed else first,
        "c": normal(*bias),
        "w": weight(6, K) if transposed else weight(K, 6),
        "d": normal(6),
    }
    assert values["v"].shape == shape
    model = parse(text, values)
    result = smoothed(model, [{"x": normal(4, 8, seed=seed)} for seed in range(3)])
    assert "into t" in next(change.detail for change in result.changes if change.where == "y")
    assert not nodes(model, "Mul")


def test_a_gemm_that_adds_what_it_multiplies_gets_a_mul() -> None:
    text = "g (float[4, 16] x) => (float[4, 16] y) { p = Tanh(x)  t = Mul(p, c)  y = Gemm(t, w, t) }"
    model = parse(text, {"c": PEAKS, "w": weight(K, K)})
    result = smoothed(model, [{"x": normal(4, K)}])
    assert "by a Mul: t is read by y too" in result.changes[-1].detail


def test_a_convolution_before_takes_the_division_in() -> None:
    text = """g (float[n, 3, 4, 4] x) => (float[n, 6] y) {
      c = Conv<pads = [1, 1, 1, 1]>(x, v, b)  r = Relu(c)  p = GlobalAveragePool(r)  t = Flatten(p)  y = Gemm(t, w) }"""
    values = {"v": weight(K, 3, 3, 3) * PEAKS[:, None, None, None], "b": normal(K), "w": weight(K, 6)}
    model = parse(text, values)
    result = smoothed(model, [{"x": normal(2, 3, 4, 4, seed=seed)} for seed in range(3)])
    assert "into c" in result.changes[-1].detail
    assert not nodes(model, "Mul")


# constants that others read


def test_a_large_weight_behind_two_tensors_is_left_alone() -> None:
    size = 96
    text = "g (float[n, 96] x) => (float y, float z) { t = Mul(x, c)  y = MatMul(t, w)  z = MatMul(x, w) }"
    peaks = np.where(np.arange(size) == 5, 50.0, 1.0).astype(np.float32)
    model = parse(text, {"c": peaks, "w": weight(size, size)})
    before = model.digest()
    result = smoothed(model, [{"x": normal(7, size)}])
    assert ("y", "its weight w is used elsewhere too") in [(skip.node, skip.reason) for skip in result.skipped]
    assert model.digest() == before


def test_a_small_weight_behind_two_tensors_is_copied() -> None:
    text = "g (float[n, 16] x) => (float y, float z) { t = Mul(x, c)  y = MatMul(t, w)  z = MatMul(x, w) }"
    model = parse(text, {"c": PEAKS, "w": weight(K, 8)})
    smoothed(model, [{"x": normal(7, K)}])
    first, second = (node.inputs[1].name for node in nodes(model, "MatMul"))
    assert (first, second) == ("w_scaled", "w")


def test_a_weight_that_two_layers_of_one_tensor_read_is_scaled_once() -> None:
    text = "g (float[n, 16] x) => (float y, float z) { t = Mul(x, c)  y = MatMul(t, w)  z = Gemm(t, w, b) }"
    model = parse(text, {"c": PEAKS, "w": weight(K, 640), "b": normal(640)})
    smoothed(model, [{"x": normal(7, K)}])
    assert nodes(model, "MatMul")[0].inputs[1] is nodes(model, "Gemm")[0].inputs[1]


def test_weights_and_norms_that_are_outputs_keep_their_values() -> None:
    text = """g (float[n, 16] x) => (float y, float[16, 8] w, float[16] c) {
      t = LayerNormalization(x, c)  y = MatMul(t, w) }"""
    model = parse(text, {"c": PEAKS, "w": weight(K, 8)})
    assert smoothed(model, [{"x": normal(7, K)}]).changes


def test_a_tensor_that_is_an_output_or_read_in_a_branch_gets_a_mul() -> None:
    shown = "g (float[n, 16] x) => (float y, float[n, 16] t) { t = LayerNormalization(x, c)  y = MatMul(t, w) }"
    branch = """g (float[n, 16] x, bool which) => (float y, float z) {
      t = LayerNormalization(x, c)  y = MatMul(t, w)
      z = If (which) < then_branch = a () => (float p) { p = Identity(t) },
                       else_branch = b () => (float q) { q = Neg(t) }> }"""
    for text, extra in ((shown, {}), (branch, {"which": np.array(True)})):
        model = parse(text, {"c": PEAKS, "w": weight(K, 8)})
        result = smoothed(model, [{"x": normal(7, K), **extra}])
        assert "by a Mul: t is read by " in result.changes[0].detail


# what is left alone


def test_layers_in_bodies_are_left_alone_with_the_reason() -> None:
    text = """g (float[n, 16] x, bool which) => (float y) {
      y = If (which) < then_branch = a () => (float p) { t = Mul(x, c) p = MatMul(t, w) },
                       else_branch = b () => (float q) { q = MatMul(x, w) }> }"""
    model = parse(text, {"c": PEAKS, "w": weight(K, 8)})
    result = smoothed(model, [{"x": normal(7, K), "which": np.array(True)}])
    assert not result.changes
    assert {skip.reason for skip in result.skipped} == {"figures of channels are taken in the main graph only"}


def test_without_data_nothing_is_done() -> None:
    model = chain(*FOLDED["matmul"][:2])
    before = model.digest()
    result = Smooth().run(model, Context())
    assert model.digest() == before
    assert {skip.reason for skip in result.skipped} == {"nothing is known of its input: give --data"}


def test_what_has_no_outliers_is_left_alone() -> None:
    model = parse("g (float[n, 16] x) => (float y) { y = MatMul(x, w) }", {"w": weight(K, 8)})
    result = smoothed(model, [{"x": np.ones((3, K), np.float32)}])
    assert not result.changes
    assert "dB less noise at 8 bits" in result.skipped[0].reason


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_channels_of_zeros_are_not_scaled(alpha: float | None) -> None:
    first = weight(8, K) * PEAKS * (np.arange(K) != 5)
    second = weight(K, 6) * (np.arange(K) != 6)[:, None]
    values = {"v": first.astype(np.float32), "w": second.astype(np.float32)}
    model, before = chain("t = MatMul(x, v)", values), chain("t = MatMul(x, v)", values)
    assert smoothed(model, FEEDS, alpha=alpha).changes
    new, old = (next(c for c in each.constants() if c.name == "w").values for each in (model, before))
    assert np.array_equal(new[5], old[5])
    assert np.isfinite(new).all()


@pytest.mark.parametrize(("body", "reason"), [("Identity", "its input or its weights are zero"), ("Log", "infinities")])
def test_inputs_of_zeros_and_without_figures(body: str, reason: str) -> None:
    model = parse(f"g (float[n, 16] x) => (float y) {{ t = {body}(x) y = MatMul(t, w) }}", {"w": weight(K, 8)})
    before = model.digest()
    result = smoothed(model, [{"x": np.zeros((2, K), np.float32)}])
    assert model.digest() == before
    [skip] = result.skipped
    assert reason in skip.reason


def test_float16_layers_are_left_alone() -> None:
    model = parse("g (float16[n, 16] x) => (float16 y) { y = MatMul(x, w) }", {"w": weight(K, 8).astype(np.float16)})
    result = smoothed(model, [{"x": normal(7, K).astype(np.float16)}])
    assert [skip.reason for skip in result.skipped] == ["its weight is float16, not float32"]


def test_factors_that_would_overflow_a_weight_change_nothing() -> None:
    values = {"c": PEAKS * np.float32(1e-3), "w": np.full((K, 6), 2e38, np.float32)}
    model = chain("p = Tanh(u) t = Mul(p, c)", values)
    the_pass = Smooth(alpha=1.0)
    statistics = collect(model, the_pass.needs(model), samples(FEEDS[:1]))
    result = the_pass.run(model, Context(statistics=statistics))
    assert ("y", "scaled values of w are not finite") in [(skip.node, skip.reason) for skip in result.skipped]
    kept = {constant.name: constant.values for constant in model.constants()}
    assert all(np.array_equal(kept[name], values[name]) for name in values)


# figures


def test_factors_by_the_formula() -> None:
    inputs, weights = np.array([8.0, 0.5, 0.0, 2.0]), np.array([0.5, 2.0, 1.0, 0.5])
    exact = inputs[[0, 1, 3]] ** 0.5 / weights[[0, 1, 3]] ** 0.5  # 4, 0.5, 2
    found = smoothing_factors(inputs, weights, 0.5)
    assert found[2] == 1
    ratios = found[[0, 1, 3]] / exact
    assert np.ptp(np.log2(ratios)) <= 1  # one common factor, up to rounding to powers of two
    assert smoothing_factors(inputs * 64, weights, 0.5).tolist() == found.tolist()


def test_outliers_come_within_the_bound_and_nothing_else_moves() -> None:
    found = outlier_factors(np.array([0.0, 1.0, 3.0, 4.0, 4.1, 100.0]), 4.0)
    assert found.tolist() == [1, 1, 1, 1, 2, 32]


@pytest.mark.parametrize("alpha", [None, 0.3, 0.8])
def test_a_second_run_finds_little_to_do(alpha: float | None) -> None:
    model = chain(*FOLDED["matmul and bias"][:2])
    before = chain(*FOLDED["matmul and bias"][:2])
    smoothed(model, FEEDS, alpha=alpha)
    first = powers(model, before, "w")
    once = parse_again(model)
    smoothed(model, FEEDS, alpha=alpha)
    again = powers(model, once, "w")
    assert first.max() / first.min() >= 4
    assert again.max() / again.min() <= 2


def parse_again(model: Model) -> Model:
    return load(model.to_proto())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_outliers_cost_less_after_smoothing(kind: str) -> None:
    peaks = np.where(np.arange(64) % 16 == 3, 60.0, 1.0).astype(np.float32)
    text = """g (float[n, 64] x) => (float[n, 80] y) {
      t = LayerNormalization(x, c, b)  p = MatMul(t, w)  e = Sigmoid(p)  y = Add(e, p) }"""
    values = {"c": peaks, "b": normal(64) * peaks, "w": weight(64, 80)}
    values["w"] = (values["w"] / peaks[:, None]).astype(np.float32)
    feeds = [{"x": normal(8, 64, seed=seed)} for seed in range(6)]
    found = []
    for smooth in (False, True):
        model = parse(text, values)
        truth = Session(model).run(feeds[0])["y"]
        if smooth:
            assert smoothed(model, feeds).changes
        if kind == "static":
            assert any(change.kind == "quantized" for change in quantize(model, feeds, smooth=False).changes)
        else:
            result = Int8Dynamic(all_layers=True).run(model, Context(target=resolve("x86")))
            assert result.changes
            model.normalize()
        found.append(sqnr_db(truth, Session(model).run(feeds[0])["y"]))
    assert found[1] > found[0] + 6


OUTLIERS = np.where(np.arange(64) % 16 == 3, 60.0, 1.0).astype(np.float32)
# what reads the normalized tensor besides the layer: nothing, so that its constants take the factors in; or a sum
WITHIN = {
    "folded": "t = LayerNormalization(x, c, b)  p = MatMul(t, w)  y = Tanh(p)",
    "inserted": "t = LayerNormalization(x, c, b)  p = MatMul(t, w)  q = Slice(t, k, n, k)  e = Exp(p)  "
    "m = ReduceMean(q)  y = Add(e, m)",
}


@pytest.mark.parametrize("how", list(WITHIN))
@pytest.mark.parametrize("calibrator", ["minmax", "mse"])
def test_int8_smooths_what_it_quantizes_by_the_same_statistics(how: str, calibrator: str) -> None:
    """As good as the pass in front of it, which is calibrated after."""
    text = f"g (float[n, 64] x) => (float[n, 80] y) {{ {WITHIN[how]} }}"
    values = {"c": OUTLIERS, "b": normal(64) * OUTLIERS, "w": (weight(64, 80) / OUTLIERS[:, None]).astype(np.float32)}
    values |= {"k": np.array([0]), "n": np.array([1])} if how == "inserted" else {}
    feeds = [{"x": normal(8, 64, seed=seed)} for seed in range(6)]
    truth = Session(parse(text, values)).run(feeds[0])["y"]
    found = {}
    for kind in ("none", "before", "within"):
        model = parse(text, values)
        if kind == "before":
            assert smoothed(model, feeds).changes
        result = quantize(model, feeds, smooth=kind == "within", calibrator=(calibrator,))
        assert any(change.kind == "quantized" for change in result.changes)
        assert any(change.kind == "smoothed" for change in result.changes) is (kind == "within")
        found[kind] = sqnr_db(truth, Session(model).run(feeds[0])["y"])
    assert found["within"] > found["none"] + 6
    assert abs(found["within"] - found["before"]) < 1.5


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
@pytest.mark.parametrize("form", ["initializers", "constant nodes"])
def test_every_operator_set_and_both_homes_of_constants(opset: int, form: str) -> None:
    text = """g (float[n, 16] x) => (float[n, 6] y) {
      m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) s = Mul(d, d) r = Sqrt(s) e = Add(r, eps) q = Div(d, e)
      g1 = Mul(q, c) t = Add(b, g1) y = MatMul(t, w) }"""
    if opset >= 18:
        text = text.replace("ReduceMean<axes = [-1]>(x)", "ReduceMean(x, last)")
    values: dict[str, Array] = {
        "eps": np.array(0.1, np.float32),
        "c": PEAKS,
        "b": normal(K),
        "w": weight(K, 6),
        "last": np.array([-1]),
    }
    if opset < 18:
        del values["last"]
    if form == "constant nodes":
        lines = "".join(f"{name} = Constant() " for name in values)
        proto = parse(text, values, opset).to_proto()
        del proto.graph.initializer[:]
        made = list(parse(text.replace("{", "{ " + lines, 1), {}, opset).to_proto().graph.node)
        for node in made[: len(values)]:
            attribute = node.attribute.add(name="value", type=4)
            attribute.t.CopyFrom(numpy_helper.from_array(np.asarray(values[node.output[0]])))
        del proto.graph.node[:]
        proto.graph.node.extend(made)
        model = load(proto)
    else:
        model = parse(text, values, opset)
    result = smoothed(model, [{"x": normal(4, K, seed=seed)} for seed in range(3)])
    assert "into g1" in result.changes[0].detail
    assert len(nodes(model, "Mul")) == 2


def test_the_pass_promises_rounding_and_reads_its_options() -> None:
    [step] = parse_passes("smooth:alpha=0.7:insert=false")
    assert step.pass_ == Smooth(alpha=0.7, insert=False)
    assert str(Smooth()) == "smooth"
    assert Smooth().effect is Effect.ROUNDING


def test_dynamic_quantization_is_prepared_by_it() -> None:
    steps = with_prepared(parse_passes("int8_dynamic"))
    assert [str(step) for step in steps] == ["fold_constants", "smooth", "convert_opset", "int8_dynamic"]


def test_data_makes_dynamic_quantization_better_and_its_lack_does_no_harm() -> None:
    peaks = np.where(np.arange(128) % 32 == 3, 60.0, 1.0).astype(np.float32)
    text = "g (float[n, 128] x) => (float[n, 256] y) { e = Sigmoid(x) t = Mul(e, c) y = MatMul(t, w) }"
    proto = parse(text, {"c": peaks, "w": (weight(128, 256) / peaks[:, None]).astype(np.float32)}).to_proto()
    feeds = [{"x": normal(8, 128, seed=seed)} for seed in range(12)]
    truth = Session(load(proto)).run(feeds[0])["y"]
    found = []
    for data in (feeds, None):
        result = onnxopt.optimize(proto, passes="int8_dynamic:all_layers=true", feeds=data, keep_failed=True)
        assert nodes(result.model, "MatMulInteger")
        found.append(sqnr_db(truth, Session(result.model).run(feeds[0])["y"]))
    assert found[0] > found[1] + 6


# random attention blocks

ACTIVATIONS = (
    "f = Relu(m)",
    "f = LeakyRelu(m)",
    "e = Erf(m) g1 = Add(e, one) h = Mul(m, g1) f = Mul(h, half)",
    "sg = Sigmoid(m) f = Mul(m, sg)",
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_random_blocks_compute_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads, width = int(rng.choice([1, 2, 4])), int(rng.choice([2, 3, 4]))
    size = heads * width
    values: dict[str, Array] = {
        "heads": np.array([0, 0, heads, width]),
        "whole": np.array([0, 0, size]),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }

    def draw(name: str, *shape: int) -> str:
        spread = np.exp2(rng.integers(-4, 5, shape[-1])) * (rng.random(shape[-1]) > 0.1)
        values[name] = (rng.standard_normal(shape) * spread).astype(np.float32)
        return name

    norm = f"s = LayerNormalization(x, {draw('c', size)}, {draw('b', size)})" if rng.random() < 0.7 else "s = Tanh(x)"
    third = str(rng.choice(["s", "x"]))
    shared = draw("wq", size, size)
    key = shared if rng.random() < 0.3 else draw("wk", size, size)
    residual = "z = Add(o2, s)" if rng.random() < 0.5 else "z = Relu(o2)"
    act = str(rng.choice(ACTIVATIONS))
    text = f"""g (float[2, 5, {size}] x) => (float y) {{
      {norm} q = MatMul(s, {shared}) k = MatMul(s, {key}) v0 = MatMul({third}, {draw("wv", size, size)})
      v = Add(v0, {draw("bv", size)})
      q1 = Reshape(q, heads) q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
      k1 = Reshape(k, heads) k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
      v1 = Reshape(v, heads) v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
      l = MatMul(q2, k2) a = Softmax(l) p = MatMul(a, v2) p1 = Transpose<perm = [0, 2, 1, 3]>(p) p2 = Reshape(p1, whole)
      o = MatMul(p2, {draw("wo", size, size)}) o2 = Add(o, {draw("bo", size)}) {residual}
      m = MatMul(z, {draw("w1", size, 12)}) {act} y = MatMul(f, {draw("w2", 12, size)}) }}"""
    feeds = [{"x": normal(2, 5, size, seed=seed + i)} for i in range(2)]
    smoothed(parse(text, values), feeds, alpha=None if rng.random() < 0.6 else float(rng.random()))


def test_int8_looks_for_outliers_among_many_channels_only() -> None:
    text = "g (float[n, 16] x) => (float[n, 80] y) { p = MatMul(x, w)  y = Tanh(p) }"
    model = parse(text, {"w": weight(16, 80)})
    feeds = [{"x": normal(8, 16, seed=seed) * PEAKS} for seed in range(4)]
    assert not Int8().needs(model).channel_moments
    assert Int8().needs(model).channel_means or not Int8().needs(model).channel_ranges
    result = quantize(model, feeds)
    assert {change.kind for change in result.changes} >= {"quantized"}
    assert not any(change.kind == "smoothed" for change in result.changes)
    wide = parse(text.replace("16", "64"), {"w": weight(64, 80)})
    asked = Int8().needs(wide)
    assert asked.channel_moments
    assert not set(asked.channel_means) & set(asked.channel_moments)
