"""simplify_shapes: shapes are computed from as little as they depend on, and come out the same."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.model import Constant, Model, load
from onnxopt.passes.simplify_shapes import SimplifyShapes
from tests.helpers import apply, assert_equal, assert_valid, node_of, operators, proto, run

NUMBERS = """<int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2},
  int64[1] m1 = {-1}, int64[1] c3 = {3}, int64[1] c4 = {4}, int64 s4 = {4}, int64[1] c12 = {12}, int64[2] v12 = {1, 2},
  int64[3] ones = {1, 1, 1}>"""
# nodes that make the target t of a Reshape of x: float[N, S, 12] -> the constant it becomes
TARGETS = {
    "one open length, given as -1": ("n = Gather(s, v0) t = Concat<axis = 0>(n, m1)", [0, -1]),
    "a length that stays, scalars in between": (
        "n = Gather(s, i0) u = Unsqueeze(n, v0) t = Concat<axis = 0>(u, m1, c4)", [0, -1, 4]),
    "two lengths that stay": (
        "n = Slice(s, v0, v2, v0) t = Concat<axis = 0>(n, c4, c3)", [0, 0, 4, 3]),
    "a product": (
        "n = Gather(s, i0) k = Gather(s, i1) p = Mul(n, k) u = Unsqueeze(p, v0) t = Concat<axis = 0>(u, c12)",
        [-1, 12]),
    "a known length of an open shape": (
        "n = Gather(s, v0) k = Gather(s, v2) t = Concat<axis = 0>(n, m1, k)", [0, -1, 12]),
    "a known length divided": (
        "n = Gather(s, v0) k = Gather(s, i2) d = Div(k, s4) u = Unsqueeze(d, v0) t = Concat<axis = 0>(n, m1, c4, u)",
        [0, -1, 4, 3]),
    "Where and Equal, as exporters write -1": (
        "n = Gather(s, v0) q = Concat<axis = 0>(n, m1, c12) e = Equal(q, m1) t = Where(e, m1, q)", [0, -1, 12]),
    "all as it was": ("t = Identity(s)", [0, 0, 12]),
    "a Cast there and back": (
        "n = Gather(s, v0) a = Cast<to = 6>(n) b = Cast<to = 7>(a) t = Concat<axis = 0>(b, m1)", [0, -1]),
}  # fmt: skip


def feeds(n: int = 2, s: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((n, s, 12)).astype(np.float32)}


def source_of(body: str, opset: int = 17, rank: int = 2):  # type: ignore[no-untyped-def]
    dims = ",".join("abcdef"[:rank])
    return proto(
        f"g (float[N,S,12] x) => (float[{dims}] y) {NUMBERS} {{ s = Shape(x) {body} y = Reshape(x, t) }}", opset
    )


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_targets_become_constant(kind: str, opset: int) -> None:
    body, wanted = TARGETS[kind]
    source = source_of(body, opset, len(wanted))
    target = load(source)
    apply(SimplifyShapes(), target)
    assert operators(target) == ["Reshape"]
    given = node_of(target, "Reshape").inputs[1]
    assert isinstance(given, Constant)
    assert given.values.tolist() == wanted
    assert_valid(target)
    for n, s in ((1, 1), (2, 5), (3, 2)):
        assert_equal(run(source, feeds(n, s)), run(target, feeds(n, s)))
    assert not apply(SimplifyShapes(), target).changes


@pytest.mark.parametrize("body", [
    "n = Gather(s, v0) k = Gather(s, v1) t = Concat<axis = 0>(k, n, c12)",
    "n = Gather(s, v1) t = Concat<axis = 0>(n, m1, c12)",
    "n = Gather(s, v0) k = Gather(s, v1) q = Add(n, k) r = Sub(q, n) p = Sub(q, k) t = Concat<axis = 0>(p, r, c12)",
])  # fmt: skip
def test_targets_of_two_open_lengths_are_computed(body: str) -> None:
    source = source_of(body, rank=3)
    target = load(source)
    apply(SimplifyShapes(), target)
    assert not isinstance(node_of(target, "Reshape").inputs[1], Constant)
    assert_equal(run(source, feeds()), run(target, feeds()))


@pytest.mark.parametrize("name", ["?", "None", "unknown", "N"])
def test_a_name_of_several_lengths_says_nothing(name: str) -> None:
    # some exporters call every open length the same
    source = proto(
        """g (float[A,B,3] x) => (float[a,b,c] y) <int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] c3 = {3}> {
        s = Shape(x) n = Gather(s, v0) k = Gather(s, v1) t = Concat<axis = 0>(k, n, c3) y = Reshape(x, t) }"""
    )
    for dim in source.graph.input[0].type.tensor_type.shape.dim[:2]:
        dim.dim_param = name
    target = load(source)
    apply(SimplifyShapes(), target)
    given = {"x": np.arange(30, dtype=np.float32).reshape(2, 5, 3)}
    assert_equal(run(source, given), run(target, given))


def test_allowzero_means_zero() -> None:
    source = proto(
        "g (float[N,12] x) => (float[a,b] y) { s = Shape(x) t = Identity(s) y = Reshape<allowzero = 1>(x, t) }"
    )
    target = load(source)
    apply(SimplifyShapes(), target)
    given = {"x": np.ones((0, 12), np.float32)}
    assert_equal(run(source, given), run(target, given))


def test_numbers_among_open_lengths_become_constants() -> None:
    source = proto(
        f"g (float[N,3,H] x) => (int64 y, float[a,b,c] z) {NUMBERS} "
        "{ s = Shape(x) k = Gather(s, i1) y = Mul(k, i2) n = Gather(s, v1) e = ConstantOfShape(n) z = Add(x, z0) "
        "z1 = Unsqueeze(e, v1) z0 = Unsqueeze(z1, v0) }"
    )
    nodes = {node.output[0]: node for node in source.graph.node}
    del source.graph.node[:]
    source.graph.node.extend(nodes[name] for name in ("s", "k", "y", "n", "e", "z1", "z0", "z"))
    source.graph.node[6].input[1] = "v0"
    target = load(source)
    apply(SimplifyShapes(), target)
    assert "Gather" not in operators(target)
    assert "Shape" not in operators(target)


def test_what_was_computed_before_is_taken_from_there() -> None:
    source = proto(
        f"""g (float[N,S] x) => (float[a,b] y, float[c,d] z) {NUMBERS} {{
        r = Relu(x) s = Shape(r) n = Gather(s, v0) k = Gather(s, v1) t = Concat<axis = 0>(n, k)
        q = Shape(x) y = Expand(i, q) i = Cast<to = 1>(v1)
        e = ConstantOfShape(t) z = Add(e, x) }}"""
    )
    order = ["r", "s", "n", "k", "t", "q", "i", "y", "e", "z"]
    nodes = {node.output[0]: node for node in source.graph.node}
    del source.graph.node[:]
    source.graph.node.extend(nodes[name] for name in order)
    target = load(source)
    apply(SimplifyShapes(), target)
    assert operators(target).count("Shape") == 1
    assert "Concat" not in operators(target)
    given = {"x": np.ones((2, 3), np.float32)}
    assert_equal(run(source, given), run(target, given))


@pytest.mark.parametrize(("opset", "wanted"), [(13, ["Shape", "Gather"]), (15, ["Shape"]), (21, ["Shape"])])
def test_a_gather_of_a_shape_becomes_a_part_of_it(opset: int, wanted: list[str]) -> None:
    source = proto(
        "g (float[N,S,12] x) => (int64[2] y) <int64[2] v12 = {0, 1}> { s = Shape(x) y = Gather(s, v12) }", opset
    )
    target = load(source)
    apply(SimplifyShapes(), target)
    assert operators(target) == wanted
    assert_equal(run(source, feeds()), run(target, feeds()))


def test_within_bodies_and_from_around_them() -> None:
    source = proto(
        f"""g (float[N,S,12] x, bool b) => (float[c,d] y) {NUMBERS} {{
        s = Shape(x) n = Gather(s, v0)
        y = If (b) < then_branch = t () => (float[p,q] u) {{ t = Concat<axis = 0>(n, m1) u = Reshape(x, t) }},
                     else_branch = e () => (float[r,v] w) {{
            f = Shape(x) k = Gather(f, v0) m = Gather(f, v1) z = Mul(k, m) t = Concat<axis = 0>(z, c12)
            w = Reshape(x, t) }}> }}"""
    )
    target = load(source)
    apply(SimplifyShapes(), target)
    assert [operators(body) for body in target.bodies()] == [["If"], ["Reshape"], ["Reshape"]]
    for which in (True, False):
        given = feeds() | {"b": np.array(which)}
        assert_equal(run(source, given), run(target, given))


def random_model(seed: int):  # type: ignore[no-untyped-def]
    """Random integer arithmetic on the lengths of x, its results the outputs, as vectors of one entry."""
    rng = np.random.default_rng(seed)
    nodes = [helper.make_node("Shape", ["x"], ["s"])]
    arrays = [numpy_helper.from_array(np.array([value], np.int64), f"c{value}") for value in (-1, 0, 1, 2, 3)]
    names = [array.name for array in arrays]
    for at in range(12):
        op = rng.choice(["Gather", "Add", "Sub", "Mul", "Div", "Concat", "Equal", "Slice", "Cast"])
        a, b = (str(name) for name in rng.choice(names, 2))
        if op == "Gather":
            nodes.append(helper.make_node("Gather", ["s", f"c{rng.integers(0, 3)}"], [f"n{at}"]))
        elif op == "Concat":
            nodes.append(helper.make_node("Concat", [a, b], [f"j{at}"], axis=0))
            nodes.append(helper.make_node("Gather", [f"j{at}", f"c{rng.integers(-1, 2)}"], [f"n{at}"]))
        elif op == "Equal":
            nodes.append(helper.make_node("Equal", [a, b], [f"e{at}"]))
            nodes.append(helper.make_node("Where", [f"e{at}", a, b], [f"n{at}"]))
        elif op == "Slice":
            nodes.append(helper.make_node("Slice", ["s", "c1", "c2", "c0"], [f"n{at}"]))
        elif op == "Cast":
            nodes.append(helper.make_node("Cast", [a], [f"i{at}"], to=TensorProto.INT32))
            nodes.append(helper.make_node("Cast", [f"i{at}"], [f"n{at}"], to=TensorProto.INT64))
        else:
            divisor = "c3" if op == "Div" else b
            nodes.append(helper.make_node(str(op), [a, divisor], [f"n{at}"]))
        names.append(f"n{at}")
    made = [name for name in names if name.startswith("n")]
    nodes.append(helper.make_node("Concat", made, ["all"], axis=0))
    nodes.append(helper.make_node("Neg", ["all"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, None])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [len(made)])],
        arrays,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("seed", range(60))
def test_random_arithmetic_on_lengths(seed: int) -> None:
    source = random_model(seed)
    target: Model = load(source)
    apply(SimplifyShapes(), target)
    for shape in ((1, 3, 1), (2, 3, 5), (4, 3, 2)):
        given = {"x": np.zeros(shape, np.float32)}
        assert_equal(run(source, given), run(target, given))
    assert not apply(SimplifyShapes(), target).changes
