"""Stored forms in models: valid, loadable and equal bit for bit at every optimization level."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnxopt.encoding import Form, find_mask, find_palette, store
from onnxopt.model import Model, load
from tests.encoding.grids import FORMS, LEVELS, NARROW, Array, constant, feed, form, model_of, run, same_bits
from tests.passes.quantizing import parse

VERSIONS = ((9, 5), (11, 6), (13, 7), (17, 8), (21, 10), (25, 13))


def stored(model: Model, wanted: Form, name: str = "W") -> str | None:
    """Store one constant; the reason where it stays dense."""
    stands = constant(model, name)
    return store(model, {stands: wanted}).left.get(stands)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("opset", "ir_version"), VERSIONS)
def test_every_form_computes_the_same_bits(kind: str, opset: int, ir_version: int) -> None:
    for bits in (1, 3, 4, 7, 8):
        wanted = form(kind, bits)
        model = model_of(wanted.values(), opset, ir_version)
        expected = {level: run(model, level, feed())[0] for level in LEVELS}
        before = model.to_proto().ByteSize()
        reason = stored(model, wanted)
        if reason is not None:
            assert opset < 11 or ir_version < 6 or "would not be smaller" in reason
            continue
        proto = model.to_proto()
        onnx.checker.check_model(proto, full_check=kind != "sparse")
        assert proto.ByteSize() < before
        for level in LEVELS:
            assert same_bits(run(model, level, feed())[0], expected[level]), (bits, level)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["whole", "rows", "mask", "masked palette"])
def test_narrow_types_are_stored_too(dtype: npt.DTypeLike, kind: str) -> None:
    wanted = form(kind, 2, dtype)
    model = model_of(wanted.values())
    expected = run(model, LEVELS[0], feed())[0]
    assert stored(model, wanted) is None
    assert all(same_bits(run(model, level, feed())[0], expected) for level in LEVELS[:1])
    assert np.allclose(run(model, LEVELS[3], feed())[0], expected, rtol=1e-4)


def test_the_estimate_is_never_above_what_is_saved_by_much() -> None:
    for kind in FORMS:
        wanted = form(kind)
        model = model_of(wanted.values())
        before = model.to_proto().ByteSize()
        weight = constant(model)
        result = store(model, {weight: wanted})
        saved = before - model.to_proto().ByteSize()
        assert abs(saved - result.saved[weight]) < 600, kind


def test_weights_of_one_name_in_two_branches_are_told_apart() -> None:
    """What was said of one counted for the other: stored, and reported as left dense."""
    model = parse(
        """g (float[1, 48] x, bool c) => (float[1, m] y) {
        y = If (c) <then_branch = a () => (float[1, m] p) { p = MatMul(x, V) },
                    else_branch = b () => (float[1, n] q) { q = MatMul(x, W) }> }""",
        {"V": form("whole").values(), "W": form("whole").values()[:, :4]},
    )
    large, small = constant(model, "V"), constant(model, "W")
    model.normalize()
    large.name = small.name = "w"
    palettes = {each: find_palette(each.values) for each in (large, small)}
    result = store(model, {each: palette for each, palette in palettes.items() if palette is not None})
    assert list(result.saved) == [large]
    assert list(result.left) == [small]


def test_what_outputs_annotations_and_training_name_stays() -> None:
    coarse = np.round(np.random.default_rng(0).normal(size=(48, 64))).astype(np.float32)
    palette = find_palette(coarse)
    assert palette is not None
    given = parse("g (float[1, 48] x) => (float[1, 64] y, float[48, 64] W) { y = MatMul(x, W) }", {"W": coarse})
    assert "output of graph" in str(stored(given, palette))
    proto = model_of(coarse).to_proto()
    note = proto.graph.quantization_annotation.add(tensor_name="x")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="W")
    assert "annotation" in str(stored(load(proto), palette))
    proto = model_of(coarse).to_proto()
    proto.training_info.add().update_binding.add(key="W", value="W_new")
    assert "training" in str(stored(load(proto), palette))


def test_a_constant_of_a_branch_is_stored_in_it() -> None:
    coarse = np.round(np.random.default_rng(0).normal(size=(48, 64))).astype(np.float32)
    text = """g (float[1, 48] x, bool c) => (float[1, 64] y) {
        y = If (c) <then_branch = a () => (float[1, 64] p) { p = MatMul(x, W) },
                    else_branch = b () => (float[1, 64] q) { r = MatMul(x, W)  q = Neg(r) }> }"""
    model = parse(text, {"W": coarse})
    palette = find_palette(coarse)
    assert palette is not None
    cases = [{**feed(), "c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, level, case)[0] for level in LEVELS for case in cases]
    assert stored(model, palette) is None
    found = [run(model, level, case)[0] for level in LEVELS for case in cases]
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_of_one_content_share_one_form() -> None:
    coarse = np.round(np.random.default_rng(0).normal(size=(64, 64))).astype(np.float32)
    model = parse(
        "g (float[1, 64] x) => (float[1, 64] y) { h = MatMul(x, A)  y = MatMul(h, B) }", {"A": coarse, "B": coarse}
    )
    one, other = constant(model, "A"), constant(model, "B")
    other.values = one.data
    palette = find_palette(coarse)
    assert palette is not None
    store(model, {one: palette, other: palette})
    assert [node.op for node in model.graph.nodes].count("Gather") == 1
    assert len([each for each in model.constants() if each.data.nbytes > 1000]) == 1


def test_masks_and_vectors_need_their_operator_sets() -> None:
    values: Array = form("mask").values()
    assert "operator set 11" in str(stored(model_of(values, 9, 5), find_mask(values)))
    assert "IR version 6" in str(stored(model_of(values, 9, 5), form("sparse")))
