"""The outputs of a session over feeds, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from onnxopt.feeds import Feeds
from onnxopt.runtime import Array, Session
from onnxopt.runtime.storage import DEFAULT_MEMORY, Spool

# Told (feeds done, feeds in all) after each feed.
Progress: TypeAlias = Callable[[int, int], None]


class RecordedOutputs:
    """What a session gives for each feed: run once when made, in memory up to `memory` bytes, then on disk.

    names: the outputs in the model's order. sources, labels: those of the samples, in order. Iterating gives one dict
    (output name -> value) a feed, as often as wanted. Raises FeedError and PassError as feeds and session do.
    """

    def __init__(
        self, session: Session, feeds: Feeds, *, memory: int = DEFAULT_MEMORY, progress: Progress | None = None
    ) -> None:
        self.names: tuple[str, ...] = tuple(output.name for output in session.outputs)
        self.feeds = feeds
        self.sources: list[str] = []
        self.labels: list[Array | None] = []
        self._spool = Spool(memory)
        for done, sample in enumerate(feeds, start=1):
            self._spool.append(session.run(sample.inputs))
            self.sources.append(sample.source)
            self.labels.append(sample.labels)
            if progress is not None:
                progress(done, len(feeds))

    def __len__(self) -> int:
        return len(self._spool)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._spool)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._spool[index]
