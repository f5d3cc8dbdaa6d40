"""recompose: what exporters take apart becomes one operator again."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import load
from onnxopt.passes.recompose import Recompose
from tests.helpers import apply, assert_close, assert_valid, operators, proto, run, with_weights

HEAD = """g (float[2,3,4] x) => (float[a,b,c] y)
<float two = {2}, float half = {0.5}, float one = {1}, float zero = {0}, float three = {3}, float root = {1.4142135},
 float eps = {0.00001}, float turn = {0.70710677}, float cubic = {0.044715}, float wide = {0.7978846}, float a = {0.2},
 float[4] w = {1, 2, 3, 4}, float[4] b = {0.5, -1, 0, 1}, float[1,3,1] p = {0.1, 0.2, -0.3}, int64[1] last = {-1},
 int64[1] middle = {1}>"""
LAYER = "m = ReduceMean{axes} d = Sub(x, m) {square} v = ReduceMean{axes2} e = Add(v, eps) s = Sqrt(e) n = Div(d, s)"


def layer(opset: int, square: str = "q = Pow(d, two)", axis: int = -1) -> str:
    if opset >= 18:
        axes, axes2 = "(x, last)", "(q, last)"
    else:
        axes, axes2 = f"<axes = [{axis}]>(x)", f"<axes = [{axis}]>(q)"
    return LAYER.format(axes=axes, axes2=axes2, square=square)


ERF = "g0 = Div(x, root) g1 = Erf(g0) g = Add(g1, one)"
TANH = "k = Mul(x, x) k3 = Mul(x, k) u0 = Mul(k3, cubic) u = Add(x, u0) v = Mul(u, wide) w0 = Tanh(v) g = Add(w0, one)"
FUSED = {
    "LayerNormalization": (17, layer(17) + " z = Mul(n, w) y = Add(z, b)", "LayerNormalization"),
    "LayerNormalization, squared by Mul": (
        17, layer(17, "q = Mul(d, d)") + " z = Mul(w, n) y = Add(b, z)", "LayerNormalization"),
    "LayerNormalization, axes as input": (18, layer(18) + " z = Mul(n, w) y = Add(z, b)", "LayerNormalization"),
    "LayerNormalization, axis from the front": (
        17, layer(17, axis=2) + " z = Mul(n, w) y = Add(z, b)", "LayerNormalization"),
    "Gelu": (20, f"{ERF} m = Mul(x, g) y = Mul(m, half)", "Gelu"),
    "Gelu, halved first": (20, f"{ERF} m = Mul(x, half) y = Mul(m, g)", "Gelu"),
    "Gelu, gate halved": (20, f"{ERF} m = Mul(g, half) y = Mul(m, x)", "Gelu"),
    "Gelu, turned by Mul": (20, f"{ERF.replace('Div(x, root)', 'Mul(turn, x)')} m = Mul(x, g) y = Div(m, two)", "Gelu"),
    "Gelu by tanh": (20, f"{TANH} m = Mul(x, half) y = Mul(m, g)", "Gelu"),
    "Gelu by tanh, cubed by Pow": (
        20, TANH.replace("k = Mul(x, x) k3 = Mul(x, k)", "k3 = Pow(x, three)") + " m = Mul(x, half) y = Mul(m, g)",
        "Gelu"),
    "Softmax": (
        13, "m = ReduceMax<axes = [1]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, middle) y = Div(e, s)", "Softmax"),
    "HardSigmoid": (17, "m = Mul(x, a) s = Add(m, half) y = Clip(s, zero, one)", "HardSigmoid"),
    "HardSigmoid, divided": (17, "m = Div(x, three) s = Add(half, m) y = Clip(s, zero, one)", "HardSigmoid"),
    "LeakyRelu": (17, "r = Relu(x) t = Neg(x) u = Relu(t) v = Mul(u, a) y = Sub(r, v)", "LeakyRelu"),
    "LeakyRelu, slope turned": (
        17, "r = Relu(x) t = Neg(x) u = Relu(t) k = Neg(a) v = Mul(k, u) y = Add(r, v)", "LeakyRelu"),
    "PRelu": (17, "r = Relu(x) t = Neg(x) u = Relu(t) v = Mul(u, p) y = Add(r, v)", "PRelu"),
}  # fmt: skip
KEPT = {
    "LayerNormalization before opset 17": (16, layer(16) + " z = Mul(n, w) y = Add(z, b)"),
    "a mean over another axis": (17, layer(17, axis=1) + " z = Mul(n, w) y = Add(z, b)"),
    "a scale of another shape": (17, layer(17) + " z = Mul(n, p) y = Add(z, b)"),
    "Gelu before opset 20": (17, f"{ERF} m = Mul(x, g) y = Mul(m, half)"),
    "another root": (20, f"{ERF.replace('Div(x, root)', 'Div(x, two)')} m = Mul(x, g) y = Mul(m, half)"),
    "another factor": (20, f"{ERF} m = Mul(x, g) y = Mul(m, two)"),
    "another x": (20, f"{ERF} h = Neg(x) m = Mul(h, g) y = Mul(m, half)"),
    "a softmax without its maximum": (13, "e = Exp(x) s = ReduceSum(e, middle) y = Div(e, s)"),
    "a sum over another axis": (
        13, "m = ReduceMax<axes = [1]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)"),
    "a clip to 2": (17, "m = Mul(x, a) s = Add(m, half) y = Clip(s, zero, two)"),
    "divided by x": (17, "m = Div(a, x) s = Add(m, half) y = Clip(s, zero, one)"),
    "a result read elsewhere": (17, "m = Mul(x, a) s = Add(m, half) k = Clip(s, zero, one) y = Add(k, m)"),
}  # fmt: skip


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).uniform(-4, 4, (2, 3, 4)).astype(np.float32)}


@pytest.mark.parametrize("kind", list(FUSED))
def test_one_operator_stands_for_them(kind: str) -> None:
    opset, body, wanted = FUSED[kind]
    source = proto(f"{HEAD} {{ {body} }}", opset)
    target = load(source)
    assert len(apply(Recompose(), target).changes) == 1
    assert operators(target) == [wanted]
    assert_valid(target)
    assert_close(run(source, feeds()), run(target, feeds()))
    assert not apply(Recompose(), target).changes


@pytest.mark.parametrize("kind", list(KEPT))
def test_what_only_looks_like_it_stays(kind: str) -> None:
    opset, body = KEPT[kind]
    target = load(proto(f"{HEAD} {{ {body} }}", opset))
    before = target.digest()
    assert not apply(Recompose(), target).changes
    assert target.digest() == before


def test_reasons_name_the_opset() -> None:
    for kind, wanted in (("LayerNormalization before opset 17", "17"), ("Gelu before opset 20", "20")):
        opset, body = KEPT[kind]
        result = apply(Recompose(), load(proto(f"{HEAD} {{ {body} }}", opset)))
        assert any(f"opset={wanted}" in skip.reason for skip in result.skipped)


def test_the_gelu_of_onnxruntime_on_request() -> None:
    source = proto(f"{HEAD} {{ {KEPT['Gelu before opset 20'][1]} }}", 17)
    target = load(source)
    assert apply(Recompose(contrib=True), target).changes
    assert target.graph.nodes[0].kind == ("com.microsoft", "Gelu")
    assert target.opset_imports == {"": 17, "com.microsoft": 1}
    assert_close(run(source, feeds()), run(target, feeds()))


def test_float16_stays() -> None:
    source = with_weights(
        proto("g (float16[2,3] x) => (float16[2,3] y) { m = Mul(x, a) s = Add(m, h) y = Clip(s, z, o) }"),
        **{name: np.array(value, np.float16) for name, value in (("a", 0.2), ("h", 0.5), ("z", 0), ("o", 1))},
    )
    assert not apply(Recompose(), load(source)).changes
