"""Garbage collection is as it was afterwards, and models that are let go do not pile up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from onnxopt.model import collection, load
from onnxopt.model.collection import collection_paused
from tests.helpers import proto, with_weights


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_previous_state_comes_back(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is enabled
    with pytest.raises(RuntimeError), collection_paused():
        raise RuntimeError
    assert gc.isenabled() is enabled


def test_many_new_objects_count_as_old() -> None:
    with collection_paused():
        made = [[number] for number in range(150_000)]
        assert any(item is made for item in gc.get_objects(generation=0))
    assert not any(item is made for item in gc.get_objects(generation=0))
    assert gc.get_freeze_count() == 0


def test_what_the_program_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with collection_paused():
            made = [[number] for number in range(150_000)]
        assert gc.get_freeze_count() == frozen
        assert len(made) == 150_000
    finally:
        gc.unfreeze()


def test_models_that_are_let_go_are_collected_by_later_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "_MANY", 100)
    monkeypatch.setattr(collection, "_alive", 0)
    text = " ".join(f"t{n + 1} = Add(t{n}, w)" for n in range(200))
    source = with_weights(proto(f"g (float[2] t0) => (float[2] t200) {{ {text} }}"), w=np.ones(2, np.float32))
    gone = []
    for _ in range(200):
        gone.append(weakref.ref(load(source).graph))
        monkeypatch.setattr(collection, "_alive", min(collection._alive, 20_000))
    assert sum(reference() is not None for reference in gone) < 150
