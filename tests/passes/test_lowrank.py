"""lowrank: every kind of layer in every form, what is chosen, and what is left whole and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.graph.macs import layer_macs
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Model, load
from onnxopt.passbase import Effect
from onnxopt.passes.lowrank import LowRank
from onnxopt.pipeline.grammar import canonical
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.lowrank.nets import FREE, Given, apart, low, outputs, split, together
from tests.passes.quantizing import Array, nodes, normal, parse, weight

Case = tuple[str, dict[str, Array]]

# layers that multiply rows: text and initializers; weights are of rank 8
ROWS: dict[str, Case] = {
    "matmul": ("g (float[n, 96] x) => (float[n, 64] y) { y = MatMul(x, w) }", {"w": low(96, 64)}),
    "matmul_add": (
        "g (float[n, 96] x) => (float[n, 64] y) { a = MatMul(x, w) y = Add(b, a) }",
        {"w": low(96, 64), "b": normal(64)},
    ),
    "gemm": (
        "g (float[n, 96] x) => (float[n, 64] y) { y = Gemm(x, w, b) }",
        {"w": low(96, 64), "b": normal(64)},
    ),
    "gemm_scaled": (
        "g (float[n, 96] x) => (float[n, 64] y) { y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b) }",
        {"w": low(64, 96), "b": normal(1, 64)},
    ),
    "gemm_no_bias": ("g (float[n, 96] x) => (float[n, 64] y) { y = Gemm<transB = 1>(x, w) }", {"w": low(64, 96)}),
    "gemm_scalar_bias": (
        "g (float[n, 96] x) => (float[n, 64] y) { y = Gemm(x, w, b) }",
        {"w": low(96, 64), "b": normal(1)},
    ),
}
KERNELS = {
    "plain": "",
    "padded": "pads = [1, 1, 1, 1]",
    "uneven": "pads = [0, 1, 2, 1], strides = [2, 1]",
    "dilated": "dilations = [2, 1], pads = [2, 0, 2, 1]",
    "same_upper": 'auto_pad = "SAME_UPPER", strides = [2, 2]',
    "same_lower": 'auto_pad = "SAME_LOWER", strides = [1, 2]',
    "valid": 'auto_pad = "VALID"',
}


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def macs(model: Model, feed: dict[str, Array]) -> int:
    facts = known(model, {name: value.shape for name, value in feed.items()})

    def shape_of(tensor: Any) -> tuple[int, ...] | None:
        if isinstance(tensor, Constant):
            return tuple(tensor.shape)
        return facts[id(tensor)].shape  # type: ignore[return-value]

    return sum(layer_macs(node, shape_of) or 0 for body in model.bodies() for node in body.nodes)


def rows(seeds: int = 6, count: int = 200, width: int = 96) -> Given:
    return [{"x": together(count, width, seed=seed)} for seed in range(seeds)]


def images(channels: int = 32, size: int = 12, seeds: int = 6) -> Given:
    return [{"x": together(2, channels, size, size, seed=seed, axis=1)} for seed in range(seeds)]


def conv(attributes: str, values: Array, bias: bool = True) -> Model:
    channels = values.shape[1] * (2 if "group" in attributes else 1)
    text = (
        f"g (float[2, {channels}, 12, 12] x) => (float[a, b, c, d] y) {{ "
        f"r = Conv{f'<{attributes}>' if attributes else ''}(x, w{', b' if bias else ''}) y = Relu(r) }}"
    )
    return parse(text, {"w": values, **({"b": normal(values.shape[0])} if bias else {})})


# what is of low rank already


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_rows_of_low_rank_are_split_to_rounding(kind: str, opset: int) -> None:
    if kind == "gemm_no_bias" and opset < 11:
        return  # Gemm asks for a bias
    model, before = (parse(*ROWS[kind], opset=opset) for _ in range(2))
    result = split(model, rows(3))
    [change] = result.changes
    assert "rank 8" in change.detail
    assert apart(model, before, rows(2, count=7)) < 1e-5
    last = nodes(before, ops(before)[0])[0]
    assert ops(model) == ["MatMul", *ops(before)]
    assert model.graph.nodes[1].name == last.name
    assert macs(model, {"x": normal(5, 96)}) < 0.35 * macs(before, {"x": normal(5, 96)})


@pytest.mark.parametrize("opset", [9, 17])
def test_gemm_of_columns(opset: int) -> None:
    text = "g (float[96, n] x) => (float[n, 64] y) { y = Gemm<transA = 1, alpha = 2.0>(x, w, b) }"
    model, before = (parse(text, {"w": low(96, 64), "b": normal(64)}, opset=opset) for _ in range(2))
    feeds = [{"x": normal(96, 30, seed=seed)} for seed in range(3)]
    assert split(model, feeds).changes
    assert ops(model) == ["Gemm", "Gemm"]
    assert apart(model, before, feeds) < 1e-5


@pytest.mark.parametrize("shape", ["3, n, 96", "2, 5, n, 96", "96"])
def test_matmul_keeps_the_axes_before_the_last(shape: str) -> None:
    made = ", ".join([*shape.split(", ")[:-1], "64"])
    text = f"g (float[{shape}] x) => (float[{made}] y) {{ y = MatMul(x, w) }}"
    model, before = (parse(text, {"w": low(96, 64)}) for _ in range(2))
    dims = [4 if dim == "n" else int(dim) for dim in shape.split(", ")]
    feeds = [{"x": normal(*dims, seed=seed)} for seed in range(3)]
    assert split(model, feeds).changes
    assert apart(model, before, feeds) < 1e-5


def test_weights_on_the_left_are_split_too() -> None:
    text = "g (float[2, 96, n] x) => (float[2, 64, n] y) { y = MatMul(w, x) }"
    model, before = (parse(text, {"w": low(64, 96)}) for _ in range(2))
    feeds = [{"x": together(2, 96, 40, seed=seed, axis=1)} for seed in range(5)]
    assert split(model, feeds).changes
    assert apart(model, before, feeds) < 1e-5
    model = parse(text, {"w": weight(64, 96)})
    plain = parse(text, {"w": weight(64, 96)})
    split(plain, feeds, ratio=0.4, whiten=False)
    split(model, feeds, ratio=0.4)
    before = parse(text, {"w": weight(64, 96)})
    assert apart(model, before, feeds[-1:]) < 0.5 * apart(plain, before, feeds[-1:])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_low_rank_are_split_to_rounding(kernel: str, bias: bool) -> None:
    model, before = (conv(KERNELS[kernel], low(48, 32, 3, 3), bias) for _ in range(2))
    assert split(model, images(seeds=3)).changes
    assert ops(model) == ["Conv", "Conv", "Relu"]
    assert apart(model, before, images(seeds=2)) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_strips_and_tucker_put_strides_pads_and_dilations_where_they_belong(kernel: str) -> None:
    rng = np.random.default_rng(0)
    striped = np.einsum("nrx,rcy->ncyx", rng.standard_normal((48, 16, 3)), rng.standard_normal((16, 32, 3)))
    core = np.einsum("ns,sryx->nryx", rng.standard_normal((48, 16)), rng.standard_normal((16, 16, 3, 3)))
    folded = np.einsum("nryx,rc->ncyx", core, rng.standard_normal((16, 32)))
    for form, values, count in (("strips", striped, 2), ("tucker", folded, 3)):
        model, before = (conv(KERNELS[kernel], np.asarray(values / 30, np.float32)) for _ in range(2))
        result = split(model, images(), ratio=0.6, forms=(form,))
        assert result.changes[0].detail.startswith(form)
        assert ops(model) == ["Conv"] * count + ["Relu"]
        assert apart(model, before, images()) < 2e-3
        assert np.isfinite(outputs(model, {"x": normal(2, 32, 12, 12)})[0]).all()


def test_one_and_three_positions_axes() -> None:
    for text, shape, values in (
        ("g (float[2, 32, 40] x) => (float[a, b, c] y) { y = Conv<pads = [1, 1]>(x, w) }", (2, 32, 40), low(48, 32, 3)),
        (
            "g (float[1, 32, 5, 6, 7] x) => (float[a, b, c, d, e] y) { y = Conv<strides = [1, 2, 1]>(x, w) }",
            (1, 32, 5, 6, 7),
            low(48, 32, 3, 3, 3),
        ),
    ):
        model, before = (parse(text, {"w": values}) for _ in range(2))
        feeds = [{"x": normal(*shape, seed=seed)} for seed in range(3)]
        assert split(model, feeds).changes
        assert apart(model, before, feeds) < 1e-5


def test_groups_are_split_each_by_itself() -> None:
    values = np.concatenate([low(48, 32, 3, 3, seed=1), low(48, 32, 3, 3, seed=5)])
    model, before = (conv("group = 2, pads = [1, 1, 1, 1]", values) for _ in range(2))
    feeds = images(64)
    assert split(model, feeds).changes
    assert [node.attrs["group"] for node in nodes(model, "Conv")] == [2, 2]
    assert apart(model, before, feeds) < 1e-5
    rough = np.concatenate([weight(48, 32, 3, 3, seed=1), weight(48, 32, 3, 3, seed=2)])
    model, before = (conv("group = 2, pads = [1, 1, 1, 1]", rough) for _ in range(2))
    assert split(model, feeds, ratio=0.4).changes
    assert apart(model, before, feeds) < 0.9


def recurrent(op: str, gates: int, directions: int, layout: bool, bias: bool, values: Array) -> Model:
    both = ', direction = "bidirectional"' if directions == 2 else ""
    form = ", layout = 1" if layout else ""
    given, made = ("2, n, 96", "2, n, d, 16") if layout else ("n, 2, 96", "n, d, 2, 16")
    text = (
        f"g (float[{given}] x) => (float[{made}] y) {{ "
        f"y = {op}<hidden_size = 16{both}{form}>(x, w, r{', b' if bias else ''}) }}"
    )
    constants = {"w": values, "r": weight(directions, gates * 16, 16, seed=4)}
    return parse(text, constants | ({"b": normal(directions, 2 * gates * 16)} if bias else {}))


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_input_weights_of_recurrent_layers(op: str, gates: int, directions: int, bias: bool) -> None:
    values = low(directions * gates * 16, 96).reshape(directions, gates * 16, 96)
    feeds = [{"x": together(11, 2, 96, seed=seed)} for seed in range(6)]
    model, before = (recurrent(op, gates, directions, False, bias, values) for _ in range(2))
    if gates * directions * 16 * 96 // (gates * directions * 16 + 96) > 8:
        assert split(model, feeds).changes
        assert ops(model) == ["MatMul", op]
        assert apart(model, before, feeds) < 1e-5
    rough = weight(directions, gates * 16, 96) * 3
    model, before, plain = (recurrent(op, gates, directions, False, bias, rough) for _ in range(3))
    if split(model, feeds, ratio=0.2).changes:
        split(plain, feeds, ratio=0.2, whiten=False, refit=False)
        assert apart(model, before, feeds[-1:]) < 0.6 * apart(plain, before, feeds[-1:])


def test_recurrent_layers_say_that_their_recurrence_stays() -> None:
    model = recurrent("LSTM", 4, 1, False, True, low(64, 96).reshape(1, 64, 96))
    result = split(model, [{"x": normal(5, 2, 96, seed=seed)} for seed in range(3)])
    assert any("recurrent weights stay whole" in skip.reason for skip in result.skipped)


TABLE = "g (int64[n, 7] i) => (float[n, 7, 64] y) { e = Gather(t, i) y = Relu(e) }"


def test_tables_are_split_where_size_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    values = np.asarray(rng.standard_normal((500, 64)) @ np.diag(np.arange(1, 65.0) ** -1.0), np.float32)
    feeds = [{"i": rng.integers(0, 500, (3, 7))} for _ in range(6)]
    model, before = (parse(TABLE, {"t": values}) for _ in range(2))
    assert not split(model, feeds, ratio=0.5).changes
    result = split(model, feeds, ratio=0.5, of="parameters")
    assert result.changes
    assert ops(model) == ["Gather", "MatMul", "Relu"]
    assert model.parameters() <= 0.5 * before.parameters()
    assert apart(model, before, feeds) < 0.2


# what is chosen


def test_whitened_factors_beat_plain_ones_and_the_mean_goes_into_the_bias() -> None:
    feeds = rows()
    for kind in ("matmul_add", "gemm", "gemm_scaled"):
        text, constants = ROWS[kind]
        constants = constants | {"w": weight(*constants["w"].shape)}
        found = {}
        asked: dict[str, dict[str, Any]] = {
            "plain": {"whiten": False, "refit": False},
            "no bias": {"bias": False, "refit": False},
            "whitened": {"refit": False},
            "refitted": {},
        }
        for name, options in asked.items():
            model = parse(text, constants)
            assert split(model, feeds, ratio=0.5, **options).changes
            found[name] = apart(model, parse(text, constants), feeds[-1:])
        assert found["whitened"] < 0.3 * found["plain"]
        assert found["whitened"] < found["no bias"]
        assert found["refitted"] <= found["whitened"]


def test_the_mean_of_the_outputs_stays() -> None:
    text, constants = ROWS["gemm_scaled"]
    constants = constants | {"w": weight(64, 96)}
    model, before = parse(text, constants), parse(text, constants)
    feeds = rows()
    split(model, feeds, ratio=0.5, refit=False)
    one, other = (np.concatenate([outputs(each, feed)[0] for feed in feeds[:-2]]) for each in (before, model))
    np.testing.assert_allclose(other.mean(axis=0), one.mean(axis=0), atol=2e-5)


def two_layers(first: Array, second: Array) -> Model:
    text = """g (float[n, 96] x) => (float[n, 96] y) {
        a = MatMul(x, w) b = Add(a, c) h = Relu(b) d = MatMul(h, v) y = Add(d, e) }"""
    return parse(text, {"w": first, "v": second, "c": normal(96), "e": normal(96)})


def test_the_layer_that_costs_less_is_split_further() -> None:
    flat, steep = weight(96, 96), np.asarray(low(96, 96, rank=12) + 0.02 * weight(96, 96), np.float32)
    for first, second, gentle in ((flat, steep, "d"), (steep, flat, "a")):
        result = split(two_layers(first, second), rows(), ratio=0.3)
        ranks = {change.where: int(change.detail.split("rank ")[1].split()[0]) for change in result.changes}
        assert min(ranks, key=lambda name: ranks[name]) == gentle


def test_a_ratio_is_reached_and_what_can_not_be_is_said() -> None:
    model = two_layers(weight(96, 96), weight(96, 96, seed=3))
    feed = {"x": normal(10, 96)}
    before = macs(model, feed)
    result = split(model, rows(), ratio=0.5)
    assert 0.35 * before < macs(model, feed) <= 0.5 * before
    assert any(note.startswith("5") for note in result.notes)
    model = two_layers(weight(96, 96), weight(96, 96, seed=3))
    result = split(model, rows(), ratio=0.95)
    assert any("asked for 95%" in note for note in result.notes)


def test_auto_keeps_the_aim() -> None:
    for aim in (15.0, 25.0):
        model, before = (two_layers(weight(96, 96), weight(96, 96, seed=3)) for _ in range(2))
        result = split(model, rows(), ratio="auto", aim=aim)
        assert result.changes
        assert apart(model, before, rows()[-2:]) < 10 ** (-aim / 20) * 1.2


def test_auto_splits_nothing_where_nothing_holds() -> None:
    model = two_layers(weight(96, 96), weight(96, 96, seed=3))
    before = model.digest()
    result = split(model, rows(), ratio="auto", holds=lambda _: False)
    assert not result.changes
    assert any("no layer can be split within the budgets on quality" in note for note in result.notes)
    assert model.digest() == before
    assert len(result.skipped) == 2


def test_auto_splits_nothing_where_the_whole_model_gains_too_little() -> None:
    dear = replace(FREE, costs=replace(FREE.costs, float_element=1e3))
    model = two_layers(weight(96, 96), weight(96, 96, seed=3))
    result = split(model, rows(), replace(dear, costs=replace(dear.costs, node=1e9)), ratio="auto", aim=5.0)
    assert not result.changes
    assert any(skip.reason.startswith("no split pays") for skip in result.skipped)


def test_auto_without_real_inputs_says_so() -> None:
    model = two_layers(weight(96, 96), weight(96, 96, seed=3))
    result = split(model, None, ratio="auto")
    assert not result.changes
    assert "no real inputs" in result.skipped[0].reason


def test_without_real_inputs_weights_decide() -> None:
    text = ROWS["gemm"][0].replace("float[n, ", "float[50, ")
    model = parse(text, {"w": low(96, 64, rank=20), "b": normal(64)})
    result = split(model, None, ratio=0.3)
    assert result.changes
    assert any("no real inputs" in note for note in result.notes)
    before = parse(text, {"w": low(96, 64, rank=20), "b": normal(64)})
    assert apart(model, before, [{"x": normal(50, 96)}]) < 0.2


def test_small_layers_do_not_pay_on_a_real_target() -> None:
    model = parse(*ROWS["gemm"])
    result = split(model, [{"x": normal(2, 96, seed=seed)} for seed in range(3)], resolve("x86"))
    assert not result.changes
    assert any("no split pays" in skip.reason or "takes" in skip.reason for skip in result.skipped)


# what stays as it is


def test_activations_and_biases_stay_behind_the_last_piece() -> None:
    model = conv("pads = [1, 1, 1, 1]", weight(48, 32, 3, 3))
    bias = model.graph.nodes[0].inputs[2]
    split(model, images(), ratio=0.4, refit=False, bias=False)
    first, *_, last = nodes(model, "Conv")
    assert len(first.inputs) == 2
    assert last.inputs[2] is bias
    assert last.outputs[0].outputs[0].op == "Relu"


def test_a_matmul_with_an_add_stays_one() -> None:
    model = parse(ROWS["matmul_add"][0], {"w": weight(96, 64), "b": normal(64)})
    split(model, rows(), ratio=0.4)
    assert ops(model) == ["MatMul", "MatMul", "Add"]
    assert isinstance(model.graph.nodes[2].inputs[0], Constant)


def test_shared_weights_are_split_once() -> None:
    text = """g (float[n, 96] x, float[n, 96] z) => (float[n, 64] y) {
        a = MatMul(x, w) b = Add(a, c) d = MatMul(z, w) e = Add(d, f) y = Add(b, e) }"""
    constants = {"w": weight(96, 64), "c": normal(64), "f": normal(64, seed=2)}
    model, before = (parse(text, constants) for _ in range(2))
    feeds = [{"x": together(50, 96, seed=s), "z": together(50, 96, seed=s + 40, mean=-2.0)} for s in range(6)]
    assert split(model, feeds, ratio=0.5).changes
    products = nodes(model, "MatMul")
    assert len(products) == 4
    assert len({id(node.inputs[1]) for node in products}) == 2
    assert apart(model, before, feeds[-1:]) < 0.1


REFUSED: dict[str, tuple[str, dict[str, Array], str]] = {
    "depthwise": (
        "g (float[2, 64, 12, 12] x) => (float[a, b, c, d] y) { y = Conv<group = 64>(x, w) }",
        {"w": weight(64, 1, 5, 5)},
        "depthwise",
    ),
    "batched": (
        "g (float[4, n, 32] x) => (float[4, n, 32] y) { y = MatMul(x, w) }",
        {"w": weight(4, 32, 32)},
        "more than two axes",
    ),
    "nan": (
        "g (float[n, 96] x) => (float[n, 64] y) { y = MatMul(x, w) }",
        {"w": np.where(np.arange(96 * 64).reshape(96, 64) == 5, np.nan, weight(96, 64)).astype(np.float32)},
        "NaN or infinity",
    ),
    "zero": (
        "g (float[n, 96] x) => (float[n, 64] y) { y = MatMul(x, w) }",
        {"w": np.zeros((96, 64), np.float32)},
        "zero",
    ),
    "constant input": (
        "g (float[n, 64] x) => (float[n, 64] y) { a = MatMul(k, w) y = Add(x, a) }",
        {"w": weight(96, 64), "k": normal(1, 96)},
        "its input is a constant",
    ),
    "an output": (
        "g (float[n, 96] x) => (float[n, 64] y, float[96, 64] w) { y = MatMul(x, w) }",
        {"w": weight(96, 64)},
        "an output too",
    ),
    "read in two ways": (
        "g (float[n, 64] x) => (float[n, 64] y) { a = MatMul(x, w) y = Gemm<transB = 1>(a, w) }",
        {"w": weight(64, 64)},
        "read in different ways",
    ),
    "read by another": (
        "g (float[64, 64] x) => (float[64, 64] y) { a = MatMul(x, w) y = Add(a, w) }",
        {"w": weight(64, 64)},
        "is read by",
    ),
    "transposed convolution": (
        "g (float[2, 64, 8, 8] x) => (float[a, b, c, d] y) { y = ConvTranspose(x, w) }",
        {"w": weight(64, 32, 3, 3)},
        "has no form of two factors",
    ),
    "too narrow": (
        "g (float[n, 2048] x) => (float[n, 1] y) { y = MatMul(x, w) }",
        {"w": weight(2048, 1)},
        "no multiple of 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_whole_has_a_reason(case: str) -> None:
    text, constants, reason = REFUSED[case]
    model = parse(text, constants)
    before = model.digest()
    shape = [dim if isinstance(dim, int) else 9 for dim in model.graph.inputs[0].shape]
    result = split(model, [{"x": normal(*shape, seed=seed)} for seed in range(4)], ratio=0.3)
    assert any(reason in skip.reason for skip in result.skipped)
    assert not result.changes
    assert model.digest() == before


def test_selection() -> None:
    model = conv("", weight(48, 32, 3, 3))
    model.graph.nodes[0].name = "stem"
    assert not split(model, images(), ratio=0.3, exclude=("st*",)).changes
    assert split(model, images(), ratio=0.3, only=("stem",)).changes
    with pytest.raises(UsageError, match="no node is called 'nobody'"):
        split(model, images(), ratio=0.3, only=("nobody",))


BRANCHES = """g (float[n, 96] x, bool c) => (float[n, 64] y) {
    y = If(c) <
        then_branch = t () => (float[n, 64] p) { a = MatMul(x, w) p = Add(a, b) },
        else_branch = e () => (float[n, 64] q) { q = MatMul(x, v) }
    > }"""


def test_layers_in_branches_are_split_where_feeds_come() -> None:
    constants = {"w": weight(96, 64), "b": normal(64), "v": weight(96, 64, seed=8)}
    model, before = (parse(BRANCHES, constants) for _ in range(2))
    feeds = [{"x": together(40, 96, seed=seed), "c": np.array(True)} for seed in range(6)]
    result = split(model, feeds, ratio=0.4)
    assert len(result.changes) == 1
    assert any("no feed comes here" in skip.reason for skip in result.skipped)
    assert apart(model, before, feeds[-1:]) < 0.15


def test_layers_in_loops_are_split_by_their_weights() -> None:
    text = """g (float[4, 96] x, int64 m) => (float[4, 96] y) {
        k = Constant<value = bool {1}>()
        y = Loop(m, k, x) <body = l (int64 i, bool d, float[4, 96] s) => (bool e, float[4, 96] t)
            { a = MatMul(s, w) t = Tanh(a) e = Identity(d) }> }"""
    values = np.asarray(low(96, 96, rank=10) * 20, np.float32)
    model, before = (parse(text, {"w": values}) for _ in range(2))
    feeds = [{"x": normal(4, 96, seed=seed), "m": np.array(3)} for seed in range(5)]
    [change] = split(model, feeds, ratio=0.5).changes
    assert "by its weights alone: what it reads is in the body of a Loop" in change.detail
    assert apart(model, before, feeds) < 1e-4


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_float_types_keep_their_type(kind: str) -> None:
    name = {"float16": "float16", "float64": "double"}[kind]
    text = f"g ({name}[n, 96] x) => ({name}[n, 64] y) {{ a = MatMul(x, w) y = Add(a, b) }}"
    constants = {"w": low(96, 64).astype(kind) * np.array(9, kind), "b": normal(64).astype(kind)}
    model, before = (parse(text, constants) for _ in range(2))
    feeds = [{"x": normal(30, 96, seed=seed).astype(kind)} for seed in range(5)]
    assert split(model, feeds, ratio=0.5).changes
    assert all(
        each.dtype == kind for node in nodes(model, "MatMul") for each in node.inputs if isinstance(each, Constant)
    )
    assert apart(model, before, feeds) < 0.05


def test_constant_inputs_and_dynamic_lengths() -> None:
    model, before = (parse(ROWS["gemm"][0], {"w": weight(96, 64), "b": normal(64)}) for _ in range(2))
    still: Given = [{"x": np.full((count, 96), 0.5, np.float32)} for count in (3, 9, 4, 1)]
    assert split(model, still, ratio=0.3).changes
    assert apart(model, before, still) < 1e-4


# the pass itself


def test_effects_options_and_text() -> None:
    assert LowRank().effect is Effect.ROUNDING
    assert LowRank(ratio=0.2).effect is Effect.LOSSY
    assert LowRank(ratio="auto").effect is Effect.LOSSY
    text = "lowrank:ratio=0.3:of=latency:forms=factors+tucker:refit=false"
    assert canonical(parse_passes(text)).endswith(text)
    for wrong in ({"ratio": 1.0}, {"ratio": "much"}, {"forms": ("square",)}, {"forms": ()}, {"of": "bytes"}):
        with pytest.raises(UsageError):
            LowRank(**wrong)


def test_results_are_the_same_each_time_and_may_be_split_again() -> None:
    made: list[bytes] = []
    for _ in range(2):
        model = conv("pads = [1, 1, 1, 1]", weight(48, 32, 3, 3))
        split(model, images(), ratio=0.4)
        made.append(model.to_proto().SerializeToString(deterministic=True))
    assert made[0] == made[1]
    names = [tensor.name for tensor in model.graph.initializers]
    assert {"w_first", "w_last"} <= set(names)
    assert len(set(names)) == len(names)
    split(model, images(), ratio=0.3)
    Session(model)


@pytest.mark.parametrize("form", ["factors", "strips", "tucker"])
def test_a_split_computes_what_its_trial_did(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing chosen by trials is worth anything if the pieces compute something else."""
    from onnxopt.lowrank import engine

    dense: list[Array] = []
    own = engine._Run._replace

    def watched(self: Any, layer: Any, form_: Any) -> Any:
        undo = own(self, layer, form_)
        clone = self.model.clone().model
        dense.append(outputs(clone, images()[-1])[0])
        return undo

    monkeypatch.setattr(engine._Run, "_replace", watched)
    model = conv('auto_pad = "SAME_UPPER", strides = [2, 1]', weight(48, 32, 3, 3))
    split(model, images(), ratio=0.5, forms=(form,), refit=False)
    [made] = outputs(model, images()[-1])
    assert min(float(np.abs(made - each).max()) for each in dense) < 1e-4


