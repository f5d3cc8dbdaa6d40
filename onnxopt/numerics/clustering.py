"""Codebooks: a few values that stand for all weights of a tensor, so that each is stored as the index of one.

A codebook c of K entries and an assignment a cost sum_i m_i (x_i - c_{a_i})^2, m_i the importance of weight x_i. In one
dimension every x takes the nearest entry, so clusters are stretches of the sorted x, and with prefix sums of m and m x
each step of Lloyd's algorithm (1982) takes K searches (`fit`). It starts where entries lie as densely as the cube root
of the density of x, which is best for many of them (Panter and Dite 1951), and then joins the two neighbours that cost
least and splits the cluster that gains most, as long as that pays, against local optima.

Vectors of several weights share one index in `fit_vectors`: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd.

Nearest entries ignore that errors add up in the outputs. `feedback_share` chooses the entries of a matrix [R, K] input
after input and makes good for the error of each in later inputs (`feedback`; with codebooks: van Baalen et al. 2024,
"GPTVQ", arXiv 2402.15319). For these choices the entries with the least output error could be solved for; that gains
0.01 % with 16 entries, so it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numerics.feedback import Sweep, Wide

Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]

# Weights of a codebook beyond which they are counted on the grid of float16 in place of being sorted.
_SORTED = 1 << 15
_GRID = 1 << 16
_FEW = 16  # entries up to which a second start is tried: as dense as the weights themselves
_STEPS = 200  # of Lloyd's algorithm
_MOVES = 12  # rounds of joining and splitting
_STRETCHES = 1024  # of equal mass, between which the density is read at the start
# Added to every importance, as a share of the mean: weights of inputs that were never seen still get about their value.
_FLOOR = 0.01
# Points on which a vector codebook is found, and how often; points that look for their entry together.
_POINTS, _ROUNDS, _TOGETHER = 1 << 14, 12, 1 << 14


@dataclass(frozen=True)
class Cells:
    """Sorted weights of G codebooks, or bins of them. at: [G, n], ascending; mass, moment, square: sums of m, m x and
    m x^2 over the cells before, [G, n + 1].
    """

    at: Wide
    mass: Wide
    moment: Wide
    square: Wide

    @staticmethod
    def of(values: Floats, importance: Floats | None = None) -> Cells:
        """Of values [G, M]; importance: of the same shape, or None where all count alike."""
        if values.shape[1] > _SORTED:
            rows = [_binned(row, None if importance is None else importance[g]) for g, row in enumerate(values)]
            most = max(len(at) for at, _ in rows)
            at = np.stack([np.pad(at, (0, most - len(at)), mode="edge") for at, _ in rows])
            mass = np.stack([np.pad(mass, (0, most - len(mass))) for _, mass in rows])
        elif importance is None:
            at = np.sort(values, axis=1).astype(np.float64)
            mass = np.ones(at.shape)
        else:
            order = np.argsort(values, axis=1, kind="stable")
            at = np.take_along_axis(values, order, axis=1).astype(np.float64)
            mass = np.take_along_axis(importance, order, axis=1).astype(np.float64)
        return Cells._of_sorted(at, mass)

    @staticmethod
    def pooled(pools: Sequence[Cells]) -> Cells:
        """Cells of one codebook each as those of one; each counts for its cost over what zeros would cost."""
        at = np.concatenate([pool.at for pool in pools], axis=1)
        tiny = np.finfo(np.float64).tiny
        mass = np.concatenate([np.diff(pool.mass, axis=1) / max(pool.square[0, -1], tiny) for pool in pools], axis=1)
        order = np.argsort(at, axis=1, kind="stable")
        return Cells._of_sorted(np.take_along_axis(at, order, axis=1), np.take_along_axis(mass, order, axis=1))

    @staticmethod
    def _of_sorted(at: Wide, mass: Wide) -> Cells:
        return Cells(at, *(_sums(mass * at**power) for power in range(3)))

    def rows(self, chosen: Indices | Mask) -> Cells:
        """Those of some codebooks."""
        return Cells(self.at[chosen], self.mass[chosen], self.moment[chosen], self.square[chosen])


def fit(values: Floats, entries: int, importance: Floats | None = None, zero: bool = False) -> Wide:
    """Codebooks [G, entries], ascending, with a small error for values [G, M]; finite, M > 0.

    importance: [G, M], not negative, of each squared error. zero: 0 is among the entries of every codebook.
    """
    cells = Cells.of(values, None if importance is None else _floored(importance))
    return fit_cells(cells, entries, zero)


def fit_cells(cells: Cells, entries: int, zero: bool = False) -> Wide:
    """As `fit`, for what was sorted before."""
    starts = [_spread(cells, entries - zero, 1 / 3)]
    if entries <= _FEW:
        starts.append(_spread(cells, entries - zero, 1.0))
    if zero:
        starts = [np.sort(np.pad(start, ((0, 0), (1, 0))), axis=1) for start in starts]
    book, cost = _lloyd(cells, starts[0], zero)
    for start in starts[1:]:
        book, cost, _ = _better((book, cost), _lloyd(cells, start, zero))
    moves = max(1, entries // 8)
    for _ in range(_MOVES if entries > 2 else 0):
        tried = _moved(cells, book, moves, zero)
        if tried is None:
            break
        book, cost, won = _better((book, cost), _lloyd(cells, tried, zero))
        if not won:
            if moves == 1:
                break
            moves = max(1, moves // 2)
    return _met(cells, book, zero)


def _better(one: tuple[Wide, Wide], other: tuple[Wide, Wide]) -> tuple[Wide, Wide, bool]:
    """Of two (codebooks, costs) for each row the cheaper, and whether the second ever is."""
    better = other[1] < one[1] * (1 - 1e-6)
    return np.where(better[:, None], other[0], one[0]), np.where(better, other[1], one[1]), bool(better.any())


def _met(cells: Cells, book: Wide, zero: bool) -> Wide:
    """The codebooks, with the very values of those that have no more than there are entries."""
    counts = 1 + (np.diff(cells.at, axis=1) > 0).sum(axis=1)
    for row in np.flatnonzero(counts + zero <= book.shape[1]):
        values = np.unique(np.append(cells.at[row], 0.0) if zero else cells.at[row])
        book[row] = np.pad(values, (0, book.shape[1] - len(values)), mode="edge")
    return book


def nearest(values: Floats, book: Floats) -> Indices:
    """Index of the entry nearest to each of values [G, M] in ascending codebooks [G, K]; the lower of two as near."""
    wide = book.astype(np.float64)
    middles = (wide[:, 1:] + wide[:, :-1]) / 2
    if len(book) <= 8 or middles.shape[1] > 64:
        rows = [np.searchsorted(middle, row, "left") for middle, row in zip(middles, values, strict=True)]
        return np.stack(rows) if rows else np.zeros(values.shape, np.intp)
    found = np.zeros(values.shape, np.intp)
    for at in range(middles.shape[1]):
        found += values > middles[:, at, None]
    return found


def feedback_share(matrix: Floats, second: Wide, book: Floats, zeros: Mask | None = None) -> Indices:
    """Entries [R, K] of ascending codebooks [G, E] for `matrix` [R, K]; each serves R / G rows. Time R K^2.

    second: E[x x^T] of the inputs of each of P runs of R / P rows, [P, K, K]. Inputs of most power go first; in the end
    each weight moves to where it leaves the least error, all others kept. zeros: [R, K], weights that take the entry
    nearest to 0 whatever is to be made good; others may take it too.
    """
    rows, width = matrix.shape
    parts, groups = len(second), len(book)
    order = np.argsort(-np.einsum("pkk->k", second), kind="stable")
    exact = np.asarray(matrix, np.float64).reshape(parts, -1, width)
    sweep = Sweep(exact[:, :, order], second[:, order[:, None], order])
    wide = book.astype(np.float64)
    nil = np.abs(wide).argmin(axis=1)[:, None]
    found, values = np.empty((rows, width), np.intp), np.empty(exact.shape)

    def choose(at: int, wanted: Wide) -> None:
        chosen = nearest(wanted.reshape(groups, -1), wide)
        if zeros is not None:
            chosen = np.where(zeros[:, at].reshape(groups, -1), nil, chosen)
        found[:, at] = chosen.reshape(-1)
        values[:, :, at] = np.take_along_axis(wide, chosen, axis=1).reshape(parts, -1)

    for k, at in enumerate(order):
        choose(at, sweep.column(k))
        sweep.settle(values[:, :, at])
    pull = np.matmul(exact - values, second)
    for at in order:
        power = second[:, at, at, None]
        before = values[:, :, at].copy()
        choose(at, before + np.divide(pull[:, :, at], power, out=np.zeros_like(before), where=power > 0))
        moved = values[:, :, at] - before
        part, row = np.nonzero(moved)
        pull[part, row] -= moved[part, row, None] * second[part, at]
    return found


def fit_vectors(points: Floats, entries: int, seed: int, importance: Floats | None = None) -> Wide:
    """A codebook [entries, d] for points [n, d], n > 0; importance: of the square of each coordinate's error, [n, d].

    Found on a sample of the points where they are many; the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    if len(points) > max(_POINTS, 16 * entries):
        chosen = np.sort(rng.choice(len(points), max(_POINTS, 16 * entries), replace=False))
        points, importance = points[chosen], None if importance is None else importance[chosen]
    wide = points.astype(np.float64)
    mass = np.ones(wide.shape) if importance is None else _floored(importance.reshape(1, -1)).reshape(wide.shape)
    book = _far_apart(wide, mass, entries, rng)
    for _ in range(_ROUNDS):
        index = nearest_vector(wide, book, mass)
        sums = np.stack([np.bincount(index, column, entries) for column in mass.T], axis=1)
        moment = np.stack([np.bincount(index, column, entries) for column in (mass * wide).T], axis=1)
        book = np.divide(moment, sums, out=book.copy(), where=sums > 0)
        empty = np.flatnonzero(sums[:, 0] == 0)
        if len(empty):  # to the points that are served worst
            cost = (mass * np.square(wide - book[index])).sum(axis=1)
            worst = np.argsort(-cost, kind="stable")[: len(empty)]
            book[empty[: len(worst)]] = wide[worst]
    return book


