"""Python's cyclic garbage collector, kept out of where only lasting objects are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# fewer new objects than this are left to the collector's own rules
_MANY = 100_000
# objects made within `collection_paused` that no full collection has seen, and all objects after the last one it made
_unseen = 0
_alive = 0


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection within; the previous state is restored.

    A model of n nodes is a few dozen times n objects that all stay. The collector wakes up again and again while they
    are made and walks over all that are there, finding nothing, which made loading twice as many nodes take three times
    as long. Collection is a setting of the process: what other threads leave behind meanwhile is collected later.

    At the end many new objects count as old ones, or the next collection would walk over all of them once more. That is
    done by freezing and unfreezing, which walks over nothing, unless the program has frozen objects of its own. Old
    objects are collected rarely, models are full of cycles, and their weights must not outlive them: so where many were
    made before, a full collection comes first.
    """
    global _alive, _unseen
    enabled = gc.isenabled()
    if enabled and _unseen > max(_alive, _MANY):
        gc.collect()
        _alive, _unseen = len(gc.get_objects()), 0
    gc.disable()
    try:
        yield
    finally:
        made = gc.get_count()[0]
        if enabled and made > _MANY and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
            _unseen += made
        if enabled:
            gc.enable()
