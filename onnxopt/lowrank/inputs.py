"""What is known of the inputs of layers: second moments and means, and the biases that can take what a mean loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Requests
from onnxopt.calibration.channels import Measure, Moments, gather
from onnxopt.calibration.gram import patches_of
from onnxopt.calibration.moments import ENTRY, MOST_BYTES
from onnxopt.graph.biases import BiasSlot, bias_slot
from onnxopt.graph.edit import drop_unused
from onnxopt.lowrank.layers import Kind, Layer
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.numerics.lowrank import Second, Wide
from onnxopt.quantization.layers import shared_tensors
from onnxopt.quantization.storage import Stored

# inputs beyond which all pairs of a patch's are not related to each other: those of its channels are, at all positions
WIDEST = 4608
# For how many each input counts beside as many unrelated ones as there are channels. On layers of a transformer 8 left
# 0.92 to 0.97 of the error that 1 leaves on inputs not seen; from there to no shrinking at all little changes.
TRUST = 8.0
_BIAS = 3  # of recurrent operators


@dataclass
class Inputs:
    """Of one layer. seen: second moments [K, K] of each group, centred as far as biases take the mean; of a table those
    of its rows [D, D]. rows: how many inputs that is over; None where nothing is known. means: E[x] of each reader
    that has a bias, [groups, K]. reason: why nothing is known.
    """

    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)
    rows: float | None = None
    means: dict[Node, Wide] = field(default_factory=dict)
    reason: str | None = None

    def seconds(self, layer: Layer, trust: float = TRUST) -> list[Second]:
        """For each group; trust: for how many each input counts."""
        if self.rows is None:
            table = layer.matrices()[0] if layer.kind is Kind.TABLE else None
            return [Second() if table is None else Second(table @ table.T, table @ table.T)] * layer.groups
        return [Second.of(seen.astype(np.float64), self.rows * trust) for seen in self.seen]


class Biases:
    """The biases of layers, each as it was at first with an amount added that may be changed."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._slots: dict[Node, BiasSlot | None] = {}
        self._gates: dict[Node, Constant | None] = {}
        self._given: dict[Node, Wide] = {}
        self._made: list[Constant] = []

    @cached_property
    def _shared(self) -> set[int]:
        return shared_tensors(self._model)

    def slot(self, node: Node) -> BiasSlot | None:
        """The slot of a Conv, Gemm or MatMul, with what stood there at first."""
        if node not in self._slots:
            self._slots[node] = bias_slot(node, self._shared)
        return self._slots[node]

    def has(self, layer: Layer, node: Node) -> bool:
        """Whether a reader of the layer can take a constant for each output."""
        if layer.kind is Kind.GATES:
            given = _input(node, _BIAS)
            return given is None or isinstance(given, Constant)
        return layer.kind in (Kind.ROWS, Kind.CONV) and self.slot(node) is not None

    def given(self, node: Node) -> Wide | None:
        """What is added now."""
        return self._given.get(node)

    def set(self, layer: Layer, node: Node, amounts: Wide | None) -> None:
        """Add `amounts` [N], in units of W x, to the bias that a reader had at first; None: that bias again."""
        if amounts is None:
            self._given.pop(node, None)
        else:
            self._given[node] = amounts
        if layer.kind is Kind.GATES:
            first = self._gates.setdefault(node, _input(node, _BIAS))
            _put(node, _BIAS, first if amounts is None else self._new(_gates(layer, first, amounts)))
            return
        slot = self.slot(node)
        assert slot is not None
        if amounts is None:
            _put(slot.node, slot.at, slot.given)
            return
        base = slot.given.name if slot.given is not None else f"{layer.weight.name}_bias"
        _put(slot.node, slot.at, self._new(Constant(base, slot.plus(amounts, layer.weight.dtype))))

    def clean(self) -> None:
        """Take biases that were tried and are not read out of the model."""
        drop_unused(self._made, self._model)
        self._made.clear()

    def _new(self, constant: Constant) -> Constant:
        self._made.append(constant)
        return constant


def _input(node: Node, at: int) -> Constant | Variable | None:
    return node.inputs[at] if len(node.inputs) > at and not node.inputs[at].is_empty() else None


def _put(node: Node, at: int, tensor: Constant | Variable | None) -> None:
    """Give a node an optional input, or take it away."""
    while len(node.inputs) <= at:
        node.inputs.append(Variable.empty())
    node.inputs[at] = Variable.empty() if tensor is None else tensor
    while node.inputs[-1].is_empty():
        node.inputs.pop()


def _gates(layer: Layer, first: Constant | Variable | None, amounts: Wide) -> Constant:
    """B [directions, 2 rows] of a recurrent layer with amounts on the half that goes with W."""
    directions, rows = layer.weight.shape[:2]
    assert not isinstance(first, Variable)
    bias = np.zeros((directions, 2 * rows)) if first is None else np.array(first.values, np.float64)
    bias[:, :rows] += amounts.reshape(directions, rows)
    return Constant(first.name if first is not None else f"{layer.weight.name}_bias", bias.astype(layer.weight.dtype))


