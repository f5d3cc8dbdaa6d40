"""int8_weights, int4 and fp8: every kind of weight, in every form, at every operator set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxopt.calibration import collect, moments
from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.passbase import Context, Pass, PassResult, lookup
from onnxopt.pipeline.grammar import parse as parse_passes
from onnxopt.runtime import Session
from onnxopt.target import resolve
from tests.passes.quantizing import Array, nodes, normal, optimized, parse, samples, weight

LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)

# text, initializers, feed: one weight of each kind
KINDS: dict[str, tuple[str, dict[str, Array], dict[str, Array]]] = {
    "matmul": (
        "g (float[m, 96] x) => (float[y0, y1] y) { y = MatMul(x, w) }",
        {"w": weight(96, 70)},
        {"x": normal(5, 96)},
    ),
    "matmul_left": (
        "g (float[96, m] x) => (float[y0, y1] y) { y = MatMul(w, x) }",
        {"w": weight(70, 96)},
        {"x": normal(96, 3)},
    ),
    "matmul_batched": (
        "g (float[b, m, 96] x) => (float[y0, y1, y2] y) { y = MatMul(x, w) }",
        {"w": weight(3, 96, 40)},
        {"x": normal(3, 5, 96)},
    ),
    "gemm": (
        "g (float[m, 96] x) => (float[y0, y1] y) { y = Gemm(x, w, b) }",
        {"w": weight(96, 70), "b": normal(70)},
        {"x": normal(4, 96)},
    ),
    "gemm_transposed": (
        "g (float[m, 96] x) => (float[y0, y1] y) { y = Gemm<transB = 1>(x, w, b) }",
        {"w": weight(70, 96), "b": normal(1, 70)},
        {"x": normal(4, 96)},
    ),
    "gemm_scaled": (
        "g (float[m, 96] x) => (float[y0, y1] y) { y = Gemm<transB = 1, alpha = 0.5>(x, w) }",
        {"w": weight(70, 96)},
        {"x": normal(4, 96)},
    ),
    "conv": (
        "g (float[n, 20, 9, 9] x) => (float[y0, y1, y2, y3] y) "
        "{ y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b) }",
        {"w": weight(24, 20, 3, 3), "b": normal(24)},
        {"x": normal(2, 20, 9, 9)},
    ),
    "conv_grouped": (
        "g (float[n, 32, 9, 9] x) => (float[y0, y1, y2, y3] y) { y = Conv<group = 4>(x, w) }",
        {"w": weight(64, 8, 3, 3)},
        {"x": normal(2, 32, 9, 9)},
    ),
    "conv_1d": (
        "g (float[n, 64, t] x) => (float[y0, y1, y2] y) { y = Conv(x, w) }",
        {"w": weight(40, 64, 3)},
        {"x": normal(1, 64, 20)},
    ),
    "conv_transposed": (
        "g (float[n, 64, 5, 5] x) => (float[y0, y1, y2, y3] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }",
        {"w": weight(64, 24, 2, 2)},
        {"x": normal(1, 64, 5, 5)},
    ),
    "table": (
        "g (int64[n, t] i) => (float[y0, y1, y2] y) { y = Gather(w, i) }",
        {"w": normal(90, 64)},
        {"i": np.array([[0, 89, -1], [5, 5, 7]])},
    ),
    "table_scalar": ("g (int64 i) => (float[y0] y) { y = Gather(w, i) }", {"w": normal(90, 64)}, {"i": np.array(3)}),
    "table_deep": (
        "g (int64[n] i) => (float[y0, y1, y2] y) { y = Gather(w, i) }",
        {"w": normal(90, 4, 32)},
        {"i": np.array([2, 3])},
    ),
    "lstm": (
        "g (float[t, n, 48] x) => (float[y0, y1, y2, y3] y) { y = LSTM<hidden_size = 40>(x, w, r) }",
        {"w": weight(1, 160, 48), "r": weight(1, 160, 40)},
        {"x": normal(6, 2, 48)},
    ),
    "gru": (
        "g (float[t, n, 48] x) => (float[y0, y1, y2, y3] y) "
        '{ y = GRU<hidden_size = 40, direction = "bidirectional">(x, w, r) }',
        {"w": weight(2, 120, 48), "r": weight(2, 120, 40)},
        {"x": normal(6, 2, 48)},
    ),
}
PASSES = ("int8_weights", "int8_weights:save=memory", "int4", "int4:save=memory", "int4:block=16", "fp8")
# noise over signal of weights whose values are normal: 8 bits, 3 bits of fraction, 4 bits
NOISE = {"int8_weights": 1e-3, "fp8": 2e-3, "int4": 1.2e-2}


def built(kind: str, opset: int = 17) -> Model:
    source, initializers, _ = KINDS[kind]
    model = parse(source, initializers, opset)
    if opset == 21:
        model.ir_version = 10
    return model


def made(text: str) -> Pass:
    return parse_passes(text)[0].pass_


def run(model: Model, text: str, feeds: list[dict[str, Array]] | None = None, target: str = "x86") -> PassResult:
    rewriting = made(text)
    needs = rewriting.needs(model)
    statistics = None if feeds is None or needs is None else collect(model, needs, samples(feeds))
    result = rewriting.run(model, Context(statistics=statistics, target=resolve(target)))
    model.normalize()
    return result


def noise(exact: Array, approximate: Array) -> float:
    apart = exact.astype(np.float64) - approximate
    return float(np.square(apart).sum() / np.square(exact.astype(np.float64)).sum())


def outputs_at_all_levels(model: Model, feed: dict[str, Array]) -> list[list[Array]]:
    found = []
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        session = ort.InferenceSession(model.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])
        found.append(session.run(None, feed))
    return found


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_weight_in_every_form(kind: str, text: str, opset: int) -> None:
    if text == "fp8":
        opset = max(opset, 19)
    _, initializers, feed = KINDS[kind]
    model, reference = built(kind, opset), built(kind, opset)
    result = run(model, text)
    assert [change.kind for change in result.changes] == ["stored"] * len(
        [w for n, w in initializers.items() if n != "b"]
    )
    assert not result.skipped
    onnx.checker.check_model(model.to_proto(), full_check=True)
    [exact] = Session(reference).run(feed).values()
    for [found] in outputs_at_all_levels(model, feed):
        assert found.shape == exact.shape
        assert noise(exact, found) < NOISE[text.split(":")[0]]
    size = sum(values.nbytes for name, values in initializers.items() if name != "b")
    left = sum(constant.data.stored_nbytes for constant in model.constants())
    assert left < (0.35 if text.startswith("int4") else 0.33) * size + 400
    assert model.opset_imports.get("com.microsoft", 1) == 1


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("int4:save=memory", ("matmul", "gemm", "gemm_transposed")),
        ("int8_weights:save=memory", ("matmul", "gemm_transposed")),
    ],
)
def test_kernels_read_codes_when_memory_is_to_be_saved(
    text: str, kinds: tuple[str, ...], opset: int, tmp_path: Path
) -> None:
    for kind in kinds:
        model = built(kind, opset)
        run(model, text)
        operators, _ = optimized(model, tmp_path)
        assert operators["MatMulNBits"] == 1, kind
        assert not operators["DequantizeLinear"]


@pytest.mark.parametrize("text", ["int8_weights", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["matmul", "conv", "lstm", "gemm"])
def test_what_saves_the_file_alone_is_folded_when_loaded(kind: str, text: str, tmp_path: Path) -> None:
    model = built(kind, 21)
    run(model, text)
    operators, _ = optimized(model, tmp_path)
    before, _ = optimized(built(kind, 21), tmp_path)
    assert operators == before


@pytest.mark.parametrize("text", ["int8_weights", "int4"])
def test_tables_are_never_computed_as_a_whole(text: str, tmp_path: Path) -> None:
    model = parse(*KINDS["table"][:2], 17)
    run(model, text)
    _, graph = optimized(model, tmp_path)
    assert (
        max(int(np.prod(tensor.dims)) * (4 if tensor.data_type == 1 else 1) for tensor in graph.initializer) <= 90 * 64
    )


@pytest.mark.parametrize("opset", [17, 21])
def test_a_table_that_a_layer_reads_too_is_coded_once(opset: int) -> None:
    text = "g (int64[n] i, float[m, 64] x) => (float y, float z) { y = Gather(w, i)  z = Gemm<transB = 1>(x, w) }"
    feed = {"i": np.array([1, 77]), "x": normal(3, 64)}
    reference, model = (parse(text, {"w": normal(90, 64)}, opset) for _ in range(2))
    model.ir_version = 10
    run(model, "int4")
    packed = [constant for constant in model.constants() if constant.data.size >= 90 * 32]
    assert len({constant.name for constant in packed}) == 1
    exact, found = Session(reference).run(feed), Session(model).run(feed)
    assert all(noise(exact[name], found[name]) < 1.2e-2 for name in exact)


def test_narrow_weights_become_int8_under_int4() -> None:
    text = "g (float[n, 64, 9, 9] x) => (float y) { y = Conv<group = 64>(x, w) }"
    model = parse(text, {"w": weight(64, 1, 3, 3)}, 17)
    result = run(model, "int4")
    assert [change.detail for change in result.changes] in (["int8"], [])
    wide = parse(text, {"w": weight(64, 1, 5, 5)}, 17)
    assert [change.detail for change in run(wide, "int4").changes] == ["int8"]


def test_blocks_that_do_not_divide_are_filled_up() -> None:
    model = parse("g (float[m, 101] x) => (float y) { y = MatMul(x, w) }", {"w": weight(101, 64)}, 17)
    reference = parse("g (float[m, 101] x) => (float y) { y = MatMul(x, w) }", {"w": weight(101, 64)}, 17)
    run(model, "int4:save=memory")
    feed = {"x": normal(4, 101)}
    assert noise(Session(reference).run(feed)["y"], Session(model).run(feed)["y"]) < 1.2e-2
    assert len(nodes(model, "Slice")) == 1


def correlated(rows: int, width: int, seed: int) -> Array:
    base = normal(rows, width // 8, seed=seed)
    mixing = normal(width // 8, width, seed=99)
    return np.asarray(base @ mixing / 4 + 0.2 * normal(rows, width, seed=seed + 50), np.float32)


def effective_error(text: str, feeds: list[dict[str, Array]], seen: dict[str, Array]) -> float:
    source, initializers = KINDS["matmul"][:2]
    model, reference = (parse(source, initializers, 17) for _ in range(2))
    run(model, text, feeds)
    return noise(Session(reference).run(seen)["y"], Session(model).run(seen)["y"])


def test_error_feedback_on_inputs_not_seen() -> None:
    feeds = [{"x": correlated(40, 96, seed)} for seed in range(8)]
    seen = {"x": correlated(200, 96, 1000)}
    plain = effective_error("int4:feedback=false", feeds, seen)
    fed = effective_error("int4", feeds, seen)
    assert fed < 0.6 * plain


def test_second_moments_keep_to_a_limit_of_memory_small_layers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[m, 96] x) => (float[m, 96] y) { h = MatMul(x, w)  z = MatMul(h, v)  y = MatMul(z, u) }"
    values = {"w": weight(96, 200), "v": weight(200, 64), "u": weight(64, 96)}
    feeds = [{"x": correlated(40, 96, seed)} for seed in range(3)]

    def fed(limit: int) -> list[bool]:
        monkeypatch.setattr(moments, "MOST_BYTES", limit)
        return ["error feedback" in change.detail for change in run(parse(text, values), "int4", feeds).changes]

    sizes = [16 * inputs**2 for inputs in (96, 200, 64)]
    assert fed(sum(sizes)) == [True, True, True]
    assert fed(sizes[0] + sizes[2]) == [True, False, True]
    assert fed(sizes[2]) == [False, False, True]
    assert fed(0) == [False, False, False]


def test_error_feedback_in_groups_and_shared_weights() -> None:
    source = """g (float[n, 64, 6, 6] x) => (float y, float z) {
      y = Conv<group = 2>(x, w)  r = Relu(x)  z = Conv<group = 2>(r, w) }"""
    initializers = {"w": weight(128, 32, 1, 1)}

    def feed(seed: int) -> dict[str, Array]:
        return {"x": correlated(2 * 36, 64, seed).reshape(2, 36, 64).transpose(0, 2, 1).reshape(2, 64, 6, 6)}

    model, plain, reference = (parse(source, initializers, 17) for _ in range(3))
    result = run(model, "int4", [feed(seed) for seed in range(8)])
    run(plain, "int4:feedback=false")
    assert len(result.changes) == 2
    assert all("error feedback" in change.detail for change in result.changes)
    assert len([c for c in model.constants() if c.data.size in (128 * 32, 128 * 16)]) == 1
    exact, ours, theirs = (Session(each).run(feed(77)) for each in (reference, model, plain))
    assert all(noise(exact[name], ours[name]) < noise(exact[name], theirs[name]) for name in exact)


def test_biases_take_the_mean_error() -> None:
    source, initializers, _ = KINDS["conv"]
    feeds = [{"x": normal(2, 20, 9, 9, seed=seed) + 3} for seed in range(4)]

    def error(text: str) -> float:
        model, reference = (parse(source, initializers, 19) for _ in range(2))
        run(model, text, feeds)
        feed = {"x": normal(2, 20, 9, 9, seed=9) + 3}
        exact, found = Session(reference).run(feed)["y"], Session(model).run(feed)["y"]
        return float(np.square((exact - found)[:, :, 2:-2, 2:-2].mean(axis=(0, 2, 3))).sum())

    for text in ("int4:feedback=false", "int8_weights", "fp8"):
        corrected, plain = error(text), error(f"{text}:correct_bias=false")
        assert corrected < 0.1 * plain, text


# what stays


def test_named_nodes_stay_and_unknown_names_are_refused() -> None:
    source = "g (float[m, 96] x) => (float y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    initializers = {"w": weight(96, 70), "v": weight(70, 96)}

    def changed(text: str) -> tuple[list[str], list[tuple[str, str]]]:
        model = parse(source, initializers)
        for node, name in zip(model.graph.nodes, ("first/layer", "second/layer"), strict=True):
            node.name = name
        result = run(model, text)
        return [c.where.split(",")[0] for c in result.changes], [
            (s.node.split(",")[0], s.reason) for s in result.skipped
        ]

    assert changed("int4:exclude=first/*") == (["second/layer"], [("first/layer", "excluded by 'first/*'")])
    assert changed("int4:only=first/layer") == (["first/layer"], [("second/layer", "not among only=first/layer")])
    with pytest.raises(UsageError, match="no node is called 'frist/layer'") as caught:
        changed("int4:exclude=frist/layer")
    assert "first/layer" in caught.value.remedy


BROKEN: dict[str, tuple[Callable[[Array], Array], str]] = {
    "nan": (lambda w: np.where(np.arange(w.size).reshape(w.shape) == 7, np.nan, w), "holds NaN"),
    "infinite": (lambda w: np.where(np.arange(w.size).reshape(w.shape) == 7, np.inf, w), "holds NaN or infinity"),
    "tiny": (lambda w: w * 1e-36, "too small"),
}


@pytest.mark.parametrize("text", ["int8_weights", "int4", "fp8"])
@pytest.mark.parametrize("how", list(BROKEN))
def test_weights_that_no_scale_holds_stay(how: str, text: str) -> None:
    spoil, reason = BROKEN[how]
    model = parse(KINDS["matmul"][0], {"w": spoil(weight(96, 70)).astype(np.float32)}, 19)
    before = model.digest()
    result = run(model, text)
    assert not result.changes
    assert [reason in skip.reason for skip in result.skipped] == [True]
    assert model.digest() == before


@pytest.mark.parametrize("text", PASSES)
def test_a_second_run_finds_nothing(text: str) -> None:
    model = parse(*KINDS["conv"][:2], 19)
    run(model, text)
    before = model.digest()
    assert not run(model, text).changes
    assert model.digest() == before


@pytest.mark.parametrize("text", ["int8_weights", "int4", "fp8", "int4:save=memory"])
def test_zeros_and_constants(text: str) -> None:
    w = np.zeros((96, 70), np.float32)
    w[:, 3] = 0.25
    model = parse(KINDS["matmul"][0], {"w": w}, 19)
    run(model, text)
    feed = {"x": normal(5, 96)}
    exact, found = feed["x"] @ w, Session(model).run(feed)["y"]
    assert np.abs(found[:, :3]).max() < 1e-4
    assert np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


BODIES = """g (float[m, 96] x, bool c) => (float y) {
  y = If (c) < then_branch = t () => (float a) { a = MatMul(x, w) },
               else_branch = e () => (float b) { h = MatMul(x, v)  b = Neg(h) }> }"""


@pytest.mark.parametrize("text", PASSES)
def test_weights_of_inner_bodies(text: str) -> None:
    initializers = {"w": weight(96, 70), "v": weight(96, 70, seed=5)}
    model, reference = (parse(BODIES, initializers, 19) for _ in range(2))
    feeds = [{"x": normal(4, 96, seed=seed), "c": np.array(bool(seed % 2))} for seed in range(4)]
    assert len(run(model, text, feeds).changes) == 2
    for feed in feeds:
        exact, found = Session(reference).run(feed)["y"], Session(model).run(feed)["y"]
        assert noise(exact, found) < NOISE[text.split(":")[0]]


def test_the_file_gives_back_what_was_in_memory(tmp_path: Path) -> None:
    for text, opset in (("int4", 17), ("int4", 21), ("int4:save=memory", 21), ("fp8", 19)):
        model = parse(*KINDS["matmul"][:2], opset)
        model.ir_version = 10
        run(model, text)
        model.save(tmp_path / "saved.onnx")
        feed = KINDS["matmul"][2]
        assert np.array_equal(Session(model).run(feed)["y"], Session(load(tmp_path / "saved.onnx")).run(feed)["y"])


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="no power of two"):
        lookup("int4").parse({"block": "48"})
    with pytest.raises(UsageError, match="'save'"):
        lookup("int4").parse({"save": "disk"})


def test_results_are_the_same_bytes_every_time() -> None:
    feeds = [{"x": correlated(40, 96, seed)} for seed in range(4)]
    protos = []
    for _ in range(2):
        model = parse(*KINDS["matmul"][:2])
        run(model, "int4", feeds)
        protos.append(model.to_proto().SerializeToString(deterministic=True))
    assert protos[0] == protos[1]


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("shape", [(64, 5), (64, 12), (64, 32), (64, 48), (128, 64)])
def test_four_bits_are_taken_where_they_save_more_than_their_nodes_cost(shape: tuple[int, int], opset: int) -> None:
    inputs, outputs = shape
    sizes = []
    for text in ("int8_weights", "int4:save=file"):
        source = f"g (float[1, {inputs}] x) => (float[1, {outputs}] y) {{ y = MatMul(x, w) }}"
        model = parse(source, {"w": weight(inputs, outputs)}, opset)
        if opset == 21:
            model.ir_version = 10
        run(model, text)
        sizes.append(len(model.to_proto().SerializeToString()))
    assert sizes[1] <= sizes[0] + 64


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e7])
def test_scales_that_float16_does_not_hold_stay_float32(factor: float) -> None:
    source = "g (float[1, 128] x) => (float[1, 96] y) { y = MatMul(x, w) }"
    model, reference = (parse(source, {"w": weight(128, 96) * np.float32(factor)}) for _ in range(2))
    run(model, "int4:save=file")
    feed = {"x": normal(1, 128)}
    assert noise(Session(reference).run(feed)["y"], Session(model).run(feed)["y"]) < NOISE["int4"]


def test_changes_name_the_nodes_that_were_there() -> None:
    source = "g (float[n, 64] x) => (float[n, 40] y) { a = Gemm(x, w) y = MatMul(a, v) }"
    model = parse(source, {"w": weight(64, 64), "v": weight(64, 40)})
    result = run(model, "int4:save=memory")
    assert [change.where for change in result.changes] == ["a, weight w", "y, weight v"]


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("text", ["int4:save=memory", "int8_weights:save=memory"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (3, 1), (1,), ()])
@pytest.mark.parametrize("known", [True, False])
def test_a_bias_of_any_shape_stays_right(shape: tuple[int, ...], known: bool, text: str, opset: int) -> None:
    bias = {"b": np.float32(3) * normal(*shape)}
    given = "" if known else f", float[{', '.join(map(str, shape))}] c"
    source = (
        f"g (float[3, 64] x{given}) => (float[3, 40] y) {{ {'' if known else 'b = Identity(c)'} y = Gemm(x, w, b) }}"
    )
    if not known and not shape:
        pytest.skip("the textual form has no scalar inputs")
    model, reference = (parse(source, {"w": weight(64, 40)} | (bias if known else {}), opset) for _ in range(2))
    model.ir_version = 10 if opset == 21 else 8
    feed = {"x": normal(3, 64)} | ({} if known else {"c": bias["b"]})
    run(model, text, [feed] * 2)
    exact = Session(reference).run(feed)["y"]
    for (found,) in outputs_at_all_levels(model, feed):
        assert noise(exact, found) < NOISE["int4"]


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("text", ["int4:save=memory", "int8_weights:save=memory"])
def test_codes_that_two_bodies_read_load_at_all_levels(text: str, opset: int) -> None:
    source = """g (float[n, 96] x, bool c) => (float[n, 40] y, float[n, 40] z) {
        z = MatMul(x, w)
        y = If (c) <
            then_branch = t () => (float[n, 40] a) { a = MatMul(x, w) },
            else_branch = e () => (float[n, 40] b) { d = MatMul(x, w) b = Relu(d) }
        > }"""
    model, reference = (parse(source, {"w": weight(96, 40)}, opset) for _ in range(2))
    model.ir_version = 10 if opset == 21 else 8
    run(model, text)
    for choice in (True, False):
        feed = {"x": normal(3, 96), "c": np.array(choice)}
        exact = Session(reference).run(feed)
        for found in outputs_at_all_levels(model, feed):
            assert all(noise(want, got) < NOISE["int4"] for want, got in zip(exact.values(), found, strict=True))
