"""Every kind of figure of every kind of tensor, against numpy on the exposed tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.sampling import ELEMENTS
from onnxopt.feeds import Sample
from onnxopt.model import Model, Variable, load
from tests.calibration.truth import Exposed, check, everything, tensor, tensors
from tests.helpers import model, proto, with_weights

WAYS: list[dict[str, Any]] = [{}, {"elements": 2}, {"memory": 1}]


def feeds(*arrays: npt.ArrayLike, dtype: npt.DTypeLike = np.float32, **more: npt.ArrayLike) -> list[Sample]:
    others = {name: np.asarray(value) for name, value in more.items()}
    return [Sample({"x": np.asarray(a).astype(dtype), **others}, None, f"sample {i}") for i, a in enumerate(arrays)]


def random_feeds(*shapes: Sequence[int], seed: int = 0, dtype: npt.DTypeLike = np.float32) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return feeds(*(np.asarray(rng.standard_normal(shape)) * 3 for shape in shapes), dtype=dtype)


def chain(rank: int, opset: int = 17, kind: str = "float", op: str = "Relu", typed: bool = True) -> Model:
    """x, an input; a; y, an output. Element types stand in the file for a where `typed`."""
    dims = "[" + ",".join("abcdefg"[:rank]) + "]" if rank else "[]"
    told = f"<{kind}{dims} a>" if typed else ""
    return model(f"g ({kind}{dims} x) => ({kind}{dims} y) {told} {{ a = {op}(x)  y = Identity(a) }}", opset)


def holds(the_model: Model, names: str, axes: Sequence[int], samples: list[Sample], **options: Any) -> Statistics:
    wanted = tensors(the_model, names)
    requests = everything(wanted, axes)
    found = collect(the_model, requests, samples, **options)
    check(found, requests, Exposed(the_model, wanted, samples), elements=options.get("elements", ELEMENTS))
    assert found.skipped == []
    return found


@pytest.mark.parametrize("opset", range(7, 22))
def test_operator_sets(opset: int) -> None:
    holds(chain(4, opset), "x a y", (0, 1, -1, 2), random_feeds((2, 3, 4, 5), (2, 3, 4, 5)), elements=20)


@pytest.mark.parametrize("rank", range(7))
def test_ranks(rank: int) -> None:
    shapes = [(3, 4, 2, 3, 2, 2)[:rank], (3, 4, 2, 3, 2, 2)[:rank]]
    holds(chain(rank), "x a y", range(-rank, rank), random_feeds(*shapes), elements=5)
    holds(chain(rank), "x a y", range(-rank, rank), random_feeds(*shapes))


DTYPES = {"float16": np.float16, "double": np.float64, "float": np.float32, "int32": np.int32, "int64": np.int64}


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("kind", [*DTYPES, "int8", "uint8"])
def test_element_types(kind: str, typed: bool) -> None:
    dtype = DTYPES.get(kind, np.dtype(kind if kind not in DTYPES else np.int8))
    samples = random_feeds((2, 3, 4), (2, 3, 4), dtype=dtype)
    op = "Identity" if kind == "uint8" else "Abs"
    holds(chain(3, 17, kind, op, typed), "x a y", (1, -1), samples)


def test_booleans_are_numbers_and_text_is_not() -> None:
    text = "g (float[n] x, string[n] s) => (bool[n] y, string[n] z) { y = Greater(x, x)  z = Identity(s) }"
    the_model = model(text)
    wanted = tensors(the_model, "y z")
    samples = feeds([1, 2], s=np.array(["a", "b"], object))
    found = collect(the_model, everything(wanted, (0,)), samples)
    measured = found.range(wanted[0])
    assert measured is not None
    assert (measured.minimum, measured.maximum, measured.count) == (0, 0, 2)
    assert found.skipped == [("z", "holds text")]


def test_sequences_are_no_tensors() -> None:
    text = "g (float[2] x) => (seq(float[1]) y) { a = Relu(x)  y = SplitToSequence<axis = 0>(a) }"
    the_model = model(text)
    a, y = tensors(the_model, "a y")
    found = collect(the_model, everything((a, y)), feeds([1, 2]))
    assert found.range(a) is not None
    assert found.skipped == [("y", "is no tensor")]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([1, 3, 10, 40, None]),
    st.sampled_from(["x a y", "a", "x", "a y"]),
    st.integers(0, 99),
)
def test_any_shapes(tail: list[int], lengths: list[int], elements: int | None, names: str, seed: int) -> None:
    samples = random_feeds(*((length, *tail) for length in lengths), seed=seed)
    rank = 1 + len(tail)
    holds(chain(rank), names, sorted({1, rank - 1, -1}), samples, elements=elements)


CONV = """g (float[n, 8, h, w] x) => (float[n, c, i, j] y) {
  a = Conv<strides = [STRIDE, STRIDE], pads = [1, 1, 1, 1]>(x, w)  b = Relu(a)  d = Add(b, b)  y = Conv(d, v) }"""


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([8, 16, 24, 5, 12]),
    st.sampled_from([1, 2]),
    st.integers(3, 19),
    st.integers(3, 19),
    st.integers(1, 3),
    st.sampled_from([8, 60, 300, None]),
    st.sampled_from([9, 10, 13, 18]),
)
def test_what_the_runtime_keeps_blocked(
    channels: int, stride: int, height: int, width: int, items: int, elements: int | None, opset: int
) -> None:
    rng = np.random.default_rng(channels)
    weights = {
        "w": rng.standard_normal((channels, 8, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((8, channels, 1, 1)).astype(np.float32),
    }
    the_model = load(with_weights(proto(CONV.replace("STRIDE", str(stride)), opset), **weights))
    wanted = tensors(the_model, "x a b d y")
    samples = random_feeds((items, 8, height, width), (items, 8, height, width), (1, 8, width, height))
    requests = everything(wanted, (1,))
    found = collect(the_model, requests, samples, elements=elements)
    truth = Exposed(the_model, wanted, samples)
    check(found, requests, truth, elements=elements, channels_first=lambda v: True, relative=1e-5)


LARGE = [(1, 16, 70, 61), (3, 16, 61, 70), (2, 9000), (4, 700, 33), (20000,), (1, 3, 9, 40, 41)]


@pytest.mark.parametrize("shape", LARGE)
def test_large_tensors_by_default(shape: tuple[int, ...]) -> None:
    """The figures of a tensor of thousands of elements, of which histograms look at some an item."""
    found = holds(chain(len(shape)), "a", (-1,), random_feeds(shape, shape))
    histogram = found.histogram(tensor(chain(len(shape)), "a"))
    assert histogram is None  # a tensor of another model


def test_samples_that_come_in_batches_are_sampled_item_by_item() -> None:
    the_model = chain(3)
    a = tensor(the_model, "a")
    samples = random_feeds((1, 300, 40), (1, 300, 40), (1, 300, 40), (1, 300, 40))
    joined = feeds(*(np.concatenate([s.inputs["x"] for s in samples[at : at + 2]]) for at in (0, 2)))
    for both in (samples, joined):
        holds(the_model, "a", (), both)
    one = collect(the_model, Requests(histograms=(a,)), samples).histogram(a)
    for other in (
        collect(the_model, Requests(histograms=(a,)), joined).histogram(a),
        collect(the_model, Requests(histograms=(a,)), samples, batch=3).histogram(a),
        collect(the_model, Requests(histograms=(a,)), joined, batch=2).histogram(a),
    ):
        assert one is not None
        assert other is not None
        assert one.exponent == other.exponent
        assert np.array_equal(one.counts, other.counts)


def test_what_is_asked_twice_is_counted_once() -> None:
    the_model = chain(2)
    a = tensor(the_model, "a")
    channel = ((a, 1), (a, 1))
    twice = Requests((a, a), (a, a), (a, a), (a, a), channel, channel, channel, ((a, 1, 0.5), (a, 1, 0.5)))
    samples = random_feeds((3, 4), (3, 4))
    found = collect(the_model, twice, samples)
    check(found, twice, Exposed(the_model, (a,), samples))
    moments, of_channels = found.moments(a), found.channel_moments(a, 1)
    assert moments is not None
    assert of_channels is not None
    assert (moments.count, of_channels.count) == (24, 6)


KINDS = ["moments", "channel_means", "channel_moments", "channel_ranges", "firings", "histograms"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind: str) -> None:
    the_model = chain(3)
    a = tensor(the_model, "a")
    subject: Any = {"moments": a, "histograms": a, "firings": (a, 1, 0.5)}.get(kind, (a, 1))
    requests = Requests(**{kind: (subject,)})
    samples = random_feeds((2, 3, 40), (2, 3, 40))
    for elements in (8192, 10):
        found = collect(the_model, requests, samples, elements=elements)
        check(found, requests, Exposed(the_model, (a,), samples), elements=elements)
        assert [at[0] for at in found.tallies()] == [kind]


def test_channel_means_are_told_by_moments_too() -> None:
    the_model = chain(2)
    a = tensor(the_model, "a")
    found = collect(the_model, Requests(channel_moments=((a, 1),)), random_feeds((3, 4)))
    moments, mean = found.channel_moments(a, 1), found.channel_mean(a, 1)
    assert moments is not None
    assert mean is not None
    assert np.array_equal(moments.mean, mean)
    assert (moments.variance >= 0).all()


def test_channels_are_larger_of_both_extremes() -> None:
    the_model = chain(2, op="Identity")
    a = tensor(the_model, "a")
    found = collect(the_model, Requests(channel_ranges=((a, -1),)), feeds([[1, -5, 2]], [[-3, 4, 0]]))
    largest = found.channel_maximum(a, -1)
    assert largest is not None
    assert largest.tolist() == [3, 5, 2]


@pytest.mark.parametrize(("axis", "rank"), [(2, 2), (-3, 2), (0, 0), (-1, 0), (7, 4)])
def test_an_axis_that_is_not_there_is_skipped(axis: int, rank: int) -> None:
    the_model = chain(rank)
    a = tensor(the_model, "a")
    requests = everything((a,), (axis,)) | everything((a,), range(rank))
    found = collect(the_model, requests, random_feeds((2, 3, 4, 5)[:rank]))
    assert found.skipped == [("a", f"has {rank} axes, none of them is {axis}")]
    assert found.channel_mean(a, axis) is None
    assert found.range(a) is not None
    assert all(found.channel_mean(a, other) is not None for other in range(rank))


def test_channels_that_change_in_number_are_skipped_and_nothing_else() -> None:
    the_model = chain(2)
    a = tensor(the_model, "a")
    requests = everything((a,), (0, 1))
    for arrays in ([(2, 3), (2, 5), (2, 3)], [(2, 5), (2, 3)]):
        samples = random_feeds(*arrays)
        found = collect(the_model, requests, samples)
        assert found.skipped == [("a", "has 3 channels in one sample and 5 in another")]
        assert found.channel_mean(a, 1) is None
        check(found, everything((a,)) | Requests(channel_means=((a, 0),)), Exposed(the_model, (a,), samples))


def test_axes_that_come_and_go() -> None:
    """Squeeze without axes: two axes where there are several rows, one where there is one."""
    the_model = model("g (float[n, 3] x) => (float[k] y) { a = Squeeze(x)  y = Neg(a) }")
    a = tensor(the_model, "a")
    requests = everything((a,), (-1,))
    for shapes in ([(2, 3), (1, 3), (4, 3), (1, 3)], [(1, 3), (2, 3)]):
        samples = random_feeds(*shapes)
        for options in WAYS:
            found = collect(the_model, requests, samples, **options)
            check(found, requests, Exposed(the_model, (a,), samples), elements=options.get("elements", ELEMENTS))


EMPTY = [((1, 3, 4, 4), (0, 3, 4, 4)), ((1, 3, 4, 4), (1, 3, 0, 4)), ((1, 3, 4, 4), (1, 3, 4, 0))]


@pytest.mark.parametrize("elements", [8192, 10])
@pytest.mark.parametrize(("full", "empty"), EMPTY)
def test_empty_tensors_add_nothing(full: tuple[int, ...], empty: tuple[int, ...], elements: int) -> None:
    the_model = chain(4)
    for shapes in ([full, empty, full, empty], [empty, full], [empty, empty, full]):
        found = holds(the_model, "x a y", (1,), random_feeds(*shapes), elements=elements)
        assert found.samples == len(shapes)
    nothing = collect(the_model, everything(tensors(the_model, "a"), (1,)), random_feeds(empty))
    assert nothing.skipped == []
    assert list(nothing.tallies()) == [] or nothing.histogram(tensor(the_model, "a")) is None


def test_tensors_that_are_empty_by_their_values() -> None:
    text = """g (float[n, 2, 3, 3] x) => (float[k] y) <int64[1] flat = {-1}> {
      f = Reshape(x, flat)  p = Relu(f)  nz = NonZero(p)  i = Transpose(nz)  b = GatherND(p, i)
      s = Constant<value_ints = [1, 1, 1, -1]>()  c = Reshape(b, s)
      y = Relu(b) }"""
    the_model = model(text)
    wanted = tensors(the_model, "b c y")
    arrays = [np.full((1, 2, 3, 3), value) for value in (1.0, -1.0, 2.0, -1.0, 3.0)]
    for shuffled in (arrays, arrays[::-1], arrays[1:]):
        samples = feeds(*shuffled)
        requests = everything(wanted[:1]) | everything(wanted[1:2], (1,)) | everything(wanted[2:])
        for options in WAYS:
            found = collect(the_model, requests, samples, **options)
            truth = Exposed(the_model, wanted, samples)
            check(found, requests, truth, elements=options.get("elements", ELEMENTS))


DUPLICATES = """g (float[n] x, bool c) => (float[n] y, float[n] z) {
  y = If (c) < then_branch = t () => (float[n] o) { a = Neg(x)  o = Exp(a) },
               else_branch = e () => (float[n] o) { a = Abs(x)  o = Neg(a) }>
  z = If (c) < then_branch = t () => (float[n] o) { a = Add(x, x)  o = Neg(a) },
               else_branch = e () => (float[n] o) { a = Mul(x, x)  o = Neg(a) }> }"""


def test_tensors_of_one_name_in_sibling_bodies() -> None:
    the_model = model(DUPLICATES)
    wanted = [v for body in the_model.bodies() for node in body.nodes for v in node.outputs if v.name == "a"]
    found = collect(the_model, Requests(tuple(wanted)), feeds([1, 3], c=np.array(True)))
    ranges = [found.range(variable) for variable in wanted]
    assert [(r.minimum, r.maximum) if r else None for r in ranges] == [(-3, -1), None, (2, 6), None]


LOOPS = """g (float[2] x, int64 trips, bool which) => (float[2] y) {
  yes = Constant<value: tensor = bool {1}>()
  y = If (which) <
    then_branch = t () => (float[2] tt) { p = Neg(x)  tt = Loop (trips, yes, p) <
      body = b (int64 i, bool go, float[2] v) => (bool again, float[2] next) {
        again = Identity(go)  d = Add(v, v)  next = Loop (trips, yes, d) <
          body = l (int64 j, bool on, float[2] w) => (bool more, float[2] last) {
            more = Identity(on)  h = Abs(w)  last = Neg(h) }> }> },
    else_branch = e () => (float[2] ee) { q = Abs(x)  ee = Neg(q) }> }"""


@pytest.mark.parametrize("opset", [8, 11, 13, 17, 21])
def test_loops_within_loops_within_branches(opset: int) -> None:
    the_model = model(LOOPS, opset)
    wanted = tensors(the_model, "p v d h last q")
    found = collect(the_model, Requests(wanted), feeds([1, 3], trips=np.array(2), which=np.array(True)))
    p, v, d, h, last, q = (found.range(variable) for variable in wanted)
    assert p is not None
    assert v is not None
    assert d is not None
    assert h is not None
    assert last is not None
    assert q is None
    assert (p.minimum, p.maximum, p.count) == (-3, -1, 2)
    assert (v.minimum, v.maximum, v.count) == (-6, -1, 4)
    assert (d.minimum, d.maximum, d.count) == (-12, -2, 4)
    assert (h.minimum, h.maximum, h.count) == (2, 12, 8)
    assert (last.minimum, last.maximum, last.count) == (-12, -2, 8)
    mean = found.mean_magnitude(wanted[3])
    assert mean == pytest.approx((2 + 6 + 4 + 12) / 4)


SCAN = """g (float[1, 2] start, float[1, n, 2] x) => (float[1, 2] last, float[1, n, 2] ys) {
  last, ys = Scan (, start, x) <num_scan_inputs = 1,
    body = b (float[2] s, float[2] e) => (float[2] next, float[2] out) { next = Add(s, e)  out = Neg(next) }> }"""


def test_scans_of_opset_8_are_not_looked_into() -> None:
    the_model = model(SCAN, 8)
    variable = tensor(the_model, "next")
    outer = tensor(the_model, "last")
    samples = feeds([[[1, 2], [3, 4]]], start=np.zeros((1, 2), np.float32))
    found = collect(the_model, Requests((variable, outer)), samples)
    assert found.skipped == [("next", "is in the body of a Scan of opset 8, which is not measured")]
    measured = found.range(outer)
    assert measured is not None
    assert (measured.minimum, measured.maximum) == (4, 6)


def test_halves_in_inner_bodies() -> None:
    text = """g (float16[2] x, int64 trips) => (float16[2] y) { yes = Constant<value: tensor = bool {1}>()
      y = Loop (trips, yes, x) < body = b (int64 i, bool go, float16[2] v) => (bool again, float16[2] next) {
        again = Identity(go)  m = Abs(v)  next = Neg(m) }> }"""
    the_model = model(text)
    wanted = tensors(the_model, "v m next")
    found = collect(the_model, Requests(wanted), feeds([1.5, -3], trips=np.array(2), dtype=np.float16))
    assert [(r.minimum, r.maximum) for r in map(found.range, wanted) if r] == [(-3, 1.5), (1.5, 3), (-3, -1.5)]


def test_bodies_that_meet_empty_tensors() -> None:
    text = """g (float[n] x, int64 trips) => (float[k] y) { yes = Constant<value: tensor = bool {1}>()
      s = Constant<value_ints = [1]>()  e = Constant<value_ints = [100]>()
      y = Loop (trips, yes, x) < body = b (int64 i, bool go, float[m] v) => (bool again, float[l] next) {
        again = Identity(go)  next = Slice(v, s, e) }> }"""
    the_model = model(text)
    variable = tensor(the_model, "next")
    found = collect(the_model, Requests((variable,)), feeds([5, 2, 3], trips=np.array(6)))
    measured = found.range(variable)
    assert measured is not None
    assert (measured.minimum, measured.maximum, measured.count) == (2, 3, 3)


def test_mean_magnitudes() -> None:
    the_model = chain(2, op="Identity")
    a = tensor(the_model, "a")
    samples = random_feeds((4, 50))
    found = collect(the_model, Requests((a,), histograms=(a,)), samples)
    expected = float(np.abs(samples[0].inputs["x"]).mean())
    assert found.mean_magnitude(a) == pytest.approx(expected, abs=1e-2)
    assert collect(the_model, Requests((a,)), samples).mean_magnitude(a) is None
    assert found.mean_magnitude(Variable("other")) is None


def test_a_channel_fires_above_its_threshold_not_at_it() -> None:
    the_model = chain(2, op="Identity")
    a = tensor(the_model, "a")
    found = collect(the_model, Requests(firings=((a, 1, 0.5),)), feeds([[0.5, 0.6, 0.4], [0.7, 0.5, -1]]))
    share = found.firing(a, 1, 0.5)
    assert share is not None
    assert share.tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("op", ["Inverse", "Abs"])
def test_doubles_that_inference_does_not_know(op: str) -> None:
    """Behind an operator of the runtime's own."""
    text = f"g (double[n, 2, 2] x) => (double[n, 2, 2] y) {{ b = com.microsoft.Inverse(x)  a = {op}(b)  y = Neg(a) }}"
    the_model = model(text.replace("com.microsoft.Abs", "Abs"), imports='"com.microsoft" : 1')
    for node in the_model.graph.nodes:
        node.domain = "com.microsoft" if node.op == "Inverse" else node.domain
    samples = random_feeds((2, 2, 2), (3, 2, 2), dtype=np.float64)
    holds(the_model, "b a", (1, -1), samples)
