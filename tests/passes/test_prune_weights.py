"""prune_weights: every kind of weight, what is asked for in every form, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest

from onnxopt.calibration import collect
from onnxopt.errors import UsageError
from onnxopt.model import Constant, Model, load
from onnxopt.numerics.blocks import output_error
from onnxopt.passbase import Context, Effect, PassResult, lookup
from onnxopt.passes.prune_weights import PruneWeights
from onnxopt.pipeline.grammar import canonical
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.pipeline.passes import evaluate
from onnxopt.runtime import Session
from tests.passes.quantizing import Array, nodes, normal, parse, samples, weight

Feeds = list[dict[str, Array]]


def prune(model: Model, feeds: Feeds | None = None, /, **options: Any) -> PassResult:
    """Gather what the pass needs, run it in place, and have the model checked."""
    pass_ = PruneWeights(**options)
    wanted = pass_.needs(model)
    statistics = None if feeds is None or not wanted else collect(model, wanted, samples(feeds))
    result = pass_.run(model, Context(statistics=statistics, evaluate=evaluate))
    model.normalize()
    Session(model)
    return result


def values(model: Model, op: str, at: int = 1) -> Array:
    return np.array(nodes(model, op)[0].inputs[at].values)


def zeros(array: Array) -> float:
    return float((array == 0).mean())


def correlated(rows: int, width: int, seed: int = 0, mean: float = 1.5) -> Array:
    """Inputs that move together around a mean."""
    mixed = normal(width // 4, width, seed=90)
    middle = mean * np.abs(normal(width, seed=91))
    return np.asarray(normal(rows, width // 4, seed=seed) @ mixed + 0.5 * normal(rows, width, seed=seed + 50) + middle)


# layers that multiply rows: text, initializers, operator
KINDS: dict[str, tuple[str, dict[str, Array], str]] = {
    "matmul": (
        "g (float[n, 64] x) => (float[n, 32] y) { y = MatMul(x, w) }",
        {"w": weight(64, 32)},
        "MatMul",
    ),
    "matmul_add": (
        "g (float[n, 64] x) => (float[n, 32] y) { a = MatMul(x, w) y = Add(b, a) }",
        {"w": weight(64, 32), "b": normal(32)},
        "MatMul",
    ),
    "gemm": (
        "g (float[n, 64] x) => (float[n, 32] y) { y = Gemm(x, w, b) }",
        {"w": weight(64, 32), "b": normal(32)},
        "Gemm",
    ),
    "gemm_scaled": (
        "g (float[n, 64] x) => (float[n, 32] y) { y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b) }",
        {"w": weight(32, 64), "b": normal(1, 32)},
        "Gemm",
    ),
    "gemm_without_bias": (
        "g (float[n, 64] x) => (float[n, 32] y) { y = Gemm<transB = 1>(x, w) }",
        {"w": weight(32, 64)},
        "Gemm",
    ),
}


def rows_model(kind: str) -> Model:
    text, initializers, _ = KINDS[kind]
    return parse(text, initializers)


def error(kind: str, **options: Any) -> float:
    """Relative error of the outputs on inputs that were not seen."""
    op = KINDS[kind][2]
    model, exact = rows_model(kind), rows_model(kind)
    prune(model, [{"x": correlated(400, 64, seed)} for seed in range(4)], **options)
    feed = {"x": correlated(500, 64, 40)}
    y, t = (np.asarray(next(iter(Session(each).run(feed).values()))) for each in (model, exact))
    assert zeros(values(model, op)) >= 0.5 - 1e-9
    return float(np.linalg.norm(y - t) / np.linalg.norm(t - t.mean(axis=0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "row"}], ids=str)
def test_with_data_each_criterion_beats_the_one_below_it(kind: str, asked: dict[str, Any]) -> None:
    found = {criterion: error(kind, criterion=criterion, bias=False, **asked) for criterion in ("magnitude", "wanda")}
    found |= {criterion: error(kind, criterion=criterion, **asked) for criterion in ("sparsegpt", "least_squares")}
    found["auto"] = error(kind, **asked)
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"]
    assert found["least_squares"] < 0.9 * found["wanda"]
    assert found["auto"] <= 1.02 * min(found.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "matmul"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_mean_of_the_error_goes_into_the_bias(kind: str, criterion: str) -> None:
    model, exact = rows_model(kind), rows_model(kind)
    feeds: Feeds = [{"x": correlated(300, 64, seed)} for seed in range(3)]
    result = prune(model, feeds, sparsity=0.5, criterion=criterion)
    assert result.changes[0].detail.endswith(", bias")
    seen = {"x": np.concatenate([feed["x"] for feed in feeds])}
    y, t = (np.asarray(next(iter(Session(each).run(seen).values()))) for each in (model, exact))
    np.testing.assert_allclose((y - t).mean(axis=0), 0, atol=2e-5)
    assert np.abs(y - t).max() > 0.1
    assert len(list(model.graph.nodes)) == len(list(exact.graph.nodes))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_inputs_that_never_vary_need_no_weights_but_a_bias(share: float) -> None:
    feeds: Feeds = []
    for seed in range(2):
        x = correlated(200, 64, seed)
        x[:, : int(share * 64)] = np.linspace(-900, 800, int(share * 64))
        feeds.append({"x": x.astype(np.float32)})
    model = rows_model("gemm")
    prune(model, feeds, sparsity=share, scope="row")
    assert not values(model, "Gemm")[: int(share * 64)].any()
    found, exact = (Session(each).run(feeds[0])["y"] for each in (model, rows_model("gemm")))
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_a_matmul_without_an_add_has_no_bias() -> None:
    model = rows_model("matmul")
    result = prune(model, [{"x": correlated(300, 64)}], sparsity=0.5)
    assert "bias" not in result.changes[0].detail
    assert [node.op for node in model.graph.nodes] == ["MatMul"]


# convolutions


def conv(text: str, shape: tuple[int, ...], channels: int, bias: bool = True, outputs: int | None = None) -> Model:
    given = {"w": weight(*shape)} | ({"b": normal(outputs or shape[0])} if bias else {})
    return parse(f"g (float[n, {channels}, 9, 9] x) => (float[n, o, h, k] y) {{ {text} }}", given)


CONVS: dict[str, Callable[[], Model]] = {
    "plain": lambda: conv("y = Conv<pads = [1, 1, 1, 1]>(x, w, b)", (16, 8, 3, 3), 8),
    "without_bias": lambda: conv("y = Conv<strides = [2, 2]>(x, w)", (16, 8, 3, 3), 8, bias=False),
    "grouped": lambda: conv("y = Conv<group = 2, pads = [1, 1, 1, 1]>(x, w, b)", (16, 8, 3, 3), 16),
    "pointwise": lambda: conv("y = Conv(x, w, b)", (32, 16, 1, 1), 16),
    "narrow": lambda: conv("y = Conv(x, w, b)", (16, 3, 3, 3), 3),
}


def images(channels: int, count: int = 3) -> Feeds:
    mixed = normal(channels, channels, seed=77)
    return [
        {
            "x": np.asarray(
                np.einsum("nchw,cd->ndhw", np.abs(normal(4, channels, 9, 9, seed=s)), mixed) + 0.5, np.float32
            )
        }
        for s in range(count)
    ]


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions_of_any_form(kind: str) -> None:
    channels = CONVS[kind]().graph.inputs[0].shape[1]
    test = images(channels, 9)[-1]
    exact = next(iter(Session(CONVS[kind]()).run(test).values()))
    errors = {}
    for criterion in ("magnitude", "wanda", "sparsegpt", "auto"):
        model = CONVS[kind]()
        result = prune(model, images(channels), sparsity=0.5, criterion=criterion, bias=criterion != "magnitude")
        assert zeros(values(model, "Conv")) == pytest.approx(0.5, abs=0.01)
        assert [change.kind for change in result.changes] == ["weights zeroed"]
        errors[criterion] = float(np.linalg.norm(next(iter(Session(model).run(test).values())) - exact))
    assert errors["auto"] < errors["wanda"]
    assert errors["auto"] < 1.05 * errors["sparsegpt"]
    assert errors["auto"] < 0.9 * errors["magnitude"]


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("data", [False, True])
def test_groups_of_a_convolution_are_channels_of_one_position(kind: str, data: bool) -> None:
    model = CONVS[kind]()
    channels = model.graph.inputs[0].shape[1]
    prune(model, images(channels) if data else None, pattern="2of4")
    found = values(model, "Conv")
    for start in range(0, found.shape[1], 4):
        group = found[:, start : start + 4]
        assert ((group != 0).sum(axis=1) == min(2, group.shape[1])).all()


def test_depthwise_convolutions_stay_unless_asked_for() -> None:
    def made() -> Model:
        return conv("y = Conv<group = 32>(x, w, b)", (32, 1, 3, 3), 32)

    model = made()
    result = prune(model, images(32), sparsity=0.5)
    assert not result.changes
    assert [skip.reason for skip in result.skipped] == ["it is depthwise; depthwise=true zeroes those too"]
    model = made()
    prune(model, images(32), sparsity=0.5, depthwise=True)
    assert ((values(model, "Conv") == 0).reshape(32, -1).sum(axis=1) == 4).all()


def test_transposed_convolutions_are_judged_by_what_their_channels_are_worth() -> None:
    model = conv("y = ConvTranspose<strides = [2, 2]>(x, w, b)", (16, 8, 3, 3), 16, outputs=8)
    feeds: Feeds = [{"x": normal(2, 16, 9, 9) * np.array([10.0, *[0.01] * 15]).reshape(-1, 1, 1)}]
    feeds[0]["x"] = feeds[0]["x"].astype(np.float32)
    result = prune(model, feeds, sparsity=0.9)
    assert "Wanda" in result.changes[0].detail
    found = values(model, "ConvTranspose")
    assert zeros(found[0]) == 0
    assert zeros(found) == pytest.approx(0.9, abs=0.001)


# recurrent


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("data", [False, True])
def test_both_weights_of_recurrent_operators(op: str, gates: int, data: bool) -> None:
    model = parse(
        f"g (float[5, 2, 24] x) => (float[5, 1, 2, 20] y) {{ y, h = {op}<hidden_size = 20>(x, w, r) }}",
        {"w": weight(1, gates * 20, 24), "r": weight(1, gates * 20, 20, seed=2)},
    )
    result = prune(model, [{"x": normal(5, 2, 24)}] if data else None, sparsity=0.5)
    assert [zeros(values(model, op, at)) for at in (1, 2)] == [0.5, 0.5]
    assert ["Wanda" in change.detail for change in result.changes] == [data, False]


# without data, and what is asked for


def test_without_data_the_smallest_go_and_none_changes() -> None:
    model = rows_model("gemm")
    before, bias = values(model, "Gemm"), values(model, "Gemm", 2)
    result = prune(model, sparsity=0.7)
    after = values(model, "Gemm")
    gone = after == 0
    np.testing.assert_array_equal(after[~gone], before[~gone])
    assert gone.sum() == int(0.7 * before.size)
    assert np.abs(before[gone]).max() <= np.abs(before[~gone]).min()
    np.testing.assert_array_equal(values(model, "Gemm", 2), bias)
    assert "no real inputs: weights go by size alone, and none makes good for them" in result.notes
    assert result.changes[0].count == gone.sum()
    assert result.changes[0].detail == "70.0% of 2,048 zero, magnitude"


def test_a_threshold_is_absolute_or_of_the_largest() -> None:
    for options, limit in (({"threshold": 0.2}, 0.2), ({"relative": 0.3}, 0.3 * np.abs(weight(64, 32)).max())):
        model = rows_model("matmul")
        before = values(model, "MatMul")
        prune(model, **options)
        np.testing.assert_array_equal(values(model, "MatMul"), np.where(np.abs(before) <= limit, 0, before))


def test_weights_behind_a_threshold_make_good_too_where_there_is_data() -> None:
    model, plain = rows_model("gemm"), rows_model("gemm")
    feeds: Feeds = [{"x": correlated(400, 64)}]
    result = prune(model, feeds, relative=0.3)
    prune(plain, feeds, relative=0.3, refit=False, bias=False)
    np.testing.assert_array_equal(values(model, "Gemm") == 0, values(plain, "Gemm") == 0)
    assert "magnitude and least squares, bias" in result.changes[0].detail
    feed = {"x": correlated(300, 64, 9)}
    exact = Session(rows_model("gemm")).run(feed)["y"]
    errors = [float(np.linalg.norm(Session(each).run(feed)["y"] - exact)) for each in (model, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_without_refit_only_zeros_change() -> None:
    for criterion in ("auto", "sparsegpt", "least_squares", "wanda"):
        model = rows_model("gemm")
        before = values(model, "Gemm")
        prune(model, [{"x": correlated(300, 64)}], sparsity=0.5, refit=False, criterion=criterion)
        after = values(model, "Gemm")
        np.testing.assert_array_equal(after[after != 0], before[after != 0])


def test_rows_or_the_whole_layer_are_counted() -> None:
    scaled = weight(64, 32) * np.geomspace(0.01, 1, 32).astype(np.float32)
    text = KINDS["matmul"][0]
    by_layer, by_row = parse(text, {"w": scaled}), parse(text, {"w": scaled})
    prune(by_layer, sparsity=0.5)
    prune(by_row, sparsity=0.5, scope="row")
    assert ((values(by_row, "MatMul") == 0).sum(axis=0) == 32).all()
    assert (values(by_layer, "MatMul") == 0).sum() == 1024
    assert zeros(values(by_layer, "MatMul")[:, 0]) > 0.95


def test_global_sparsity_compares_tensors_by_what_they_lose() -> None:
    text = "g (float[n, 64] x) => (float[n, 16] y) { a = MatMul(x, v) y = MatMul(a, w) }"
    flat = (np.sign(weight(32, 16)) * (1 + 0.01 * np.abs(normal(32, 16)))).astype(np.float32)
    peaked = weight(64, 32) ** 3
    for scale in (1.0, 1e-3):  # of one tensor: what is lost relative to its own weights is the same
        model = parse(text, {"v": np.asarray(peaked * scale, np.float32), "w": flat})
        prune(model, sparsity=0.5, scope="global")
        found = [np.array(node.inputs[1].values) for node in nodes(model, "MatMul")]
        assert sum(int((each == 0).sum()) for each in found) == (64 * 32 + 32 * 16) // 2
        assert zeros(found[0]) > 0.55
        assert zeros(found[1]) < 0.3


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    for options in ({}, {"threshold": 0.0}, {"sparsity": 0.0, "criterion": "wanda", "scope": "global"}):
        pass_ = PruneWeights(**options)
        assert pass_.effect is Effect.EXACT
        model = rows_model("gemm")
        assert pass_.needs(model) is None
        result = pass_.run(model, Context())
        assert not result.changes
        assert result.notes == ["nothing is asked for: give sparsity=0.5, pattern=2of4, threshold= or relative="]
    assert PruneWeights(sparsity=0.1).effect is Effect.LOSSY


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity and pattern exclude each other"),
        ({"threshold": 0.5, "relative": 0.1}, "threshold and relative exclude each other"),
        ({"sparsity": 1.0}, "0.0 to 0.99"),
        ({"sparsity": float("nan")}, "out of range"),
        ({"pattern": "4:4"}, "'4:4' is not N:M with N below M"),
        ({"pattern": "0:4"}, "is not N:M"),
        ({"pattern": "half"}, "is not N:M"),
        ({"pattern": "2of4", "scope": "row"}, "scope=row has no meaning with pattern"),
        ({"threshold": 0.1, "scope": "global"}, "scope=global has no meaning with threshold"),
        ({"threshold": 0.1, "criterion": "sparsegpt"}, "threshold goes by size alone"),
        ({"sparsity": 0.1, "criterion": "random"}, "'random' is not among its values"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=r".") as caught:
        PruneWeights(**options)
    assert said in f"{caught.value.cause} {caught.value.remedy}"


def test_the_pattern_can_be_typed_in_a_pass_list() -> None:
    for text in ("prune_weights:pattern=2of4", "prune_weights{pattern=2:4}", 'prune_weights:pattern="2:4"'):
        steps = parse_passes(text)
        assert steps[0].pass_.pruning.wanted.kept == 2  # type: ignore[attr-defined]
        assert canonical(parse_passes(canonical(steps))) == canonical(steps)


# what stays, and why


def reasons(result: PassResult) -> list[str]:
    return [skip.reason for skip in result.skipped]


def test_every_weight_left_alone_is_told() -> None:
    text = """g (float[n, 64] x, int64[n] i) => (float[n, 16] y, float[n, 64] t, float[2, 2] s, float[64, 16] o) {
        y = MatMul(x, w)
        t = Gather(table, i)
        s = MatMul(p, q)
        o = Identity(w)
    }"""
    given = {"w": weight(64, 16), "table": weight(50, 64), "p": weight(2, 2), "q": weight(2, 2)}
    result = prune(parse(text, given), sparsity=0.5)
    assert not result.changes
    assert {skip.node: skip.reason for skip in result.skipped} == {
        "t, weight table": "its rows are looked up, not multiplied: a zero changes what a row is for all that read it",
        "s, weight p": "its weight has 4 elements, fewer than 256",
        "s, weight q": "its weight has 4 elements, fewer than 256",
        "y, weight w": "its weight is read by o too, which is to stay as it is",
    }


def test_a_weight_that_is_an_output_stays() -> None:
    result = prune(
        parse("g (float[n, 64] x) => (float[n, 16] y, float[64, 16] w) { y = MatMul(x, w) }", {"w": weight(64, 16)}),
        sparsity=0.5,
    )
    assert reasons(result) == ["it is an output too"]


@pytest.mark.parametrize(
    ("values_of", "options", "said"),
    [
        (lambda w: w * 0, {"sparsity": 0.5}, "its weight is zero already"),
        (lambda w: np.where(w > 0.1, np.nan, w), {"sparsity": 0.5}, "its weight holds NaN or infinity"),
        (lambda w: np.where(w > 0.1, np.inf, w), {"threshold": 0.5}, "its weight holds NaN or infinity"),
        (lambda w: w * 0 + 1, {"threshold": 0.5}, "no weight is that small"),
        (lambda w: np.where(np.abs(w) < 0.15, 0, w), {"sparsity": 0.3}, "of it are zero already, as many as asked for"),
        (lambda w: w, {"only": ("nobody*", "y"), "exclude": ("y",), "sparsity": 0.5}, None),
        (lambda w: w, {"exclude": ("y",), "sparsity": 0.5}, "excluded by 'y'"),
    ],
)
def test_values_and_names_that_keep_a_weight(
    values_of: Callable[[Array], Array], options: dict[str, Any], said: str | None
) -> None:
    given = np.asarray(values_of(weight(64, 32)), np.float32)
    model = parse(KINDS["matmul"][0], {"w": given})
    if said is None:
        with pytest.raises(UsageError, match="no node is called 'nobody"):
            prune(model, **options)
        return
    result = prune(model, **options)
    assert not result.changes
    assert reasons(result)[0].endswith(said)
    np.testing.assert_array_equal(values(model, "MatMul"), given)


def test_one_input_an_output_leaves_nothing_to_choose() -> None:
    text = "g (float[n, 1] x) => (float[n, 512] y) { y = MatMul(x, w) }"
    for options in ({"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}):
        model = parse(text, {"w": weight(1, 512)})
        assert reasons(prune(model, [{"x": normal(4, 1)}], **options)) == ["it has too few inputs for that"]
    model = parse(text, {"w": weight(1, 512)})
    prune(model, [{"x": normal(4, 1)}], sparsity=0.5)
    assert zeros(values(model, "MatMul")) == 0.5


def test_twice_is_once() -> None:
    asked: list[dict[str, Any]] = [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "row"}]
    for options in (*asked, {"sparsity": 0.5, "scope": "global"}, {"threshold": 0.1, "refit": False}):
        model = rows_model("gemm")
        feeds: Feeds = [{"x": correlated(300, 64)}]
        prune(model, feeds, **options)
        once = values(model, "Gemm")
        again = prune(model, feeds, **options)
        assert not again.changes
        np.testing.assert_array_equal(values(model, "Gemm"), once)


# shared weights, bodies, functions, types


SHARED = """g (float[n, 64] x, float[m, 64] z) => (float[n, 32] y, float[m, 32] t) {
    y = Gemm(x, w, b)
    t = Gemm(z, w, b)
}"""


def test_a_weight_of_two_layers_stays_one_and_each_has_a_bias_of_its_own() -> None:
    def made() -> Model:
        return parse(SHARED, {"w": weight(64, 32), "b": normal(32)})

    model = made()
    feed = {"x": correlated(250, 64), "z": correlated(200, 64, 5) - 7}
    prune(model, [feed], sparsity=0.5)
    first, second = nodes(model, "Gemm")
    assert first.inputs[1] is second.inputs[1]
    assert zeros(values(model, "Gemm")) == 0.5
    assert not np.allclose(first.inputs[2].values, second.inputs[2].values)
    found, exact = Session(model).run(feed), Session(made()).run(feed)
    for name in ("y", "t"):
        np.testing.assert_allclose((found[name] - exact[name]).mean(axis=0), 0, atol=1e-4)


def test_a_weight_that_an_excluded_layer_reads_stays() -> None:
    model = parse(SHARED, {"w": weight(64, 32), "b": normal(32)})
    result = prune(model, sparsity=0.5, exclude=("t",))
    assert not result.changes
    assert sorted(reasons(result)) == [
        "excluded by 't'",
        "its weight is read by t too, which is to stay as it is",
    ]


def test_a_weight_read_in_two_ways_stays() -> None:
    text = """g (float[n, 64] x) => (float[n, 64] y, float[n, 64] t) {
        y = MatMul(x, w)
        t = Gemm<transB = 1>(x, w)
    }"""
    result = prune(parse(text, {"w": weight(64, 64)}), sparsity=0.5)
    assert reasons(result) == ["its weight is read in different ways"]


def test_a_table_that_is_multiplied_too_stays() -> None:
    text = """g (int64[n] i) => (float[n, 80] y) {
        x = Gather(table, i)
        y = Gemm<transB = 1>(x, table)
    }"""
    result = prune(parse(text, {"table": weight(80, 64)}), sparsity=0.5)
    assert not result.changes
    assert "its weight is read by x too, which is to stay as it is" in reasons(result)


def test_weights_in_bodies_and_in_constant_nodes_go_by_size() -> None:
    numbers = ", ".join(f"{value:.6f}" for value in weight(32, 32).reshape(-1))
    text = f"""g (float[n, 32] x, bool c) => (float[n, 32] y) {{
        y = If(c) <
            then_branch = a () => (float[n, 32] p) {{
                w = Constant<value = float[32, 32] {{{numbers}}}>()
                p = MatMul(x, w)
            }},
            else_branch = b () => (float[n, 32] q) {{ q = MatMul(x, v) }}
        >
    }}"""
    model = parse(text, {"v": weight(32, 32, seed=5)})
    feeds: Feeds = [{"x": normal(9, 32), "c": np.array(True)}, {"x": normal(9, 32), "c": np.array(False)}]
    result = prune(model, feeds, sparsity=0.5)
    assert [change.detail for change in result.changes] == ["50.0% of 1,024 zero, magnitude"] * 2
    assert [zeros(np.array(node.inputs[1].values)) for node in nodes(model, "MatMul")] == [0.5, 0.5]


def test_local_functions_are_left_alone() -> None:
    numbers = ", ".join(f"{value:.6f}" for value in weight(16, 16).reshape(-1))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[n, 16] x) => (float[n, 16] y) {{ y = local.f(x) }}
        <domain: "local", opset_import: ["" : 17]>
        f (p) => (q) {{
            w = Constant<value = float[16, 16] {{{numbers}}}>()
            q = MatMul(p, w)
        }}"""
    )
    result = prune(load(proto), sparsity=0.5)
    assert not result.changes
    assert reasons(result) == ["it is in a local function, which several callers share"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_of_other_types_keep_theirs(dtype: type) -> None:
    name = np.dtype(dtype).name
    word = "double" if name == "float64" else name
    model = parse(
        f"g ({word}[n, 64] x) => ({word}[n, 32] y) {{ a = MatMul(x, w) y = Add(a, b) }}",
        {"w": weight(64, 32).astype(dtype), "b": normal(32).astype(dtype)},
    )
    pass_ = PruneWeights(sparsity=0.5)
    result = pass_.run(model, Context())
    found = nodes(model, "MatMul")[0].inputs[1].values
    assert found.dtype == np.dtype(dtype)
    assert zeros(found.astype(np.float64)) == 0.5
    assert result.changes[0].count == 1024


def test_half_precision_layers_are_refitted_in_their_type() -> None:
    def made() -> Model:
        return parse(
            "g (float16[n, 64] x) => (float16[n, 32] y) { a = MatMul(x, w) y = Add(a, b) }",
            {"w": weight(64, 32).astype(np.float16), "b": normal(32).astype(np.float16)},
        )

    model = made()
    result = prune(model, [{"x": correlated(200, 64).astype(np.float16)}], sparsity=0.5)
    assert values(model, "MatMul").dtype == np.float16
    assert values(model, "Add", 1).dtype == np.float16
    assert "least squares" in result.changes[0].detail or "magnitude" in result.changes[0].detail
    assert zeros(values(model, "MatMul")) == pytest.approx(0.5, abs=0.002)


def test_values_are_replaced_not_written_into() -> None:
    model = rows_model("gemm")
    held = nodes(model, "Gemm")[0].inputs[1].values
    before = held.copy()
    clone = model.clone().model
    prune(model, [{"x": correlated(100, 64)}], sparsity=0.5)
    np.testing.assert_array_equal(held, before)
    np.testing.assert_array_equal(values(clone, "Gemm"), before)


def test_the_same_again_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        model = rows_model("gemm")
        prune(model, [{"x": correlated(300, 64)}], sparsity=0.5)
        made.append(model.to_proto().SerializeToString(deterministic=True))
    assert made[0] == made[1]


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21])
def test_every_operator_set(opset: int) -> None:
    text = "g (float[n, 8, 9, 9] x) => (float[n, 16, 7, 7] y) { y = Conv(x, w) }"
    model = parse(text, {"w": weight(16, 8, 3, 3)}, opset)
    prune(model, images(8), sparsity=0.5)
    assert zeros(values(model, "Conv")) == 0.5


