"""Moving range between the channels of a tensor and the weights that multiply them, before both are rounded.

A layer's input is rounded with one scale for all of its channels: what is large in few of them leaves few codes for the
others. With any s > 0 a channel,

    x W = (x / s) (s W)

and s is chosen so that neither factor holds outliers. `smooth` takes the ranges of x from data (the identity of
SmoothQuant, Xiao et al. 2023), `equalize` those of the weights that make x (Nagel et al. 2019, section 4.1). Division
by s goes into the constants that make x (`quantization.rescale`), or into a Mul before the layers.

SmoothQuant's own s = max|x|^alpha / max|w|^(1 - alpha) brings all channels to one range. That leaves no room for a
channel that grows beyond what calibration saw, and spends accuracy of weights where inputs are no outliers. Here s is 1
but for channels beyond a bound, which they are brought within; the bound is the one that leaves the least noise by the
ranges of both sides (`_Noise`).

All s are powers of two, so that nothing but the exponents of floats change: the model gives the same bits as long as
no value leaves the range of normal float32 numbers. They are at most 1.41 times off the value of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph import insert_before, label
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.passbase import Change, PassResult, Skip
from onnxopt.quantization import qdq
from onnxopt.quantization.layers import channel_axis, unfit_weight
from onnxopt.quantization.rescale import Doubles, Edit, Fold, Ints, Refused, Rescaler

SMOOTHED = frozenset({"Gemm", "MatMul"})
EQUALIZED = frozenset({"Conv", "Gemm", "MatMul"})
# Layers whose weights can make a tensor to be equalized.
_MAKERS = EQUALIZED | {"ConvTranspose"}
# Operators that read the shape of a tensor, not its values.
_BLIND = frozenset({("", "Shape"), ("", "Size")})
# Equalizing one pair changes the ranges of its neighbours: rounds until nothing changes, at most so many.
ROUNDS = 20
# s stays within 2^-LARGEST to 2^LARGEST, so that what few samples leave almost at zero isn't blown up.
LARGEST = 10
# Bounds of outliers that are tried: the largest value divided by 2^(1/4), 2^(2/4) and so on.
BOUNDS = 24
# dB over the least noise that a bound may leave: the largest such bound is taken, as room for what few samples did not
# show. On a BERT of 6 layers this cost nothing with 64 samples (SQNR 17.8 dB without, 19.7 with), and with 16 it made
# the difference between 12.6 and 16.7 dB, 15.7 being that of the network not smoothed.
HEADROOM = 1.5
# dB of noise that smoothing a tensor must save: by constants that are there, and by a Mul.
FOLDED_GAIN = 0.5
INSERTED_GAIN = 1.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Group:
    """The layers of one body that read `tensor`, whose channels lie along `axis`, and multiply them by weights."""

    body: Graph
    tensor: Variable
    axis: int
    layers: tuple[Node, ...]

    @property
    def name(self) -> str:
        """How reports name it."""
        return ", ".join(map(label, self.layers))

    @property
    def channels(self) -> int:
        """How many channels the tensor has."""
        return len(input_ranges(self.layers[0]))

    def index(self) -> Ints:
        """The channel of each position of the tensor, broadcast from the last axis."""
        weight = self.layers[0].inputs[1]
        spatial = 0 if self.axis == -1 else len(weight.shape) - 2
        return np.arange(self.channels).reshape(-1, *[1] * spatial)

    def weight_ranges(self) -> Doubles:
        """max |w| over all weights that multiply each channel, [channels]."""
        return np.asarray(np.max([input_ranges(node) for node in self.layers], axis=0))


@dataclass(frozen=True)
class Smoothing:
    """What a pass decides of smoothing.

    alpha: share of the range that moves, 0 to 1, by the formula; None: only outliers move, as far as that pays.
    insert: put a Mul before MatMul and Gemm where no constant takes the division in; else such layers are left alone.
    among: smooth no other layers than these; None: all. near: only constants that make the tensor itself take the
    division in, or make it from one that `statistics` know nothing of, so that no other figures become wrong. least:
    fewest channels that are smoothed.
    """

    alpha: float | None = None
    insert: bool = True
    among: frozenset[Node] | None = None
    near: bool = False
    least: int = 1


def smooth_requests(model: Model, insert: bool = True, least: int = 1) -> Requests:
    """Ranges and mean squares of the channels of the tensors that can be smoothed. insert, least: as in Smoothing."""
    rescaler = Rescaler(model)
    read = []
    for group in _groups(model, SMOOTHED, []):
        if group.channels < least:
            continue
        try:
            _smoothing_way(group, model, rescaler, insert)
            read.append((group.tensor, group.axis))
        except Refused:
            continue
    return Requests(channel_ranges=tuple(read), channel_moments=tuple(read))


def smooth(model: Model, statistics: Statistics | None, settings: Smoothing) -> PassResult:
    """Move outliers of what MatMul and Gemm layers read into their weights, in place.

    With `near` the statistics are brought up to date too, so that they hold for the smoothed model.
    """
    changes: list[Change] = []
    skipped: list[Skip] = []
    rescaler = Rescaler(model)
    for group in _groups(model, SMOOTHED, skipped):
        try:
            if group.channels < settings.least:
                raise Refused(f"it reads {group.channels} channels only")
            if settings.among is not None and not settings.among.issuperset(group.layers):
                raise Refused("not all that read its input run on integers")
            way = _smoothing_way(group, model, rescaler, settings.insert)
            figures = _figures(group, statistics)
            if settings.near and statistics is not None:
                _check_near(group, way, statistics, rescaler)
            detail, factors = _smooth(group, way, figures, rescaler, settings.alpha)
            if settings.near and statistics is not None:
                readers = [node for node in group.layers if node.op != "Conv"]
                statistics.divide((group.tensor, group.axis), factors, group.layers[0].inputs[0], readers)
            changes.append(Change("smoothed", group.name, detail))
        except Refused as refusal:
            skipped.append(Skip(group.name, str(refusal)))
    return PassResult(changes, skipped)


def equalize(model: Model) -> PassResult:
    """Give each channel between two layers the same range in the weights before and behind it, in place."""
    changes: list[Change] = []
    skipped: list[Skip] = []
    rescaler = Rescaler(model)
    pairs: list[tuple[Group, Fold]] = []
    for group in _groups(model, EQUALIZED, skipped):
        try:
            pairs.append((group, _traced(group, rescaler)))
        except Refused as refusal:
            skipped.append(Skip(group.name, str(refusal)))
    for group, fold, total in _balanced(pairs, rescaler, skipped):
        before = ", ".join(label(edit.node) for edit in fold.ends)
        changes.append(Change("equalized", group.name, f"with {before} by {_span(total)}"))
    return PassResult(changes, skipped)


# the layers


def _groups(model: Model, operators: frozenset[str], skipped: list[Skip]) -> Iterator[Group]:
    """Layers by the tensor that they read, in the order of the first; those that are none are skipped."""
    for body in model.bodies():
        found: dict[tuple[Variable, int], list[Node]] = {}
        for node in body.nodes:
            if node.kind[0] != "" or node.op not in operators:
                continue
            reason = _unfit(node, body)
            if reason is not None:
                skipped.append(Skip(label(node), reason))
                continue
            found.setdefault((node.inputs[0], channel_axis(node)), []).append(node)
        for (tensor, axis), nodes in found.items():
            yield Group(body, tensor, axis, tuple(nodes))


def _unfit(node: Node, body: Graph) -> str | None:
    reason = unfit_weight(node, body)
    if reason is None and node.op == "Gemm" and node.attrs.get("transA", 0):
        return "its input is transposed"
    if reason is None and node.inputs[1] in node.inputs[2:]:
        return "its weight is its bias too"
    return reason


def input_ranges(node: Node) -> Doubles:
    """max |w| of a Conv's, Gemm's or MatMul's weight for each channel that it reads, [channels]."""
    edit = _multiplied(node)
    return _ranges([edit], int(edit.index.max()) + 1)


