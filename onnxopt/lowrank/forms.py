"""The forms that a layer may be split into, at which ranks, and what each costs by the target's table.

    factors    W ~ A B                  first r outputs with the kernel of the layer, last 1 x 1
    strips     kh x 1, then 1 x kw      convolutions over two axes
    tucker     1 x 1, kernel, 1 x 1     convolutions with a kernel of more than one position

The time of a piece is that of its multiply-adds, or of reading its weights where that takes longer, with the fixed cost
of a layer, and an element's cost for each value that it hands to the next piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.calibration.elements import Seen, Shape
from onnxopt.graph.macs import ShapeOf, layer_macs
from onnxopt.lowrank.layers import Kind, Layer
from onnxopt.model import Constant, Node, Variable
from onnxopt.numerics.lowrank import (
    TURNS,
    Second,
    Spectrum,
    Wide,
    spectrum,
    spectrum_of_outputs,
    squared_error,
    strips,
    tucker,
)
from onnxopt.quantization.storage import Stored
from onnxopt.target import CostFacts, Target

FACTORS, STRIPS, TUCKER = "factors", "strips", "tucker"
FORMS = (FACTORS, STRIPS, TUCKER)
UNITS = ("macs", "parameters", "latency")
# A split is made where it takes at most this share of the time by the table: tables are good to about a tenth, and
# measured break-even ranks are 0.85 to 0.95 of those by multiply-adds.
PAYS = 0.92
# where size is asked for, at most this share of the weights
SMALLER = 0.97
# kernels of AVX-512 compute convolutions in blocks of 16 channels, others in 8; files should be right on both
CONV_STEP = 16
# ranks that are looked at for the forms whose factors have to be searched for, and for the others
_FEW, _MANY = 5, 24
# inputs of a convolution beyond which no factors are searched for, and beyond which they are searched for briefly while
# forms are compared
_SEARCHED, _BRIEF = 2400, 1200


@dataclass(frozen=True)
class Work:
    """Of a layer or of what it is split into, in one run of the model."""

    macs: float = 0.0
    parameters: float = 0.0
    latency: float = 0.0  # ns

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.parameters + other.parameters, self.latency + other.latency)

    def of(self, unit: str) -> float:
        """In one of UNITS."""
        return float(getattr(self, unit))


@dataclass(frozen=True)
class Form:
    """One way to split a layer. ranks: (r,), of tucker (input, output). error: relative squared error of the layer's
    outputs, as its inputs were seen.
    """

    name: str
    ranks: tuple[int, ...]
    error: float
    work: Work

    def __str__(self) -> str:
        return f"{self.name}, rank {' and '.join(map(str, self.ranks))}"


class Positions:
    """At how many positions each reader of a layer computes, in one run on average.

    shapes: `run_shapes`; seen: what runs showed where these tell nothing. A layer none of whose readers runs has none.
    """

    def __init__(self, layer: Layer, shapes: Mapping[int, Shape], seen: Seen) -> None:
        self.out: list[float] = []
        self.strip: list[float] = []  # behind kh x 1
        self.into: list[float] = []  # of the input
        self.unknown = False

        def shape_of(tensor: Constant | Variable) -> Shape | None:
            return tuple(tensor.shape) if isinstance(tensor, Constant) else shapes.get(id(tensor))

        for reader in layer.readers:
            if reader.node in seen.idle:
                continue
            found = _positions(layer, reader.node, shape_of) or _lines(layer, reader, seen)
            if found is None:
                self.unknown = True
                continue
            for counts, count in zip((self.out, self.strip, self.into), found, strict=True):
                counts.append(count)


def _positions(layer: Layer, node: Node, shape_of: ShapeOf) -> tuple[float, float, float] | None:
    given, made = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if layer.kind is Kind.CONV:
        if given is None or made is None or len(given) != len(made):
            return None
        out, into = math.prod(made) / made[1], math.prod(given) / given[1]
        strip = made[0] * made[2] * given[3] if len(made) == 4 else out
        return out, strip, into
    if layer.kind is Kind.GATES:
        count = None if given is None else math.prod(given[:2])
    elif layer.kind is Kind.TABLE:
        places = shape_of(node.inputs[1])
        count = None if places is None else math.prod(places)
    else:
        macs = layer_macs(node, shape_of)
        count = None if macs is None else macs / (layer.outputs * layer.inputs)  # type: ignore[assignment]
    return None if count is None else (float(count), float(count), float(count))


def _lines(layer: Layer, reader: Stored, seen: Seen) -> tuple[float, float, float] | None:
    """Of an input of unknown shape as many lines as were seen, as wide as the weights that read them."""
    source = layer.source(reader)
    elements = None if source is None else seen.elements.get(id(source.tensor))
    if elements is None or layer.kind is Kind.CONV:
        return None
    count = elements / (layer.outputs if layer.kind is Kind.TABLE else layer.inputs)
    return count, count, count


class Pricing:
    """What pieces of layers cost on a target."""

    def __init__(self, target: Target) -> None:
        self.costs: CostFacts = target.costs
        self.channels = target.channels

    def step(self, layer: Layer) -> int:
        """What ranks are multiples of."""
        return max(CONV_STEP, self.channels) if layer.kind is Kind.CONV else self.channels

    def whole(self, layer: Layer, at: Positions) -> Work:
        """The layer as it is."""
        if layer.kind is Kind.TABLE:
            return Work(parameters=layer.outputs * layer.inputs)
        return self._piece(layer.outputs, layer.inputs, at.out, self._rate(layer.kernel))

    def split(self, layer: Layer, name: str, ranks: Sequence[int], at: Positions) -> Work:
        """The layer in pieces."""
        outputs, inputs, point = layer.outputs, layer.inputs, self._rate((1, 1) if layer.kernel else ())
        if layer.kind is Kind.TABLE:
            return Work(parameters=inputs * ranks[0]) + self._piece(outputs, ranks[0], at.out, point)
        if name == FACTORS:
            first = self._piece(ranks[0] * layer.groups, inputs, at.out, self._rate(layer.kernel), handed=True)
            return first + self._piece(outputs, ranks[0], at.out, point)
        channels = inputs // layer.taps
        if name == STRIPS:
            tall, wide = layer.kernel
            strip = self._rate((tall, 1))
            first = self._piece(ranks[0], channels * tall, at.strip, strip, handed=True)
            return first + self._piece(outputs, ranks[0] * wide, at.out, strip)
        first = self._piece(ranks[0], channels, at.into, point, handed=True)
        core = self._piece(ranks[1], ranks[0] * layer.taps, at.out, self._rate(layer.kernel), handed=True)
        return first + core + self._piece(outputs, ranks[1], at.out, point)

    def _rate(self, kernel: Sequence[int]) -> float:
        """Ns of a multiply-add."""
        costs = self.costs
        if kernel and math.prod(kernel) == 1:
            return costs.known("float_pointwise_mac", costs.float_mac)
        if len(kernel) == 2 and min(kernel) == 1:
            return costs.known("float_strip_mac", costs.float_mac)
        return costs.float_mac

    def _piece(self, outputs: int, inputs: int, positions: Sequence[float], rate: float, handed: bool = False) -> Work:
        """outputs: over all groups; inputs: of one group."""
        weights = outputs * inputs
        time = 0.0
        for count in positions:
            time += max(weights * count * rate, weights * self.costs.known("float_weight", 0.0) if count else 0.0)
            time += max(self.costs.known("layer", 0.0), self.costs.node)
            if handed:
                time += count * outputs * self.costs.known("float_element", 0.0)
        return Work(weights * sum(positions), weights, time)


class Splitter:
    """The factors of one layer, by what is known of its inputs. The layer's weight is read each time."""

    def __init__(self, layer: Layer, seconds: list[Second]) -> None:
        self.layer = layer
        searched = layer.taps > 1 and layer.inputs <= _SEARCHED and layer.groups == 1
        self._second = seconds[0] if searched else Second()
        if layer.kind is Kind.TABLE:
            seen, trusted = seconds[0].seen, seconds[0].trusted
            assert seen is not None
            assert trusted is not None
            self._spectra = [spectrum_of_outputs(seen, trusted)]
        else:
            self._spectra = [spectrum(m, s) for m, s in zip(layer.matrices(), seconds, strict=True)]

    @property
    def total(self) -> float:
        """Power of the outputs, as far as the moments tell."""
        return sum(each.total for each in self._spectra)

    @property
    def spectra(self) -> list[Spectrum]:
        """Of each group."""
        return self._spectra

    def factors(self, name: str, ranks: Sequence[int], turns: int = TURNS) -> tuple[Wide, ...]:
        """The first factor, the last one, and of tucker the one between, in this order: first, [core,] last.

        factors: [groups, r, K] and [groups, N / groups, r]; strips: [r, C, kh] and [N, r, kw]; tucker: [r, C],
        [s, r, P] and [N, s].
        """
        matrices = self.layer.matrices()
        if name == FACTORS:
            pairs = [each.split(m, ranks[0]) for each, m in zip(self._spectra, matrices, strict=True)]
            rank = max(first.shape[0] for _, first in pairs)
            firsts = [np.pad(first, ((0, rank - len(first)), (0, 0))) for _, first in pairs]
            return np.array(firsts), np.array([np.pad(last, ((0, 0), (0, rank - last.shape[1]))) for last, _ in pairs])
        weight = matrices[0].reshape(self.layer.outputs, -1, *self.layer.kernel)
        if name == STRIPS:
            found = strips(weight, self._second, ranks[0], turns)
            return found.first, found.last
        parts = tucker(weight.reshape(*weight.shape[:2], -1), self._second, (ranks[0], ranks[1]), turns)
        return parts.first, parts.core, parts.last

    def dense(self, name: str, factors: tuple[Wide, ...]) -> Wide:
        """[groups, N / groups, K]: the weight that the factors stand for."""
        if name == FACTORS:
            return factors[1] @ factors[0]
        if name == STRIPS:
            found = np.einsum("nrx,rcy->ncyx", factors[1], factors[0], optimize=True)
        else:
            found = np.einsum("ns,srp,rc->ncp", factors[2], factors[1], factors[0], optimize=True)
        return np.asarray(found.reshape(1, self.layer.outputs, -1))

    def error(self, name: str, ranks: Sequence[int]) -> float:
        """Predicted squared error of the outputs as a share of their power."""
        if name == FACTORS:
            left = sum(each.error(ranks[0]) for each in self._spectra)
        else:
            dense = self.dense(name, self.factors(name, ranks, turns=int(self.layer.inputs <= _BRIEF)))
            left = squared_error(self.layer.matrices()[0], dense[0], self._second.seen)
        return left / self.total if self.total > 0 else 0.0


