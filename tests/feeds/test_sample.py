from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.errors import FeedError
from onnxopt.feeds import Feeds
from onnxopt.feeds.function import Items
from onnxopt.feeds.sample import Chain, Labelled
from onnxopt.runtime import Port
from tests.feeds.ports import X, indices, row


def feeds_of(*rows: object) -> Feeds:
    return Feeds(Items([{"x": item} for item in rows], "test"), [X])


THREE = feeds_of(row(0, 1, 2), row(1, 1, 2), row(2, 1, 2))


def test_feeds_may_be_walked_again_and_sliced() -> None:
    assert indices(THREE) == indices(THREE) == [0, 1, 2]
    assert indices(THREE.take(2)) == [0, 1]
    assert len(THREE.take(9)) == 3
    assert indices(THREE.select([2, 0])) == [2, 0]
    assert indices(THREE.select([2, 0]).select([1])) == [0]
    assert [sample.source for sample in THREE.select([2])] == ["test[2]"]


def many(count: int) -> Feeds:
    return feeds_of(*(row(index, 0, 0) for index in range(count)))


@given(count=st.integers(1, 30), wanted=st.integers(-2, 40), seed=st.integers(0, 5))
def test_drawn_samples_are_distinct_and_in_order(count: int, wanted: int, seed: int) -> None:
    feeds = many(count)
    drawn = indices(feeds.draw(wanted, seed))
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(max(wanted, 0), count)
    assert set(indices(feeds.draw(wanted - 1, seed))) <= set(drawn)
    assert drawn == indices(many(count).draw(wanted, seed))


def test_the_seed_decides_what_is_drawn() -> None:
    feeds = many(50)
    draws = {tuple(indices(feeds.draw(10, seed))) for seed in range(5)}
    assert len(draws) == 5
    assert tuple(range(10)) not in draws


@given(total=st.integers(0, 30), count=st.integers(1, 7), turn=st.integers(-3, 3))
def test_shards_are_disjoint_and_together_all(total: int, count: int, turn: int) -> None:
    feeds = many(total)
    shards = [indices(feeds.shard(turn * count + index, count)) for index in range(count)]
    assert sorted(itertools.chain(*shards)) == list(range(total))
    assert all(position % count == index for index, shard in enumerate(shards) for position in shard)
    assert all(shard == sorted(shard) for shard in shards)


def test_shards_of_selected_samples_go_by_position() -> None:
    feeds = many(6).select([5, 3, 1])
    assert indices(feeds.shard(0, 2)) == [5, 1]
    assert indices(feeds.shard(1, 2)) == [3]


def test_fingerprint_is_of_content_alone() -> None:
    assert THREE.fingerprint == feeds_of(row(0, 1, 2), row(1, 1, 2), row(2, 1, 2)).fingerprint
    assert THREE.take(3).fingerprint == THREE.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        THREE.take(2),
        THREE.select([0, 2, 1]),
        feeds_of(row(0, 1, 2), row(1, 1, 2), row(2, 1, 3)),
        Feeds(Labelled(Items([{"x": sample.inputs["x"]} for sample in THREE], "t"), [np.zeros(1)] * 3), [X]),
        Feeds(Items([{"y": sample.inputs["x"]} for sample in THREE], "t"), [Port("y", X.dtype, X.shape)]),
    ],
    ids=["fewer", "order", "value", "labels", "name"],
)
def test_fingerprint_changes_with_the_content(other: Feeds) -> None:
    assert other.fingerprint != THREE.fingerprint


def test_fingerprint_tells_types_shapes_and_strings_apart() -> None:
    ports = [Port("x", None, None)]
    arrays = [
        np.zeros((1, 4), np.float32),
        np.zeros((4, 1), np.float32),
        np.zeros((1, 4), np.int32),
        np.zeros((1, 2), np.float64),
        np.array([["ab", "c"]]),
        np.array([["a", "bc"]]),
    ]
    prints = {Feeds(Items([{"x": array}], "t"), ports).fingerprint for array in arrays}
    assert len(prints) == len(arrays)


def test_labels_are_taken_out_unless_they_are_an_input() -> None:
    item = {"x": row(0, 0, 0), "labels": np.array([3])}
    sample = Feeds(Items([item], "t"), [X])[0]
    assert list(sample.inputs) == ["x"]
    assert sample.labels is not None
    assert sample.labels.tolist() == [3]
    both = Feeds(Items([item], "t"), [X, Port("labels", np.dtype(np.int64), (None,))])[0]
    assert list(both.inputs) == ["x", "labels"]
    assert both.labels is None


def test_chained_sources_count_on() -> None:
    sources = [
        Items([{"x": row(n, 0, 0)} for n in part], name) for name, part in (("a", [0, 1]), ("b", [2]), ("c", [3, 4]))
    ]
    feeds = Feeds(Chain(sources), [X])
    assert indices(feeds) == [0, 1, 2, 3, 4]
    assert [sample.source for sample in feeds] == ["a[0]", "a[1]", "b[0]", "c[0]", "c[1]"]


def test_every_sample_is_checked_when_read() -> None:
    feeds = feeds_of(row(0, 1, 2), np.zeros((1, 4), np.float32))
    assert feeds[0].inputs["x"].shape == (1, 3)
    with pytest.raises(FeedError, match=r"test\[1\]: input 'x'"):
        list(feeds)
