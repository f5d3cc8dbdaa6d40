"""The pass fp16 with compute=half: which nodes compute in float16, and the Casts where they meet the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt import optimize
from onnxopt.model import Model, Node
from onnxopt.passbase import Context
from onnxopt.passes.fp16 import Fp16
from onnxopt.quantization.halving import SENSITIVE
from onnxopt.target import resolve
from tests.helpers import run
from tests.passes.halving import assert_sound, decibels, halve, kinds, skips
from tests.passes.quantizing import Array, nodes, normal, parse, weight

HALF = np.dtype(np.float16)
VALUES: dict[str, Array] = {"w": weight(64, 64), "v": weight(64, 64, seed=2)}
FEEDS = [{"x": normal(4, 64, seed=seed)} for seed in range(3)]


def mixed(body: str, values: dict[str, Array] | None = None, feeds: Any = FEEDS, **options: Any) -> tuple[Model, Any]:
    """A model from x[4, 64] to y, as a mixed graph; its outputs are held against the original's."""
    text = f"g (float[4, 64] x) => (float[n, m] y) {{ {body} }}"
    given = VALUES if values is None else values
    used = {name: array for name, array in given.items() if name in body}
    model, before = parse(text, used), parse(text, used)
    result = halve(model, feeds, compute="half", **options)
    assert decibels(before, model, FEEDS) > 50
    return model, result


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def node(model: Model, name: str) -> Node:
    found: Node = next(each for each in model.graph.nodes if name in (tensor.name for tensor in each.outputs))
    return found


def test_one_cast_at_each_border_and_half_between() -> None:
    model, result = mixed("z = MatMul(x, w)  r = Relu(z)  y = MatMul(r, v)")
    assert ops(model) == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert [tensor.dtype for tensor in (*model.graph.inputs, *model.graph.outputs)] == [np.float32, np.float32]
    assert all(tensor.dtype == HALF for each in model.graph.nodes[:4] for tensor in each.outputs)
    assert all(constant.dtype == HALF for constant in model.constants())
    assert result.notes == ["3 nodes compute in float16, 0 in float32, 0 weights of these stored as float16"]
    assert not result.skipped
    assert kinds(result, "half") == ["z", "r", "y"]


def test_descriptions_of_inner_tensors_follow() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y) <float[4, 64] z> { z = MatMul(x, w)  y = Relu(z) }"
    model = parse(text, {"w": VALUES["w"]})
    halve(model, FEEDS, compute="half")
    (info,) = [info for info in model.to_proto().graph.value_info if info.name == "z"]
    assert info.type.tensor_type.elem_type == 10


@pytest.mark.parametrize(("factor", "half"), [(1.0, True), (1000.0, True), (2e4, False), (1e6, False)])
def test_nodes_whose_values_come_near_the_end_of_the_range_stay(factor: float, half: bool) -> None:
    body = "a = MatMul(x, w)  b = Mul(a, up)  c = Relu(b)  d = Mul(c, down)  e = MatMul(d, v)  y = Tanh(e)"
    scales = {"up": np.array(factor, np.float32), "down": np.array(1 / factor, np.float32)}
    model, result = mixed(body, {**VALUES, **scales})
    assert (node(model, "b").outputs[0].dtype == HALF) is half
    if not half:
        assert "too near to where float16 ends (6.55e+04)" in skips(result)["c"]


def test_without_real_inputs_only_constants_are_judged_and_that_is_said() -> None:
    body = "a = MatMul(x, w)  b = Relu(a)  c = Mul(b, big)  d = Mul(c, small)  e = MatMul(d, v)  y = Tanh(e)"
    scales = {"big": np.array(1e5, np.float32), "small": np.array(1e-5, np.float32)}
    model, result = mixed(body, {**VALUES, **scales}, feeds=None)
    assert skips(result)["c"] == "its constant big reaches 1e+05, and float16 ends at 6.55e+04"
    assert node(model, "b").outputs[0].dtype == HALF
    assert "no real inputs" in result.notes[1]


