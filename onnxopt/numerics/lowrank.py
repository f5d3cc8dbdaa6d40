"""A weight as a product of smaller ones, so that the outputs change least: whitened by what the weight multiplies.

A layer y = W x + b, W [N, K], is computed as A (B x) + b' with A [N, r] and B [r, K]. With the covariance C of x,

    E |(W - A B)(x - m)|^2 = tr((W - A B) C (W - A B)^T)

is least for the leading eigenvectors U of W C W^T: A = U, B = U^T W, and what is left is the sum of the other
eigenvalues (principal components of the outputs; the same weights as an SVD of W C^(1/2) gives: Wang et al.,
"SVD-LLM", 2024). b' = b + (W - A B) m leaves the mean as it is. Without a place for b', C is E[x x^T].

Two more forms split the kernel of a convolution W [N, C, kh, kw]. Nothing closed is known for them under a covariance
of whole patches; the factors are found in turn, each by least squares while the other stands:

    spatial    W ~ sum_r A[n, r, kx] B[r, c, ky]         kh x 1, then 1 x kw (Jaderberg et al. 2014)
    tucker     W ~ sum A[n, s] M[s, r, ky, kx] B[r, c]   1 x 1, kh x kw, 1 x 1 (Kim et al. 2016)

Whatever the form, its error is computed from C, not estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float64]

# of the mean variance: what varies no more than that is told apart by the weights alone
RIDGE = 1e-4
# powers below this share of the largest are rounding
_NOTHING = 1e-13
# steps of conjugate gradients for a first factor, and turns of both factors
_STEPS = 6
TURNS = 2


@dataclass(frozen=True)
class Second:
    """Second moments of what a weight multiplies, [K, K]. seen: as measured; trusted: as factors are chosen by it.

    None stands for inputs that nothing is known of, all alike and unrelated: the identity, which makes an SVD of
    everything below.
    """

    seen: Wide | None = None
    trusted: Wide | None = None

    @classmethod
    def of(cls, seen: Wide, rows: float, ridge: float = RIDGE) -> Second:
        """Of `rows` inputs: entries off the diagonal are trusted as if K unrelated inputs had come on top."""
        width = len(seen)
        share = rows / (rows + width) if rows + width else 0.0
        diagonal = np.diagonal(seen)
        trusted = seen * share
        trusted[np.arange(width), np.arange(width)] = diagonal + ridge * float(diagonal.mean() if width else 0.0)
        return cls(seen, trusted)


@dataclass(frozen=True)
class Spectrum:
    """Directions of the outputs, the strongest first.

    vectors [N, m]: orthonormal; powers [m]: mean square of the outputs along each; total: of all outputs.
    """

    vectors: Wide
    powers: Wide
    total: float

    def error(self, rank: int) -> float:
        """What the first `rank` directions leave: the predicted squared error of the layer's outputs, [0, total]."""
        return max(0.0, float(self.powers[rank:].sum()))

    def rank(self, share: float) -> int:
        """The smallest rank that leaves at most this share of the power."""
        left = np.concatenate([np.cumsum(self.powers[::-1])[::-1], [0.0]])
        return int(np.argmax(left <= share * self.total))

    def split(self, matrix: Wide, rank: int) -> tuple[Wide, Wide]:
        """A [N, r] and B [r, K] of `matrix` [N, K]; r is less than `rank` where the matrix has no more directions."""
        kept = self.vectors[:, :rank]
        return kept, kept.T @ matrix


def spectrum(matrix: Wide, second: Second) -> Spectrum:
    """The spectrum of W x; time of the shorter side cubed, and N K^2."""
    rows, width = matrix.shape
    if rows <= width:
        return spectrum_of_outputs(
            _weighed(matrix, second.seen) @ matrix.T, _weighed(matrix, second.trusted) @ matrix.T
        )
    spread = matrix
    if second.trusted is not None:
        values, axes = np.linalg.eigh(second.trusted)
        spread = matrix @ (axes * np.sqrt(np.maximum(values, 0.0)))
    powers, turned = _descending(spread.T @ spread)
    kept = powers > _NOTHING * max(float(powers[0]), 1e-300)
    vectors = _signed((spread @ turned[:, kept]) / np.sqrt(powers[kept]))
    projected = vectors.T @ matrix
    seen = np.einsum("rk,rk->r", _weighed(projected, second.seen), projected)
    total = float(np.einsum("nk,nk->", _weighed(matrix, second.seen), matrix))
    # directions that were cut off hold nothing of the trusted moments, and what they hold of the seen is left over
    rest = max(0.0, total - float(seen.sum()))
    return Spectrum(vectors, np.append(np.maximum(seen, 0.0), rest), total)


