"""sparsify: bytes saved, every bit kept, and what stays dense and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.passbase import Context, Effect, PassResult
from onnxopt.passes.sparsify import Sparsify
from onnxopt.pipeline.passes import evaluate
from tests.encoding.grids import LEVELS, Array, run, same_bits
from tests.passes.quantizing import normal, parse, weight

DIGITS = Path(__file__).parents[2] / "models" / "digits_cnn" / "digits_cnn.onnx"


def sparse(*shape: int, density: float = 0.2, seed: int = 0) -> Array:
    values = weight(*shape, seed=seed)
    values[np.random.default_rng(seed).random(shape) >= density] = 0
    return values


def one_layer(values: Array, opset: int = 17) -> Model:
    rows, columns = values.shape
    return parse(f"g (float[n, {rows}] x) => (float[n, {columns}] y) {{ y = MatMul(x, w) }}", {"w": values}, opset)


def sparsify(model: Model, **options: object) -> PassResult:
    result = Sparsify(**options).run(model, Context(evaluate=evaluate))  # type: ignore[arg-type]
    model.normalize()
    return result


@pytest.mark.parametrize(("density", "limit"), [(0.02, 0.06), (0.2, 0.24), (0.5, 0.54), (0.9, 0.94)])
def test_the_file_takes_a_bit_a_weight_and_the_values_that_stay(density: float, limit: float) -> None:
    model = one_layer(sparse(512, 256, density=density))
    before = model.to_proto().ByteSize()
    x = {"x": normal(3, 512)}
    expected = [run(model, level, x)[0] for level in LEVELS]
    result = sparsify(model)
    assert [change.where for change in result.changes] == ["w"]
    assert model.to_proto().ByteSize() < limit * before
    assert all(same_bits(run(model, level, x)[0], one) for level, one in zip(LEVELS, expected, strict=True))


def test_values_of_a_palette_become_codes_behind_the_mask() -> None:
    values = np.array(np.round(weight(512, 256) * 200) / 4, np.float32)
    values[np.random.default_rng(0).random(values.shape) >= 0.3] = 0
    values[np.abs(values) > 1.5] = 0
    model = one_layer(values)
    before = model.to_proto().ByteSize()
    [change] = sparsify(model).changes
    assert "palette" in change.detail
    assert model.to_proto().ByteSize() < 0.07 * before


def test_sparse_initializers_are_asked_for_and_told_of() -> None:
    values = sparse(512, 256, density=0.05)
    model = one_layer(values)
    x = {"x": normal(3, 512)}
    expected = [run(model, level, x)[0] for level in LEVELS]
    result = sparsify(model, forms=("sparse",))
    proto = model.to_proto()
    onnx.checker.check_model(proto)
    assert [each.values.name for each in proto.graph.sparse_initializer] == ["w"]
    assert proto.graph.sparse_initializer[0].indices.data_type == onnx.TensorProto.INT64
    assert not proto.graph.initializer
    assert all(same_bits(run(model, level, x)[0], one) for level, one in zip(LEVELS, expected, strict=True))
    assert any("version converter" in note for note in result.notes)
    again = sparsify(load(proto))
    assert [skip.reason for skip in again.skipped] == ["it is a sparse tensor already"]


def test_of_both_forms_the_smaller_is_taken() -> None:
    rare = one_layer(sparse(512, 256, density=0.001))
    assert "sparse initializer" in sparsify(rare, forms=("bitmask", "sparse")).changes[0].detail
    usual = one_layer(sparse(512, 256, density=0.2))
    assert "bitmask" in sparsify(usual, forms=("bitmask", "sparse")).changes[0].detail


def test_what_stays_dense_is_told_with_the_reason() -> None:
    text = """g (float[n, 64] x) => (float[n, 64] y, float[64, 64] given) {
        a = MatMul(x, dense)  b = MatMul(a, given)  c = MatMul(b, coarse)  d = MatMul(c, left_out)
        y = com.microsoft.FusedMatMul(d, foreign) }"""
    zeros = sparse(64, 64, density=0.1)
    model = parse(
        text.replace("g (", "g (", 1),
        {
            "dense": weight(64, 64),
            "given": zeros,
            "coarse": np.where(sparse(64, 64, density=0.8) != 0, 1, 0).astype(np.float32),
            "left_out": sparse(64, 64, density=0.1, seed=2),
            "foreign": sparse(64, 64, density=0.1, seed=3),
        },
    )
    model.import_opset("com.microsoft", 1)
    result = sparsify(model, exclude=("d",))
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert not result.changes
    assert "too few" in reasons["dense"]
    assert "output of graph" in reasons["given"]
    assert "share:mode=unique" in reasons["coarse"]
    assert "excluded" in reasons["left_out"]
    assert "com.microsoft.FusedMatMul" in reasons["foreign"]


def test_codes_of_eight_bits_and_weights_of_constant_nodes_are_stored_too() -> None:
    codes = np.where(sparse(256, 128, density=0.2) != 0, np.random.default_rng(0).integers(-127, 127, (256, 128)), 0)
    model = parse(
        "g (float[n, 256] x) => (float[n, 128] y) { w = Cast <to = 1> (c)  v = Mul(w, s)  y = MatMul(x, v) }",
        {"c": codes.astype(np.int8), "s": np.array(0.01, np.float32)},
    )
    proto = model.to_proto()
    node = onnx.helper.make_node("Constant", [], ["c"], value=proto.graph.initializer[0])
    proto.graph.node.insert(0, node)
    del proto.graph.initializer[0]
    model = load(proto)
    x = {"x": normal(3, 256)}
    expected = run(model, LEVELS[3], x)[0]
    before = model.to_proto().ByteSize()
    assert [change.where for change in sparsify(model).changes] == ["c"]
    assert model.to_proto().ByteSize() < 0.4 * before
    assert same_bits(run(model, LEVELS[3], x)[0], expected)


def test_options() -> None:
    assert Sparsify().effect is Effect.EXACT
    with pytest.raises(UsageError, match="unknown form"):
        Sparsify(forms=("bitmap",))
    with pytest.raises(UsageError, match="no form"):
        Sparsify(forms=())
    with pytest.raises(UsageError, match="no node is called"):
        sparsify(one_layer(sparse(64, 64)), only=("nobody",))


def test_through_the_pipeline_and_on_again() -> None:
    """Zeros, then masks, then codes of 8 bits: each pass finds what the one before left, and nothing is undone."""
    shape = onnx.load(DIGITS).graph.input[0]
    dims = [dim.dim_value or 1 for dim in shape.type.tensor_type.shape.dim]
    inputs = [{shape.name: normal(*dims, seed=at)} for at in range(6)]
    sizes = {}
    for passes in ("prune_weights:sparsity=0.5", "prune_weights:sparsity=0.5,sparsify"):
        result = onnxopt.optimize(DIGITS, passes=f"{passes},int8", feeds=inputs, min_sqnr="0dB")
        assert result.report.quantization is not None
        assert result.report.quantization.kernels is not None
        sizes[passes] = (result.model.to_proto().ByteSize(), result.report.quantization.kernels.integer)
    (dense, layers), (masked, still) = sizes.values()
    assert masked < 0.85 * dense
    assert layers == still > 0
