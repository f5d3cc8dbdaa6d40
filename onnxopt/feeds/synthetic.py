"""Inputs made up from the model's signature. They show that a model runs, and little of what it is worth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxopt.errors import FeedError, PassError
from onnxopt.feeds.sample import Feeds, Record
from onnxopt.runtime.ports import Array, Port, Shape, is_extension, is_float

# (generator, how many) -> so many values
Draw: TypeAlias = Callable[[np.random.Generator, int], Array]

DEFAULT_COUNT = 16
DEFAULT_SIZE = 16
# Tried for dimensions without a number, None standing for the usual size of the dimension.
_SIZES = (None, 1, 32, 224, 512, 2)
_ATTEMPTS = 64
# What exporters write for an unknown size: equal ones need not be equal sizes.
_NAMELESS = (None, "", "?")
_WORDS = ("a", "cat", "on", "the", "mat")
# Integers may be indices into a table; a short one leaves only 0 and 1.
DEFAULT_HIGH = 10
_SHORT = 2


class Synthetic:
    """`count` feeds drawn from a seed, by the name, type and shape of each input.

    Floats are standard normal; integers lie below `high` (packed ones in 0..1), those of inputs named like a mask are
    1 and like a type 0; uint8 of rank 3 and more covers 0..255. Dimensions without a number: `sizes` by name ("N", or
    "input:axis" for one axis), else 1 on the first axis, 64 for the sides of a picture, `size` elsewhere; equal names
    get equal sizes.
    """

    def __init__(
        self, ports: Sequence[Port], count: int, seed: int, sizes: Mapping[str, int], size: int, high: int
    ) -> None:
        self._ports = [port for port in ports if port.required]
        self._count = count
        self._seed = seed
        self._high = high
        self._shapes = _shapes(self._ports, sizes, size)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """synthetic[index]."""
        return f"synthetic[{index}]"

    def read(self, index: int) -> Record:
        """The feed at `index`; the same for the same seed."""
        rng = np.random.default_rng([self._seed, index])
        values = {port.name: _value(port, self._shapes[port.name], rng, self._high) for port in self._ports}
        return Record(values, self.name(index))


class Redrawn:
    """Made-up feeds whose float inputs are drawn value by value from measured distributions.

    draws: input name -> (generator, count) -> float64 values; other inputs stay as they are.
    """

    def __init__(self, feeds: Feeds, draws: Mapping[str, Draw], seed: int) -> None:
        self._feeds = feeds
        self._draws = draws
        self._seed = seed

    def __len__(self) -> int:
        return len(self._feeds)

    def name(self, index: int) -> str:
        """synthetic[index]."""
        return f"synthetic[{index}]"

    def read(self, index: int) -> Record:
        """The feed at `index`; the same for the same seed."""
        values = dict(self._feeds[index].inputs)
        rng = np.random.default_rng([self._seed, index, len(values)])
        for name, draw in self._draws.items():
            old = values.get(name)
            if isinstance(old, np.ndarray) and is_float(old.dtype):
                values[name] = draw(rng, old.size).reshape(old.shape).astype(old.dtype)
        return Record(values, self.name(index))


def redrawn_feeds(feeds: Feeds, draws: Mapping[str, Draw], *, seed: int = 0) -> Feeds:
    """The same made-up feeds with inputs drawn from what was measured of them (see Redrawn)."""
    return Feeds(Redrawn(feeds, draws, seed), feeds.ports)


def synthetic_feeds(
    ports: Sequence[Port],
    *,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    size: int = DEFAULT_SIZE,
    high: int = DEFAULT_HIGH,
) -> Feeds:
    """Feeds made up for the model's inputs (see Synthetic). Raises FeedError for inputs that can't be made up."""
    for port in ports:
        if port.kind in ("map", "sparse") or (port.dtype is None and port.required):
            raise FeedError(f"no values can be made up for input {port}", "give feeds with --data")
    return Feeds(Synthetic(ports, count, seed, sizes or {}, size, high), ports)


def runnable_feeds(
    ports: Sequence[Port], run: Callable[[Mapping[str, Any]], object], *, count: int = DEFAULT_COUNT, seed: int = 0
) -> Feeds:
    """Made-up feeds that the model runs on: tries sizes for its open dimensions, the usual ones first,
    then smaller integers.

    run: runs the model on inputs, raising PassError when they don't suit it. Raises FeedError when no size tried does.
    """
    synthetic_feeds(ports, count=1)
    keys = _open_dims(ports)
    last: PassError | None = None
    choices = list(itertools.islice(_choices(len(keys)), _ATTEMPTS))
    for high, choice in itertools.product((DEFAULT_HIGH, _SHORT), choices):
        sizes = {key: size for key, size in zip(keys, choice, strict=True) if size is not None}
        feeds = synthetic_feeds(ports, count=count, seed=seed, sizes=sizes, high=high)
        try:
            run(feeds[0].inputs)
        except PassError as error:
            last = error
            continue
        return feeds
    cause = "" if last is None else f": {last.cause}"
    raise FeedError(f"the model runs on no inputs that were made up for it{cause}", "give feeds with --data")


def _choices(count: int) -> Iterator[tuple[int | None, ...]]:
    """Sizes for `count` dimensions (None: the usual one): all alike first, then every combination."""
    alike = [(size,) * count for size in _SIZES]
    yield from alike
    yield from (choice for choice in itertools.product(_SIZES, repeat=count) if choice not in alike)


def _open_dims(ports: Sequence[Port]) -> list[str]:
    """The dimensions without a number, behind the first axis, by the key that `sizes` knows them by."""
    keys = []
    for port in ports:
        for axis, dim in enumerate(port.shape or ()):
            if axis and port.required and not isinstance(dim, int):
                keys.append(f"{port.name}:{axis}" if dim in _NAMELESS else str(dim))
    return list(dict.fromkeys(keys))


def _shapes(ports: Sequence[Port], sizes: Mapping[str, int], size: int) -> dict[str, tuple[int, ...]]:
    chosen: dict[str, int] = dict(sizes)
    shapes = {}
    for port in ports:
        dims: list[int] = []
        for axis, dim in enumerate(port.shape or ()):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            default = sizes.get(f"{port.name}:{axis}", _default(port.shape or (), axis, size))
            dims.append(default if dim in _NAMELESS else chosen.setdefault(str(dim), default))
        shapes[port.name] = tuple(dims)
    return shapes


def _default(shape: Shape, axis: int, size: int) -> int:
    if axis == 0:
        return 1
    picture = len(shape) == 4 and (shape[1] in (1, 3, 4) or shape[3] in (1, 3, 4))
    return 64 if picture else size


def _value(port: Port, shape: tuple[int, ...], rng: np.random.Generator, high: int) -> Any:
    if port.kind == "sequence":
        return [_array(port, (size,), rng, high) for size in (2, 3)]
    return _array(port, shape, rng, high)


def _array(port: Port, shape: tuple[int, ...], rng: np.random.Generator, high: int) -> Array:
    dtype = port.dtype or np.dtype(np.float32)
    if dtype.kind == "O":
        words: Array = np.empty(shape, object)
        words[...] = rng.choice(np.array(_WORDS, object), shape)
        return words
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if is_float(dtype):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    name = port.name.lower()
    if "mask" in name:
        return np.ones(shape, dtype)
    if "type" in name:
        return np.zeros(shape, dtype)
    pixels = dtype == np.uint8 and len(shape) >= 3
    bound = 256 if pixels else 2 if is_extension(dtype) else high
    return np.asarray(rng.integers(0, bound, shape)).astype(dtype)