# what a refit is held to


def test_a_refit_that_would_be_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(part: Array, *_: object) -> Array:
        return np.full_like(part, 1e-9)

    for name in ("sparse_gpt", "refitted"):
        monkeypatch.setattr(f"onnxopt.sparsity.pruning.{name}", worse)
    model = rows_model("gemm")
    result = prune(model, [{"x": correlated(300, 64)}], sparsity=0.5)
    assert result.changes[0].detail == "50.0% of 2,048 zero, Wanda, bias"


def test_no_second_moments_within_reach_leave_wanda_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxopt.calibration.moments.MOST_BYTES", 16)
    cases: list[tuple[Callable[[], Model], Feeds]] = [
        (lambda: rows_model("gemm"), [{"x": correlated(300, 64)}]),
        (CONVS["grouped"], images(16)),
        (CONVS["plain"], images(8)),
    ]
    for made, feeds in cases:
        model = made()
        before = made()
        result = prune(model, feeds, sparsity=0.5)
        assert result.changes[0].detail.endswith("zero, Wanda, bias")
        op = "Gemm" if nodes(model, "Gemm") else "Conv"
        pruned, exact = values(model, op), values(before, op)
        np.testing.assert_array_equal(pruned[pruned != 0], exact[pruned != 0])


def test_the_error_is_judged_with_the_moments_of_the_layer() -> None:
    model = rows_model("matmul")
    exact = values(model, "MatMul").T.astype(np.float64)
    x = correlated(500, 64).astype(np.float64)
    h = x.T @ x / len(x)
    errors = []
    for criterion in ("magnitude", "wanda", "auto"):
        pruned = rows_model("matmul")
        prune(pruned, [{"x": x.astype(np.float32)}], sparsity=0.5, criterion=criterion)
        errors.append(output_error(exact, values(pruned, "MatMul").T, h))
    assert errors[0] > errors[1] > errors[2]