def test_an_epsilon_that_would_become_zero_stays() -> None:
    body = """a = MatMul(x, w)  m = ReduceMean<axes = [1]>(a)  c = Sub(a, m)  q = Mul(c, c)
      var = ReduceMean<axes = [1]>(q)  e = Add(var, eps)  s = Sqrt(e)  n = Div(c, s)  y = MatMul(n, v)"""
    for value, half in ((1e-12, False), (1e-5, True)):
        model, _ = mixed(body, {**VALUES, "eps": np.array(value, np.float32)})
        assert (node(model, "e").outputs[0].dtype == HALF) is half


def test_sums_that_may_overflow_on_the_way_stay() -> None:
    body = (
        "a = MatMul(x, w)  b = Mul(a, k)  m = ReduceMean<axes = [1]>(b)  s = Sub(b, m)  r = Tanh(s)  y = MatMul(r, v)"
    )
    _, result = mixed(body, {**VALUES, "k": np.array(300.0, np.float32)})
    assert "its sums may reach" in skips(result)["m"]
    _, result = mixed(body, {**VALUES, "k": np.array(3.0, np.float32)})
    assert "m" not in skips(result)


def test_a_lone_half_node_between_float_regions_stays_float() -> None:
    body = "a = CumSum(x, one)  b = Relu(a)  c = CumSum(b, one)  d = Tanh(c)  e = MatMul(d, w)  y = MatMul(e, v)"
    model, result = mixed(body, {**VALUES, "one": np.array(1)})
    assert ops(model) == ["CumSum", "Relu", "CumSum", "Cast", "Tanh", "MatMul", "MatMul", "Cast"]
    assert skips(result)["b"] == "the Casts around it would outnumber what it computes"
    assert "adds up a whole axis" in skips(result)["a"]


def test_a_tensor_is_cast_once_for_all_its_readers() -> None:
    body = """a = MatMul(x, w)  b = Relu(a)  c = CumSum(b, one)  d = CumSum<reverse = 1>(b, one)  f = MatMul(b, v)
      g1 = Add(c, d)  h = Tanh(g1)  i = Add(h, f)  j = Sigmoid(h)  y = Mul(i, j)"""
    model, _ = mixed(body, {**VALUES, "one": np.array(1)})
    reading = [each.inputs[0].name for each in nodes(model, "Cast")]
    assert len(reading) == len(set(reading))
    assert len(node(model, "b").outputs[0].outputs) == 2  # a Cast for both CumSum, and the MatMul


def test_a_half_output_that_is_read_within_too() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y, float[4, 64] z) { z = MatMul(x, w)  r = Relu(z)  y = MatMul(r, v) }"
    model, before = parse(text, VALUES), parse(text, VALUES)
    halve(model, FEEDS, compute="half")
    assert ops(model).count("Cast") == 3
    assert node(model, "z").op == "Cast"
    assert decibels(before, model, FEEDS) > 60


# Casts of the model itself


def test_a_cast_of_integers_makes_float16_at_once() -> None:
    text = "g (int64[4, 64] x) => (float[4, 64] y) { f = Cast<to = 1>(x)  z = MatMul(f, w)  y = MatMul(z, v) }"
    model, before = parse(text, VALUES), parse(text, VALUES)
    feeds = [{"x": np.arange(256).reshape(4, 64) % 5}]
    halve(model, feeds, compute="half")
    assert ops(model) == ["Cast", "MatMul", "MatMul", "Cast"]
    assert decibels(before, model, feeds) > 55


def test_a_cast_of_integers_that_float_nodes_read_too_gets_a_twin() -> None:
    text = """g (int64[4, 64] x) => (float[4, 64] y, float[4, 64] c) {
      f = Cast<to = 1>(x)  c = CumSum(f, one)  z = MatMul(f, w)  y = MatMul(z, v) }"""
    model = parse(text, {**VALUES, "one": np.array(1)})
    halve(model, [{"x": np.ones((4, 64), np.int64)}], compute="half")
    casts = nodes(model, "Cast")
    assert [(each.inputs[0].name, each.attrs["to"]) for each in casts].count(("x", 10)) == 1
    assert [(each.inputs[0].name, each.attrs["to"]) for each in casts].count(("x", 1)) == 1


