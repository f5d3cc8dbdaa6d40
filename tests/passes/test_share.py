"""share: every kind of weight, what is asked for in every form, and what is left alone and why."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxopt.calibration import collect
from onnxopt.encoding import Opened
from onnxopt.errors import UsageError
from onnxopt.model import Constant, Model, load
from onnxopt.passbase import Context, Effect, PassResult, lookup
from onnxopt.passes.share import Share
from onnxopt.pipeline.grammar import canonical
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session
from tests.passes.quantizing import Array, nodes, normal, parse, samples, weight

Feeds = list[dict[str, Array]]


def share(
    model: Model, feeds: Feeds | None = None, /, context: dict[str, Any] | None = None, **options: Any
) -> PassResult:
    """Gather what the pass needs, run it in place, and have the model checked."""
    pass_ = Share(**options)
    wanted = pass_.needs(model)
    statistics = None if feeds is None or not wanted else collect(model, wanted, samples(feeds))
    result = pass_.run(model, Context(statistics=statistics, evaluate=evaluate, **(context or {})))
    model.normalize()
    Session(model)
    return result


def values(model: Model, op: str, at: int = 1) -> Array:
    """A weight, whatever its form in the file."""
    clone = load(model.to_proto())
    Opened(clone, evaluate)
    found = nodes(clone, op)[0].inputs[at]
    assert isinstance(found, Constant)
    return np.array(found.values)


def distinct(array: Array) -> int:
    return len(np.unique(array))


def correlated(rows: int, width: int, seed: int = 0) -> Array:
    """Inputs that move together around a mean."""
    mixed = normal(width // 4, width, seed=90)
    middle = 1.5 * np.abs(normal(width, seed=91))
    return np.asarray(normal(rows, width // 4, seed=seed) @ mixed + 0.5 * normal(rows, width, seed=seed + 50) + middle)


def evenly(array: Array, levels: int) -> Array:
    low, high = array.min(), array.max()
    step = (high - low) / (levels - 1)
    return np.asarray(np.rint((array - low) / step) * step + low).astype(array.dtype)


# layers that multiply rows: text, initializers, operator
KINDS: dict[str, tuple[str, dict[str, Array], str]] = {
    "matmul": ("g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }", {"w": weight(64, 48)}, "MatMul"),
    "matmul_add": (
        "g (float[n, 64] x) => (float[n, 48] y) { a = MatMul(x, w) y = Add(b, a) }",
        {"w": weight(64, 48), "b": normal(48)},
        "MatMul",
    ),
    "gemm": (
        "g (float[n, 64] x) => (float[n, 48] y) { y = Gemm(x, w, b) }",
        {"w": weight(64, 48), "b": normal(48)},
        "Gemm",
    ),
    "gemm_scaled": (
        "g (float[n, 64] x) => (float[n, 48] y) { y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b) }",
        {"w": weight(48, 64), "b": normal(1, 48)},
        "Gemm",
    ),
}


def outputs(model: Model, feed: dict[str, Array]) -> Array:
    return np.asarray(next(iter(Session(model).run(feed).values())))


def error(kind: str, changed: Model) -> float:
    """Relative error of the outputs on inputs that were not seen, without their mean."""
    feed = {"x": correlated(500, 64, 40)}
    y, t = (outputs(each, feed) for each in (changed, parse(*KINDS[kind][:2])))
    return float(np.linalg.norm(y - t) / np.linalg.norm(t - t.mean(axis=0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"group": 8}, {"bits": 2, "fine": 0.0}, {"store": "plain"}], ids=str)
def test_shared_values_beat_levels_evenly_spread(kind: str, options: dict[str, Any]) -> None:
    text, given, op = KINDS[kind]
    feeds: Feeds = [{"x": correlated(400, 64, seed)} for seed in range(4)]
    errors = []
    extras: list[dict[str, Any]] = [{}, {"feedback": False}]
    for extra in extras:
        model = parse(text, given)
        result = share(model, feeds, **options, **extra)
        assert [change.kind for change in result.changes] == ["values shared"]
        stored = values(model, op)
        entries = 2 ** options.get("bits", 4)
        assert distinct(stored) <= entries * (6 if "group" in options else 1)
        errors.append(error(kind, model))
    rounded = parse(text, {**given, "w": evenly(given["w"], entries)})
    assert errors[0] < 0.85 * errors[1] < 0.85 * error(kind, rounded)
    assert errors[0] < 0.5 * error(kind, rounded)


@pytest.mark.parametrize("store", ["palette", "plain"])
def test_the_model_computes_with_what_is_stored(store: str) -> None:
    text, given, op = KINDS["gemm"]
    model = parse(text, given)
    share(model, store=store)
    feed = {"x": correlated(20, 64)}
    expected = outputs(parse(text, {**given, "w": values(model, op)}), feed)
    np.testing.assert_array_equal(outputs(model, feed), expected)
    assert (len(list(model.graph.nodes)) == 1) == (store == "plain")


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_bits(bits: int) -> None:
    model = parse("g (float[n, 256] x) => (float[n, 64] y) { y = MatMul(x, w) }", {"w": weight(256, 64)})
    result = share(model, bits=bits, fine=0.0, group=64)
    assert distinct(values(model, "MatMul")) == 2**bits
    assert "no real inputs" in result.notes[-1]
    assert len(model.to_proto().SerializeToString()) < 256 * 64 * bits / 8 + 4 * 2**bits + 4000


@pytest.mark.parametrize("kind", ["matmul_add", "gemm", "gemm_scaled"])
def test_the_mean_of_the_error_goes_into_the_bias(kind: str) -> None:
    text, given, _ = KINDS[kind]
    model = parse(text, given)
    feeds: Feeds = [{"x": correlated(300, 64, seed)} for seed in range(3)]
    result = share(model, feeds, bits=2, fine=0.0)
    assert ", bias" in result.changes[0].detail
    seen = {"x": np.concatenate([feed["x"] for feed in feeds])}
    y, t = (outputs(each, seen) for each in (model, parse(text, given)))
    np.testing.assert_allclose((y - t).mean(axis=0), 0, atol=5e-5)
    assert np.abs(y - t).max() > 0.1


# operators

OTHERS: dict[str, tuple[str, dict[str, Array], str, tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "conv": (
        "g (float[n, 16, 6, 6] x) => (float[n, 24, 6, 6] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w, b) }",
        {"w": weight(24, 16, 3, 3), "b": normal(24)},
        "Conv",
        (1,),
        {"x": (2, 16, 6, 6)},
    ),
    "conv_groups": (
        "g (float[n, 16, 6, 6] x) => (float[n, 24, 4, 4] y) { y = Conv<group = 4>(x, w) }",
        {"w": weight(24, 4, 3, 3)},
        "Conv",
        (1,),
        {"x": (2, 16, 6, 6)},
    ),
    "depthwise": (
        "g (float[n, 96, 6, 6] x) => (float[n, 96, 4, 4] y) { y = Conv<group = 96>(x, w) }",
        {"w": weight(96, 1, 3, 3)},
        "Conv",
        (1,),
        {"x": (2, 96, 6, 6)},
    ),
    "conv_1d": (
        "g (float[n, 16, 20] x) => (float[n, 32, 16] y) { y = Conv(x, w) }",
        {"w": weight(32, 16, 5)},
        "Conv",
        (1,),
        {"x": (2, 16, 20)},
    ),
    "conv_transpose": (
        "g (float[n, 16, 5, 5] x) => (float[n, 24, 7, 7] y) { y = ConvTranspose(x, w) }",
        {"w": weight(16, 24, 3, 3)},
        "ConvTranspose",
        (1,),
        {"x": (2, 16, 5, 5)},
    ),
    "left": (
        "g (float[b, 32, n] x) => (float[b, 48, n] y) { y = MatMul(w, x) }",
        {"w": weight(48, 32)},
        "MatMul",
        (0,),
        {"x": (2, 32, 5)},
    ),
    "batched": (
        "g (float[3, n, 32] x) => (float[3, n, 20] y) { y = MatMul(x, w) }",
        {"w": weight(3, 32, 20)},
        "MatMul",
        (1,),
        {"x": (3, 4, 32)},
    ),
    "one_row": (
        "g (float[n, 700] x) => (float[n, 1] y) { y = MatMul(x, w) }",
        {"w": weight(700, 1)},
        "MatMul",
        (1,),
        {"x": (9, 700)},
    ),
    "lstm": (
        "g (float[s, n, 16] x) => (float[s, 2, n, 12] y)"
        ' { y = LSTM<hidden_size = 12, direction = "bidirectional">(x, w, r) }',
        {"w": weight(2, 48, 16), "r": weight(2, 48, 12)},
        "LSTM",
        (1, 2),
        {"x": (5, 2, 16)},
    ),
    "gru": (
        "g (float[s, n, 16] x) => (float[s, 1, n, 20] y) { y = GRU<hidden_size = 20>(x, w, r) }",
        {"w": weight(1, 60, 16), "r": weight(1, 60, 20)},
        "GRU",
        (1, 2),
        {"x": (5, 2, 16)},
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("options", [{}, {"group": 4}, {"vector": 2}, {"scope": "model"}, {"fine": 1.0}], ids=str)
@pytest.mark.parametrize("data", [True, False])
def test_every_operator(kind: str, options: dict[str, Any], data: bool) -> None:
    text, given, op, places, shapes = OTHERS[kind]
    model = parse(text, given)
    feeds = [{name: normal(*shape, seed=seed) for name, shape in shapes.items()} for seed in range(6)]
    result = share(model, feeds if data else None, bias=False, **options)
    stored = {at: values(model, op, at) for at in places}
    changed = {name: stored[at] for at, name in zip(places, "wr", strict=False)}
    np.testing.assert_array_equal(outputs(model, feeds[0]), outputs(parse(text, {**given, **changed}), feeds[0]))
    assert len(result.changes) + len(result.skipped) == len(places)
    for change in result.changes:
        assert change.where
    for name, array in changed.items():
        apart = np.linalg.norm(array - given[name]) / np.linalg.norm(given[name])
        assert apart < 0.45


def test_tables_and_weights_that_several_read_are_stored_once() -> None:
    table = weight(500, 32)
    model = parse(
        """g (int64[n] i, float[m, 32] x) => (float[n, 32] y, float[m, 500] z) {
             y = Gather(w, i)
             z = Gemm<transB = 1>(x, w)
           }""",
        {"w": table},
    )
    result = share(model, [{"i": np.arange(5), "x": normal(50, 32)}], bias=False)
    assert len(result.changes) == 1
    assert [node.op for node in model.graph.nodes].count("Gather") == 2
    stored = values(model, "Gemm")
    found = Session(model).run({"i": np.arange(500), "x": np.eye(32, dtype=np.float32)})
    np.testing.assert_array_equal(found["y"], stored)
    np.testing.assert_array_equal(found["z"], stored.T)


def test_a_weight_that_something_else_reads_changes_for_it_too() -> None:
    model = parse(
        "g (float[n, 64] x) => (float[n, 48] y, float[48, 64] z) { y = MatMul(x, w) z = Transpose(w) }",
        {"w": weight(64, 48)},
    )
    share(model)
    found = Session(model).run({"x": normal(3, 64)})
    np.testing.assert_array_equal(found["z"], values(model, "MatMul").T)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=str)
def test_other_floats(dtype: Any) -> None:
    name = {"float16": "float16", "float64": "double", "bfloat16": "bfloat16"}[np.dtype(dtype).name]
    text = f"g ({name}[n, 64] x) => ({name}[n, 80] y) {{ y = MatMul(x, w) }}"
    given = weight(64, 80).astype(dtype)
    model = parse(text, {"w": given}, 17)
    pass_ = Share(fine=0.0)
    result = pass_.run(model, Context(evaluate=evaluate))
    assert len(result.changes) == 1
    stored = values(model, "MatMul")
    assert stored.dtype == given.dtype
    assert distinct(stored.astype(np.float64)) == 16
    model.normalize()


def test_bodies_of_if_are_shared_too() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (bool c, float[n, 32] x) => (float[n, 40] y) {
      y = If (c) <
        then_branch = a () => (float[n, 40] p) { p = MatMul(x, w) },
        else_branch = b () => (float[n, 40] q) { q = Gemm(x, v) }
      >
    }"""
    proto = onnx.parser.parse_model(text)
    for name, seed in (("w", 1), ("v", 2)):
        branch = proto.graph.node[0].attribute[seed - 1].g
        branch.initializer.append(numpy_helper.from_array(weight(32, 40, seed=seed), name))
    model = load(proto)
    result = share(model, [{"c": np.array(True), "x": normal(5, 32)}])
    assert len(result.changes) == 2
    for op in ("MatMul", "Gemm"):
        assert distinct(values(model, op)) <= 16