def nearest_vector(points: Floats, book: Floats, importance: Floats | None = None) -> Indices:
    """Index of the entry of `book` [K, d] with the least weighted distance to each of points [n, d]."""
    wide = book.astype(np.float64)
    found = np.empty(len(points), np.intp)
    squares, double = np.square(wide).T, -2 * wide.T
    for start in range(0, len(points), _TOGETHER):
        some = points[start : start + _TOGETHER].astype(np.float64)
        if importance is None:
            costs = some @ double + squares.sum(axis=0)
        else:
            mass = importance[start : start + _TOGETHER]
            costs = np.concatenate([some * mass, mass], axis=1) @ np.concatenate([double, squares])
        found[start : start + _TOGETHER] = costs.argmin(axis=1)
    return found


def feedback_vectors(matrix: Floats, second: Wide, book: Floats, across: bool) -> Indices:
    """Entries of a codebook [E, d] for vectors of `matrix` [R, K]; second: as in `feedback_share`.

    across: a vector holds the weights of d consecutive rows for one input, indices [R / d, K]; else those of one row
    for d consecutive inputs, [R, K / d].
    """
    rows, width = matrix.shape
    parts, wide = len(second), book.astype(np.float64)
    size = wide.shape[1]
    sweep = Sweep(matrix.reshape(parts, -1, width), second)
    step = 1 if across else size
    found = np.empty((rows // size, width) if across else (rows, width // size), np.intp)
    for start in range(0, width, step):
        now = sweep.ahead(start + step)  # [step, P, R]
        if across:
            chosen = nearest_vector(now.reshape(-1, size), wide)
            settled = wide[chosen].reshape(now.shape)
        else:
            mass = np.repeat(1.0 / sweep.freedom[:, start : start + step], rows // parts, axis=0)
            chosen = nearest_vector(now.reshape(step, -1).T, wide, mass / mass.mean())
            settled = wide[chosen].T.reshape(now.shape)
        found[:, start // step] = chosen
        for values in settled:
            sweep.settle(values)
    return found


def _far_apart(points: Wide, mass: Wide, entries: int, rng: np.random.Generator) -> Wide:
    """Points to start from: each is drawn by its distance to those drawn before (k-means++)."""
    weight = mass.sum(axis=1)
    book = np.empty((entries, points.shape[1]))
    book[0] = points[_drawn(weight, rng)]
    apart = (mass * np.square(points - book[0])).sum(axis=1)
    for entry in range(1, entries):
        book[entry] = points[_drawn(apart, rng)]
        np.minimum(apart, (mass * np.square(points - book[entry])).sum(axis=1), out=apart)
    return book


def _drawn(weight: Wide, rng: np.random.Generator) -> int:
    total = np.cumsum(weight)
    return min(int(np.searchsorted(total, rng.random() * total[-1], "right")), len(weight) - 1)


def _floored(importance: Floats) -> Wide:
    mean = importance.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.where(mean > 0, importance / np.where(mean > 0, mean, 1.0) + _FLOOR, 1.0)


def _sums(values: Wide) -> Wide:
    found = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=found[:, 1:])
    return found


def _binned(values: Floats, importance: Floats | None) -> tuple[Wide, Wide]:
    """(mean, mass) of the weights [M] in each bin that holds some; bins are as wide as float16 values are apart."""
    largest = float(np.abs(values).max())
    scale = np.ldexp(1.0, 15 - int(np.frexp(largest)[1])) if largest > 0 else 1.0
    bits = (values.astype(np.float64) * scale).astype(np.float16).view(np.uint16)
    keys = np.where(bits >> 15, ~bits, bits | np.uint16(1 << 15))  # ascending as the values are
    wide = values.astype(np.float64)
    mass = np.bincount(keys, importance, _GRID).astype(np.float64)
    moment = np.bincount(keys, wide if importance is None else wide * importance, _GRID)
    held = mass > 0
    return np.maximum.accumulate(moment[held] / mass[held]), mass[held]


def _first_above(rows: Wide, wanted: Wide) -> Indices:
    """How many of the ascending rows [G, n] are at most each of wanted [G, m]."""
    if len(rows) == 1:
        return np.asarray(np.searchsorted(rows[0], wanted[0], "right")[None])
    width = rows.shape[1]
    found = np.zeros(wanted.shape, np.intp)
    step = 1 << (width.bit_length() - 1)
    while step:
        tried = found + step
        inside = tried <= width
        below = np.take_along_axis(rows, np.where(inside, tried, 1) - 1, axis=1) <= wanted
        found = np.where(inside & below, tried, found)
        step >>= 1
    return found


def _spread(cells: Cells, entries: int, power: float) -> Wide:
    """Entries [G, K] as dense as a power of the density of the cells."""
    width = cells.at.shape[1]
    stretches = min(_STRETCHES, width)
    total = cells.mass[:, -1:]
    ends = _first_above(cells.mass[:, 1:], total * (np.arange(1, stretches) / stretches))
    edges = np.concatenate([cells.at[:, :1], np.take_along_axis(cells.at, ends, axis=1), cells.at[:, -1:]], axis=1)
    share = np.diff(edges, axis=1) ** (1 - power)
    above = _sums(share)
    wanted = above[:, -1:] * ((np.arange(entries) + 0.5) / entries)
    stretch = np.minimum(_first_above(above[:, 1:], wanted), stretches - 1)
    begin, wide, mine = (np.take_along_axis(each, stretch, axis=1) for each in (edges, np.diff(edges, axis=1), share))
    within = (wanted - np.take_along_axis(above, stretch, axis=1)) / np.where(mine > 0, mine, 1.0)
    return np.asarray(begin + wide * np.clip(within, 0.0, 1.0))


def _edges(cells: Cells, book: Wide) -> Indices:
    """Where the cells of each entry begin and end, [G, K + 1]."""
    inner = _first_above(cells.at, (book[:, 1:] + book[:, :-1]) / 2)
    rows, width = cells.at.shape
    return np.concatenate([np.zeros((rows, 1), np.intp), inner, np.full((rows, 1), width, np.intp)], axis=1)


def _within(sums: Wide, edges: Indices) -> Wide:
    return np.diff(np.take_along_axis(sums, edges, axis=1), axis=1)


def _lloyd(cells: Cells, book: Wide, zero: bool) -> tuple[Wide, Wide]:
    """The codebooks after steps from ascending `book`, and their costs [G]."""
    book = book.copy()
    active = np.arange(len(book))
    mine, before = cells, _edges(cells, book)
    for _ in range(_STEPS):
        mass, moment = _within(mine.mass, before), _within(mine.moment, before)
        now = book[active]
        moved = np.divide(moment, mass, out=now.copy(), where=mass > 0)
        if zero:
            moved[now == 0] = 0.0
        book[active] = moved
        edges = _edges(mine, moved)
        left = (edges != before).any(axis=1)
        if not left.any():
            break
        before = edges
        if left.sum() <= len(left) // 2:
            active, before, mine = active[left], edges[left], mine.rows(left)
    return book, _costs(cells, book).sum(axis=1)


def _costs(cells: Cells, book: Wide) -> Wide:
    """What each cluster costs, [G, K]."""
    edges = _edges(cells, book)
    mass, moment, square = (_within(each, edges) for each in (cells.mass, cells.moment, cells.square))
    return np.asarray(np.maximum(square - 2 * book * moment + book * book * mass, 0.0))


def _moved(cells: Cells, book: Wide, moves: int, zero: bool) -> Wide | None:
    """The codebooks with cheap entries gone and dear clusters split, at most `moves` of each; None where none pays."""
    edges = _edges(cells, book)
    mass = _within(cells.mass, edges)
    pair = mass[:, 1:] * mass[:, :-1] / np.maximum(mass[:, 1:] + mass[:, :-1], np.finfo(np.float64).tiny)
    joined = pair * np.square(np.diff(book, axis=1))
    costs = np.concatenate([joined[:, :1], np.minimum(joined[:, 1:], joined[:, :-1]), joined[:, -1:]], axis=1)
    if zero:
        costs[book == 0] = np.inf
    middle = np.clip(_first_above(cells.at, book), edges[:, :-1], edges[:, 1:])
    halves = []
    for low, high in ((edges[:, :-1], middle), (middle, edges[:, 1:])):
        held, moment = (
            np.take_along_axis(each, high, axis=1) - np.take_along_axis(each, low, axis=1)
            for each in (cells.mass, cells.moment)
        )
        halves.append((held, np.divide(moment, held, out=book.copy(), where=held > 0)))
    (less, lower), (more, upper) = halves
    gains = less * more / np.maximum(less + more, np.finfo(np.float64).tiny) * np.square(upper - lower)
    cheap, dear = np.argsort(costs, axis=1, kind="stable"), np.argsort(-gains, axis=1, kind="stable")
    found = book.copy()
    any_moved = False
    rows = np.arange(len(book))
    for move in range(moves):
        gone, split = cheap[:, move], dear[:, move]
        pays = (gains[rows, split] > costs[rows, gone]) & (gone != split)
        any_moved |= bool(pays.any())
        at = rows[pays]
        kept = found[at, split[pays]] == 0 if zero else np.zeros(len(at), np.bool_)
        found[at, gone[pays]] = upper[at, split[pays]]
        found[at, split[pays]] = np.where(kept, 0.0, lower[at, split[pays]])
    return np.sort(found, axis=1) if any_moved else None
