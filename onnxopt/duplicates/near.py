"""Constants that are nearly equal, up to the order of their axes and a factor where these may differ.

Groups are found in the order of the file: the first constant that is not in a group yet gathers all that can lie within
the tolerance of a common value. That value is the mean, which has the least sum of squared errors; whoever lies further
from it than the tolerance leaves the group again, the furthest first. So every error is one against what is stored, and
no chain of small steps leads away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxopt.duplicates.related import SCALED_TYPES, Perm, Relation, back, blocks, is_candidate, sample, turns
from onnxopt.model import Constant

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Indices = NDArray[np.intp]

_FLOATS = (*SCALED_TYPES, "bfloat16")
# elements by which most pairs are told apart, and how much further these may be than all
_SAMPLES, _SLACK = 1024, 2.0
# axes in another order are looked for in matrices only
_TURNED_RANK = 2
# samples that are held against all others at once, and how many that samples leave may fail before a search is given up
_AT_ONCE, _FAILURES = 128, 32


@dataclass(frozen=True, eq=False)
class Near:
    """A group: `kept` takes the common `values`, from which the others follow; error: of `kept`, as in Relation."""

    kept: Constant
    values: Array
    error: float
    relations: tuple[Relation, ...]


@dataclass(frozen=True, eq=False)
class _Member:
    """A constant seen as the leader of its group is stored.

    perm: that turns it so. scale: it over the leader, None where both are of one size within the tolerance.
    """

    constant: Constant
    perm: Perm
    scale: float | None = None

    @property
    def values(self) -> Array:
        return self.constant.values.transpose(self.perm)


def near_groups(
    constants: Sequence[Constant],
    tolerance: float,
    *,
    turned: bool,
    scaled: bool,
    admits: Callable[[Relation], bool] = lambda _: True,
) -> Iterator[Near]:
    """Groups whose members lie within `tolerance` of one value, measured as the error of a Relation.

    admits: whether a duplicate may follow from another like this; its scale and error are still to change.
    """
    families: dict[tuple[Any, ...], list[Constant]] = {}
    for constant in constants:
        if is_candidate(constant) and str(constant.dtype) in _FLOATS:
            shape = constant.shape
            dims = sorted(shape) if turned and len(shape) == _TURNED_RANK else [-1, *shape]
            families.setdefault((str(constant.dtype), *dims), []).append(constant)
    for family in families.values():
        if len(family) > 1:
            scales = scaled and str(family[0].dtype) in SCALED_TYPES
            yield from _Family(family, tolerance, scales, admits).groups()


class _Family:
    """Constants of one type and one shape, or of two where one is the other's turned."""

    def __init__(
        self,
        constants: list[Constant],
        tolerance: float,
        scaled: bool,
        admits: Callable[[Relation], bool],
    ) -> None:
        self._tolerance, self._scaled, self._admits = tolerance, scaled, admits
        self._reach = 2 * tolerance
        self._left = {id(constant): constant for constant in constants}
        shapes = list(dict.fromkeys(constant.shape for constant in constants))
        self._views = {shape: [_Member(c, p) for c in constants for p in turns(c.shape, shape)] for shape in shapes}
        self._promising: dict[int, Indices] = {}
        for shape, views in self._views.items():
            self._sample([at for at, view in enumerate(views) if view.constant.shape == shape], views)

    def groups(self) -> Iterator[Near]:
        for leader in list(self._left.values()):
            if id(leader) not in self._left:
                continue
            del self._left[id(leader)]
            own = _Member(leader, tuple(range(len(leader.shape))))
            norm = _norm(leader.values)
            if not np.isfinite(norm) or norm == 0:
                continue
            near = self._settled([own, *self._within_reach(own)])
            if near is not None:
                for relation in near.relations:
                    del self._left[id(relation.duplicate)]
                yield near

    def _within_reach(self, leader: _Member) -> Iterator[_Member]:
        """Those at most twice the tolerance away from the leader: what lies between is within it."""
        views, reach = self._views[leader.constant.shape], self._reach
        seen, failures = {id(leader.constant)}, 0
        for at in self._promising[id(leader.constant)]:
            view = views[at]
            if id(view.constant) in seen or id(view.constant) not in self._left:
                continue
            if failures == _FAILURES:
                break
            scale = None
            error = _error(view.values, leader.values)
            if error > reach and self._scaled:
                scale = _fit(view.values, leader.values)
                error = _error(view.values, leader.values, scale)
            perm = back(view.perm)
            kind: Callable[[float], np.generic] = view.values.dtype.type
            relation = Relation(view.constant, leader.constant, perm, None if scale is None else kind(scale), error)
            if error <= reach and self._admits(relation):
                seen.add(id(view.constant))
                yield _Member(view.constant, view.perm, scale)
            elif error > reach:
                failures += 1

    def _sample(self, own: list[int], views: list[_Member]) -> None:
        """Note for each constant, seen unturned at `own`, which views may be within its reach by their samples."""
        samples = _matrix([view.values for view in views])
        for start in range(0, len(own), _AT_ONCE):
            some = own[start : start + _AT_ONCE]
            near = _sampled_errors(samples, samples[some], self._scaled) <= _SLACK * self._reach
            for column, at in enumerate(some):
                self._promising.setdefault(id(views[at].constant), np.flatnonzero(near[:, column]))

    def _settled(self, members: list[_Member]) -> Near | None:
        """The group once everybody who lies too far from the mean has left."""
        while len(members) > 1:
            values = _mean(members)
            leader, *others = members
            scales = [None if each.scale is None else _rounded_fit(each.values, values) for each in others]
            fitted = list(zip(others, scales, strict=True))
            errors = [_error(member.values, values, scale) for member, scale in fitted]
            own = _error(leader.values, values)
            if max(own, *errors) <= self._tolerance:
                relations = tuple(
                    Relation(member.constant, leader.constant, back(member.perm), scale, error)
                    for (member, scale), error in zip(fitted, errors, strict=True)
                )
                return Near(leader.constant, values, own, relations)
            del members[1 + int(np.argmax(errors))]
        return None


