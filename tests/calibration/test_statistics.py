from typing import Any

import numpy as np
import pytest

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.tallies import (
    KINDS,
    ChannelMeanTally,
    ChannelMomentsTally,
    ChannelRangeTally,
    FiringTally,
    GramTally,
    HistogramTally,
    RangeTally,
    Tally,
)
from onnxopt.feeds import Sample
from onnxopt.model import Model, Node, Variable
from tests.calibration.truth import everything, same, tensor, tensors
from tests.helpers import model
from tests.passes.quantizing import normal, parse, samples

TEXT = "g (float[n, 3] x) => (float[n, 3] y) { a = Relu(x)  y = Log(a) }"


def feeds(*arrays: Any) -> list[Sample]:
    return [Sample({"x": np.asarray(a, np.float32)}, None, f"sample {i}") for i, a in enumerate(arrays)]


def test_figures_follow_a_clone() -> None:
    the_model = model(TEXT)
    found = collect(the_model, everything(tensors(the_model, "a y"), (1,)), feeds([[1, 2, 0]]))
    clone = the_model.clone()
    moved = found.moved(clone.tensors)
    a, y = (clone.tensors[id(variable)] for variable in tensors(the_model, "a y"))
    assert moved.samples == 1
    assert moved.range(a) == found.range(tensor(the_model, "a"))
    before, after = found.channel_mean(tensor(the_model, "a"), 1), moved.channel_mean(a, 1)
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)
    assert moved.reason(y) == "holds infinities (sample 0)"
    assert moved.range(tensor(the_model, "a")) is None


def test_nothing_is_known_of_what_was_not_asked() -> None:
    found, stranger = Statistics(), Variable("stranger")
    assert found.range(stranger) is None
    assert found.mean_extremes(stranger) is None
    assert found.moments(stranger) is None
    assert found.histogram(stranger) is None
    assert found.mean_magnitude(stranger) is None
    assert found.channel_range(stranger, 0) is None
    assert found.channel_maximum(stranger, 0) is None
    assert found.channel_mean(stranger, 0) is None
    assert found.channel_moments(stranger, 0) is None
    assert found.firing(stranger, 0, 0.0) is None
    assert found.reason(stranger) is None
    assert found.skipped == []


def test_a_merge_changes_only_what_it_is_merged_into() -> None:
    the_model = model(TEXT)
    requests = everything(tensors(the_model, "x a"), (1,))
    parts = [collect(the_model, requests, feeds(row)) for row in ([[1, 2, 3]], [[4, 5, 6]], [[0.1, 0.2, 0.3]])]
    copies = [collect(the_model, requests, feeds(row)) for row in ([[1, 2, 3]], [[4, 5, 6]], [[0.1, 0.2, 0.3]])]
    total = Statistics()
    for part in (*parts, *parts):
        total.merge(part)
    for part, copy in zip(parts, copies, strict=True):
        same(part, copy, sums=0)
    assert total.samples == 6


def tallies() -> list[Tally]:
    rng = np.random.default_rng(0)
    found: list[Tally] = [
        RangeTally(-1.0, 2.0, 3),
        HistogramTally(),
        ChannelRangeTally(np.array([-1.0, 0.0]), np.array([2.0, 0.0])),
        ChannelMeanTally.empty(2),
        ChannelMomentsTally.empty(3),
        FiringTally(np.array([1, 2]), 5),
        GramTally.empty(2, 3),
    ]
    gram = found[-1]
    assert isinstance(gram, GramTally)
    gram.add(rng.standard_normal((2, 5, 3)))
    return found


@pytest.mark.parametrize("at", range(7))
def test_tallies_are_their_arrays(at: int) -> None:
    tally = tallies()[at]
    tally.check()
    arrays = tally.arrays()
    assert list(arrays) == tally.names()
    copy = tally.copy()
    again = type(tally).from_arrays(arrays)
    for name, array in arrays.items():
        assert np.array_equal(copy.arrays()[name], array)
        assert np.array_equal(again.arrays()[name], array)
    copy.merge(tally)
    assert all(np.array_equal(tally.arrays()[name], array) for name, array in tallies()[at].arrays().items())


def test_channels() -> None:
    assert [tally.channels for tally in tallies()] == [1, 1, 2, 2, 3, 2, 3]


def test_what_no_counting_gives_is_found() -> None:
    broken: list[Tally] = [
        RangeTally(np.inf, 2.0, 3),
        RangeTally(1.0, 2.0, -3),
        RangeTally(1, 2.0, 3),
        HistogramTally(200),
        HistogramTally(3, np.zeros(5, np.int64)),
        ChannelRangeTally(np.zeros(2), np.zeros(3)),
        ChannelRangeTally(np.zeros((2, 2)), np.zeros((2, 2))),
        ChannelMeanTally.empty(2),
        FiringTally(np.zeros(3), 1),
    ]
    mean = broken[-2]
    assert isinstance(mean, ChannelMeanTally)
    mean.total.low = np.zeros(3)
    for tally in broken:
        with pytest.raises(ValueError, match=r"shape|type|hold|exponent"):
            tally.check()


def test_every_kind_has_a_tally() -> None:
    assert set(KINDS) == set(Requests().by_kind())


def test_figures_of_a_divided_tensor_are_those_that_a_run_would_give() -> None:
    text = "g (float[n, 6] x) => (float[n, 4] y) { t = Mul(x, c)  y = MatMul(t, w) }"
    values = {"c": np.array([1, 8, 1, 1, 64, 1], np.float32), "w": np.ones((6, 4), np.float32)}
    given, divided = parse(text, values), parse(text, {**values, "c": np.ones(6, np.float32)})
    feeds = samples([{"x": normal(5, 6, seed=seed)} for seed in range(4)])

    def asked(of: Model) -> tuple[Requests, Variable, Node]:
        product, layer = of.graph.nodes
        made = product.outputs[0]
        wanted = Requests(
            ranges=(made,),
            histograms=(made,),
            channel_ranges=((made, -1),),
            channel_moments=((made, -1),),
            grams=(layer,),
        )
        return wanted, made, layer

    wanted, here, layer = asked(given)
    found = collect(given, wanted, feeds)
    changed = found.copy()
    changed.divide((here, -1), values["c"].astype(np.float64), here, [layer])
    other, there, reader = asked(divided)
    truth = collect(divided, other, feeds)
    assert changed.range(here) == pytest.approx(truth.range(there))
    mean, exact = changed.channel_mean(here, -1), truth.channel_mean(there, -1)
    assert mean is not None
    assert mean == pytest.approx(exact)
    gram, true_gram = changed.gram(layer), truth.gram(reader)
    assert gram is not None
    assert true_gram is not None
    assert gram.second == pytest.approx(true_gram.second)
    assert gram.mean == pytest.approx(true_gram.mean)
    assert changed.histogram(here) is None
    assert found.histogram(here) is not None  # the copy alone was changed
    assert found.range(here) != changed.range(here)
