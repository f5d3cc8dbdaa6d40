"""Whatever way samples take through the sessions, in whatever order and parts they come, the figures are the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.storage import Provenance, SavedStatistics, merge
from onnxopt.feeds import Sample
from onnxopt.model import Model, Variable, load
from tests.calibration.conftest import Made
from tests.calibration.truth import Exposed, check, everything, same, tensors
from tests.helpers import proto, with_weights


def weights(*shape: int) -> Any:
    rng = np.random.default_rng(shape)
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def convolutional() -> Model:
    """What the runtime keeps blocked, with bounds that are reached, and channels that don't come in eights."""
    text = """g (float[n, 3, h, w] x) => (float[n, 5] y) <float zero = {0}, float six = {6}> {
      a = Conv<pads = [1, 1, 1, 1]>(x, w1)  b = Clip(a, zero, six)
      c = Conv<pads = [1, 1, 1, 1], group = 16>(b, w2)  d = Relu(c)
      e = Conv(d, w3)  f = Add(e, b)  g1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(f)
      h1 = Conv(g1, w4)  i = Sigmoid(h1)  j = Mul(h1, i)  k = Concat<axis = 1>(j, g1)
      l = GlobalAveragePool(k)  m = Flatten(l)  y = Gemm(m, w5) }"""
    return load(
        with_weights(
            proto(text),
            w1=weights(16, 3, 3, 3) * 4,
            w2=weights(16, 1, 3, 3),
            w3=weights(16, 16, 1, 1),
            w4=weights(12, 16, 1, 1),
            w5=weights(28, 5),
        )
    )


def attending() -> Model:
    """What the runtime fuses wherever nobody looks: biases, normalization, Gelu, attention."""
    text = """g (float[n, t, 16] x) => (float[n, t, 16] y)
    <float half = {0.5}, float one = {1}, float root = {1.4142135}, float quarter = {0.25}> {
      q0 = MatMul(x, wq)  q = Add(q0, bq)  k0 = MatMul(x, wk)  k = Add(k0, bk)
      kt = Transpose<perm = [0, 2, 1]>(k)  s0 = MatMul(q, kt)  s = Mul(s0, quarter)  p = Softmax<axis = -1>(s)
      v = MatMul(x, wv)  o = MatMul(p, v)  r = Add(o, x)  n1 = LayerNormalization<axis = -1>(r, bq, bk)
      u0 = MatMul(n1, wu)  u = Add(u0, bu)  g0 = Div(u, root)  g1 = Erf(g0)  g2 = Add(g1, one)  g3 = Mul(u, g2)
      ge = Mul(g3, half)  d0 = MatMul(ge, wd)  d = Add(d0, bq)  y = Add(d, n1) }"""
    square = {name: weights(16, 16) for name in ("wq", "wk", "wv")}
    more = {"wu": weights(16, 32), "wd": weights(32, 16), "bq": weights(16), "bk": weights(16), "bu": weights(32)}
    return load(with_weights(proto(text), **square, **more))


def deciding() -> Model:
    """Shapes, and what is computed at all, depend on values."""
    text = """g (float[n, 4] x, int64 trips) => (float[k] y) <float zero = {0}, int64[1] flat = {-1}> {
      a = Relu(x)  f = Reshape(a, flat)  nz = NonZero(f)  i = Transpose(nz)  b = GatherND(f, i)
      yes = Constant<value: tensor = bool {1}>()
      c = Loop (trips, yes, x) < body = l (int64 at, bool go, float[n, 4] v) => (bool again, float[n, 4] next) {
        again = Identity(go)  next = Tanh(v) }>
      low = ReduceMin<keepdims = 0>(c)  positive = Greater(low, zero)
      d = If (positive) < then_branch = t () => (float[m, 4] tt) { tt = Neg(c) },
        else_branch = e () => (float[o] ee) { ee = Exp(b) }>
      e = Abs(d)  y = Reshape(e, flat) }"""
    return load(proto(text))