def test_layers_in_local_functions_stay() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[n, 96] x) => (float[n, 96] y) { y = f.layer(x) }
        <domain: "f", opset_import: ["" : 17]> layer (x) => (y) { y = Relu(x) }""")
    product = proto.functions[0].node.add(op_type="MatMul", input=["y_", "w"], output=["y"])
    proto.functions[0].node[0].output[0] = "y_"
    constant = onnx.helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(96, 96)))
    proto.functions[0].node.insert(0, constant)
    assert product.output[0] == "y"
    model = load(proto)
    result = split(model, rows(4), ratio=0.3)
    assert not result.changes
    assert any("local function" in skip.reason for skip in result.skipped)


def test_layers_quantized_before_stay(tmp_path: Path) -> None:
    model = parse(*ROWS["gemm"])
    model.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in rows()]))
    made = onnxopt.optimize(
        tmp_path / "m.onnx", "int8:all_layers=true,lowrank:ratio=0.5", tmp_path / "data.npz", latency_seconds=0
    )
    [record] = [each for each in made.report.passes if each.name == "lowrank"]
    assert not record.changes
    assert any("already quantized" in note for note in record.notes)


def test_low_rank_keeps_its_promise_of_rounding_in_a_pipeline(tmp_path: Path) -> None:
    text = "g (float[n, 2000, 96] x) => (float[n, 2000, 64] y) { a = MatMul(x, w) y = Add(b, a) }"
    parse(text, {"w": low(96, 64), "b": normal(64)}).save(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=normal(6, 2000, 96))
    made = onnxopt.optimize(tmp_path / "m.onnx", "lowrank", tmp_path / "data.npz", latency_seconds=0)
    [record] = [each for each in made.report.passes if each.name == "lowrank"]
    assert record.status.value == "changed"
    assert record.effect == "rounding"
    assert [node.op for node in made.model.graph.nodes] == ["MatMul", "MatMul", "Add"]


@pytest.mark.parametrize("seed", range(8))
def test_random_kernels_in_every_form_come_closer_than_plain_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels, made = (int(size) * 16 for size in rng.integers(1, 5, 2))
    tall, wide = (int(size) for size in rng.integers(1, 6, 2))
    group = int(rng.choice([1, 1, 2]))
    strides, dilations = rng.integers(1, 3, 2).tolist(), rng.integers(1, 3, 2).tolist()
    pads = f"pads = {rng.integers(0, 3, 4).tolist()}, dilations = {dilations}"
    kernel = str(rng.choice([pads, 'auto_pad = "SAME_UPPER"', 'auto_pad = "SAME_LOWER"', 'auto_pad = "VALID"']))
    text = (
        f"g (float[2, {channels}, 15, 14] x) => (float[a, b, c, d] y) {{ "
        f"r = Conv<{kernel}, strides = {strides}, group = {group}>(x, w, b) y = Relu(r) }}"
    )
    constants = {"w": weight(made, channels // group, tall, wide, seed=seed), "b": normal(made)}
    feeds = [{"x": together(2, channels, 15, 14, seed=at, axis=1)} for at in range(4)]
    for form in ("factors", "strips", "tucker"):
        model, plain, before = (parse(text, constants) for _ in range(3))
        if split(model, feeds, ratio=0.3, forms=(form,)).changes:
            split(plain, feeds, ratio=0.3, forms=(form,), refit=False, whiten=False)
            assert apart(model, before, feeds) < apart(plain, before, feeds)