# whole channels


def test_channels_that_become_zero_are_told_and_prune_removes_them() -> None:
    first, second = weight(32, 16, 1, 1), weight(24, 32, 1, 1, seed=3)
    first[::2] *= 1e-3
    second[:, 1::8] *= 1e-3
    text = """g (float[n, 16, 5, 5] x) => (float[n, 24, 5, 5] y) {
        a = Conv(x, v, c)
        b = Relu(a)
        y = Conv(b, w)
    }"""
    model = parse(text, {"v": first, "c": normal(32), "w": second})
    result = prune(model, relative=0.02)
    note = next(note for note in result.notes if "became zero" in note)
    assert note == "16 output and 4 input channels became zero (a, y): run prune after this"
    feed = {"x": normal(2, 16, 5, 5)}
    masked = Session(model).run(feed)["y"]
    removed = lookup("prune")(round_to=1).run(model, Context(evaluate=evaluate))  # type: ignore[call-arg]
    model.normalize()
    assert sum(change.count for change in removed.changes) == 20
    np.testing.assert_allclose(Session(model).run(feed)["y"], masked, atol=1e-5)


def test_the_notes_say_what_zeros_are_good_for() -> None:
    result = prune(rows_model("gemm"), pattern="2:4")
    assert result.notes[0] == "1,024 of 2,048 weights in 1 tensors are zero (50.0%), 0 were before"
    assert "the file keeps its size and runs no faster" in result.notes[1]
    assert result.notes[2].startswith("2:4: NVIDIA GPUs")
    assert result.changes[0].detail == "50.0% of 2,048 zero, 2:4, magnitude"


def test_what_is_quantized_already_is_told() -> None:
    model = rows_model("gemm")
    lookup("int8_weights")().run(model, Context())
    model.normalize()
    result = prune(load(model.to_proto()), sparsity=0.5)
    assert not result.changes
    assert "already quantized: 1 nodes left as they are" in result.notes


def test_the_shared_constant_is_really_one() -> None:
    model = parse(SHARED, {"w": weight(64, 32), "b": normal(32)})
    prune(model, sparsity=0.5)
    assert len({id(node.inputs[1]) for node in nodes(model, "Gemm") if isinstance(node.inputs[1], Constant)}) == 1