def conv_samples() -> list[Sample]:
    sizes = [(1, 12, 12), (1, 12, 12), (2, 12, 12), (1, 6, 20), (1, 40, 30), (1, 12, 12), (3, 2, 2), (1, 30, 40)]
    rng = np.random.default_rng(1)
    return [sample(at, x=rng.standard_normal((n, 3, h, w))) for at, (n, h, w) in enumerate(sizes * 2)]


def attending_samples() -> list[Sample]:
    rng = np.random.default_rng(2)
    lengths = [5, 9, 3, 12, 5, 1, 9, 20, 3, 5]
    return [sample(at, x=rng.standard_normal((1 + at % 2, t, 16))) for at, t in enumerate(lengths)]


def deciding_samples() -> list[Sample]:
    """Two of them have no positive value at all, some have all."""
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((1 + at % 3, 4)) + shift for at, shift in enumerate([0, 9, -9, 0, 9, 0, -9, 9, 0])]
    return [sample(at, x=array, trips=np.array(at % 4)) for at, array in enumerate(arrays)]


def sample(at: int, x: Any, **more: Any) -> Sample:
    return Sample({"x": np.asarray(x, np.float32), **{k: np.asarray(v) for k, v in more.items()}}, None, f"sample {at}")


CASES: dict[str, tuple[Callable[[], Model], Callable[[], list[Sample]], str, tuple[int, ...]]] = {
    "convolutional": (convolutional, conv_samples, "x a b c d e f g1 h1 j k y", (1,)),
    "attending": (attending, attending_samples, "x q0 q kt s p o r n1 u0 u g1 ge d0 y", (-1,)),
    "deciding": (deciding, deciding_samples, "x a f b c d e y", ()),
}


def case(name: str) -> tuple[Model, Requests, list[Sample]]:
    make, feeds, names, axes = CASES[name]
    model = make()
    wanted = tensors(model, names)
    if name == "attending":  # the last axis of scores has no fixed length
        requests = everything([v for v in wanted if v.name not in ("kt", "s", "p")], axes) | everything(wanted)
    else:
        requests = everything(wanted, axes)
    layers = [node for node in model.graph.nodes if node.op in ("Conv", "Gemm", "MatMul")]
    grams = tuple(node for node in layers if node.inputs[1].name.startswith("w"))
    inner = tensors(model, "tt ee next") if name == "deciding" else ()
    return model, requests | Requests(ranges=inner, grams=grams), feeds()


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "small memory": {"memory": 1},
    "some memory": {"memory": 20_000},
}


@pytest.mark.parametrize("elements", [8192, 100, None])
@pytest.mark.parametrize("name", CASES)
def test_figures_are_true(name: str, elements: int | None) -> None:
    model, requests, samples = case(name)
    found = collect(model, requests, samples, elements=elements)
    main = Requests(**{k: tuple(s for s in v if _main(model, s)) for k, v in requests.by_kind().items()})
    spatial = (lambda v: v.name not in ("m", "y")) if name == "convolutional" else (lambda v: False)
    truth = Exposed(model, main.ranges, samples)
    check(found, main, truth, elements=elements, channels_first=spatial, relative=1e-5, exact=True)
    plain = Exposed(model, main.ranges, samples, optimize=False)
    check(found, main, plain, elements=elements, channels_first=spatial, relative=1e-4, exact=False)


def _main(model: Model, subject: Any) -> bool:
    variable = subject[0] if isinstance(subject, tuple) else subject
    mine = {tensor for node in model.graph.nodes for tensor in node.outputs} | set(model.graph.inputs)
    return not isinstance(variable, Variable) or variable in mine


@pytest.mark.parametrize("elements", [8192, 100])
@pytest.mark.parametrize("name", CASES)
def test_neither_order_nor_memory_shows(name: str, elements: int, made: Made) -> None:
    model, requests, samples = case(name)
    expected = collect(model, requests, samples, elements=elements)
    usual = len(made.asked)
    for at, options in enumerate(WAYS.values()):
        shuffled = random.Random(at).sample(samples, len(samples))
        same(expected, collect(model, requests, shuffled, elements=elements, **options))
    cut = any(wanted.grid for asked in made.asked for wanted in asked.values())
    assert cut is (name == "convolutional" or (name == "attending" and elements == 100))
    assert len(made.asked) > 3 * usual + 3  # small memory makes many