# what is left, and what loses nothing


def test_few_distinct_values_lose_none_whatever_is_asked_for() -> None:
    given = np.random.default_rng(0).choice(normal(14), (64, 40))
    for options in ({}, {"mode": "unique"}, {"vector": 2}, {"scope": "model"}):
        model = parse("g (float[n, 64] x) => (float[n, 40] y) { y = MatMul(x, w) }", {"w": given})
        result = share(model, [{"x": normal(30, 64)}], **options)
        assert "a palette of 14 entries, no bit is lost" in result.changes[0].detail
        np.testing.assert_array_equal(values(model, "MatMul").view(np.uint32), given.view(np.uint32))


def test_unique_is_exact_and_takes_nothing_else() -> None:
    few, many = np.random.default_rng(0).choice(normal(200), (64, 64)), weight(64, 64)
    model = parse("g (float[n, 64] x) => (float[n, 64] y) { a = MatMul(x, v) y = MatMul(a, w) }", {"v": few, "w": many})
    before = outputs(model, {"x": normal(4, 64)})
    pass_ = Share(mode="unique")
    assert pass_.effect is Effect.EXACT
    assert Share().effect is Effect.LOSSY
    assert pass_.needs(model) is None
    assert pass_.prepare == ("convert_opset",)
    result = share(model, mode="unique")
    assert len(result.changes) == 1
    assert [skip.reason for skip in result.skipped] == [
        "it has more than 256 distinct values, and no few for each channel"
    ]
    np.testing.assert_array_equal(outputs(model, {"x": normal(4, 64)}), before)


