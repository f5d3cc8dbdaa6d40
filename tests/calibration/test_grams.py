"""Second moments of layer inputs: against onnxruntime's own layer with weights that pick one input each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxopt.calibration import Gram, Requests, collect
from onnxopt.calibration.gram import POSITIONS, ROWS, spread
from onnxopt.feeds import Sample
from onnxopt.model import Model, load
from tests.helpers import model, node_of, proto, session, with_weights

Array = npt.NDArray[Any]


def feeds(*arrays: Array) -> list[Sample]:
    return [Sample({"x": np.asarray(a, np.float32)}, None, f"sample {i}") for i, a in enumerate(arrays)]


def measured(the_model: Model, op: str, samples: list[Sample], **options: Any) -> Gram:
    node = node_of(the_model, op)
    found = collect(the_model, Requests(grams=(node,)), samples, **options).gram(node)
    assert found is not None
    return found


def judge(found: Gram, rows: list[Array]) -> None:
    """Hold it against rows, one array [groups, n, K] a sample."""
    every = np.concatenate(rows, axis=1).astype(np.float64)
    assert found.rows == every.shape[1]
    second = np.einsum("gnk,gnl->gkl", every, every) / found.rows
    mean = every.mean(axis=1)
    assert np.allclose(found.second, second, rtol=1e-12, atol=1e-14)
    assert np.allclose(found.mean, mean, rtol=1e-12, atol=1e-14)
    covariance = np.stack([np.cov(group.T, bias=True).reshape(second.shape[1:]) for group in every])
    assert np.allclose(found.covariance, covariance, rtol=1e-6, atol=1e-9)


def conv(attrs: str, channels: int, groups: int, kernel: tuple[int, ...]) -> tuple[Model, Any]:
    """A Conv, and onnxruntime's Conv of the same attributes that puts out all that each of its outputs multiplies."""
    inputs = channels // groups * int(np.prod(kernel))
    dims = ", ".join("abcdef"[: 2 + len(kernel)])
    text = f"g (float[{dims}] x) => (float[{dims.upper()}] y) {{ y = Conv<group = {groups}{attrs}>(x, w) }}"
    picks = np.tile(np.eye(inputs, dtype=np.float32), (groups, 1)).reshape(groups * inputs, channels // groups, *kernel)
    rng = np.random.default_rng(0)
    real = rng.standard_normal((2 * groups, channels // groups, *kernel)).astype(np.float32)
    return load(with_weights(proto(text), w=real)), session(with_weights(proto(text), w=picks))


def patches(runner: Any, sample: Sample, groups: int) -> Array:
    """[groups, rows, K] of the positions that are looked at."""
    value: Array = runner.run(None, sample.inputs)[0]
    items = value.shape[0]
    flat = value.reshape(items, groups, value.shape[1] // groups, -1)
    chosen: Array = flat[..., spread(flat.shape[-1], POSITIONS)]
    return np.moveaxis(chosen, 0, 2).transpose(0, 2, 3, 1).reshape(groups, -1, flat.shape[2])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), "positions")
    groups, each = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]), "groups")
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    strides = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(data.draw(st.integers(1, 2)) for _ in range(rank))
    auto = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]), "auto_pad")
    assume(auto == "NOTSET" or max(dilations) == 1)  # which the runtime refuses
    sizes = tuple(data.draw(st.integers(4, 12 if rank < 3 else 6)) for _ in range(rank))
    assume(all((k - 1) * d < size for k, d, size in zip(kernel, dilations, sizes, strict=True)))
    attrs = f", strides = {list(strides)}, dilations = {list(dilations)}"
    if auto != "NOTSET":
        attrs += f', auto_pad = "{auto}"'
    elif data.draw(st.booleans(), "padded"):
        pads = [data.draw(st.integers(0, kernel[at % rank] - 1)) for at in range(2 * rank)]
        attrs += f", pads = {pads}"
    if data.draw(st.booleans(), "kernel told"):
        attrs += f", kernel_shape = {list(kernel)}"
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    samples = feeds(*(rng.standard_normal((items, groups * each, *sizes)) for items in (1, 2)))
    the_model, runner = conv(attrs, groups * each, groups, kernel)
    found = measured(the_model, "Conv", samples)
    judge(found, [patches(runner, sample, groups) for sample in samples])