def _matrix(arrays: list[Array]) -> Doubles:
    return np.stack([sample(array, _SAMPLES).astype(np.float64) for array in arrays])


def _sampled_errors(samples: Doubles, leaders: Doubles, scaled: bool) -> Doubles:
    """Of each sample, a row, against each leader, a column."""
    with np.errstate(all="ignore"):
        norms, own = np.sum(samples**2, 1, keepdims=True), np.sum(leaders**2, 1)
        products = samples @ leaders.T
        square = norms - (products**2 / own if scaled else 2 * products - own)
        errors = np.sqrt(np.maximum(square, 0) / norms)
    unknown = np.where(own == 0, 0.0, np.inf)  # samples of zeros tell nothing of each other
    return np.where(np.isfinite(errors), errors, unknown)


def _mean(members: list[_Member]) -> Array:
    """Of the members, each over its scale, in their type."""
    first = members[0].values
    found = np.empty(first.shape, first.dtype)
    for at in blocks(first.shape):
        total = np.zeros(first[at].shape)
        for member in members:
            total += member.values[at].astype(np.float64) / (member.scale or 1.0)
        found[at] = (total / len(members)).astype(first.dtype)
    return found


def _products(one: Array, other: Array) -> tuple[float, float]:
    """(<one, other>, <other, other>)."""
    both, square = 0.0, 0.0
    for at in blocks(one.shape):
        mine, theirs = one[at].astype(np.float64).reshape(-1), other[at].astype(np.float64).reshape(-1)
        both += float(mine @ theirs)
        square += float(theirs @ theirs)
    return both, square


def _norm(values: Array) -> float:
    return float(np.sqrt(_products(values, values)[1]))


def _fit(values: Array, source: Array) -> float:
    """The multiple of `source` that comes nearest."""
    both, square = _products(values, source)
    return both / square if square and both else 1.0


def _rounded_fit(values: Array, source: Array) -> np.generic:
    kind: Callable[[float], np.generic] = values.dtype.type
    return kind(_fit(values, source))


def _error(values: Array, source: Array, scale: float | np.generic | None = None) -> float:
    """|values - scale * source| / |values|; infinite where that says nothing."""
    difference, square, factor = 0.0, 0.0, 1.0 if scale is None else float(scale)
    for at in blocks(values.shape):
        mine = values[at].astype(np.float64)
        difference += float(np.sum((mine - factor * source[at].astype(np.float64)) ** 2))
        square += float(np.sum(mine**2))
    error = np.sqrt(difference / square) if square else np.inf
    return float(error) if np.isfinite(error) else np.inf
