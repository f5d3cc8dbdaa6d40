import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest

from onnxopt.calibration import Range, Requests, collect
from onnxopt.errors import FeedError
from onnxopt.feeds import Sample
from onnxopt.model import Model, Variable, load
from tests.calibration.truth import tensor


def parse(text: str, opset: int = 17) -> Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    return load(onnx.parser.parse_model(header + text))


def samples(*arrays: npt.ArrayLike, name: str = "x", **more: npt.ArrayLike) -> list[Sample]:
    return [
        Sample({name: np.asarray(a, np.float32), **{k: np.asarray(v) for k, v in more.items()}}, None, f"sample {i}")
        for i, a in enumerate(arrays)
    ]


CHAIN = "g (float[n, 3] x) => (float[n, 3] y) { a = Relu(x)  b = Neg(a)  y = Exp(b) }"


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_ranges_are_those_of_all_samples(opset: int) -> None:
    model = parse(CHAIN, opset)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((rows, 3)).astype(np.float32) for rows in (4, 1, 9)]
    wanted = tuple(tensor(model, name) for name in "xab")
    found = collect(model, Requests(wanted), samples(*arrays))
    everything = np.concatenate(arrays)
    for variable, value in zip(
        wanted, (everything, np.maximum(everything, 0), -np.maximum(everything, 0)), strict=True
    ):
        measured = found.range(variable)
        assert measured is not None
        assert (measured.minimum, measured.maximum, measured.count) == (value.min(), value.max(), value.size)
    assert found.samples == 3
    assert found.range(tensor(model, "y")) is None


def test_the_model_is_not_touched() -> None:
    model = parse(CHAIN)
    before = model.digest()
    collect(model, Requests((tensor(model, "a"),)), samples([[1, 2, 3]]))
    assert model.digest() == before


def test_ranges_do_not_depend_on_order() -> None:
    model = parse(CHAIN)
    arrays = [np.full((2, 3), value) for value in (1.0, -7.0, 3.5)]
    wanted = tensor(model, "a")
    one = collect(model, Requests((wanted,)), samples(*arrays)).range(wanted)
    other = collect(model, Requests((wanted,)), samples(*reversed(arrays))).range(wanted)
    assert one is not None
    assert other is not None
    assert (one.minimum, one.maximum, one.count) == (other.minimum, other.maximum, other.count)


def test_empty_tensors_are_left_out() -> None:
    model = parse(CHAIN)
    wanted = tensor(model, "a")
    found = collect(model, Requests((wanted,)), samples(np.zeros((0, 3)), np.ones((1, 3))))
    assert found.range(wanted) == Range(1.0, 1.0, 3)
    nothing = collect(model, Requests((wanted,)), samples(np.zeros((0, 3))))
    assert nothing.range(wanted) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_nan_and_infinity_in_an_input_name_it_and_the_sample(bad: float, at: int) -> None:
    model = parse(CHAIN)
    row = np.ones((1, 3))
    row[0, at] = bad
    with pytest.raises(FeedError, match=r"input 'x'.*sample 1"):
        collect(model, Requests((tensor(model, "x"),)), samples(np.ones((1, 3)), row))


@pytest.mark.parametrize(("bad", "what"), [(-1.0, "NaN"), (0.0, "infinities")])
def test_tensors_that_are_not_finite_are_skipped_with_the_first_such_sample_named(bad: float, what: str) -> None:
    model = parse("g (float[n, 3] x) => (float[n, 3] y) { a = Log(x)  b = Relu(x)  y = Exp(a) }")
    a, b = tensor(model, "a"), tensor(model, "b")
    row = np.array([[1, bad, 1]])
    found = collect(
        model, Requests((a, b), channel_means=((a, -1), (b, -1))), samples(np.ones((1, 3)), row, row, np.ones((1, 3)))
    )
    assert found.skipped == [("a", f"holds {what} (sample 1)")]
    assert found.reason(a) == f"holds {what} (sample 1)"
    assert found.range(a) is None
    assert found.channel_mean(a, -1) is None
    assert found.range(b) == Range(min(1.0, max(bad, 0.0)), 1.0, 12)
    assert found.reason(b) is None
    assert found.channel_mean(b, -1) is not None


def test_infinities_of_both_signs_have_no_mean() -> None:
    model = parse("g (float[n, 3] x) => (float[n, 3] y) { r = Neg(x)  z = Add(x, r)  a = Div(x, z)  y = Exp(a) }")
    a = tensor(model, "a")
    found = collect(model, Requests(channel_means=((a, -1),)), samples([[1, 1, 1]], [[-1, 1, 1]]))
    assert found.channel_mean(a, -1) is None


MASKED = "g (float[n, 3] x, float[n, 3] mask) => (float[n, 3] y) { a = Add(x, mask)  b = Relu(x)  y = Exp(a) }"