def _multiplied(node: Node) -> Edit:
    """The weight of a layer, with the channel of its input that each value multiplies."""
    weight = node.inputs[1]
    if node.op != "Conv":
        turned = node.op == "Gemm" and node.attrs.get("transB", 0)
        channels = np.arange(weight.shape[1 if turned else 0])
        return Edit(node, 1, channels if turned else channels[:, None], inverse=True)
    groups = int(node.attrs.get("group", 1))
    made, each, *kernel = weight.shape
    rows = np.repeat(np.arange(groups * each).reshape(groups, each), made // groups, axis=0)
    return Edit(node, 1, rows.reshape(made, each, *[1] * len(kernel)), inverse=True)


def _ranges(edits: Sequence[Edit], channels: int) -> Doubles:
    """max |w| over all values that belong to each channel, [channels]."""
    found = np.zeros(channels)
    for edit in edits:
        values = np.abs(edit.node.inputs[edit.at].values.astype(np.float64))
        axes = (1,) * (values.ndim - edit.index.ndim) + edit.index.shape
        widest = values.max(axis=tuple(at for at, size in enumerate(axes) if size == 1), keepdims=True)
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            np.maximum.at(found, np.broadcast_to(edit.index, widest.shape).reshape(-1), widest.reshape(-1))
    return found


# smoothing


@dataclass(frozen=True)
class Figures:
    """What was measured of the channels of a tensor, each [channels]: extremes and E[x^2]."""

    low: Doubles
    high: Doubles
    mean_square: Doubles

    @property
    def largest(self) -> Doubles:
        """max |x| of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


class _Noise:
    """What 8 bits cost at the outputs of the layers that read a tensor, by the factors of its channels.

    Rounding adds step^2 / 12 to each value on average. The input has one step, and its noise in channel j meets the
    weights s_j w_j; the weights of each output have a step of their own, and their noise meets x_j / s_j. Half a code
    of rounding at random: correlations are neglected, and the common factor 1 / 12 and the 255 steps are left out.
    """

    def __init__(self, group: Group, figures: Figures) -> None:
        self.figures = figures
        self.energy = np.zeros(group.channels)  # sum of w^2 over all weights that multiply a channel
        self.peaks: list[tuple[Floats, int]] = []  # max |w| over taps [groups, inputs, outputs], number of taps
        for node in group.layers:
            weights = _by_input(node)
            self.energy += np.square(weights).sum(axis=(2, 3)).reshape(-1)
            self.peaks.append((np.abs(weights).max(axis=3).astype(np.float32), weights.shape[3]))

    def __call__(self, factors: Doubles) -> float:
        """The power of the noise for `factors` [channels], in a unit of its own."""
        seen = self.figures
        span = max(0.0, float((seen.high / factors).max())) - min(0.0, float((seen.low / factors).min()))
        noise = span**2 * float((np.square(factors) * self.energy).sum())
        power = seen.mean_square / np.square(factors)
        for peaks, taps in self.peaks:
            by_group = factors.astype(np.float32).reshape(peaks.shape[:2])
            with np.errstate(over="ignore"):
                steps = 2.0 * (peaks * by_group[:, :, None]).max(axis=1)
            squares = np.square(steps, dtype=np.float64).sum(axis=1)
            noise += taps * float((squares * power.reshape(len(peaks), -1).sum(axis=1)).sum())
        return noise


def _by_input(node: Node) -> Doubles:
    """A layer's weight as [groups, inputs of a group, outputs of a group, taps]."""
    weight = node.inputs[1].values.astype(np.float64)
    if node.op != "Conv":
        turned = node.op == "Gemm" and node.attrs.get("transB", 0)
        return np.asarray((weight.T if turned else weight)[None, :, :, None])
    groups = int(node.attrs.get("group", 1))
    split = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return np.asarray(split.transpose(0, 2, 1, 3))


def smoothing_factors(inputs: Doubles, weights: Doubles, alpha: float) -> Doubles:
    """s = inputs^alpha / weights^(1 - alpha) as powers of two, up to a common factor; 1 where either is zero.

    inputs, weights: max |x| and max |w| of each channel, [channels]. The common factor makes s about 1 on average.
    """
    used = (inputs > 0) & (weights > 0)
    exponents = np.zeros(len(inputs))
    exponents[used] = alpha * np.log2(inputs[used]) - (1 - alpha) * np.log2(weights[used])
    if used.any():
        exponents[used] -= np.rint(exponents[used].mean())
    return _powers(np.rint(exponents))


def outlier_factors(inputs: Doubles, bound: float) -> Doubles:
    """The powers of two, 1 or more, that bring each channel within `bound`; inputs: max |x|, [channels]."""
    over = np.maximum(inputs / bound, 1.0)
    return _powers(np.ceil(np.log2(over)))


def _powers(exponents: Doubles) -> Doubles:
    return np.asarray(np.exp2(np.clip(exponents, -LARGEST, LARGEST)))


def _figures(group: Group, statistics: Statistics | None) -> Figures:
    """What is known of the channels that a group reads. Raises Refused where nothing is."""
    if statistics is None:
        raise Refused("nothing is known of its input: give --data")
    extremes = statistics.channel_range(group.tensor, group.axis)
    moments = statistics.channel_moments(group.tensor, group.axis)
    if extremes is None or moments is None:
        reason = statistics.reason((group.tensor, group.axis), "channel_ranges")
        raise Refused("no sample reached it" if reason is None else f"its input {reason}")
    found = Figures(*extremes, moments.mean_square)
    if len(found.low) != group.channels or not np.isfinite([found.low, found.high, found.mean_square]).all():
        raise Refused("its input is not finite, or not that of a layer")
    return found


@dataclass(frozen=True)
class _Way:
    """How the tensor of a group is divided: by constants, or where there is an obstacle by a Mul."""

    fold: Fold
    obstacle: str = ""


def _smoothing_way(group: Group, model: Model, rescaler: Rescaler, insert: bool) -> _Way:
    """How a group is smoothed. Raises Refused where it can't be, or not without a Mul that costs more than it gives."""
    if group.body is not model.graph:
        raise Refused("figures of channels are taken in the main graph only")
    _check_weights(group, rescaler)
    try:
        _check_alone(group, rescaler)
        return _Way(rescaler.trace(group.tensor, group.index()))
    except Refused as refusal:
        if not insert:
            raise
        if _may_be_codes(group.tensor):
            raise Refused(f"{refusal}, and a Mul would stand between integer kernels") from refusal
        return _Way(Fold(), str(refusal))


def _may_be_codes(tensor: Variable) -> bool:
    """Whether static quantization may hand `tensor` on as codes, from layers through what moves or computes codes."""
    pending, seen = [tensor], {tensor}
    while pending:
        node = next(iter(pending.pop().inputs), None)
        row = None if node is None else qdq.row(node)
        if node is None or row is None:
            return False
        if row.role is qdq.Role.LAYER:
            if not isinstance(node.inputs[1], Constant):
                return False
            continue
        affine = node.op in ("Add", "Mul") and any(isinstance(each, Constant) for each in node.inputs)
        if row.role is not qdq.Role.FOLDED and not affine and qdq.island_row(node) is None:
            return False
        wanted = node.inputs if row.inputs is None else node.inputs[:1]
        fresh = [each for each in wanted if isinstance(each, Variable) and each not in seen]
        seen.update(fresh)
        pending += fresh
    return True


def _check_near(group: Group, way: _Way, statistics: Statistics, rescaler: Rescaler) -> None:
    """Raise Refused where constants far from the tensor take the division in, so that others on the way change too.

    Also where a weight would have to be copied: codes are shared where weights are.
    """
    for node in group.layers:
        if rescaler.read_elsewhere(node.inputs[1], set(group.layers)):
            raise Refused(f"its weight {node.inputs[1].name} is used elsewhere too")
    made = {tensor for edit in way.fold.edits for tensor in edit.node.outputs} - {group.tensor}
    if any(statistics.range(tensor) is not None for tensor in made):
        raise Refused("its scales would pass tensors that carry codes")


def _smooth(group: Group, way: _Way, figures: Figures, rescaler: Rescaler, alpha: float | None) -> tuple[str, Doubles]:
    """Smooth one tensor; returns what was done, and the factors. Raises Refused where nothing is to be gained."""
    factors, told = _chosen(group, figures, alpha, INSERTED_GAIN if way.obstacle else FOLDED_GAIN)
    rescaler.apply([*map(_multiplied, group.layers), *way.fold.edits], factors)
    told = f"{group.tensor.name} by {_span(factors)}{told}"
    if not way.obstacle:
        return f"{told}, into {', '.join(label(edit.node) for edit in way.fold.ends)}", factors
    _insert(group, factors, rescaler)
    return f"{told}, by a Mul: {way.obstacle}", factors


def _chosen(group: Group, figures: Figures, alpha: float | None, gain: float) -> tuple[Doubles, str]:
    """The factors, and what is to be said of them. Raises Refused where they would gain less than `gain` dB."""
    largest = figures.largest
    if alpha is not None:
        factors = smoothing_factors(largest, group.weight_ranges(), alpha)
        if (factors == 1).all():
            raise Refused("its channels are as wide as each other, compared with their weights")
        return factors, ""
    noise = _Noise(group, figures)
    before = noise(np.ones(group.channels))
    if not 0 < before < math.inf:
        raise Refused("its input or its weights are zero, or their product is not finite")
    bounds = largest.max() * np.exp2(-np.arange(1, BOUNDS + 1) / 4)
    tried = [outlier_factors(largest, bound) for bound in bounds]
    noises = [noise(each) for each in tried]
    enough = min(noises) * 10 ** (HEADROOM / 10)
    factors, after = next((each, left) for each, left in zip(tried, noises, strict=True) if left <= enough)
    saved = 10 * math.log10(before / after)
    if saved < gain:
        raise Refused(f"it would leave {max(saved, 0.0):.1f} dB less noise at 8 bits")
    return factors, f" for {saved:.1f} dB less noise at 8 bits"


def _insert(group: Group, factors: Doubles, rescaler: Rescaler) -> None:
    first = group.layers[0]
    spread = (1.0 / factors).astype(np.float32).reshape(group.index().shape)
    constant = Constant(rescaler.names.tensor(f"{group.tensor.name}_factors"), spread)
    divided = Variable(rescaler.names.tensor(f"{group.tensor.name}_smoothed"), dtype=np.dtype(np.float32))
    node = Node(
        "Mul", rescaler.names.node(f"{label(first)}_smooth"), inputs=[group.tensor, constant], outputs=[divided]
    )
    insert_before(first, [node], group.body)
    for layer in group.layers:
        layer.inputs[0] = divided


def _check_alone(group: Group, rescaler: Rescaler) -> None:
    """Raise Refused where others read the tensor too."""
    mine = set(group.layers)
    others = [node for node in group.tensor.outputs if node not in mine and node.kind not in _BLIND]
    others += [node for node in mine if any(tensor is group.tensor for tensor in node.inputs[1:])]
    if others or id(group.tensor) in rescaler.shared:
        reader = label(others[0]) if others else "another graph or an output"
        raise Refused(f"{group.tensor.name} is read by {reader} too")


def _check_weights(group: Group, rescaler: Rescaler) -> None:
    """Raise Refused where a weight of the group is used otherwise too."""
    for node in group.layers:
        reason = rescaler.refuses(node, 1, set(group.layers))
        if reason is not None:
            raise Refused(reason)


# equalizing


def _traced(group: Group, rescaler: Rescaler) -> Fold:
    """The way to the layers that make what the group reads. Raises Refused where something else makes it."""
    _check_weights(group, rescaler)
    _check_alone(group, rescaler)
    fold = rescaler.trace(group.tensor, group.index())
    for edit in fold.ends:
        if edit.node.op not in _MAKERS:
            raise Refused(f"{edit.node.op} {label(edit.node)} makes its input, no weights of a layer")
    return fold


def _balanced(
    pairs: list[tuple[Group, Fold]], rescaler: Rescaler, skipped: list[Skip]
) -> Iterator[tuple[Group, Fold, Doubles]]:
    """Equalize pairs in turn until none changes; those that changed, with all their factors taken together."""
    totals = [np.ones(group.channels) for group, _ in pairs]
    stuck: dict[int, str] = {}
    for _ in range(ROUNDS):
        still = True
        for at, (group, fold) in enumerate(pairs):
            if at in stuck:
                continue
            factors = equalizing_factors(_ranges(fold.ends, group.channels), group.weight_ranges())
            if (factors == 1).all():
                continue
            try:
                rescaler.apply([*map(_multiplied, group.layers), *fold.edits], factors)
            except Refused as refusal:
                stuck[at] = str(refusal)
                continue
            totals[at] *= factors
            still = False
        if still:
            break
    for at, ((group, fold), total) in enumerate(zip(pairs, totals, strict=True)):
        if (total != 1).any():
            yield group, fold, total
        else:
            skipped.append(Skip(group.name, stuck.get(at, "ranges before and behind its input are equal already")))


def equalizing_factors(before: Doubles, behind: Doubles) -> Doubles:
    """s = sqrt(before / behind) as powers of two, 1 where either is zero or not finite.

    before, behind: max |w| of each channel in the layer that makes it and in those that read it, [channels].
    """
    with np.errstate(invalid="ignore"):
        used = (before > 0) & (behind > 0) & np.isfinite(before) & np.isfinite(behind)
    exponents = np.zeros(len(before))
    exponents[used] = 0.5 * (np.log2(before[used]) - np.log2(behind[used]))
    return _powers(np.rint(exponents))


def _span(factors: Doubles) -> str:
    low, high = np.log2([factors.min(), factors.max()])
    return f"2^{low:.0f} to 2^{high:.0f}"
