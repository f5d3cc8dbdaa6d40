import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration.instrument import can_cut
from onnxopt.calibration.sampling import Grid, batch_of, grid

SHAPES = (st.lists(st.integers(0, 10), max_size=5) | st.lists(st.integers(0, 50), max_size=3)).map(tuple)
OPTIONS = (st.booleans(), st.integers(0, 5), st.sampled_from([1, 7, 64, 1000, None]))


@settings(deadline=None)
@given(SHAPES, *OPTIONS)
def test_the_grid_takes_about_as_many_as_wanted(
    shape: tuple[int, ...], first: bool, batch: int, elements: int | None
) -> None:
    array = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    found = grid(shape, first, batch, elements)
    picked = found.pick(array).reshape(-1)
    assert len(np.unique(picked)) == picked.size
    each = array.size // max(1, found.items)
    if elements is None or each <= elements:
        assert picked.size == array.size
        assert found.all
        return
    assert picked.size > 0
    channels = shape[1] if first and len(shape) > 1 else shape[-1] if len(shape) > 1 else 1
    assert picked.size // found.items <= max(4 * elements, channels * 2)  # channels are never left out
    assert found.all or all(step <= size for step, size in zip(found.steps[1:], shape[1:], strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4).map(tuple), *OPTIONS)
def test_items_of_a_batch_are_sampled_like_one_alone(
    tail: tuple[int, ...], first: bool, batch: int, elements: int | None
) -> None:
    batch += 1
    shape = (1, *tail)
    parts = np.random.default_rng(0).standard_normal((batch, *tail))
    together = grid((batch, *tail), first, batch, elements).pick(parts)
    alone = [grid(shape, first, 1, elements).pick(parts[at : at + 1]) for at in range(batch)]
    assert np.array_equal(together.reshape(-1), np.concatenate(alone).reshape(-1))


def test_positions_are_left_out_from_half_a_step_on_and_channels_never() -> None:
    found = grid((1, 4, 100, 100), True, 1, 1000)
    assert found == Grid(1, (1, 1, 7, 6))
    picked = found.pick(np.arange(40_000).reshape(1, 4, 100, 100))
    assert picked.shape == (1, 4, 14, 17)
    assert picked[0, 0, 0].tolist()[:2] == [303, 309]
    assert grid((1, 100, 100, 4), False, 1, 1000) == Grid(1, (1, 7, 6, 1))
    assert grid((50, 30), False, 1, 100) == Grid(1, (15, 1))
    assert grid((50, 30), False, 50, 100) == Grid(50, (1, 1))
    assert grid((50, 30), False, 50, 10) == Grid(50, (1, 3))  # where there are only channels, these


def test_what_the_graph_can_cut() -> None:
    assert can_cut(Grid(1, (3, 1)), 10)
    assert can_cut(Grid(4, (1, 3)), 10)
    assert not can_cut(Grid(4, (3, 1)), 17)
    assert not can_cut(Grid(1, (3, 1)), 9)


def test_batches() -> None:
    one, three = np.ones((1, 2)), np.ones((3, 2, 2))
    assert batch_of({"x": three, "y": np.ones(3)}) == 3
    assert batch_of({"x": three, "y": np.array(2)}) == 3
    assert batch_of({"x": three, "y": one}) == 1
    assert batch_of({"x": np.array(2)}) == 1
    assert batch_of({"x": [one, one]}) == 1
    assert batch_of({}) == 1