def test_a_cast_to_bool_reads_float16_as_it_is() -> None:
    text = """g (float[4, 64] x) => (bool[4, 64] b, float[4, 64] y) {
      z = MatMul(x, w)  r = Relu(z)  b = Cast<to = 9>(r)  y = MatMul(r, v) }"""
    model, before = parse(text, VALUES), parse(text, VALUES)
    halve(model, FEEDS, compute="half")
    assert node(model, "b").inputs[0].dtype == HALF
    assert np.array_equal(run(model, FEEDS[0])["b"], run(before, FEEDS[0])["b"])


def test_what_becomes_integers_or_a_logarithm_stays_float_up_to_its_layer() -> None:
    for tail in ("i = Cast<to = 7>(t)  f = Cast<to = 1>(i)", "u = Abs(t)  u1 = Add(u, one)  f = Log(u1)"):
        body = f"a = MatMul(x, w)  r = Relu(a)  z = MatMul(r, v)  t = Floor(z)  {tail}  y = Neg(f)"
        model, result = mixed(body, {**VALUES, "one": np.array(1.0, np.float32)}, min_sqnr=0.0)
        assert {"z", "t"} <= set(skips(result))
        assert node(model, "r").outputs[0].dtype == HALF


def test_a_cast_from_float_to_float_is_no_cast() -> None:
    model, _ = mixed("a = MatMul(x, w)  c = Cast<to = 1>(a)  y = MatMul(c, v)")
    assert ops(model) == ["Cast", "MatMul", "Identity", "MatMul", "Cast"]


# operators and parts that stay


def test_operators_and_nodes_that_the_user_keeps() -> None:
    body = "a = MatMul(x, w)  b = Relu(a)  c = Tanh(b)  d = Softmax(c)  e = MatMul(d, v)  y = Sigmoid(e)"
    model, result = mixed(body, keep_ops=("Softmax",))
    assert skips(result) == {"d": "Softmax is kept float32"}
    model, result = mixed(body, exclude=("[de]",))
    assert skips(result) == {
        "d": "it is excluded",
        "e": "it is excluded",
        "y": "the Casts around it would outnumber what it computes",
        "weight v": "is read by e, which is excluded",
    }
    assert next(constant for constant in model.constants() if constant.name == "v").dtype == np.float32


