"""Groups of equal contents, however many kinds the samples leave together, against grouping by bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.duplicates import equal_groups
from onnxopt.model import Constant, TensorData
from onnxopt.model import tensor_data as module


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.integers(0, 6), min_size=2, max_size=14), size=st.sampled_from([3, 20_000, 40_001]))
def test_groups_are_those_of_equal_bytes(kinds: list[int], size: int) -> None:
    items = []
    for at, kind in enumerate(kinds):
        array = np.arange(size, dtype=np.uint8 if size % 2 else np.float32)
        array[size // 3] = kind  # between the samples of large ones
        items.append(Constant(f"w{at}", TensorData.from_array(array)))
    expected = [[at for at, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
    found = [[int(each.name[1:]) for each in group] for group in equal_groups(items)]
    assert sorted(found) == sorted(group for group in expected if len(group) > 1)


def test_contents_shared_by_several_constants_stay_together() -> None:
    data = TensorData.from_array(np.arange(20_000, dtype=np.float32))
    other = TensorData.from_array(np.arange(20_000, dtype=np.float32))
    items = [Constant("a", data), Constant("b", other), Constant("c", data)]
    assert [[each.name for each in group] for group in equal_groups(items)] == [["a", "c", "b"]]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64 << 10, (64 << 10) + 5])
def test_bytes_are_compared_to_the_last(length: int) -> None:
    one = bytes(range(256)) * (length // 256 + 1)
    one = one[:length]
    assert module._same_bytes(memoryview(one), one)
    assert not module._same_bytes(one, one + b"x")
    if length:
        assert not module._same_bytes(one, one[:-1] + bytes([one[-1] ^ 1]))


def test_many_are_held_against_one() -> None:
    base = np.arange(100_000, dtype=np.float32)
    first, last = base.copy(), base.copy()
    first[0], last[-1] = 9, 9
    contents = [TensorData.from_array(array) for array in (base.copy(), first, last, base.copy())]
    own = TensorData.from_array(base)
    assert own.equal_to([*contents, own]) == [True, False, False, True, True]
    assert own.equal_to([]) == []