def test_many_positions_are_spread() -> None:
    """64 of an item, by the shape alone; the first rows and columns no more often than the last."""
    the_model, runner = conv(", pads = [1, 1, 1, 1]", 3, 1, (3, 3))
    rng = np.random.default_rng(0)
    samples = feeds(rng.standard_normal((2, 3, 20, 30)), rng.standard_normal((1, 3, 20, 30)))
    found = measured(the_model, "Conv", samples)
    judge(found, [patches(runner, sample, 1) for sample in samples])
    assert found.rows == 3 * POSITIONS


def test_weights_times_rows_are_outputs() -> None:
    """What it is for: the mean square of every output follows from the matrix, with the weight in its own order."""
    the_model, _ = conv(", pads = [1, 0, 0, 1], strides = [2, 1]", 4, 2, (3, 2))
    samples = feeds(np.random.default_rng(0).standard_normal((1, 4, 7, 6)))
    found = measured(the_model, "Conv", samples)
    weight = next(c for c in the_model.graph.initializers if c.name == "w").values.astype(np.float64)
    grouped = weight.reshape(2, 2, -1)
    expected = np.einsum("gok,gkl,gol->go", grouped, found.second, grouped).reshape(-1)
    output = session(the_model).run(None, samples[0].inputs)[0]
    assert np.allclose(expected, np.square(output.astype(np.float64)).mean(axis=(0, 2, 3)), rtol=1e-5)


def gemm(attrs: str = "") -> Model:
    weight = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    weight = weight.T if "transB" in attrs else weight
    return load(with_weights(proto(f"g (float[a, b] x) => (float[c, 4] y) {{ y = Gemm{attrs}(x, w) }}"), w=weight))


GEMMS = [(attrs, transposed) for attrs in ("transB = 1", "alpha = 0.5") for transposed in (False, True)]


@pytest.mark.parametrize(("attrs", "transposed"), GEMMS)
def test_gemms(attrs: str, transposed: bool) -> None:
    the_model = gemm(f"<{attrs}{', transA = 1' if transposed else ''}>")
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((rows, 5)) for rows in (3, 700, 1)]
    samples = feeds(*(a.T if transposed else a for a in arrays))
    found = measured(the_model, "Gemm", samples)
    rows = [np.asarray(a, np.float32)[spread(len(a), ROWS)][None] for a in arrays]
    if not transposed:  # rows are the items of a batch then, of which none is left out
        rows[1] = np.asarray(arrays[1], np.float32)[None]
    judge(found, rows)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (2, 600, 5), (1, 300, 2, 5)])
def test_products(shape: tuple[int, ...]) -> None:
    dims = ", ".join("abcd"[: len(shape) - 1] + "5")
    weight = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    text = f"g (float[{dims}] x) => (float y) {{ y = MatMul(x, w) }}"
    source = proto(text)
    source.graph.output[0].type.tensor_type.ClearField("shape")
    the_model = load(with_weights(source, w=weight))
    rng = np.random.default_rng(1)
    samples = feeds(rng.standard_normal(shape), rng.standard_normal(shape))
    items = shape[0] if len(shape) > 1 else 1
    each = int(np.prod(shape)) // 5 // items
    rows = [s.inputs["x"].reshape(items, each, 5)[:, spread(each, ROWS)].reshape(1, -1, 5) for s in samples]
    if len(shape) == 1:
        rows = [s.inputs["x"].reshape(1, 1, 5) for s in samples]
    judge(measured(the_model, "MatMul", samples), rows)


