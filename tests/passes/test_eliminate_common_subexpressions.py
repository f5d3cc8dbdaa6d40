"""eliminate_common_subexpressions: what is computed twice alike is computed once, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.model import load
from onnxopt.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.helpers import apply, assert_equal, assert_valid, operators, proto, random_feeds, run

MERGED = {
    "one node": ("a = Relu(x) b = Relu(x) y = Mul(a, b)", ["Relu", "Mul"]),
    "a chain": (
        "a = Relu(x) b = Relu(x) c = Exp(a) d = Exp(b) y = Add(c, d)",
        ["Relu", "Exp", "Add"],
    ),
    "attributes in another order": (
        "a = Softmax<axis = 1>(x) b = Softmax<axis = 1>(x) y = Sub(a, b)",
        ["Softmax", "Sub"],
    ),
    "equal constants": ("a = Mul(x, two) b = Mul(x, zwei) y = Add(a, b)", ["Mul", "Add"]),
    "several outputs": (
        "a, i = TopK(x, one) b, j = TopK(x, one) c = Add(a, b) k = Cast<to = 1>(j) y = Mul(c, k)",
        ["TopK", "Add", "Cast", "Mul"],
    ),
}
KEPT = {
    "other attributes": "a = Softmax<axis = 0>(x) b = Softmax<axis = 1>(x) y = Sub(a, b)",
    "zeros of other signs": "a = Div(x, plus) b = Div(x, minus) y = Mul(a, b)",
    "attributes that only compare equal": "a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x) y = Sub(a, b)",
    "another order of inputs": "a = Sub(x, two) b = Sub(two, x) y = Mul(a, b)",
    "RandomNormalLike": "a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b)",
    "equal seeds": "a = RandomUniformLike<seed = 1.0>(x) b = RandomUniformLike<seed = 1.0>(x) y = Sub(a, b)",
    "Bernoulli": "p = Sigmoid(x) a = Bernoulli(p) b = Bernoulli(p) y = Sub(a, b)",
    "Dropout in training": "a = Dropout(x, half, yes) b = Dropout(x, half, yes) y = Sub(a, b)",
    "custom operators": "a = own.Thing(x) b = own.Thing(x) y = Sub(a, b)",
}  # fmt: skip
TEXT = """g (float[2,3] x) => (float[a,b] y)
<float two = {{2}}, float zwei = {{2}}, float plus = {{0}}, float minus = {{-0.0}}, float half = {{0.5}},
 bool yes = {{1}}, int64[1] one = {{1}}> {{ {} }}"""


@pytest.mark.parametrize("kind", list(MERGED))
def test_equal_nodes_become_one(kind: str) -> None:
    body, wanted = MERGED[kind]
    source = proto(TEXT.format(body))
    target = load(source)
    result = apply(EliminateCommonSubexpressions(), target)
    assert operators(target) == wanted
    assert result.changes
    assert_valid(target)
    assert_equal(run(source, random_feeds(source)), run(target, random_feeds(source)))
    assert not apply(EliminateCommonSubexpressions(), target).changes


@pytest.mark.parametrize("kind", list(KEPT))
def test_what_may_differ_stays(kind: str) -> None:
    target = load(proto(TEXT.format(KEPT[kind]), imports='"own" : 1'))
    before = target.digest()
    assert not apply(EliminateCommonSubexpressions(), target).changes
    assert target.digest() == before


def test_both_are_outputs() -> None:
    target = load(proto("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Relu(x) }"))
    result = apply(EliminateCommonSubexpressions(), target)
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("z", "it is the same as y, but gives an output its name")
    ]
    assert operators(target) == ["Relu", "Relu"]


def test_one_is_an_output() -> None:
    source = proto("g (float[2] x) => (float[2] y, float[2] z) { a = Relu(x) z = Relu(x) y = Neg(a) }")
    target = load(source)
    apply(EliminateCommonSubexpressions(), target)
    assert operators(target) == ["Relu", "Neg"]
    assert_equal(run(source, random_feeds(source)), run(target, random_feeds(source)))


def test_a_branch_takes_what_the_graph_around_it_computes() -> None:
    source = proto(
        """g (float[2] x, bool b) => (float[2] y) {
        y0 = If (b) < then_branch = t () => (float[2] p) { q = Exp(x) p = Neg(q) },
                      else_branch = e () => (float[2] r) { s = Exp(x) u = Exp(s) v = Exp(s) r = Add(u, v) }>
        late = Exp(x)
        y = Add(y0, late) }"""
    )
    target = load(source)
    apply(EliminateCommonSubexpressions(), target)
    assert sorted(operators(target)) == ["Add", "Exp", "If"]
    assert [operators(body) for body in target.bodies()][1:] == [["Neg"], ["Exp", "Add"]]
    assert_valid(target)
    for which in (True, False):
        given = {"x": np.array([-1, 2], np.float32), "b": np.array(which)}
        assert_equal(run(source, given), run(target, given))


def test_branches_do_not_take_from_each_other() -> None:
    source = proto(
        """g (float[2] x, bool b) => (float[2] y) {
        y = If (b) < then_branch = t () => (float[2] p) { q = Exp(x) p = Neg(q) },
                     else_branch = e () => (float[2] r) { s = Exp(x) r = Abs(s) }> }"""
    )
    target = load(source)
    assert not apply(EliminateCommonSubexpressions(), target).changes