def test_a_mask_of_infinities_among_the_inputs_is_nothing_wrong() -> None:
    model = parse(MASKED)
    a, b = tensor(model, "a"), tensor(model, "b")
    found = collect(model, Requests((a, b)), samples([[1, 2, 3]], mask=np.array([[0, 0, -np.inf]], np.float32)))
    assert found.reason(a) == "holds infinities (sample 0)"
    assert found.range(b) is not None


def test_nan_behind_nan_of_an_input_is_blamed_on_the_input() -> None:
    model = parse(MASKED)
    feeds = samples([[1, 2, 3]], mask=np.array([[0, 0, np.nan]], np.float32))
    with pytest.raises(FeedError, match=r"input 'mask' holds NaN for sample sample 0"):
        collect(model, Requests((tensor(model, "a"),)), feeds)


def test_huge_finite_values_are_no_error() -> None:
    model = parse(CHAIN)
    wanted = tensor(model, "x")
    found = collect(model, Requests((wanted,)), samples([[-3.4e38, 0, 1]])).range(wanted)
    assert found is not None
    assert found.minimum == np.float32(-3.4e38)


def test_no_feeds_is_an_error() -> None:
    model = parse(CHAIN)
    with pytest.raises(FeedError, match="no feeds"):
        collect(model, Requests((tensor(model, "x"),)), [])


def test_nothing_requested_runs_nothing() -> None:
    assert collect(parse(CHAIN), Requests(), []).samples == 0


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("axis", "over"), [(1, (0, 2, 3)), (-1, (0, 1, 2))])
def test_channel_means(opset: int, axis: int, over: tuple[int, ...]) -> None:
    model = parse("g (float[n, c, h, w] x) => (float[n, c, h, w] y) { a = Relu(x)  y = Neg(a) }", opset)
    wanted = tensor(model, "a")
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((2, 4, 5, 3)).astype(np.float32) for _ in range(3)]
    found = collect(model, Requests(channel_means=((wanted, axis),)), samples(*arrays)).channel_mean(wanted, axis)
    expected = np.maximum(np.stack(arrays), 0).mean(axis=(0, *(i + 1 for i in over)))
    assert found is not None
    assert np.allclose(found, expected, atol=1e-6)


IF = """
g (float[n] x) => (float[n] y) {
  zero = Constant<value: tensor = float {0.0}>()
  low = ReduceMin<keepdims: int = 0>(x)
  positive = Greater(low, zero)
  y = If (positive) <
    then_branch = t () => (float[n] tt) { a = Neg(x)  tt = Exp(a) },
    else_branch = e () => (float[n] ee) { b = Abs(x)  c = Sqrt(b)  ee = Neg(c) }>
}
"""


def test_branches_report_only_what_they_computed() -> None:
    model = parse(IF)
    a, b, c = (tensor(model, name) for name in "abc")
    requests = Requests((a, b, c))
    both = collect(model, requests, samples([1, 2], [-4, 9]))
    assert both.range(a) == Range(-2.0, -1.0, 2)
    assert both.range(b) == Range(4.0, 9.0, 2)
    assert both.range(c) == Range(2.0, 3.0, 2)
    one = collect(model, requests, samples([1, 2]))
    assert one.range(b) is None
    assert one.range(a) is not None


LOOP = """
g (float[2] x, int64 trips) => (float[2] y, float[k, 2] all) {
  yes = Constant<value: tensor = bool {1}>()
  y, all = Loop (trips, yes, x) <
    body = b (int64 i, bool go, float[2] v) => (bool again, float[2] next, float[2] out) {
      again = Identity(go)  next = Add(v, v)  out = Neg(next) }>
}
"""


@pytest.mark.parametrize(("trips", "expected"), [(3, Range(-16.0, -2.0, 6)), (1, Range(-4.0, -2.0, 2))])
def test_loops_report_every_iteration(trips: int, expected: Range) -> None:
    model = parse(LOOP)
    wanted = tensor(model, "out")
    feeds = samples([1, 2], trips=np.array(trips, np.int64))
    assert collect(model, Requests((wanted,)), feeds).range(wanted) == expected


def test_a_loop_that_does_not_run_reports_nothing() -> None:
    model = parse(LOOP)
    wanted = tensor(model, "out")
    assert collect(model, Requests((wanted,)), samples([1, 2], trips=np.array(0, np.int64))).range(wanted) is None


SCAN = """
g (float[2] start, float[n, 2] x) => (float[2] last, float[n, 2] ys) {
  last, ys = Scan (start, x) <num_scan_inputs = 1,
    body = b (float[2] s, float[2] e) => (float[2] next, float[2] out) { next = Add(s, e)  out = Neg(next) }>
}
"""


