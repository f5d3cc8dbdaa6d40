"""Shapes that Loops carry along: proven by induction, or not told."""

from __future__ import annotations

import pytest

from onnxopt.graph.shapes import Fact, known
from tests.helpers import model

LOOP = """g (float[2,N] x, int64 n, bool c) => (float[a,b] y) <int64[1] one = {{1}}> {{
  start = Identity(x)
  y = Loop (n, c, start) <body = b (int64 i, bool k, float[a,b] h) => (bool k2, float[a,b] h2) {{
    k2 = Identity(k) {} }}> }}"""
BODIES = {
    "the same shape": ("h2 = Relu(h)", (2, "N")),
    "another length at the end": ("h2 = Concat<axis = 1>(h, h)", (2, None)),
    "another length in front": ("h2 = Concat<axis = 0>(h, h)", (None, "N")),
    "turned": ("h2 = Transpose(h)", (None, None)),
    "another rank": ("h2 = Unsqueeze(h, one)", None),
}


def shape_of(fact: Fact) -> list[int | str | None] | None:
    """The shape without the names that inference gives to what it does not know."""
    if fact.shape is None:
        return None
    return [None if isinstance(length, str) and length.startswith("unk__") else length for length in fact.shape]


@pytest.mark.parametrize("kind", list(BODIES))
def test_what_every_round_keeps(kind: str) -> None:
    body, wanted = BODIES[kind]
    target = model(LOOP.format(body))
    facts = known(target)
    inner = next(each for each in target.bodies() if each.parent is not None)
    assert shape_of(facts.get(id(inner.inputs[2]), Fact())) == (None if wanted is None else list(wanted))


def test_a_swap_of_two_shapes_is_seen() -> None:
    target = model(
        """g (float[2] x, float[3] w, int64 n, bool c) => (float[a] y, float[b] z) {
        y, z = Loop (n, c, x, w) <body = b (int64 i, bool k, float[a] p, float[b] q)
                                       => (bool k2, float[b] q2, float[a] p2) {
          k2 = Identity(k) q2 = Relu(q) p2 = Relu(p) }> }"""
    )
    facts = known(target)
    inner = next(each for each in target.bodies() if each.parent is not None)
    assert [shape_of(facts[id(tensor)]) for tensor in inner.inputs[2:]] == [[None], [None]]


def test_what_comes_out_of_an_inner_loop_is_not_told() -> None:
    target = model(
        """g (float[2,3] x, int64 n, bool c) => (float[a,b] y) {
        y = Loop (n, c, x) <body = o (int64 i, bool k, float[a,b] h) => (bool k2, float[a,b] h2) {
          k2 = Identity(k)
          r = Relu(h)
          h2 = Loop (n, k, r) <body = u (int64 j, bool l, float[a,b] m) => (bool l2, float[a,b] m2) {
            l2 = Identity(l) m2 = Add(m, r) }> }> }"""
    )
    facts = known(target)
    outer, inner = (each for each in target.bodies() if each.parent is not None)
    assert [facts[id(body.inputs[2])].shape for body in (outer, inner)] == [None, None]
