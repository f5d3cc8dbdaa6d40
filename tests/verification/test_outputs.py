from __future__ import annotations

import numpy as np
import pytest

from onnxopt.verification import RecordedOutputs
from tests.verification.builders import identity, random_outputs, record

Y = random_outputs(5)


@pytest.mark.parametrize("memory", [0, 90, 1 << 20])
def test_outputs_come_back_as_often_as_wanted(memory: int) -> None:
    feeds = record(Y).feeds
    recorded = RecordedOutputs(identity(), feeds, memory=memory)
    for _ in range(2):
        for outputs, expected in zip(recorded, Y, strict=True):
            np.testing.assert_array_equal(outputs["y"], expected)
    np.testing.assert_array_equal(recorded[4]["y"], Y[4])
    assert len(recorded) == 5


def test_names_sources_and_labels_are_kept() -> None:
    recorded = record(Y, [[number] for number in range(5)])
    assert recorded.names == ("y",)
    assert recorded.sources == [f"feed[{number}]" for number in range(5)]
    assert [int(label[0]) for label in recorded.labels if label is not None] == [0, 1, 2, 3, 4]


def test_outputs_can_not_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        record(Y)[0]["y"][0, 0] = 1


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    RecordedOutputs(identity(), record(Y).feeds, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 5) for number in range(1, 6)]