def test_scans_report_every_step() -> None:
    model = parse(SCAN)
    wanted = tensor(model, "next")
    feeds = samples(np.array([[1, 2], [3, 4]]), start=np.zeros(2, np.float32))
    assert collect(model, Requests((wanted,)), feeds).range(wanted) == Range(1.0, 6.0, 4)


NESTED = """
g (float[2] x, int64 trips, bool which) => (float[2] y) {
  yes = Constant<value: tensor = bool {1}>()
  y = Loop (trips, yes, x) <
    body = b (int64 i, bool go, float[2] v) => (bool again, float[2] next) {
      again = Identity(go)
      d = Add(v, v)
      next = If (which) <
        then_branch = t () => (float[2] tt) { p = Neg(d)  tt = Neg(p) },
        else_branch = e () => (float[2] ee) { q = Abs(d)  ee = Abs(q) }> }>
}
"""


@pytest.mark.parametrize("which", [True, False])
def test_branches_inside_loops(which: bool) -> None:
    model = parse(NESTED)
    d, p, q = (tensor(model, name) for name in "dpq")
    feeds = samples([1, 2], trips=np.array(2, np.int64), which=np.array(which))
    found = collect(model, Requests((d, p, q)), feeds)
    assert found.range(d) == Range(2.0, 8.0, 4)
    assert (found.range(p) is not None, found.range(q) is not None) == (which, not which)
    if which:
        assert found.range(p) == Range(-8.0, -2.0, 4)


MAPPED = """
g (float[3, 2] x, bool which) => (float[3, 2] y) {
  a = Neg(x)
  s = SplitToSequence<axis = 0, keepdims = 1>(a)
  t = SequenceMap(s) <body = b (float[1, 2] e) => (float[1, 2] q) { p = Abs(e)  q = Neg(p) }>
  y = ConcatFromSequence<axis = 0>(t)
}
"""


def test_bodies_that_let_nothing_out_are_skipped() -> None:
    model = parse(MAPPED.replace(", bool which", ""))
    a, e, p = (tensor(model, name) for name in "aep")
    found = collect(model, Requests((a, e, p)), samples([[1, 2], [3, 4], [5, 6]]))
    assert found.range(a) == Range(-6.0, -1.0, 6)
    assert found.skipped == [(name, "is in the body of a SequenceMap, which is not measured") for name in "ep"]
    assert found.range(p) is None
    assert found.reason(p) == "is in the body of a SequenceMap, which is not measured"


def test_branches_within_closed_bodies_are_skipped() -> None:
    inner = """q = If (which) < then_branch = t () => (float[1, 2] tt) { tt = Neg(p) },
        else_branch = e () => (float[1, 2] ee) { ee = Abs(p) }> }>"""
    model = parse(MAPPED.replace("q = Neg(p) }>", inner))
    tt = tensor(model, "tt")
    found = collect(model, Requests((tt,)), samples(np.ones((3, 2)), which=np.array(True)))
    assert found.skipped == [("tt", "is in the body of a SequenceMap, which is not measured")]


def test_local_functions_are_skipped() -> None:
    text = """g (float[2] x) => (float[2] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 17]> f (u) => (v) { w = Neg(u)  v = Abs(w) }"""
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    model = load(onnx.parser.parse_model(header + text))
    found = collect(model, Requests((tensor(model, "w"),)), samples([1, 2]))
    assert found.skipped == [("w", "is in a local function")]


def test_names_of_the_model_are_not_taken() -> None:
    model = parse("g (float[2] x) => (float[2] calibration_reducemin) { a = Relu(x)  calibration_reducemin = Neg(a) }")
    wanted = tensor(model, "a")
    assert collect(model, Requests((wanted,)), samples([1, 2])).range(wanted) is not None


def test_progress_counts_samples() -> None:
    model = parse(CHAIN)
    seen: list[tuple[int, int]] = []
    collect(
        model,
        Requests((tensor(model, "a"),)),
        samples([[1, 2, 3]], [[1, 2, 3]]),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_requests_join_without_repeating() -> None:
    model = parse(CHAIN)
    a, b = tensor(model, "a"), tensor(model, "b")
    joined = Requests((a,), channel_means=((a, 1),)) | Requests((b, a), channel_means=((a, 1), (b, 1)))
    assert joined.ranges == (a, b)
    assert joined.channel_means == ((a, 1), (b, 1))
    assert not Requests()
    assert joined


def test_a_tensor_of_another_model_is_reported() -> None:
    model = parse(CHAIN)
    stranger = Variable("stranger", np.float32)
    found = collect(model, Requests((tensor(model, "a"), stranger)), samples([[1, 2, 3]]))
    assert found.skipped == [("stranger", "is not produced in the model")]