def know(model: Model, layers: Sequence[Layer], biases: Biases, measure: Measure | None) -> dict[Layer, Inputs]:
    """What runs over the feeds tell of the inputs of all layers. measure: None where there are no real feeds."""
    if measure is None:
        return {layer: Inputs(reason="there are no real inputs (--data)") for layer in layers}
    main = set(model.graph.nodes)
    patched = [layer for layer in layers if _takes_patches(layer, main)]
    found = _patches(model, patched, measure)
    every = [(layer, reader) for layer in layers for reader in layer.readers]
    lines = {(layer, reader): source for layer, reader in every if (source := layer.source(reader))}
    asked = {key: source for key, source in lines.items() if key[1].node not in found}
    seen = gather(model, asked.values(), measure)
    known = {}
    for layer in layers:
        parts = []
        reason: str | None = None
        for reader in layer.readers:
            source = lines.get((layer, reader))
            if reader.node in found:
                parts.append((reader, found[reader.node]))
            elif source in seen.moments:
                spread = _spread(layer, seen.moments[source])
                parts += [(reader, spread)] if spread else []
                reason = reason or f"its kernel reads {layer.inputs} inputs, more than are related to each other"
            elif source is not None:
                reason = reason or seen.reasons.get(source)
        known[layer] = _joined(layer, parts, biases) if parts else Inputs(reason=reason or "its input is not known")
    return known


# moments of each group of one reader
_Groups = list[Moments]


def _takes_patches(layer: Layer, main: set[Node]) -> bool:
    """Whether patches of its input tell more than its channels do, and fit into memory."""
    if layer.kind is not Kind.CONV or layer.inputs > WIDEST or any(each.node not in main for each in layer.readers):
        return False
    return layer.taps > 1 or layer.groups > 1 or any(node.attrs.get("pads") for node in map(_node, layer.readers))


def _node(reader: Stored) -> Node:
    return reader.node


def _patches(model: Model, layers: Iterable[Layer], measure: Measure) -> dict[Node, _Groups]:
    """Moments of the patches under the kernels, in as many runs as memory asks for."""
    nodes = [
        (reader.node, layer.groups * layer.inputs**2 * ENTRY)
        for layer in layers
        for reader in layer.readers
        if not isinstance(patches_of(reader.node), str)
    ]
    parts: list[list[Node]] = [[]]
    room = MOST_BYTES
    for node, size in nodes:
        if parts[-1] and size > room:
            parts.append([])
            room = MOST_BYTES
        parts[-1].append(node)
        room -= size
    found: dict[Node, _Groups] = {}
    for part in filter(None, parts):
        statistics = measure(model, Requests(grams=tuple(part)))
        for node in part:
            gram = statistics.gram(node)
            if gram is not None:
                pairs = zip(gram.second, gram.mean, strict=True)
                found[node] = [Moments.taken(second, mean, gram.rows) for second, mean in pairs]
    return found


def _spread(layer: Layer, channels: Moments) -> _Groups | None:
    """Those of the inputs of each group, from those of channels: positions of a kernel are taken for unrelated.

    None where there are too many.
    """
    if layer.kind is not Kind.CONV:
        return [channels]
    each = layer.inputs // layer.taps
    groups = [channels.of(slice(at * each, (at + 1) * each)) for at in range(layer.groups)]
    if layer.taps == 1:
        return groups
    if layer.inputs > WIDEST:
        return None
    apart = np.eye(layer.taps, dtype=np.float32)
    return [Moments(np.kron(group.centred, apart), np.repeat(group.mean, layer.taps), group.rows) for group in groups]


def _joined(layer: Layer, parts: Sequence[tuple[Stored, _Groups]], biases: Biases) -> Inputs:
    """Over all readers; the mean of each is left out where a bias takes it."""
    rows = sum(groups[0].rows for _, groups in parts)
    size = layer.outputs if layer.kind is Kind.TABLE else layer.inputs
    seen = [np.zeros((size, size)) for _ in range(layer.groups)]
    means = {}
    for reader, groups in parts:
        centred = biases.has(layer, reader.node)
        for total, group in zip(seen, groups, strict=True):
            total += (group.covariance if centred else group.second) * (group.rows / max(1, rows))
        if centred:
            means[reader.node] = np.array([group.mean for group in groups])
    if layer.kind is Kind.TABLE:
        seen = [_with_the_rest(layer, seen[0], rows)]
    return Inputs([each.astype(np.float32) for each in seen], float(rows), means)


def _with_the_rest(layer: Layer, seen: Wide, rows: int) -> Wide:
    """Moments of the rows of a table that were looked up, joined with those of all: others will be looked up too."""
    table = layer.matrices()[0]
    share = rows / (rows + table.shape[1])
    return np.asarray(share * seen + (1 - share) * (table @ table.T) / table.shape[1])
