"""Constants of which one follows from another exactly: D = a * transpose(K, perm), bit for bit.

A few hundred elements of each tensor make its key, that all tensors related to it share: what perm changes is undone by
turning every tensor so that its axes ascend in length, and of the ways that are left the one is taken whose key comes
first; of scaled tensors only the order of the largest elements and the signs count. Only tensors of equal keys are read
whole, and the reading decides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxopt.duplicates.equal import parted
from onnxopt.model import Constant

Perm = tuple[int, ...]
Array = NDArray[Any]

SCALED_TYPES = ("float16", "float32", "float64")
_TURNED_TYPES = (*SCALED_TYPES, "bfloat16", "int8", "uint8")
# elements of a tensor that are looked at before it is read whole, and how many of the largest are put in order
_SAMPLES, _ORDERED = 512, 16
# so many constants of equal keys are held against each other; of more, all they hold is looked at first
_FEW = 4
# constants from which no other follows, before the search among those of equal keys is given up
_FAILURES = 8
# axes of the largest tensor that is turned
_RANK = 4
# elements that are compared at a time: they stay in the cache
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Relation:
    """duplicate = transpose(kept, perm) * scale, where scale is None exactly what is stored.

    error: |duplicate - transpose(kept, perm) * scale| over |duplicate| (Frobenius norms); 0 where every bit is equal.
    """

    duplicate: Constant
    kept: Constant
    perm: Perm
    scale: np.generic | None = None
    error: float = 0.0

    @property
    def turned(self) -> bool:
        """Whether the axes stand in another order."""
        return self.perm != tuple(range(len(self.perm)))

    def __str__(self) -> str:
        """What the duplicate is, as a formula."""
        turned = f"transpose({self.kept.name}, {list(self.perm)})" if self.turned else self.kept.name
        return turned if self.scale is None else f"{float(self.scale):.6g} * {turned}"


def related_groups(constants: Sequence[Constant], *, turned: bool, scaled: bool) -> Iterator[list[Relation]]:
    """Relations by the constant that is kept, which is not among the duplicates of any other.

    constants: distinct contents, those first that had rather be kept. turned, scaled: which relations are looked for.
    """
    candidates = [constant for constant in constants if is_candidate(constant)]
    alike = parted(candidates, lambda constant: (str(constant.dtype), *_family(constant.shape, turned)))
    for family in alike:
        keyed = [(constant, *_key(constant, turned, scaled, _SAMPLES)) for constant in family]
        for group in parted(keyed, lambda each: each[1]):
            yield from _parted_group([constant for constant, *_ in group], turned, scaled)


def _parted_group(group: list[Constant], turned: bool, scaled: bool) -> Iterator[list[Relation]]:
    """The relations of constants that samples leave together; of more than a few, the keys of all they hold decide."""
    count = _SAMPLES if len(group) <= _FEW else None
    keyed = [(constant, *_key(constant, turned, scaled, count)) for constant in group]
    for alike in parted(keyed, lambda each: each[1]):
        yield from _by_kept([(constant, perm) for constant, _, perm in alike], scaled)


def is_candidate(constant: Constant) -> bool:
    """Whether it is a dense tensor with axes, of a type whose elements can be moved and compared."""
    data = constant.data
    return data.sparse is None and len(data.shape) > 0 and data.size > 1 and str(data.dtype) in _TURNED_TYPES


def turns(shape: Sequence[int], into: Sequence[int]) -> list[Perm]:
    """The orders of axes that give a tensor of `shape` the shape `into`; that of the tensor itself comes first."""
    if tuple(sorted(shape)) != tuple(sorted(into)) or (len(shape) > _RANK and tuple(shape) != tuple(into)):
        return []
    if len(shape) > _RANK:
        return [tuple(range(len(shape)))]
    found = itertools.permutations(range(len(shape)))
    return [perm for perm in found if tuple(shape[axis] for axis in perm) == tuple(into)]


def after(first: Perm, then: Perm) -> Perm:
    """The one order that does the same as two, one after the other."""
    return tuple(first[axis] for axis in then)


def back(perm: Perm) -> Perm:
    """The order that undoes another."""
    return tuple(int(axis) for axis in np.argsort(perm))


def blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a tensor of this shape into pieces along its longest axis."""
    axis = int(np.argmax(shape))
    rows = max(1, _BLOCK * shape[axis] // max(1, int(np.prod(shape, dtype=np.int64))))
    for start in range(0, shape[axis], rows):
        yield (*[slice(None)] * axis, slice(start, start + rows))


def sample(array: Array, count: int) -> Array:
    """Up to `count` elements, spread over all of them, the same places for every tensor of one shape."""
    size = array.size
    step = max(1, int(size * 0.6180339887)) | 1  # golden ratio: no period of the tensor is met
    while np.gcd(step, size) != 1:
        step += 2 if size % 2 == 0 else 1
    places = np.arange(min(count, size), dtype=np.int64) * step % size
    return np.asarray(array[np.unravel_index(places, array.shape)])


def _family(shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:
    return tuple(sorted(shape)) if turned and len(shape) <= _RANK else (-1, *shape)


def _key(constant: Constant, turned: bool, scaled: bool, count: int | None) -> tuple[bytes, Perm]:
    """(what related tensors share, the order of axes under which it was found); of so many elements, or all."""
    shape = constant.shape
    orders = turns(shape, sorted(shape)) if turned and len(shape) <= _RANK else [tuple(range(len(shape)))]
    of = _shape_of_values if scaled and str(constant.dtype) in SCALED_TYPES else _bits_of_values
    found = []
    for perm in orders:
        values = constant.values.transpose(perm)
        key = of(values.reshape(-1)) if count is None else of(sample(values, count))
        found.append((key, perm))
    return min(found)


def _bits_of_values(values: Array) -> bytes:
    return _hashed(values)


def _shape_of_values(values: Array) -> bytes:
    """Equal for values and their multiples: the order of the largest, and the signs beside the largest."""
    sizes = np.abs(np.nan_to_num(values.astype(np.float64), nan=0.0))
    largest = np.argpartition(sizes, -_ORDERED)[-_ORDERED:] if sizes.size > _ORDERED else np.arange(sizes.size)
    # what is as large as the least of these may be among them or not: only what is larger counts
    largest = np.flatnonzero(sizes > sizes[largest].min()) if sizes.size > _ORDERED else largest
    order = largest[np.argsort(-sizes[largest], kind="stable")]
    first = int(np.argmax(sizes))
    signs = np.sign(np.nan_to_num(values.astype(np.float64), nan=0.0)) * np.sign(float(values[first]) or 0.0)
    return order.astype(np.int64).tobytes() + _hashed(np.nan_to_num(signs).astype(np.int8))


def _hashed(values: Array) -> bytes:
    flat: Any = np.ascontiguousarray(values).view(np.uint8)
    return hashlib.sha256(flat).digest()


def _by_kept(group: list[tuple[Constant, Perm]], scaled: bool) -> Iterator[list[Relation]]:
    """Each constant in turn takes those that follow from it; one that was taken gives nothing."""
    taken: set[int] = set()
    failures = 0
    for kept, order in group:
        if id(kept) in taken or failures == _FAILURES:
            continue
        others = [(other, perm) for other, perm in group if other is not kept and id(other) not in taken]
        relations = (_relation(other, kept, after(order, back(perm)), scaled) for other, perm in others)
        found = [relation for relation in relations if relation is not None]
        if found:
            taken |= {id(kept), *(id(relation.duplicate) for relation in found)}
            yield found
        failures += not found


def _relation(duplicate: Constant, kept: Constant, perm: Perm, scaled: bool) -> Relation | None:
    values, source = duplicate.values, kept.values.transpose(perm)
    if source.shape != values.shape:
        return None
    few, few_source = sample(values, _SAMPLES), sample(source, _SAMPLES)
    if _equal_bits(few, few_source) and all(_equal_bits(values[at], source[at]) for at in blocks(values.shape)):
        return Relation(duplicate, kept, perm)
    if not scaled or str(values.dtype) not in SCALED_TYPES:
        return None
    for scale in _scales(few, few_source):
        if all(_is_product(values[at], source[at], scale) for at in blocks(values.shape)):
            return Relation(duplicate, kept, perm, scale)
    return None


def _is_product(values: Array, source: Array, scale: np.generic) -> bool:
    """Whether Mul makes the values of the source, bit for bit.

    Runtimes that compute float16 in float32 may leave out that the product is rounded: there it must need no rounding.
    """
    kind = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype
    with np.errstate(all="ignore"):
        product = source.astype(kind) * kind.type(scale)
    return _equal_bits(values.astype(kind), product)


def _scales(values: Array, source: Array) -> list[np.generic]:
    """The multiples of the sampled source that are the sampled values, bit for bit."""
    at = int(np.argmax(np.abs(np.nan_to_num(source.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0))))
    if not source[at] or not np.all(np.isfinite(values)) or not np.all(np.isfinite(source)):
        return []
    kind = values.dtype.type
    with np.errstate(all="ignore"):
        nearest = kind(float(values[at]) / float(source[at]))
        near = (nearest, np.nextafter(nearest, kind(np.inf)), np.nextafter(nearest, kind(-np.inf)))
    return [scale for scale in near if np.isfinite(scale) and scale and _is_product(values, source, scale)]


def _equal_bits(one: Array, other: Array) -> bool:
    kind = f"u{one.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(one).view(kind), np.ascontiguousarray(other).view(kind)))
