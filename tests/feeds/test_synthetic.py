from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.errors import FeedError, PassError
from onnxopt.feeds import runnable_feeds, synthetic_feeds
from onnxopt.runtime import Port

FLOAT = np.dtype(np.float32)
INT = np.dtype(np.int64)


def test_named_dims_agree_and_the_first_axis_is_one() -> None:
    ports = [
        Port("input_ids", INT, ("B", "S")),
        Port("attention_mask", INT, ("B", "S")),
        Port("x", FLOAT, ("B", 3, "S")),
    ]
    inputs = synthetic_feeds(ports)[0].inputs
    assert [inputs[name].shape for name in ("input_ids", "attention_mask", "x")] == [(1, 16), (1, 16), (1, 3, 16)]
    assert (inputs["attention_mask"] == 1).all()
    assert inputs["input_ids"].min() >= 0
    assert inputs["input_ids"].max() < 10


def test_sizes_may_be_given_by_name_or_axis() -> None:
    ports = [Port("x", FLOAT, ("B", "S")), Port("y", FLOAT, ("S", None, "?"))]
    inputs = synthetic_feeds(ports, sizes={"S": 7, "y:1": 5}, size=9)[0].inputs
    assert inputs["x"].shape == (1, 7)
    assert inputs["y"].shape == (7, 5, 9)


def test_pictures_get_room_and_bytes_their_range() -> None:
    ports = [Port("a", FLOAT, (None, 3, None, None)), Port("b", np.dtype(np.uint8), (1, 20, 20, 3))]
    inputs = synthetic_feeds(ports)[0].inputs
    assert inputs["a"].shape == (1, 3, 64, 64)
    assert inputs["b"].max() > 200


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.int8, np.bool_, np.uint64, ml_dtypes.bfloat16, ml_dtypes.int4, object]
)
def test_every_element_type_is_served(dtype: type) -> None:
    port = Port("x", np.dtype(dtype), (2, 3))
    value = synthetic_feeds([port])[0].inputs["x"]
    assert value.dtype == np.dtype(dtype)
    assert value.shape == (2, 3)


def test_scalars_sequences_and_optionals() -> None:
    ports = [
        Port("sr", INT, ()),
        Port("parts", FLOAT, None, "sequence"),
        Port("maybe", FLOAT, (2,), "optional", required=False),
    ]
    inputs = synthetic_feeds(ports)[0].inputs
    assert inputs["sr"].shape == ()
    assert [part.shape for part in inputs["parts"]] == [(2,), (3,)]
    assert "maybe" not in inputs


def test_the_seed_decides() -> None:
    port = Port("x", FLOAT, (2, 3))
    first, again, other = (synthetic_feeds([port], seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({sample.inputs["x"].tobytes() for sample in first}) == len(first) == 16


def only(**shapes: tuple[int, ...]) -> Any:
    """A model that runs on inputs of these shapes alone."""

    def run(inputs: Any) -> None:
        found = {name: value.shape for name, value in inputs.items()}
        if found != shapes:
            raise PassError(f"can't run on {found}", "feed other shapes")

    return run


def test_sizes_are_tried_until_the_model_runs() -> None:
    ports = [Port("input", FLOAT, (None, None)), Port("state", FLOAT, (2, None, 128))]
    feeds = runnable_feeds(ports, only(input=(1, 512), state=(2, 1, 128)))
    assert feeds[0].inputs["input"].shape == (1, 512)
    assert len({sample.inputs["input"].shape for sample in feeds}) == 1
    usual = runnable_feeds(ports, lambda inputs: None)
    assert usual[0].inputs["input"].shape == (1, 16)
    shared = [Port("a", FLOAT, ("N", "S")), Port("b", FLOAT, ("S", 3))]
    assert runnable_feeds(shared, only(a=(1, 32), b=(32, 3)))[0].inputs["b"].shape == (32, 3)


def test_integers_shrink_for_short_tables() -> None:
    def run(inputs: Any) -> None:
        if inputs["ids"].max() > 3:
            raise PassError("index out of bounds", "feed less")

    feeds = runnable_feeds([Port("ids", INT, ("N", "S"))], run)
    assert sorted(np.unique(feeds[0].inputs["ids"])) == [0, 1]


def test_a_model_that_runs_on_nothing_is_said_with_its_reason() -> None:
    with pytest.raises(FeedError, match="no inputs that were made up for it: can't run on"):
        runnable_feeds([Port("x", FLOAT, ("N", 3))], only(x=(7, 7)))
    fixed = [Port("x", FLOAT, (2, 3))]
    assert len(runnable_feeds(fixed, only(x=(2, 3)), count=4)) == 4


def test_what_cannot_be_made_up_is_said() -> None:
    with pytest.raises(FeedError, match="no values can be made up"):
        synthetic_feeds([Port("m", None, None, "map")])