def test_inputs_that_are_float32_by_definition_stay_constants() -> None:
    text = """g (float[1, 4, 8, 8] x) => (float[1, 4, 16, 16] y) {
      c = Conv<pads = [1, 1, 1, 1]>(x, w)  r = Resize<mode = "linear">(c, , s)  y = Relu(r) }"""
    values = {"w": weight(4, 4, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
    model, before = parse(text, values), parse(text, values)
    feeds = [{"x": normal(1, 4, 8, 8)}]
    halve(model, feeds, compute="half")
    assert ops(model) == ["Cast", "Conv", "Resize", "Relu", "Cast"]
    assert node(model, "r").inputs[2].dtype == np.float32
    assert decibels(before, model, feeds) > 60


def test_bodies_are_converted_and_their_borders_stay_float32() -> None:
    text = """g (float[4, 64] x, bool c) => (float[4, 64] y) {
      z = MatMul(x, w)  r = Relu(z)
      i = If(c) <then_branch = a () => (float[4, 64] p) { p0 = MatMul(r, v)  p1 = Tanh(p0)  p = Neg(p1) },
                 else_branch = b () => (float[4, 64] q) { q0 = MatMul(r, v)  q1 = Relu(q0)  q = Abs(q1) }>
      t = Tanh(i)  y = MatMul(t, w) }"""
    model, before = parse(text, VALUES), parse(text, VALUES)
    feeds = [{"x": normal(4, 64), "c": np.array(given)} for given in (True, False)]
    result = halve(model, feeds, compute="half")
    assert {"z", "p0", "q1", "t"} <= set(kinds(result, "half"))
    branch = nodes(model, "If")[0].attrs["then_branch"]
    assert [each.op for each in branch.nodes] == ["MatMul", "Tanh", "Neg", "Cast"]
    assert decibels(before, model, feeds) > 55


def test_a_branch_that_no_sample_took_stays() -> None:
    text = """g (float[4, 64] x, bool c) => (float[4, 64] y) {
      y = If(c) <then_branch = a () => (float[4, 64] p) { p0 = MatMul(x, w)  p1 = Tanh(p0)  p = Neg(p1) },
                 else_branch = b () => (float[4, 64] q) { q0 = MatMul(x, v)  q1 = Relu(q0)  q = Abs(q1) }> }"""
    model = parse(text, VALUES)
    result = halve(model, [{"x": normal(4, 64), "c": np.array(True)}], compute="half")
    assert skips(result)["q0"] == "no sample reached it"
    assert "p0" in kinds(result, "half")


def test_a_quantized_model_only_gets_its_weights_stored() -> None:
    text = """g (float[4, 64] x) => (float[4, 64] y) {
      c = QuantizeLinear(x, s, z)  d = DequantizeLinear(c, s, z)  m = MatMul(d, w)  y = Relu(m) }"""
    values = {"w": VALUES["w"], "s": np.array(0.05, np.float32), "z": np.array(128, np.uint8)}
    model = parse(text, values)
    result = halve(model, FEEDS, compute="half")
    assert kinds(result, "stored") == ["w"]
    assert not kinds(result, "half")
    assert result.notes[1] == "the model is quantized: nothing computes in 16 bits"


@pytest.mark.parametrize("identity", [False, True])
def test_no_cast_comes_between_a_moved_batch_and_its_matmul(identity: bool) -> None:
    # onnxruntime 1.32 crashes on such a Cast: this test would not end with a failure but with the process
    step = "i = Identity(t)  m = MatMul(i, w)" if identity else "m = MatMul(t, w)"
    text = f"""g (float[4, 5, 64] x) => (float[5, 4, 64] y) {{
      a = Reshape(x, s)  t = Transpose<perm = [1, 0, 2]>(a)  {step}  r = Tanh(m)  n = MatMul(r, v)  y = Relu(n) }}"""
    values = {**VALUES, "s": np.array([4, 5, 64])}
    model, before = parse(text, values), parse(text, values)
    feeds = [{"x": normal(4, 5, 64)}]
    result = halve(model, feeds, compute="half")
    assert skips(result)["m"] == skips(result)["t"] == "the runtime crashes on a Cast between Transpose and MatMul"
    assert decibels(before, model, feeds) > 60


@pytest.mark.parametrize(
    ("middle", "kept"),
    [
        ("r = RandomUniformLike<dtype = 1, seed = 1.0>(b)  k = Add(b, r)", "r"),
        ("u = Reshape(b, s)  p = Reshape(b, s2)  n = NonMaxSuppression(u, p, one)  h = Shape(n)  k = Identity(b)", "n"),
        ("g = Range(zero, last, step)  k = Add(b, g)", "g"),
        ("k = CumSum(b, one)", "k"),
        ("h = Shape(b)  z = ConstantOfShape(h)  k = Add(b, z)", "z"),
    ],
)
def test_operators_without_a_float16_form_do_not_stand_in_the_way(middle: str, kept: str) -> None:
    constants: dict[str, Array] = {
        "one": np.array([1]) if "NonMax" in middle else np.array(1),
        "zero": np.array(0, np.float32),
        "last": np.array(64, np.float32),
        "step": np.array(1, np.float32),
        "s": np.array([1, 64, 4]),
        "s2": np.array([1, 4, 64]),
    }
    body = f"a = MatMul(x, w)  b = Relu(a)  {middle}  d = Tanh(k)  y = MatMul(d, v)"
    model, result = mixed(body, {**VALUES, **constants})
    assert kept in skips(result)
    assert node(model, "d").outputs[0].dtype == HALF


# accuracy and targets


CHAIN = "g (float[4, 64] x) => (float[4, 64] y) { " + "  ".join(
    f"m{at} = MatMul({f't{at - 1}' if at else 'x'}, w)  t{at} = Tanh(m{at})" for at in range(8)
)
CHAIN += "  y = Neg(t7) }"


@pytest.mark.parametrize(
    ("scores", "limit", "returned"),
    [
        ({"m2": 40.0}, 30.0, set()),  # good enough
        ({"m2": 40.0}, 50.0, {"m2", "t2"}),
        ({"m2": 40.0, "t6": 45.0}, 50.0, {"m2", "t2", "m6", "t6"}),
        ({"m2": 40.0}, 90.0, {"m2", "t2"}),  # as good as float32 is
    ],
)
def test_stretches_return_to_float32_until_the_outputs_are_good_enough(
    scores: dict[str, float], limit: float, returned: set[str]
) -> None:
    def compare(model: Model, most: int | None = None, reference: Model | None = None) -> float:
        candidate = model
        made = {tensor.name: tensor.dtype for each in candidate.graph.nodes for tensor in each.outputs}
        return min([score for name, score in scores.items() if made[name] == HALF], default=60.0)

    model = parse(CHAIN, VALUES | {"v": VALUES["w"]})
    result = Fp16(compute="half", min_sqnr=limit).run(model, Context(compare=compare))
    assert_sound(model)
    wanted = {name for name, reason in skips(result).items() if reason == SENSITIVE}
    assert wanted == returned
    if returned:
        first = min(scores.values())
        assert result.notes[-1] == f"{first:.1f} dB at the outputs, 60.0 with {len(returned)} nodes returned to float32"


def test_auto_follows_the_target() -> None:
    facts, target = resolve("x86"), resolve("tensorrt")
    text = "g (float[4, 64] x) => (float[4, 64] y) { z = MatMul(x, w)  y = MatMul(z, v) }"
    for chosen, change in ((facts, "stored"), (target, "half")):
        model = parse(text, VALUES)
        assert bool(Fp16().for_target(chosen).needs(model)) is (change == "half")
        result = Fp16().run(model, Context(target=chosen))
        assert {each.kind for each in result.changes} == {change}


def test_the_pipeline_proves_it() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y) { z = MatMul(x, w)  r = Relu(z)  y = MatMul(r, v) }"
    result = optimize(parse(text, VALUES), passes="fp16:compute=half", feeds=FEEDS)
    assert [node.op for node in result.model.graph.nodes] == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    again = optimize(parse(text, VALUES), passes="fp16:compute=half", feeds=FEEDS)
    assert result.model.to_proto().SerializeToString(deterministic=True) == again.model.to_proto().SerializeToString(
        deterministic=True
    )


STEPS = {
    "Relu": "Relu({0})",
    "Tanh": "Tanh({0})",
    "MatMul": "MatMul({0}, w)",
    "Gemm": "Gemm({0}, v)",
    "CumSum": "CumSum({0}, one)",
    "Add": "Add({0}, {1})",
    "Where": "Where(cond, {0}, {1})",
    "Softmax": "Softmax({0})",
    "Floor": "Identity({0})",
    "Cast": "Cast<to = 1>({0})",
    "Concat": "MatMul({0}, w)",
    "Scale": "Mul({0}, k)",
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=14)
)
@settings(max_examples=25, deadline=None)
def test_any_mixture_of_nodes_is_sound(steps: list[tuple[str, int, int]]) -> None:
    names, lines = ["x"], []
    for at, (op, one, other) in enumerate(steps):
        lines.append(f"n{at} = " + STEPS[op].format(names[one % len(names)], names[other % len(names)]))
        names.append(f"n{at}")
    text = f"g (float[4, 64] x, bool[4, 64] cond) => (float[4, 64] y, float[4, 64] {names[len(names) // 2]}_out) {{ "
    text += (
        "  ".join(lines)
        + f"  y = Identity({names[-1]})  {names[len(names) // 2]}_out = Neg({names[len(names) // 2]}) }}"
    )
    values = {**VALUES, "one": np.array(1), "k": np.array(1.25, np.float32)}
    model = parse(text, {name: array for name, array in values.items() if name in text})
    feeds = [{"x": normal(4, 64), "cond": normal(4, 64, seed=9) > 0}]
    halve(model, feeds, compute="half")
    for found in run(model, feeds[0]).values():
        assert np.isfinite(found).all()
