"""The search for related constants: what it looks at, and how the parts it is made of behave."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxopt.duplicates import related, related_groups
from onnxopt.duplicates.related import after, back, blocks, sample, turns
from onnxopt.model import Constant, TensorData


def constant(name: str, array: NDArray[Any]) -> Constant:
    return Constant(name, TensorData.from_array(array))


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_orders_of_axes_compose_and_come_back(first: list[int], then: list[int]) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    one, other = tuple(first), tuple(then)
    assert np.array_equal(array.transpose(one).transpose(other), array.transpose(after(one, other)))
    assert np.array_equal(array.transpose(one).transpose(back(one)), array)


def test_turns_lead_to_the_shape_the_unturned_first() -> None:
    assert turns((3, 3), (3, 3)) == [(0, 1), (1, 0)]
    assert turns((2, 3), (3, 2)) == [(1, 0)]
    assert turns((2, 3), (2, 4)) == []
    assert turns((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)) == [(0, 1, 2, 3, 4)]
    assert turns((1, 2, 3, 4, 5), (2, 1, 3, 4, 5)) == []


@given(st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_blocks_cover_everything_once(shape: list[int]) -> None:
    counts = np.zeros(shape, int)
    for at in blocks(shape):
        counts[at] += 1
    assert np.all(counts == 1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_samples_are_distinct_places(shape: list[int]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    found = sample(array, 64)
    assert len(set(found.tolist())) == min(64, array.size) == found.size


@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (8, 8, 8), (4, 6, 4, 6)])
def test_each_order_of_axes_is_found(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for perm in itertools.permutations(range(len(shape))):
        if perm == tuple(range(len(shape))):
            continue
        other = np.ascontiguousarray(array.transpose(perm))
        [[relation]] = related_groups([constant("a", array), constant("b", other)], turned=True, scaled=True)
        assert relation.perm == perm
        assert relation.scale is None


def test_only_candidates_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((256, 256)).astype(np.float32) for _ in range(30)]
    arrays.append(np.ascontiguousarray(arrays[3].T))
    constants = [constant(f"w{at}", array) for at, array in enumerate(arrays)]
    read: list[int] = []
    original = related.blocks

    def counted(shape: tuple[int, ...]) -> object:
        read.append(1)
        return original(shape)

    monkeypatch.setattr(related, "blocks", counted)
    [[relation]] = related_groups(constants, turned=True, scaled=True)
    assert (relation.duplicate.name, relation.kept.name) == ("w30", "w3")
    assert len(read) == 1