def test_joined_samples_give_the_same_rows() -> None:
    the_model, _ = conv(", pads = [1, 1, 1, 1]", 3, 1, (3, 3))
    rng = np.random.default_rng(0)
    samples = feeds(*(rng.standard_normal((1, 3, 20, 30)) for _ in range(5)))
    one, other = (measured(the_model, "Conv", samples, batch=batch) for batch in (1, 3))
    assert one.rows == other.rows
    assert np.allclose(one.second, other.second, rtol=1e-12, atol=0)


def test_what_has_no_matrix_is_skipped() -> None:
    text = """g (float[2, 2] x, bool c) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
      a = MatMul(w, x)  b = Relu(x)  d = If (c) < then_branch = t () => (float[2, 2] tt) { tt = MatMul(x, w) },
      else_branch = e () => (float[2, 2] ee) { ee = Neg(x) }>  s = Add(a, b)  y = Add(s, d) }"""
    the_model = model(text)
    nodes = {node.outputs[0].name: node for body in the_model.bodies() for node in body.nodes}
    wanted = (nodes["b"], nodes["a"], nodes["tt"])
    samples = [Sample({"x": np.ones((2, 2), np.float32), "c": np.array(True)}, None, "sample 0")]
    found = collect(the_model, Requests((nodes["s"].outputs[0],), grams=wanted), samples)
    assert found.reason(nodes["b"], "grams") == "is a Relu, no Conv, MatMul or Gemm"
    assert found.reason(nodes["a"], "grams") == "multiplies a constant"
    assert found.reason(nodes["tt"], "grams") == "is not measured there: only ranges leave an inner body"
    assert all(found.gram(node) is None for node in wanted)
    assert found.range(nodes["s"].outputs[0]) is not None


def test_rows_of_changing_length_are_skipped() -> None:
    """Both operands depend on the input: what is multiplied grows with it."""
    the_model = model("g (float[n, k] x) => (float[n, n] y) { t = Transpose(x)  y = MatMul(x, t) }")
    node, x = node_of(the_model, "MatMul"), the_model.graph.inputs[0]
    found = collect(the_model, Requests((x,), grams=(node,)), feeds(np.ones((2, 3)), np.ones((2, 5)), np.ones((2, 3))))
    assert found.gram(node) is None
    assert found.reason(node, "grams") == "has 3 channels in one sample and 5 in another"
    assert found.range(x) is not None


@given(st.integers(0, 5000), st.integers(1, 300))
def test_spread(total: int, wanted: int) -> None:
    chosen = spread(total, wanted)
    assert len(chosen) <= min(total, wanted)
    assert len(chosen) >= min(total, wanted) * 0.6
    assert (np.diff(chosen) > 0).all()
    assert chosen.size == 0 or (chosen[0] >= 0 and chosen[-1] < total)
    if total > 2 * wanted > 20:  # Weyl: no gap is more than about twice the usual
        assert np.diff(chosen).max() <= 3 * total / wanted + 2


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_channels_of_any_axis(axis: int) -> None:
    """Of many positions some are looked at, the same for every sample whatever else is in the batch."""
    the_model = load(proto("g (float[N, 6, 5, 40] x) => (float[N, 6, 5, 40] y) { y = Abs(x) }"))
    y = the_model.graph.outputs[0]
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((1, 6, 5, 40)).astype(np.float32) for _ in range(3)]
    found = collect(the_model, Requests(channel_grams=((y, axis),)), feeds(*arrays)).channel_gram(y, axis)
    assert found is not None
    channels = arrays[0].shape[axis]
    lines = [np.moveaxis(np.abs(array), axis, -1).reshape(-1, channels) for array in arrays]
    judge(found, [line[spread(len(line), ROWS)][None] for line in lines])
    joined = collect(the_model, Requests(channel_grams=((y, axis),)), feeds(*arrays), batch=3).channel_gram(y, axis)
    assert joined is not None
    assert np.allclose(joined.second, found.second, rtol=1e-12, atol=1e-14)