@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_whole(name: str, tmp_path: Path) -> None:
    model, requests, samples = case(name)
    expected = collect(model, requests, samples, elements=100)
    parts = [collect(model, requests, samples[at::3], elements=100) for at in range(3)]
    saved = []
    for at, part in enumerate(parts):
        path = tmp_path / f"{at}.npz"
        provenance = Provenance("m", "d", model.content_digest(), "", 100, at, (at, 3))
        SavedStatistics.of(model, requests, part, provenance).save(path)
        saved.append(path)
    together = Statistics()
    for part in random.Random(name).sample(parts, 3):
        together.merge(part)
    same(expected, together)
    same(expected, merge(random.Random(name).sample(saved, 3)).bind(model))
    same(parts[0], SavedStatistics.load(saved[0]).bind(model))


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("name", ["convolutional", "attending"])
def test_batches_give_the_same(name: str, batch: int) -> None:
    """To rounding: some kernels sum in another order for another number of rows."""
    model, requests, samples = case(name)
    requests = Requests(**{**requests.by_kind(), "extremes": ()})
    samples.sort(key=lambda sample: sample.inputs["x"].shape[1:])
    one = collect(model, requests, samples, elements=100)
    other = collect(model, requests, samples, elements=100, batch=batch)
    assert one.samples == other.samples
    assert one.runs > other.runs
    for variable in requests.ranges:
        mine, theirs = one.range(variable), other.range(variable)
        assert mine is not None
        assert theirs is not None
        assert mine.count == theirs.count
        assert (mine.minimum, mine.maximum) == pytest.approx((theirs.minimum, theirs.maximum), rel=1e-6)
        histograms = one.histogram(variable), other.histogram(variable)
        assert histograms[0] is not None
        assert histograms[1] is not None
        assert histograms[0].count == histograms[1].count
        assert np.abs(histograms[0].counts - histograms[1].counts).sum() <= histograms[0].count / 50
    for variable, axis in requests.channel_moments:
        _close(one.channel_moments(variable, axis), other.channel_moments(variable, axis))
    for node in requests.grams:
        gram, joined = one.gram(node), other.gram(node)
        assert gram is not None
        assert joined is not None
        assert gram.rows == joined.rows
        assert np.abs(gram.second - joined.second).max() <= 1e-5 * np.abs(gram.second).max()


def _close(one: Any, other: Any) -> None:
    assert one.count == other.count
    assert np.abs(one.mean - other.mean).max() <= 1e-6 * np.abs(one.mean).max()
    assert np.allclose(one.mean_square, other.mean_square, rtol=1e-6, atol=0)


@pytest.mark.parametrize("behind", ["y = Exp(t)", "u = Transpose<perm = [0, 3, 1, 2]>(t)  y = Exp(u)"])
def test_a_transpose_that_the_runtime_may_move_changes_no_sum(behind: str) -> None:
    """Who else reads the tensor decides whether it is moved behind the reduction, which then sums in another order."""
    text = f"g (float[n, 8, h, w] x) => (float[a, b, c, d] y) {{ t = Transpose<perm = [0, 2, 3, 1]>(x)  {behind} }}"
    model = load(proto(text))
    (t,) = tensors(model, "t")
    requests = Requests(moments=(t,), histograms=(t,), channel_means=((t, -1),), channel_moments=((t, -1),))
    rng = np.random.default_rng(0)
    samples = [sample(at, rng.standard_normal((1, 8, h, h + 1))) for at, h in enumerate([60, 9, 60, 33, 60, 9])]

    def sums(order: list[Sample], memory: int) -> list[Any]:
        found = collect(model, requests, order, elements=300, memory=memory)
        whole, channels = found.moments(t), found.channel_moments(t, -1)
        assert whole is not None
        assert channels is not None
        return [whole.mean, whole.mean_square, channels.mean, channels.mean_square, found.channel_mean(t, -1)]

    first = sums(samples, 1 << 26)
    for order in (samples, samples[::-1]):
        for memory in (1 << 26, 1):
            for one, other in zip(first, sums(order, memory), strict=True):
                np.testing.assert_allclose(other, one, rtol=1e-12, atol=0)