def find_forms(
    layer: Layer, splitter: Splitter, at: Positions, pricing: Pricing, names: Sequence[str], unit: str
) -> tuple[list[Form], str]:
    """The forms that pay, and in words why others do not. unit: of `Work`, that is to become less."""
    whole = pricing.whole(layer, at)
    step = pricing.step(layer)
    forms: list[Form] = []
    nearest: tuple[float, str] | None = None
    for name in names:
        every = _ranks(layer, name, step)
        paying = []
        for ranks in every:
            work = pricing.split(layer, name, ranks, at)
            ratio = _ratio(work, whole, unit)
            if nearest is None or ratio < nearest[0]:
                nearest = ratio, f"{name} of rank {' and '.join(map(str, ranks))}"
            if ratio <= (SMALLER if unit == "parameters" else PAYS) and work.of(unit) < whole.of(unit):
                paying.append((ranks, work))
        for ranks, work in _thinned(paying, _MANY if name == FACTORS else _FEW):
            forms.append(Form(name, tuple(ranks), splitter.error(name, ranks), work))
    if forms:
        return forms, ""
    if nearest is None:
        sides = f"its {layer.outputs // layer.groups} outputs and {layer.inputs} inputs"
        return [], f"no multiple of {step} is a rank below {sides}"
    what = "weights" if unit == "parameters" else "time by the target's costs"
    return [], f"no split pays: {nearest[1]}, the best, takes {nearest[0]:.2f} of the {what}"


