"""Stored forms are weights while a pass runs, and forms again behind it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.encoding import Form, MaskedPalette, Opened, Palette, Sparse, find_palette, parameters, smallest, store
from onnxopt.graph import replace_inputs
from onnxopt.model import Constant, Model, Node, Variable, load
from onnxopt.pipeline.passes import evaluate
from tests.encoding.grids import FORMS, LEVELS, SHAPE, Array, constant, feed, form, model_of, run, same_bits
from tests.passes.quantizing import parse

NODES = [kind for kind in FORMS if kind != "sparse"]


def holding(wanted: Form, opset: int = 17) -> Model:
    """A model that holds one stored form."""
    model = model_of(wanted.values(), opset, 10)
    assert not store(model, {constant(model): wanted}).left
    return model


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("opset", [9, 13, 21])
@pytest.mark.parametrize("read_again", [False, True])
def test_what_a_pass_leaves_alone_is_the_same_model_after(kind: str, opset: int, read_again: bool) -> None:
    if opset == 9 and kind.startswith("mask"):
        return
    wanted = form(kind)
    model = holding(wanted, opset)
    if read_again:
        model = load(model.to_proto())
    before = model.to_proto().SerializeToString(deterministic=True)
    opened = Opened(model, evaluate)
    assert opened
    assert [node.op for node in model.graph.nodes] == ["MatMul", "Relu"]
    assert same_bits(constant(model).values, wanted.values())
    assert opened.close() == []
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_models_without_stored_forms_are_not_touched() -> None:
    model = model_of(np.round(form("mask").values()))
    before = model.digest()
    opened = Opened(model, evaluate)
    assert not opened
    assert opened.close() == []
    assert model.digest() == before


@pytest.mark.parametrize("kind", NODES)
def test_changed_weights_are_stored_again_without_loss(kind: str) -> None:
    wanted = form(kind, 3)
    model = holding(wanted)
    opened = Opened(model, evaluate)
    weight = constant(model)
    weight.values = (2 * weight.values[:, :32]).astype(np.float32)
    model.graph.outputs[0].shape = [1, 32]
    expected = run(model, LEVELS[3], feed())[0]
    assert opened.close() == []
    assert any(node.op == "Gather" for node in model.graph.nodes)
    assert same_bits(run(model, LEVELS[3], feed())[0], expected)


def test_what_a_pass_makes_of_a_weight_is_stored_again_too() -> None:
    """As codes of 8 bits are: other names, another type, a factor for each column."""
    model = holding(form("whole"))
    opened = Opened(model, evaluate)
    weight = constant(model)
    codes = np.clip(np.round(weight.values * 30), -127, 127).astype(np.int8)
    made = Constant("codes", codes)
    text = """g (float[1, 48] x, int8[48, 64] codes) => (float[1, 64] y) {
        w = Cast <to = 1> (codes)  h = MatMul(x, w)  y = Relu(h) }"""
    other = parse(text)
    model.graph.nodes = list(other.graph.nodes)
    replace_inputs(other.graph.inputs[1], made)
    replace_inputs(other.graph.inputs[0], model.graph.inputs[0])
    model.graph.outputs = list(other.graph.outputs)
    model.graph.initializers = []
    model.normalize()
    expected = run(model, LEVELS[3], feed())[0]
    assert opened.close() == []
    assert [node.op for node in model.graph.nodes].count("Gather") == 1
    assert max(each.data.nbytes for each in model.constants()) <= SHAPE[0] * SHAPE[1] // 2
    assert same_bits(run(model, LEVELS[3], feed())[0], expected)


def test_a_weight_that_fits_no_form_any_more_is_told() -> None:
    model = holding(form("whole"))
    opened = Opened(model, evaluate)
    constant(model).values = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    assert opened.close() == ["W is stored densely now"]
    assert [node.op for node in model.graph.nodes] == ["MatMul", "Relu"]


def test_a_weight_that_a_pass_removes_goes_with_its_nodes() -> None:
    model = holding(form("whole"))
    opened = Opened(model, evaluate)
    replace_inputs(constant(model), Constant("other", np.ones(SHAPE, np.float32)))
    model.graph.initializers = [each for each in model.graph.initializers if each.outputs]
    assert opened.close() == []
    assert all(each.name.startswith("other") for each in model.constants())
    assert run(model, LEVELS[3], feed())[0].shape == (1, SHAPE[1])


def test_two_weights_and_nodes_added_between() -> None:
    """One weight changed, the other left alone, and the body has other nodes than before."""
    coarse = np.round(np.random.default_rng(0).normal(size=(64, 64)) * 2).astype(np.float32)
    other = np.round(np.random.default_rng(1).normal(size=(64, 64)) * 2).astype(np.float32)
    model = parse(
        "g (float[1, 64] x) => (float[1, 64] y) { h = MatMul(x, A)  r = Relu(h)  y = MatMul(r, B) }",
        {"A": coarse, "B": other},
    )
    forms = {constant(model, name): find_palette(constant(model, name).values) for name in "AB"}
    store(model, {each: found for each, found in forms.items() if found is not None})
    opened = Opened(model, evaluate)
    constant(model, "A").values = -coarse
    relu = next(node for node in model.graph.nodes if node.op == "Relu")
    relu.op = "Identity"
    x = {"x": np.random.default_rng(2).normal(size=(1, 64)).astype(np.float32)}
    expected = run(model, LEVELS[3], x)[0]
    assert opened.close() == []
    assert [node.op for node in model.graph.nodes].count("Gather") == 2
    assert same_bits(run(model, LEVELS[3], x)[0], expected)
    again = load(model.to_proto())
    assert Opened(again, evaluate)


def test_codes_with_a_scale_are_no_stored_form() -> None:
    """Cast and Mul compute with floats: what they stand for is not what is stored."""
    codes = np.random.default_rng(0).integers(-9, 9, SHAPE).astype(np.int8)
    model = parse(
        "g (float[1, 48] x) => (float[1, 64] y) { w = Cast <to = 1> (c)  v = Mul(w, s)  y = MatMul(x, v) }",
        {"c": codes, "s": np.array(0.1, np.float32)},
    )
    assert not Opened(model, evaluate)


def test_what_cannot_be_computed_is_no_stored_form() -> None:
    """Indices outside of the codebook, in a branch that is never taken."""
    codes = np.full(SHAPE, 200, np.uint8)
    text = """g (float[1, 48] x, bool c) => (float[1, 64] y) {
        y = If (c) <then_branch = a () => (float[1, 64] p) {
                        i = Cast <to = 6> (codes)  w = Gather(book, i)  p = MatMul(x, w) },
                    else_branch = b () => (float[1, 64] q) { q = MatMul(x, W) }> }"""
    model = parse(text, {"codes": codes, "book": np.arange(16, dtype=np.float32), "W": form("whole").values()})
    before = model.digest()
    assert not Opened(model, evaluate)
    assert model.digest() == before


def tied() -> Model:
    """A table whose transpose multiplies at the end, as `dedup` leaves it."""
    return parse(
        """g (int64[n] i, float[48, 9] t) => (float[n, 48] y, float[9, 64] z) {
        e = Gather(W, i)  v = Transpose <perm = [1, 0]> (W)  y = MatMul(e, v)  u = Transpose(t)  z = MatMul(u, W) }""",
        {"W": form("whole").values()},
    )


def test_a_weight_in_another_layout_is_shown_where_asked() -> None:
    model = tied()
    before = model.digest()
    assert not Opened(model, evaluate)
    opened = Opened(model, evaluate, shared=True)
    assert same_bits(constant(model, "v").values, np.ascontiguousarray(constant(model, "W").values.T))
    assert opened.close() == []
    assert model.digest() == before


def test_a_layout_of_a_changed_weight_is_not_put_back() -> None:
    """The weight that it borrows changed, the layout did not: computing it again would change it too."""
    model = tied()
    opened = Opened(model, evaluate, shared=True)
    old = np.array(constant(model, "v").values)
    constant(model, "W").values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    opened.close()
    feeds: dict[str, Array] = {"i": np.arange(5), "t": np.ones((48, 9), np.float32)}
    expected = constant(model, "W").values[:5] @ old
    assert np.allclose(run(model, LEVELS[3], feeds)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NODES)
def test_parameters_are_those_of_the_weights(kind: str) -> None:
    """Not the codes, of which a byte may hold several: within what small constants of decoding come to."""
    wanted = form(kind)
    dense = parameters(model_of(wanted.values()))
    assert dense == SHAPE[0] * SHAPE[1]
    assert dense <= parameters(holding(wanted)) <= 1.05 * dense
    again = load(holding(wanted).to_proto())
    assert dense <= parameters(again) <= 1.05 * dense


def tied_form() -> Model:
    """A stored table whose transpose multiplies at the end: what `share` behind `dedup` leaves."""
    model = tied()
    assert not store(model, {constant(model): form("whole")}).left
    return model


@pytest.mark.parametrize("shared", [False, True])
def test_a_form_that_a_layout_reads_too_goes_back_as_it_came(shared: bool) -> None:
    """The layout read the weight shown in its place, which then stayed beside the codes under another name."""
    model = load(tied_form().to_proto())
    before = model.to_proto().SerializeToString(deterministic=True)
    opened = Opened(model, evaluate, shared=shared)
    assert isinstance(constant(model, "W"), Constant)
    assert [node.op for node in model.graph.nodes].count("Transpose") == (1 if shared else 2)
    assert opened.close() == []
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("rows", [5, 16])
def test_forms_of_few_codes_are_opened(rows: int) -> None:
    """One bit a weight, or one code for a vector, leaves few bytes: they were taken for other constants."""
    values = np.where(np.random.default_rng(0).random((rows, 64)) < 0.5, 0.25, -0.5).astype(np.float32)
    palette = find_palette(values)
    assert palette is not None
    vectors = Palette((16, 16), 0, np.ones((1, 2, 16), np.float32), np.zeros((16, 1), np.uint8))
    for wanted in (palette, vectors):
        model = model_of(wanted.values())
        dense = parameters(model)
        assert not store(model, {constant(model): wanted}).left
        assert dense <= parameters(model) <= dense + 20
        before = model.digest()
        opened = Opened(model, evaluate)
        assert same_bits(constant(model).values, wanted.values())
        assert opened.close() == []
        assert model.digest() == before


def test_parameters_of_a_form_and_its_layout_count_once() -> None:
    elements = SHAPE[0] * SHAPE[1]
    assert elements <= parameters(tied_form()) <= 1.05 * elements


@pytest.mark.parametrize("kind", NODES)
def test_what_a_pass_stores_again_as_it_was_is_no_change(kind: str) -> None:
    """A second run of `share` or `sparsify` writes the same bytes; the model is the one before, content by content."""
    wanted = form(kind)
    model = load(holding(wanted).to_proto())
    before = model.digest()
    opened = Opened(model, evaluate)
    assert not store(model, {constant(model): wanted}).left
    assert opened.close() == []
    assert model.digest() == before


def test_long_names_are_counted_where_forms_are_compared_with_what_they_save() -> None:
    """Each node repeats the name of its tensor: a form that saved 100 bytes by its codes took 300 more by names."""
    name = "bert.encoder.layer.11.attention.self.query.weight"
    for rows in range(12, 65, 4):
        values = np.round(np.random.default_rng(rows).normal(size=(rows, 24)) * 2).astype(np.float32)
        palette = find_palette(values)
        assert palette is not None
        model = model_of(values)
        constant(model).name = name
        before = model.to_proto().ByteSize()
        weight = constant(model, name)
        told = store(model, {weight: palette})
        assert (model.to_proto().ByteSize() < before) == bool(told.saved), rows
        assert abs(before - model.to_proto().ByteSize() - told.saved.get(weight, 0)) < 350, rows


def test_a_sparse_tensor_is_not_stored_in_more_bytes_than_it_has() -> None:
    values = np.zeros(SHAPE, np.float32)
    values[::7, ::9] = 1
    model = model_of(values)
    assert not store(model, {constant(model): Sparse(values)}).left
    palette = find_palette(values)
    assert palette is not None
    before = model.to_proto().ByteSize()
    store(model, {constant(model): palette})
    assert model.to_proto().ByteSize() <= before
    assert smallest(constant(model).data, palette=True, mask=True) is None


def test_a_form_of_short_names_is_smaller_than_the_same_one_with_long_names() -> None:
    """As tools leave it that rename all tensors: one node more in it is less than what names of ours take."""
    wanted = form("whole")
    model = load(holding(wanted).to_proto())
    made = next(tensor for node in model.graph.nodes if node.op == "MatMul" for tensor in node.inputs[1:])
    replace_inputs(made, again := Variable("again"))
    identity = Node(op="Identity", inputs=[made], outputs=[again])
    model.graph.nodes.insert(len(model.graph.nodes) - 2, identity)
    for at, node in enumerate(model.graph.nodes):
        node.name = ""
        for tensor in (*node.inputs, *node.outputs):
            tensor.name = tensor.name if tensor.name in "xy" else f"{at}{len(tensor.name)}"
    model = load(model.to_proto())
    before = model.digest()
    opened = Opened(model, evaluate)
    shown = next(each for each in model.constants() if each.shape == SHAPE)
    assert not store(model, {shown: wanted}).left
    assert opened.close() == []
    assert model.digest() == before


def test_a_smaller_form_that_a_pass_stores_stays() -> None:
    wanted = form("masked palette")
    assert isinstance(wanted, MaskedPalette)
    model = holding(wanted.palette)
    opened = Opened(model, evaluate)
    assert not store(model, {constant(model): wanted}).left
    opened.close()
    assert any(node.op == "CumSum" for node in model.graph.nodes)


def test_a_larger_form_that_a_pass_stores_goes() -> None:
    """And other values under the same name are another weight, whose codes are not stored as codes again."""
    codes = np.zeros((256, 256), np.uint8)
    codes[::16] = np.random.default_rng(0).integers(0, 16, (16, 256))
    values = np.linspace(-1, 1, 16, dtype=np.float32)[codes]
    for changed, masked in ((values, True), (-values, False)):
        model = model_of(values)
        palette = find_palette(values)
        assert palette is not None
        assert not store(model, {constant(model): MaskedPalette.of(palette)}).left
        opened = Opened(model, evaluate)
        palette = find_palette(changed)
        assert palette is not None
        constant(model).values = changed
        assert not store(model, {constant(model): palette}).left
        opened.close()
        assert any(node.op == "CumSum" for node in model.graph.nodes) == masked
