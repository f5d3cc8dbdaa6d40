"""Samples, and feeds: a sequence of samples that may be walked any number of times and is read when walked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from onnxopt.feeds.check import check_inputs, to_inputs
from onnxopt.runtime.ports import Array, Port

LABELS = "labels"


@dataclass(frozen=True, eq=False)
class Sample:
    """One feed. inputs: input name -> array (a list of arrays for a sequence input), with the batch axis.

    labels: what the outputs should be, first axis = batch, or None. source: where it came from, for messages.
    """

    inputs: dict[str, Any]
    labels: Array | None
    source: str

    def digest(self) -> int:
        """A hash of names, types, shapes and values of the inputs, of 128 bits."""
        digest = hashlib.sha256()
        _hash(digest, self.inputs)
        return int.from_bytes(digest.digest()[:16], "little")


@dataclass(frozen=True, eq=False)
class Record:
    """One feed as a source holds it, not yet held against the model's inputs."""

    values: Mapping[str, Any]
    source: str
    labels: Array | None = None


class Source(Protocol):
    """Something that holds feeds and reads any of them by its index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the feed comes from, for messages; read() gives it as Record.source."""

    def read(self, index: int) -> Record:
        """The feed at 0 <= index < len(self). Raises FeedError when it can't be read."""


class Feeds:
    """Samples of a source, checked against the model's inputs as they are read.

    Iterating reads one sample at a time and may be done again and again. ports: the model's inputs. indices: which
    feeds of the source belong to it, in order; default all. reject_nan: refuse samples with a NaN in an input.
    """

    def __init__(
        self, source: Source, ports: Sequence[Port], indices: Sequence[int] | None = None, *, reject_nan: bool = False
    ) -> None:
        self.ports = tuple(ports)
        self._source = source
        self._indices = tuple(range(len(source)) if indices is None else indices)
        self._reject_nan = reject_nan

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position. Raises FeedError when it can't be read or doesn't fit the model."""
        record = self._source.read(self._indices[position])
        values = dict(record.values)
        labels = record.labels
        if LABELS in values and LABELS not in {port.name for port in self.ports}:
            found = values.pop(LABELS)
            labels = np.asarray(found) if labels is None else labels
        inputs = to_inputs(values, self.ports)
        check_inputs(inputs, self.ports, record.source, reject_nan=self._reject_nan)
        return Sample(inputs, labels, record.source)

    def select(self, positions: Sequence[int]) -> Feeds:
        """The samples at these positions, in this order."""
        indices = [self._indices[position] for position in positions]
        return Feeds(self._source, self.ports, indices, reject_nan=self._reject_nan)

    def for_inputs(self, ports: Sequence[Port]) -> Feeds:
        """The same samples, checked against the inputs of another model."""
        return Feeds(self._source, ports, self._indices, reject_nan=self._reject_nan)

    def take(self, count: int) -> Feeds:
        """The first `count` samples, or all when there are fewer."""
        return self.select(range(min(count, len(self))))

    def draw(self, count: int, seed: int) -> Feeds:
        """`count` samples chosen at random by `seed`, in the order of the source; all when there are fewer.

        A larger count with the same seed adds samples to those of a smaller one.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(sorted(order[: max(count, 0)].tolist()))

    def shard(self, index: int, count: int) -> Feeds:
        """One of `count` disjoint parts of all samples: those at the positions p with p % count == index % count."""
        return self.select(range(index % count, len(self), count))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content of all samples in order: names, types, shapes, values and labels. Reads them once."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self:
            _hash(digest, sample.inputs)
            _hash(digest, sample.labels)
        return digest.hexdigest()


def _hash(digest: Any, value: Any) -> None:
    """Add a value and its structure to the digest, so that different values never read alike."""
    if isinstance(value, Mapping):
        digest.update(f"map{len(value)};".encode())
        for name in sorted(value):
            digest.update(f"{len(name)}:{name}".encode())
            _hash(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list{len(value)};".encode())
        for item in value:
            _hash(digest, item)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "OUST":
        digest.update(f"string{value.shape};".encode())
        for item in value.flat:
            text = str(item).encode("utf-8", "surrogateescape")
            digest.update(f"{len(text)}:".encode() + text)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.name}{value.shape};".encode())
        little = np.asarray(value, dtype=value.dtype.newbyteorder("<"), order="C")
        digest.update(little.reshape(-1).view(np.uint8) if little.size else b"")
    else:
        digest.update(f"{value!r};".encode())


class Chain:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def name(self, index: int) -> str:
        """The name its source gives the feed."""
        source, index = self._find(index)
        return source.name(index)

    def read(self, index: int) -> Record:
        """The feed at `index` of the sources taken together."""
        source, index = self._find(index)
        return source.read(index)

    def _find(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[which], index - (self._ends[which - 1] if which else 0)


class Labelled:
    """A source with labels from elsewhere, one entry a feed."""

    def __init__(self, source: Source, labels: Sequence[Array]) -> None:
        self._source = source
        self._labels = labels

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """The name the source gives the feed."""
        return self._source.name(index)

    def read(self, index: int) -> Record:
        """The feed at `index` with its label."""
        return replace(self._source.read(index), labels=self._labels[index])