def spectrum_of_outputs(seen: Wide, trusted: Wide) -> Spectrum:
    """The spectrum of outputs whose second moments [N, N] are known; directions follow `trusted`, powers `seen`."""
    _, vectors = _descending(trusted)
    powers = np.einsum("nr,nr->r", seen @ vectors, vectors)
    return Spectrum(_signed(vectors), np.maximum(powers, 0.0), float(np.trace(seen)))


def _weighed(matrix: Wide, moments: Wide | None) -> Wide:
    return matrix if moments is None else matrix @ moments


def _descending(symmetric: Wide) -> tuple[Wide, Wide]:
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _signed(vectors: Wide) -> Wide:
    """Each column with its largest entry above zero, so that the sign is not left to chance."""
    if not vectors.size:
        return vectors
    largest = np.take_along_axis(vectors, np.argmax(np.abs(vectors), axis=0)[None], axis=0)
    return np.asarray(vectors * np.where(largest < 0, -1.0, 1.0))


def squared_error(matrix: Wide, other: Wide, seen: Wide | None) -> float:
    """tr((W - W') C (W - W')^T): the squared error of the outputs, summed over them."""
    apart = matrix - other
    return max(0.0, float(np.einsum("nk,nk->", _weighed(apart, seen), apart)))


@dataclass(frozen=True)
class Strips:
    """The spatial form: last [N, r, kw], first [r, C, kh]."""

    last: Wide
    first: Wide

    def dense(self) -> Wide:
        """[N, C, kh, kw]."""
        return np.asarray(np.einsum("nrx,rcy->ncyx", self.last, self.first, optimize=True))


def strips(weight: Wide, second: Second, rank: int, turns: int = TURNS) -> Strips:
    """The spatial form of `weight` [N, C, kh, kw]; second: of patches, in the order of the weight's own axes."""
    outputs, channels, tall, wide = weight.shape
    flat = weight.reshape(outputs, -1)
    spread = _Spread(second.trusted, flat.shape[1], wide)
    unfolded = weight.transpose(0, 3, 1, 2).reshape(outputs * wide, channels * tall)
    _, first = spectrum(unfolded, Second(spread.average, spread.average)).split(unfolded, rank)
    last = spread.regressed(flat, first)
    for _ in range(turns):
        first = spread.refined(flat, first, last)
        last = spread.regressed(flat, first)
    return Strips(last.reshape(outputs, -1, wide), first.reshape(-1, channels, tall))


@dataclass(frozen=True)
class Tucker:
    """The Tucker-2 form: last [N, s], core [s, r, kernel...], first [r, C]."""

    last: Wide
    core: Wide
    first: Wide

    def dense(self) -> Wide:
        """[N, C, kernel...]."""
        return np.asarray(np.einsum("ns,srp,rc->ncp", self.last, self.core, self.first, optimize=True))


def tucker(weight: Wide, second: Second, ranks: tuple[int, int], turns: int = TURNS) -> Tucker:
    """The Tucker-2 form of `weight` [N, C, P], P positions of the kernel. ranks: of the input, of the output."""
    outputs, channels, taps = weight.shape
    flat = weight.reshape(outputs, -1)
    spread = _Spread(second.trusted, flat.shape[1], taps)
    unfolded = weight.transpose(0, 2, 1).reshape(outputs * taps, channels)
    _, first = spectrum(unfolded, Second(spread.average, spread.average)).split(unfolded, ranks[0])

    def outer(inner: Wide) -> tuple[Wide, Wide]:
        """last [N, s] and core [s, r * P]: regression, then the strongest outputs (reduced rank regression)."""
        full, moments = spread.regressed(flat, inner), spread.moments(inner)
        return spectrum(full, Second(moments, moments)).split(full, ranks[1])

    last, core = outer(first)
    for _ in range(turns):
        first = spread.refined(flat, first, last @ core)
        last, core = outer(first)
    return Tucker(last, core.reshape(core.shape[0], -1, taps), first)


