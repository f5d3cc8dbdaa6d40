from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.feeds import Sample, batch_trouble, batched
from onnxopt.feeds.batches import Batch
from onnxopt.runtime import Port
from tests.feeds.ports import IDS, PICTURE, RATE, X, row


def sample(number: int, **inputs: Any) -> Sample:
    return Sample(inputs, np.array([number]), f"feed[{number}]")


def samples(*lengths: int) -> list[Sample]:
    """Samples of X and IDS; their number stands in x, their length is that of ids along axis 1."""
    return [
        sample(number, x=row(number, 0, 0), ids=np.full((1, length), number, np.int64))
        for number, length in enumerate(lengths)
    ]


def members(batches: list[Batch]) -> list[list[str]]:
    return [[member.source for member in batch.members] for batch in batches]


@given(lengths=st.lists(st.integers(1, 3), max_size=12), size=st.integers(1, 5))
def test_batches_hold_every_sample_once_and_in_order(lengths: list[int], size: int) -> None:
    feeds = samples(*lengths)
    batches = list(batched(feeds, size, [X, IDS]))
    assert [member for batch in batches for member in batch.members] == feeds
    for batch in batches:
        assert 1 <= len(batch.members) <= size
        for name in ("x", "ids"):
            parts = [member.inputs[name] for member in batch.members]
            np.testing.assert_array_equal(batch.sample.inputs[name], np.concatenate(parts), strict=True)
    for first, second in itertools.pairwise(batches):
        same = first.members[0].inputs["ids"].shape == second.members[0].inputs["ids"].shape
        assert not same or len(first.members) == size


def test_a_joined_sample_names_its_range_and_drops_labels() -> None:
    first, second = batched(samples(2, 2, 2), 2, [X, IDS])
    assert (first.sample.source, first.sample.labels) == ("feed[0] to feed[1]", None)
    assert second.sample is second.members[0]
    assert second.sample.labels is not None


def test_size_one_copies_nothing() -> None:
    feeds = samples(2, 2)
    assert [batch.sample for batch in batched(feeds, 1, [X, IDS])] == feeds


def test_full_batches_are_given_before_the_next_sample_is_read() -> None:
    def feeds() -> Iterator[Sample]:
        yield from samples(2, 2)
        raise AssertionError("read too far")

    assert len(next(batched(feeds(), 2, [X, IDS])).members) == 2
    assert next(batched(feeds(), 1, [X, IDS])).sample.source == "feed[0]"


def test_samples_of_several_rows_are_joined_whole() -> None:
    feeds = [sample(0, x=np.zeros((2, 3), np.float32)), sample(1, x=np.ones((3, 3), np.float32))]
    (batch,) = batched(feeds, 8, [X])
    assert batch.sample.inputs["x"][:, 0].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"x": row(1, 2, 3).astype(np.float64)},
        {"x": row(1, 2)},
        {"x": row(1, 2, 3), "w": np.zeros(3, np.float32)},
        {"x": np.float32(3).reshape(())},
        {"x": [row(1, 2, 3)]},
        {"x": None},
        {},
    ],
    ids=["type", "size", "more inputs", "scalar", "sequence", "none", "nothing"],
)
def test_what_does_not_agree_closes_the_batch(other: dict[str, Any]) -> None:
    feeds = [sample(0, x=row(1, 2, 3)), sample(1, **other), sample(2, **other), sample(3, x=row(1, 2, 3))]
    found = members(list(batched(feeds, 4, [Port("x", None, None)])))
    joins = len(found) == 3
    assert found[0] == ["feed[0]"]
    assert found[-1] == ["feed[3]"]
    assert joins == (all(isinstance(value, np.ndarray) and value.ndim for value in other.values()) and bool(other))


def test_an_input_of_fixed_size_is_never_joined() -> None:
    weights = Port("w", np.dtype(np.float32), (3,), required=False)
    feeds = [sample(number, x=row(1, 2, 3), w=np.zeros(3, np.float32)) for number in range(2)]
    assert len(list(batched(feeds, 2, [X, weights]))) == 2
    assert len(list(batched(samples(1, 1), 2, [X, IDS, weights]))) == 1


def test_strings_of_all_lengths_are_joined() -> None:
    feeds = [sample(0, s=np.array(["a"])), sample(1, s=np.array(["long"]))]
    (batch,) = batched(feeds, 2, [Port("s", np.dtype(object), (None,))])
    assert batch.sample.inputs["s"].tolist() == ["a", "long"]


def test_models_that_take_batches_give_no_trouble() -> None:
    weights = Port("w", np.dtype(np.float32), (3,), required=False)
    assert batch_trouble([X, IDS, PICTURE, weights, Port("x", None, None)]) is None


@pytest.mark.parametrize(
    ("port", "cause"),
    [
        (Port("x", np.dtype(np.float32), (1, 3)), "input x: float32[1,3] fixes its first dimension at 1"),
        (RATE, "input sr: int64[] has no axis to join feeds along"),
        (Port("p", np.dtype(np.float32), None, "sequence"), "input p: sequence of float32 is no tensor"),
    ],
)
def test_models_that_take_none_say_why(port: Port, cause: str) -> None:
    trouble = batch_trouble([X, port])
    assert trouble is not None
    assert trouble[0].startswith(cause)
    assert "open first dimension" in trouble[1]
