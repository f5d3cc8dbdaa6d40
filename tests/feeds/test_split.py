from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxopt.feeds import Feeds, split_feeds
from onnxopt.feeds.function import Items
from tests.feeds.ports import X, indices


def feeds_of(count: int) -> Feeds:
    return Feeds(Items([{"x": np.full((1, 3), index, np.float32)} for index in range(count)], "t"), [X])


@pytest.mark.parametrize(
    ("count", "sizes"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (10, (6, 2, 2)), (100, (60, 20, 20))]
)
def test_parts_are_disjoint_complete_and_in_source_order(count: int, sizes: tuple[int, ...]) -> None:
    split = split_feeds(feeds_of(count))
    parts = [indices(part) for part in (split.fit, split.select, split.evaluate)]
    assert tuple(map(len, parts)) == sizes
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(part == sorted(part) for part in parts)
    assert split.note == ""


def test_the_seed_decides_which_feed_goes_where() -> None:
    def evaluate(seed: int) -> list[int]:
        return indices(split_feeds(feeds_of(50), seed=seed).evaluate)

    assert evaluate(0) == evaluate(0)
    assert evaluate(0) != evaluate(1)
    assert evaluate(0) != list(range(40, 50))


def test_one_feed_serves_all_and_it_is_said() -> None:
    split = split_feeds(feeds_of(1))
    assert indices(split.fit) == indices(split.select) == indices(split.evaluate) == [0]
    assert "one feed serves fit, select and evaluate" in split.note


def test_of_two_feeds_one_evaluates() -> None:
    split = split_feeds(feeds_of(2))
    assert indices(split.fit) == indices(split.select)
    assert sorted(indices(split.fit) + indices(split.evaluate)) == [0, 1]
    assert "one serves fit and select" in split.note


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (100, (75, 25))])
def test_with_evaluation_feeds_the_rest_is_fit_and_select(count: int, sizes: tuple[int, int]) -> None:
    final = feeds_of(7)
    split = split_feeds(feeds_of(count), evaluate=final)
    assert (len(split.fit), len(split.select)) == sizes
    assert split.evaluate is final
    assert bool(split.note) == (count == 1)
    if count > 1:
        assert not set(indices(split.fit)) & set(indices(split.select))