def _ratio(work: Work, whole: Work, unit: str) -> float:
    by = "parameters" if unit == "parameters" else "latency"
    return work.of(by) / whole.of(by) if whole.of(by) else math.inf


def _ranks(layer: Layer, name: str, step: int) -> list[tuple[int, ...]]:
    outputs, channels = layer.outputs // layer.groups, layer.inputs // layer.taps
    if name == FACTORS:
        return [(rank,) for rank in range(step, min(outputs, layer.inputs), step)]
    if layer.kind is not Kind.CONV or layer.groups > 1 or layer.taps == 1 or layer.inputs > _SEARCHED:
        return []
    if name == STRIPS:
        if len(layer.kernel) != 2 or min(layer.kernel) == 1:
            return []
        tall, wide = layer.kernel
        return [(rank,) for rank in range(step, min(outputs * wide, channels * tall), step)]
    pairs: list[tuple[int, ...]] = []
    for rank in range(step, channels + 1, step):
        other = max(step, round(rank / channels * outputs / step) * step)
        if other <= outputs and (rank < channels or other < outputs):
            pairs.append((rank, other))
    return pairs


def _thinned(every: list[tuple[tuple[int, ...], Work]], most: int) -> list[tuple[tuple[int, ...], Work]]:
    if len(every) <= most:
        return every
    chosen = np.unique(np.rint(np.linspace(0, len(every) - 1, most)).astype(int))
    return [every[at] for at in chosen]
