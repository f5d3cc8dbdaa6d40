"""NaN, infinities, and sums that overflow: what is told of them, when, and what is left of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, collect
from onnxopt.errors import FeedError
from onnxopt.feeds import Sample
from onnxopt.model import Model, Node, load
from tests.calibration.conftest import Made
from tests.calibration.truth import Exposed, check, everything, tensor, tensors
from tests.helpers import model, proto, with_weights

NAN, INF = np.nan, np.inf


pytestmark = pytest.mark.usefixtures("many")


def feeds(*arrays: Any, **more: Any) -> list[Sample]:
    others = {name: np.asarray(value) for name, value in more.items()}
    return [Sample({"x": np.asarray(a, np.float32), **others}, None, f"sample {i}") for i, a in enumerate(arrays)]


# what becomes of a value v in one place: Div(v, v) is NaN for 0, Log(v) -inf
TROUBLE = """g (float[n, 8, 6, 6] x, float[n, 8, 6, 6] z) => (float[n, 16, 6, 6] y)
<float zero = {0}, float six = {6}, float low = {-1}> {
  q = Conv<pads = [1, 1, 1, 1]>(x, w)  a = Conv<pads = [1, 1, 1, 1]>(x, w)  o = BREAK  b = Mul(a, o)  c = CLIP
  s = SWALLOW  d = Conv<pads = [1, 1, 1, 1]>(s, v)  e = Relu(d)  r = Relu(q)  y = Add(e, e) }"""
BREAKS = {"NaN": "Div(z, z)", "infinities": "Div(six, z)"}
SWALLOWS = {
    "not": "Identity(c)",
    "pool": "MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(c)",
    "where": "Where(mask, c, low)",
}


def troubled(breaks: str, clip: str, swallow: str) -> Model:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 8, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((16, 8, 3, 3)).astype(np.float32),
    }
    text = TROUBLE.replace("BREAK", BREAKS[breaks]).replace("CLIP", clip)
    if swallow == "where":
        text = text.replace(
            "s = SWALLOW", "nan = IsNaN(c)  big = IsInf(c)  bad = Or(nan, big)  mask = Not(bad)  s = SWALLOW"
        )
    return load(with_weights(proto(text.replace("SWALLOW", SWALLOWS[swallow])), **weights))


def trouble_at(bad: int, count: int, place: tuple[int, int, int] = (3, 2, 1)) -> list[Sample]:
    rng = np.random.default_rng(1)
    samples = []
    for at in range(count):
        z = np.ones((1, 8, 6, 6), np.float32)
        if at == bad:
            z[(0, *place)] = 0
        x = rng.standard_normal((1, 8, 6, 6)).astype(np.float32) * 4
        samples.append(Sample({"x": x, "z": z}, None, f"sample {at}"))
    return samples


def without(requests: Requests, lost: set[Any]) -> Requests:
    """What is left of requests without these tensors."""
    kept = {
        kind: tuple(subject for subject in wanted if _variable(subject) not in lost)
        for kind, wanted in requests.by_kind().items()
    }
    return Requests(**kept)


def _variable(subject: Any) -> Any:
    if isinstance(subject, tuple):
        return subject[0]
    return subject.inputs[0] if isinstance(subject, Node) else subject


CLIPS = ["Relu(b)", "Clip(b, low, six)", "Identity(b)"]


@pytest.mark.parametrize("swallow", SWALLOWS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [0, 2, 8, 39])
def test_nan_is_found_in_any_run(bad: int, clip: str, swallow: str) -> None:
    """After extremes were left out too, and where later operators swallow it."""
    the_model = troubled("NaN", clip, swallow)
    wanted = tensors(the_model, "q a b c s d e r y")
    samples = trouble_at(bad, 40)
    requests = everything(wanted, (1,)) | Requests(grams=tuple(n for n in the_model.graph.nodes if n.op == "Conv"))
    _judge(the_model, requests, samples, bad, elements=40)


@pytest.mark.parametrize("kind", ["ranges", "means", "histograms", "firings", "moments", "extremes", "channel_ranges"])
@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("breaks", BREAKS)
def test_whatever_is_asked(kind: str, clip: str, breaks: str) -> None:
    """Also where it lies beside the grid of the histograms."""
    the_model = troubled(breaks, clip, "where")
    wanted = tensors(the_model, "q a b c s d e r y")
    channels = tuple((variable, 1) for variable in wanted)
    requests = {
        "ranges": Requests(wanted),
        "means": Requests(wanted, channel_means=channels),
        "histograms": Requests(histograms=wanted),
        "firings": Requests(firings=tuple((*channel, 0.5) for channel in channels)),
        "moments": Requests(moments=wanted),
        "extremes": Requests(extremes=wanted),
        "channel_ranges": Requests(channel_ranges=channels),
    }[kind]
    for bad, place in ((0, (3, 2, 1)), (5, (0, 5, 5)), (5, (7, 3, 3))):
        _judge(the_model, requests, trouble_at(bad, 7, place), bad, elements=20)


def _judge(the_model: Model, requests: Requests, samples: list[Sample], bad: int, elements: int) -> None:
    names = dict.fromkeys(_variable(subject) for wanted in requests.by_kind().values() for subject in wanted)
    exposed = Exposed(the_model, names, samples)
    lost = {variable for variable in names if not np.isfinite(exposed.flat(variable)).all()}
    assert 0 < len(lost) < len(names)
    found = collect(the_model, requests, samples, elements=elements)
    left = without(requests, lost)
    check(found, left, exposed, elements=elements, channels_first=lambda v: True, relative=1e-5)
    kept = {(kind, subject) for kind, wanted in left.by_kind().items() for subject in wanted}
    assert {(kind, subject) for kind, subject, _ in found.tallies()} == kept
    for kind, wanted in requests.by_kind().items():
        for subject in wanted:
            reason = found.reason(subject, kind)
            if (kind, subject) in kept:
                assert reason is None
                continue
            values = exposed.flat(_variable(subject))
            what = "NaN" if np.isnan(values).any() else "infinities"
            assert reason == f"{'its input ' if kind == 'grams' else ''}holds {what} (sample {bad})"


def test_each_tensor_is_told_with_its_first_sample() -> None:
    the_model = model("g (float[n] x) => (float[n] y) { a = Log(x)  b = Sqrt(x)  c = Exp(x)  y = Neg(x) }")
    a, b, c, y = tensors(the_model, "a b c y")
    samples = feeds([1, 1], [1, 200], [1, 0], [1, -1], [-1, 300], [2, 1])
    for batch in (1, 2, 3, 6):
        found = collect(the_model, everything((a, b, c, y)), samples, batch=batch)
        assert (
            found.skipped
            == [
                ("c", "holds infinities (sample 1)"),
                ("a", "holds infinities (sample 2)"),
                ("b", "holds NaN (sample 3)"),
            ]
            or batch > 1
        )
        assert found.reason(a) == "holds infinities (sample 2)"
        assert found.reason(b) == "holds NaN (sample 3)"
        assert found.reason(c) == "holds infinities (sample 1)"
        assert [kind for kind, subject, _ in found.tallies() if subject is not y] == []
        check(found, Requests((y,), moments=(y,), histograms=(y,)), Exposed(the_model, (y,), samples))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_an_input_is_to_blame(at: int, bad: float, batch: int) -> None:
    the_model = model("g (float[n, 3] x) => (float[n, 3] y) { a = Relu(x)  y = Neg(a) }")
    arrays = [[[1, 2.0, 3]]] * 7
    arrays[at] = [[1, bad, 3]]
    what = "NaN" if np.isnan(bad) else "infinities"
    for names in ("x", "x y", "x a y"):
        with pytest.raises(FeedError, match=rf"^input 'x' holds {what} for sample sample {at}$"):
            collect(the_model, everything(tensors(the_model, names)), feeds(*arrays), batch=batch)


def test_nan_of_an_input_is_to_blame_behind_it_infinity_may_be_a_mask() -> None:
    text = "g (float[n] x, float[n] m) => (float[n] y) { a = Add(x, m)  b = Softmax(a)  y = Neg(x) }"
    the_model = model(text)
    wanted = tensors(the_model, "a b y")
    masked = feeds([1, 2], [3, 4], m=np.array([0, -INF], np.float32))
    found = collect(the_model, everything(wanted), masked)
    assert found.skipped == [("a", "holds infinities (sample 0)")]
    check(found, everything(wanted[1:]), Exposed(the_model, wanted[1:], masked))
    with pytest.raises(FeedError, match=r"^input 'm' holds NaN for sample sample 0$"):
        collect(the_model, everything(wanted), feeds([1, 2], m=np.array([0, NAN], np.float32)))


BODY = """g (float[2] x, int64 trips) => (float[2] y) { yes = Constant<value: tensor = bool {1}>()
  y = Loop (trips, yes, x) < body = b (int64 i, bool go, float[2] v) => (bool again, float[2] next) {
    again = Identity(go)  r = Sqrt(v)  l = Log(v)  m = Neg(v)  next = Abs(m) }> }"""


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 9])
def test_inner_bodies(at: int, batch: int, made: Made) -> None:
    the_model = model(BODY)
    r, log, m = wanted = tensors(the_model, "r l m")
    arrays = [[1.0, 2.0]] * 12
    arrays[at] = [-1.0, 2.0]
    samples = feeds(*arrays, trips=np.array(3))
    found = collect(the_model, Requests(wanted), samples, batch=batch)
    assert found.reason(r) == f"holds NaN (sample {at})"
    assert found.reason(log) == f"holds NaN (sample {at})"
    measured = found.range(m)
    assert measured is not None
    assert (measured.minimum, measured.maximum, measured.count) == (-2, 1, 72)
    assert found.range(r) is None
    assert len(made.asked) <= 3


def test_infinities_in_inner_bodies() -> None:
    the_model = model(BODY)
    wanted = tensors(the_model, "r l m")
    found = collect(the_model, Requests(wanted), feeds([1, 2], [0, 2], [-1, 1], trips=np.array(1)))
    assert found.skipped == [("l", "holds infinities (sample 1)"), ("r", "holds NaN (sample 2)")]


def test_sums_in_inner_bodies_may_overflow() -> None:
    the_model = model(BODY)
    (m,) = tensors(the_model, "m")
    found = collect(the_model, Requests((m,)), feeds([3e38, 3e38], [1, 1], trips=np.array(2)))
    measured = found.range(m)
    assert measured is not None
    assert measured.minimum == np.float32(-3e38)
    magnitude = found.mean_magnitude(m)
    assert magnitude is not None
    assert np.isfinite(magnitude)


HUGE = "g (float[n, 2, 64] x) => (float[n, 2, 64] y) { a = Neg(x)  b = Relu(x)  y = Identity(b) }"


def test_finite_values_whose_sums_overflow_keep_everything_else(made: Made) -> None:
    the_model = model(HUGE)
    a, b = wanted = tensors(the_model, "a b")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 2, 64)) for _ in range(12)]
    arrays[3] = np.full((1, 2, 64), -3e38)
    arrays[3][0, 1] = 1
    arrays[5] = arrays[3]
    samples = feeds(*arrays)
    requests = everything(wanted, (1,))
    for elements in (8192, 20):
        found = collect(the_model, requests, samples, elements=elements)
        said = "overflows when it is summed (sample 3)"
        assert found.reason(a, "moments") == said
        assert found.reason((a, 1), "channel_means") == said
        assert found.reason((a, 1), "channel_moments") == said
        assert found.moments(a) is None
        assert found.channel_mean(a, 1) is None
        left = everything((b,), (1,)) | Requests(
            (a,), (a,), (), (a,), channel_ranges=((a, 1),), firings=((a, 1, 0.25),)
        )
        check(found, left, Exposed(the_model, wanted, samples), elements=elements)
    assert len(made.asked) < 16


def test_means_survive_squares_that_overflow() -> None:
    the_model = model(HUGE)
    a = tensor(the_model, "a")
    samples = feeds(np.full((1, 2, 64), 1e25), np.ones((1, 2, 64)))
    requests = Requests((a,), channel_means=((a, 1),), channel_moments=((a, 1),))
    found = collect(the_model, requests, samples)
    assert found.reason((a, 1), "channel_moments") == "overflows when it is summed (sample 0)"
    assert found.channel_moments(a, 1) is None
    check(found, Requests((a,), channel_means=((a, 1),)), Exposed(the_model, (a,), samples))


@pytest.mark.parametrize("kind", ["means", "moments", "histograms", "firings"])
@pytest.mark.parametrize(("numerator", "what"), [(3e38, "infinities"), (0.0, "NaN")])
def test_what_is_not_finite_is_still_found_where_sums_overflow(kind: str, numerator: float, what: str) -> None:
    """In one element, beside the grid of the histogram."""
    the_model = model("g (float[n, 2, 64] x, float[n, 2, 64] d) => (float[n, 2, 64] y) { a = Div(x, d)  y = Relu(x) }")
    a = tensor(the_model, "a")
    requests = {
        "means": Requests(channel_means=((a, 1),), histograms=(a,)),
        "moments": Requests(moments=(a,), histograms=(a,)),
        "histograms": Requests(histograms=(a,)),
        "firings": Requests(firings=((a, 1, 0.5),)),
    }[kind]
    huge, usual = np.full((1, 2, 64), 3e38), np.ones((1, 2, 64))
    samples = feeds(usual, huge, usual, huge, usual, d=np.ones((1, 2, 64), np.float32))
    x, d = usual.copy(), usual.copy()
    x[0, 0, 7], d[0, 0, 7] = numerator, 0
    samples.append(Sample({"x": x.astype(np.float32), "d": d.astype(np.float32)}, None, "the last"))
    for order in (samples, samples[::-1]):
        found = collect(the_model, requests, order, elements=20)
        reasons = {reason for _, _, reason in found.reasons()}
        assert f"holds {what} (the last)" in reasons
        assert list(found.tallies()) == []


def test_outputs_that_always_hold_nan_cost_nothing(made: Made) -> None:
    text = "g (float[n] x) => (float[n] y, float[n] z) { a = Relu(x)  b = Sub(x, x)  z = Div(b, b)  y = Neg(a) }"
    the_model = model(text)
    samples = feeds(*[[1, 2]] * 40)
    wanted = tensors(the_model, "a y")
    found = collect(the_model, everything(wanted), samples)
    assert found.skipped == []
    assert made.runs <= 45
    asked = tensors(the_model, "a y z")
    made.asked, made.handed = [], []
    found = collect(the_model, everything(asked), samples)
    assert found.skipped == [("z", "holds NaN (sample 0)")]
    assert made.runs <= 45
    assert len(made.asked) <= 4


def test_doubles_beyond_float32_are_infinite() -> None:
    the_model = model("g (double[n] x) => (double[n] y) { a = Neg(x)  y = Identity(a) }")
    a = tensor(the_model, "a")
    samples = [Sample({"x": np.array([value, 1.0])}, None, f"sample {i}") for i, value in enumerate((1.0, 1e300))]
    assert collect(the_model, everything((a,)), samples).skipped == [("a", "holds infinities (sample 1)")]


def test_empty_tensors_hold_nothing_wrong() -> None:
    """In a sample in which another tensor is broken."""
    the_model = model("g (float[n] x, float[m] z) => (float[n] y) { a = Log(x)  b = Neg(z)  y = Exp(x) }")
    a, b = tensors(the_model, "a b")
    samples = feeds([1, 2], z=np.ones(3, np.float32)) + feeds([-1, 2], z=np.ones(0, np.float32))
    found = collect(the_model, everything((a, b)), samples)
    assert found.skipped == [("a", "holds NaN (sample 0)")] or found.reason(a) == "holds NaN (sample 0)"
    assert found.reason(b) is None
    measured = found.range(b)
    assert measured is not None
    assert measured.count == 3


def test_skips_of_parts_are_those_of_the_whole() -> None:
    the_model = model("g (float[n] x) => (float[n] y) { a = Log(x)  y = Neg(x) }")
    a, y = wanted = tensors(the_model, "a y")
    samples = feeds([1, 2], [1, 0], [3, 4], [-1, 2])
    parts = [collect(the_model, everything(wanted), samples[at::2]) for at in range(2)]
    parts[0].merge(parts[1])
    assert parts[0].skipped == [("a", "holds infinities (sample 1)")]
    assert parts[0].range(a) is None
    assert [subject for _, subject, _ in parts[0].tallies() if subject is a] == []
    check(parts[0], everything((y,)), Exposed(the_model, (y,), samples))


def test_branches_that_are_not_taken_hold_nothing_wrong(made: Made) -> None:
    text = """g (float[n] x, bool c) => (float[n] y) { y = If (c) <
      then_branch = t () => (float[n] o) { a = Neg(x)  o = Exp(a) },
      else_branch = e () => (float[n] o) { b = Abs(x)  o = Neg(b) }> }"""
    the_model = model(text)
    a, b = tensors(the_model, "a b")
    found = collect(the_model, Requests((a, b)), feeds(*[[1, 2]] * 5, c=np.array(True)))
    assert found.skipped == []
    assert found.range(a) is not None
    assert found.range(b) is None
    assert (len(made.asked), made.runs) == (1, 5)
