"""fuse_hard_swish: how exporters spell it, and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import load
from onnxopt.passes.fuse_hard_swish import FuseHardSwish
from tests.helpers import apply, assert_close, assert_valid, operators, proto, reference, run

SHAPES = "g (float[1,3,H,W] x) => (float[1,3,H,W] y)"
NUMBERS = (
    "<float three = {3}, float six = {6}, float zero = {0}, float sixth = {0.16666667}, float two = {2}, "
    "float[1] six1 = {6}>"
)
SWISH = {
    "divided last": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "turned around": "a = Add(three, x) c = Clip(a, zero, six) m = Mul(c, x) y = Mul(sixth, m)",
    "one element": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six1)",
    "divided first": "a = Add(x, three) c = Clip(a, zero, six) h = Div(c, six) y = Mul(x, h)",
}
OTHERS = {
    "another shift": "a = Add(x, two) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "another bound": "a = Add(x, three) c = Clip(a, zero, three) m = Mul(x, c) y = Div(m, six)",
    "another divisor": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, three)",
    "divides six": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) n = Add(m, three) y = Div(six, n)",
    "another factor": "n = Neg(x) a = Add(x, three) c = Clip(a, zero, six) m = Mul(n, c) y = Div(m, six)",
    "a second reader": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) d = Div(m, six) y = Add(d, c)",
    "a reader of the sum": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) d = Div(m, six) y = Add(d, a)",
}


def feeds() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).uniform(-6, 6, (1, 3, 4, 5)).astype(np.float32)
    values[0, 0, 0] = [-3, 3, 0, -3.0000002, 2.9999998]
    return {"x": values}


@pytest.mark.parametrize("kind", list(SWISH))
def test_every_spelling_becomes_one_gate_and_one_product(kind: str) -> None:
    source = proto(f"{SHAPES} {NUMBERS} {{ {SWISH[kind]} }}", 17)
    target = load(source)
    assert len(apply(FuseHardSwish(), target).changes) == 1
    assert operators(target) == ["HardSigmoid", "Mul"]
    assert_valid(target)
    assert_close(run(source, feeds()), run(target, feeds()))
    assert_close(reference(source, feeds()), reference(target, feeds()))
    assert not apply(FuseHardSwish(), target).changes


def test_hard_sigmoid_alone_and_bounds_as_attributes() -> None:
    source = proto(f"{SHAPES} {NUMBERS} {{ a = Add(x, three) c = Clip<min = 0.0, max = 6.0>(a) y = Div(c, six) }}", 10)
    target = load(source)
    assert apply(FuseHardSwish(), target).changes
    assert operators(target) == ["HardSigmoid"]
    assert_close(run(source, feeds()), run(target, feeds()))


@pytest.mark.parametrize("kind", list(OTHERS))
def test_what_only_looks_like_it_stays(kind: str) -> None:
    source = proto(f"{SHAPES} {NUMBERS} {{ {OTHERS[kind]} }}", 17)
    target = load(source)
    before = target.digest()
    assert not apply(FuseHardSwish(), target).changes
    assert target.digest() == before


def test_an_output_in_the_middle_stays() -> None:
    text = f"g (float[1,3,H,W] x) => (float[1,3,H,W] y, float[1,3,H,W] c) {NUMBERS} {{ {SWISH['divided last']} }}"
    target = load(proto(text, 17))
    result = apply(FuseHardSwish(), target)
    assert not result.changes
    assert [skip.reason for skip in result.skipped] == ["its result is read elsewhere too"]


def test_in_a_branch() -> None:
    text = f"""g (float[1,3,H,W] x, bool b) => (float[1,3,H,W] y) {NUMBERS} {{
      y = If (b) < then_branch = t () => (float[1,3,H,W] p) {{ {SWISH["divided last"].replace("y =", "p =")} }},
                   else_branch = e () => (float[1,3,H,W] q) {{ q = Neg(x) }}> }}"""
    source = proto(text, 17)
    target = load(source)
    assert len(apply(FuseHardSwish(), target).changes) == 1
    for which in (True, False):
        given = feeds() | {"b": np.array(which)}
        assert_close(run(source, given), run(target, given))