def test_few_distinct_values_of_each_channel_lose_none_either() -> None:
    given = np.stack([np.random.default_rng(at).choice(normal(9, seed=at), 300) for at in range(40)])
    model = parse("g (float[n, 300] x) => (float[n, 40] y) { y = Gemm<transB = 1>(x, w) }", {"w": given})
    result = share(model, mode="unique")
    assert "for each of 40 groups" in result.changes[0].detail
    np.testing.assert_array_equal(values(model, "Gemm").view(np.uint32), given.view(np.uint32))


def test_constants_that_no_layer_multiplies_by_lose_nothing() -> None:
    few = np.random.default_rng(0).choice(normal(9), (1, 5000))
    model = parse(
        "g (float[n, 5000] x) => (float[n, 5000] y) { a = Add(x, f) y = Mul(a, m) }", {"f": few, "m": normal(1, 5000)}
    )
    result = share(model)
    assert len(result.changes) == 1
    assert result.changes[0].where.endswith("constant f")
    assert result.skipped[0].reason.startswith("no layer multiplies by it")


def special(value: float) -> Array:
    found = weight(64, 48)
    found[3, 4] = value
    return found


LEFT: dict[str, tuple[dict[str, Array], str]] = {
    "nan": ({"w": special(np.nan)}, "it holds NaN or infinity"),
    "infinity": ({"w": special(np.inf)}, "it holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_finite_is_left_with_a_reason(kind: str) -> None:
    given, reason = LEFT[kind]
    model = parse("g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }", given)
    result = share(model)
    assert not result.changes
    assert [skip.reason for skip in result.skipped] == [reason]


@pytest.mark.parametrize("shape", [(2, 3), (8, 8), (0, 5)], ids=str)
def test_small_weights_are_left_where_nothing_is_saved(shape: tuple[int, int]) -> None:
    model = parse(
        f"g (float[n, {shape[0]}] x) => (float[n, {shape[1]}] y) {{ y = MatMul(x, w) }}", {"w": weight(*shape)}
    )
    result = share(model)
    assert not result.changes
    assert len(result.skipped) == 1
    assert "bytes" in result.skipped[0].reason


@pytest.mark.parametrize(
    "given",
    [np.zeros((64, 48)), np.full((64, 48), 2.5), np.full((64, 48), -0.0), np.eye(64, 48)],
    ids=["zeros", "equal", "minus zero", "eye"],
)
def test_weights_of_one_or_two_values(given: Array) -> None:
    model = parse("g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }", {"w": given.astype(np.float32)})
    share(model, [{"x": normal(30, 64)}])
    np.testing.assert_array_equal(values(model, "MatMul").view(np.uint32), given.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("vector", [1, 2])
def test_weights_of_any_size(scale: float, vector: int) -> None:
    given = (weight(64, 48) * np.float32(scale)).astype(np.float32)
    model = parse("g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }", {"w": given})
    share(model, [{"x": normal(80, 64)}], vector=vector)
    apart = (values(model, "MatMul").astype(np.float64) - given) / scale
    assert np.linalg.norm(apart) < (0.25 if vector == 1 else 0.6) * np.linalg.norm(given.astype(np.float64) / scale)


def test_zeros_of_a_sparse_weight_stay_zeros() -> None:
    given = weight(64, 96)
    given[np.random.default_rng(1).random(given.shape) < 0.5] = 0
    for feeds in (None, [{"x": correlated(200, 64, seed)} for seed in range(3)]):
        model = parse("g (float[n, 64] x) => (float[n, 96] y) { y = MatMul(x, w) }", {"w": given})
        result = share(model, feeds)
        assert "zeros kept" in result.changes[0].detail
        assert (values(model, "MatMul")[given == 0] == 0).all()


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_many_zeros_are_a_bitmask_beside_the_palette(opset: int) -> None:
    given = weight(128, 128)
    given[np.random.default_rng(1).random(given.shape) < 0.9] = 0
    model = parse("g (float[n, 128] x) => (float[n, 128] y) { y = MatMul(x, w) }", {"w": given}, opset)
    share(model, fine=0.0)
    most = {9: 1.0, 11: 0.5}.get(opset, 0.3)
    assert len(model.to_proto().SerializeToString()) < 128 * 128 * most + 2500
    assert (values(model, "MatMul")[given == 0] == 0).all()
    assert 1 < distinct(values(model, "MatMul")) <= 16


def test_outputs_functions_and_foreign_readers_are_left_with_a_reason() -> None:
    model = parse("g (float[n, 64] x) => (float[n, 48] y, float[64, 48] w) { y = MatMul(x, w) }", {"w": weight(64, 48)})
    assert "output" in share(model).skipped[0].reason


def test_only_and_exclude() -> None:
    text = "g (float[n, 64] x) => (float[n, 64] y) { [one] a = MatMul(x, v) [two] y = MatMul(a, w) }"
    given = {"v": weight(64, 64, seed=2), "w": weight(64, 64)}
    model = parse(text, given)
    result = share(model, exclude=("one",))
    assert [change.where.split(",")[0] for change in result.changes] == ["two"]
    assert [skip.reason for skip in result.skipped] == ["excluded by 'one'"]
    with pytest.raises(UsageError, match="no node is called"):
        share(parse(text, given), only=("three",))


def test_one_codebook_for_all() -> None:
    text = "g (float[n, 64] x) => (float[n, 48] y) { a = MatMul(x, v) y = MatMul(a, w) }"
    model = parse(text, {"v": weight(64, 64, seed=2), "w": weight(64, 48) * 3})
    share(model, scope="model")
    clone = load(model.to_proto())
    Opened(clone, evaluate)
    both = np.concatenate([node.inputs[1].values.ravel() for node in nodes(clone, "MatMul")])
    assert distinct(both) <= 16


def test_so_large_a_share_of_weights_gets_eight_bits() -> None:
    text = "g (float[n, 64] x) => (float[n, 512] y) { a = MatMul(x, v) y = MatMul(a, w) }"
    given = {"v": weight(64, 64, seed=2), "w": weight(64, 512)}
    found = []
    for fine in (0.0, 0.12):
        model = parse(text, given)
        share(model, fine=fine)
        clone = load(model.to_proto())
        Opened(clone, evaluate)
        found.append([distinct(node.inputs[1].values) for node in nodes(clone, "MatMul")])
    assert found[0][0] <= 16
    assert found[1][0] > 200
    assert found[0][1] == found[1][1]


# tying

TWINS = "g (float[n, 64] x) => (float[n, 64] y) { a = MatMul(x, v) y = MatMul(a, w) }"


def twins(apart: float) -> dict[str, Array]:
    first = weight(64, 64)
    return {"v": first, "w": first + np.float32(apart) * weight(64, 64, seed=5)}


@pytest.mark.parametrize(("apart", "tied"), [(0.01, True), (0.5, False)])
def test_layers_nearly_the_same_become_one(apart: float, tied: bool) -> None:
    model = parse(TWINS, twins(apart))
    result = share(model, tie=0.1)
    assert any(change.kind == "tied" for change in result.changes) == tied
    assert sum(change.kind == "values shared" for change in result.changes) == (1 if tied else 2)
    assert len(nodes(model, "Gather")) == (1 if tied else 2)


@pytest.mark.parametrize(
    "context", [{"holds": lambda _m: False}, {"compare": lambda _m, _n=None, _r=None: 5.0}], ids=str
)
def test_outputs_decide_whether_layers_are_tied(context: dict[str, Any]) -> None:
    model, given = parse(TWINS, twins(0.01)), twins(0.01)
    result = share(model, tie=0.1, store="plain", bits=8, context=context)
    assert not any(change.kind == "tied" for change in result.changes)
    assert not np.array_equal(*(node.inputs[1].values for node in nodes(model, "MatMul")))
    np.testing.assert_allclose(nodes(model, "MatMul")[0].inputs[1].values, given["v"], atol=0.02)


# options


@pytest.mark.parametrize(
    "options",
    [
        {"vector": 2, "group": 3},
        {"scope": "model", "group": 3},
        {"scope": "model", "vector": 2},
        {"mode": "unique", "tie": 0.1},
        {"bits": 0},
        {"bits": 9},
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Share(**options)


def test_the_pass_is_found_and_prints_as_it_was_read() -> None:
    assert lookup("share") is Share
    text = "share:bits=3:group=8:only=a+b"
    assert parse_passes(canonical(parse_passes(text)))[0].pass_ == parse_passes(text)[0].pass_


def test_the_same_run_gives_the_same_bytes() -> None:
    asked: list[dict[str, Any]] = [{}, {"vector": 2, "bits": 6}]
    for options in asked:
        protos = []
        for _ in range(2):
            model = parse(*KINDS["gemm"][:2])
            share(model, [{"x": correlated(100, 64)}], **options)
            protos.append(model.to_proto().SerializeToString(deterministic=True))
        assert protos[0] == protos[1]