class _Spread:
    """A first factor [r, M] that works on each of P parts of the inputs alike: on x[m, p] as z[r, p] = B x[:, p].

    The inputs are in the order (m, p), and have the second moments [M P, M P].
    """

    def __init__(self, second: Wide | None, width: int, parts: int) -> None:
        second = np.eye(width) if second is None else second
        self._second, self._parts = second, parts
        self._width = len(second) // parts
        self._blocks = second.reshape(self._width, parts, -1)
        grid = second.reshape(self._width, parts, self._width, parts)
        self.average: Wide = np.einsum("apbp->ab", grid) / parts  # moments of x[:, p], over all p

    def weighed(self, first: Wide) -> Wide:
        """E[z x^T], [r P, M P]."""
        found = np.stack([first @ self._blocks[:, at] for at in range(self._parts)], axis=1)
        return found.reshape(len(first) * self._parts, -1)

    def moments(self, first: Wide) -> Wide:
        """E[z z^T], [r P, r P]."""
        return self._folded(self.weighed(first), first)

    def regressed(self, matrix: Wide, first: Wide) -> Wide:
        """A [N, r P] with the least error of A z for W x."""
        weighed = self.weighed(first)
        inner = self._folded(weighed, first)
        size = len(inner)
        inner[np.arange(size), np.arange(size)] += 1e-9 * float(np.trace(inner)) / max(1, size) + 1e-30
        return np.asarray(np.linalg.solve(inner, weighed @ matrix.T).T)

    def refined(self, matrix: Wide, first: Wide, last: Wide) -> Wide:
        """`first` after a few steps of conjugate gradients towards the least error with `last` [N, r P] as it is."""
        scale = self._gathered(np.outer(np.square(last).sum(axis=0), np.diagonal(self._second)))
        scale = 1.0 / np.maximum(scale, 1e-12 * float(scale.max(initial=0.0)) + 1e-300)
        residual = self._gathered(last.T @ (matrix @ self._second - last @ self.weighed(first)))
        found, direction, power = np.array(first), np.zeros_like(first), 1.0
        for _ in range(_STEPS):
            towards = residual * scale
            before, power = power, float(np.sum(residual * towards))
            if power <= 0:
                break
            direction = towards + (power / before) * direction if direction.any() else towards
            pulled = self._gathered(last.T @ (last @ self.weighed(direction)))
            bent = float(np.sum(direction * pulled))
            if bent <= 0:
                break
            found += power / bent * direction
            residual = residual - power / bent * pulled
        return found

    def _folded(self, crossed: Wide, first: Wide) -> Wide:
        """[q, M P] against x as [q, r P] against z."""
        grid = crossed.reshape(len(crossed), self._width, self._parts)
        found = np.einsum("qmp,rm->qrp", grid, first, optimize=True)
        return np.asarray(found.reshape(len(crossed), -1))

    def _gathered(self, gradient: Wide) -> Wide:
        """What [r P, M P] says of the factor, [r, M]."""
        return np.asarray(np.einsum("rpmp->rm", gradient.reshape(-1, self._parts, self._width, self._parts)))


def refitted(outputs_by_inner: Wide, inner: Wide, start: Wide, rows: float, ridge: float = 1e-2) -> Wide:
    """A [N, r] that predicts outputs y from inner channels z as they now are, near `start` where rows are few.

    outputs_by_inner: E[y z^T] [N, r]; inner: E[z z^T] [r, r], both centred or both not. (Asymmetric reconstruction:
    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.2.)
    """
    rank = len(inner)
    share = rows / (rows + rank) if rows + rank else 0.0
    damped = np.array(inner, np.float64)
    damped[np.arange(rank), np.arange(rank)] += ridge * np.diagonal(inner) + 1e-30
    change = np.linalg.solve(damped, (outputs_by_inner - start @ inner).T).T
    return np.asarray(start + share * change)
