"""Dividing the channels of a tensor by numbers, without a node: the division goes into the constants that make it.

    x ── LayerNormalization(g, b) ── t         x ── LayerNormalization(g / s, b / s) ── t / s
    x ── Conv(w, b) ── Relu ── t               x ── Conv(w / s, b / s) ── Relu ── t / s          s > 0
    P · V ── t,  V = MatMul(w) + b             P · V / s ── t / s,  V / s = MatMul(w / s) + b / s

The way back from a tensor goes through operators that a positive factor a channel passes, each tensor on it read by
nobody else, until constants take the factors in. Layouts are followed element by element: what a position of a tensor
must be divided by is an array of channel numbers that broadcasts to the tensor, its axes aligned at the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.graph import Names, label, operators
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.quantization.layers import shared_tensors

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

# A constant of at most this many elements is copied for one of its readers; of larger ones no second copy is stored.
COPIED = 8192


class Refused(Exception):
    """Why the channels of a tensor can't be divided."""


@dataclass(frozen=True)
class Edit:
    """Constant input `at` of a node is divided, or multiplied where `inverse`, by the factors of channels `index`."""

    node: Node
    at: int
    index: Ints
    inverse: bool = False

    def values(self, factors: Doubles) -> npt.NDArray[Any]:
        """The new values for `factors` [channels], in the type of the old ones."""
        old = self.node.inputs[self.at].values
        by = factors[self.index]
        with np.errstate(over="ignore", under="ignore"):
            scaled = old.astype(np.float64) * by if self.inverse else old.astype(np.float64) / by
            return np.asarray(scaled.astype(old.dtype))


@dataclass
class Fold:
    """What makes a tensor, as far as its channels are divided.

    edits: all constants to change. ends: those among them that multiply: of each node in which the way ends one.
    """

    edits: list[Edit] = field(default_factory=list)
    ends: list[Edit] = field(default_factory=list)


class Rescaler:
    """What dividing needs to know of a model, whose structure stays as it is meanwhile."""

    def __init__(self, model: Model) -> None:
        self.names = Names(model)
        self.shared = shared_tensors(model)
        self._facts: dict[int, Fact] = known(model)

    def trace(self, tensor: Variable, index: Ints) -> Fold:
        """How to divide `tensor` by factors [channels], `index` being the channel of each position.

        The readers of `tensor` itself are the caller's. Raises Refused, naming the node that stands in the way.
        """
        fold = Fold()
        self._back(tensor, index, fold)
        return fold

    def apply(self, edits: list[Edit], factors: Doubles) -> None:
        """Carry out edits. Raises Refused, with nothing changed, where a result is not finite."""
        uses: dict[Constant, list[Edit]] = {}
        for edit in edits:
            uses.setdefault(edit.node.inputs[edit.at], []).append(edit)
        found = {constant: [edit.values(factors) for edit in mine] for constant, mine in uses.items()}
        for constant, values in found.items():
            if not all(np.isfinite(each).all() for each in values):
                raise Refused(f"scaled values of {constant.name} are not finite")
        for constant, values in found.items():
            self._give(constant, uses[constant], values)

    def refuses(self, node: Node, at: int, among: Collection[Node] = ()) -> str | None:
        """Why input `at` of a node can't be given other values. among: nodes that get the same values together."""
        constant = node.inputs[at]
        if not isinstance(constant, Constant):
            return f"{constant.name} of {label(node)} is not constant"
        if constant.dtype != np.float32:
            return f"{constant.name} is {constant.dtype}, not float32"
        if constant.data.size <= COPIED or not self.read_elsewhere(constant, {node, *among}):
            return None
        return f"its weight {constant.name} is used elsewhere too"

    def read_elsewhere(self, constant: Constant, readers: set[Node]) -> bool:
        """Whether others than these read a constant."""
        return id(constant) in self.shared or any(node not in readers for node in constant.outputs)

    def _give(self, constant: Constant, edits: list[Edit], values: list[npt.NDArray[Any]]) -> None:
        """New values for some uses of a constant: in place when these are all and alike, else as another one."""
        alike = all(np.array_equal(each, values[0]) for each in values)
        if alike and len(constant.outputs) == len(edits) and id(constant) not in self.shared:
            constant.values = values[0]
            return
        fresh: list[Constant] = []
        for edit, each in zip(edits, values, strict=True):
            twin = next((other for other in fresh if np.array_equal(other.values, each)), None)
            if twin is None:
                twin = Constant(self.names.tensor(f"{constant.name}_scaled"), each)
                fresh.append(twin)
            edit.node.inputs[edit.at] = twin

    # the way back

    def _back(self, tensor: Any, index: Ints, fold: Fold) -> None:
        if isinstance(tensor, Constant):
            raise Refused(f"{tensor.name} is a constant")
        if not tensor.inputs:
            raise Refused(f"{tensor.name} is computed outside of this graph")
        node = tensor.inputs[0]
        rule = _RULES.get(node.kind)
        if rule is None or node.outputs[0] is not tensor:
            raise Refused(f"no factor passes {node.op} {label(node)}")
        rule(self, node, index, fold)

    def _through(self, node: Node, at: int, index: Ints, fold: Fold) -> None:
        """On to input `at`, which nothing but this node may read."""
        tensor = node.inputs[at]
        if isinstance(tensor, Variable) and (len(tensor.outputs) != 1 or id(tensor) in self.shared):
            raise Refused(f"{tensor.name} is used elsewhere too")
        self._back(tensor, index, fold)

    def _end(self, node: Node, at: int, index: Ints, fold: Fold, inverse: bool = False) -> None:
        """Take the factors in at a constant that multiplies, and has a value of its own for each channel."""
        if isinstance(node.inputs[at], Constant) and not _fits(index, node.inputs[at].shape):
            raise Refused(f"{node.inputs[at].name} of {label(node)} has no value of its own for each channel")
        self._edit(node, at, index, fold, inverse)
        fold.ends.append(fold.edits[-1])

    def _edit(self, node: Node, at: int, index: Ints, fold: Fold, inverse: bool = False) -> None:
        """Take the factors in at a constant: one with a value for each channel, or an addend that is one number."""
        reason = self.refuses(node, at)
        if reason is not None:
            raise Refused(reason)
        constant = node.inputs[at]
        if constant.data.size != 1 and not _fits(index, constant.shape):
            raise Refused(f"{constant.name} of {label(node)} has no value of its own for each channel")
        fold.edits.append(Edit(node, at, _trimmed(index), inverse))

    def _addend(self, node: Node, at: int, index: Ints, fold: Fold) -> None:
        """The same at an optional input that is added."""
        if at < len(node.inputs) and not node.inputs[at].is_empty():
            self._edit(node, at, index, fold)

    def _shape(self, tensor: Any) -> tuple[Any, ...] | None:
        return tensor.shape if isinstance(tensor, Constant) else self._facts.get(id(tensor), Fact()).shape

    # rules: layers and normalizations, which take the factors in

    def _conv(self, node: Node, index: Ints, fold: Fold) -> None:
        weight = node.inputs[1]
        rank = len(weight.shape or ())
        channels = _along(index, rank - 1, node)
        if node.op == "Conv":
            self._end(node, 1, channels.reshape(-1, *[1] * (rank - 1)), fold)
        else:
            self._transposed(node, channels, rank, fold)
        self._addend(node, 2, channels, fold)

    def _transposed(self, node: Node, channels: Ints, rank: int, fold: Fold) -> None:
        """A ConvTranspose, weight [in, out / group, kernel...]: inputs of one group make the channels of that group."""
        weight, groups = node.inputs[1], int(node.attrs.get("group", 1))
        each = len(channels) // groups
        if rank < 3 or weight.shape[1] * groups != len(channels):
            raise Refused(f"{label(node)} makes other channels")
        rows = np.repeat(channels.reshape(groups, each), weight.shape[0] // groups, axis=0)
        self._end(node, 1, rows.reshape(*weight.shape[:2], *[1] * (rank - 2)), fold)

    def _gemm(self, node: Node, index: Ints, fold: Fold) -> None:
        channels = _along(index, 1, node)
        self._end(node, 1, channels[:, None] if node.attrs.get("transB", 0) else channels, fold)
        self._addend(node, 2, channels, fold)

    def _matmul(self, node: Node, index: Ints, fold: Fold) -> None:
        """Columns go to the right operand, rows to the left one; both may go with the axes before them."""
        at = 1 if index.ndim < 2 or index.shape[-2] == 1 else 0
        if at == 0 and index.shape[-1] != 1:
            raise Refused(f"{label(node)} mixes the channels")
        operand = node.inputs[at]
        if not isinstance(operand, Constant):
            self._through(node, at, index, fold)
            return
        if len(operand.shape) < 2:
            raise Refused(f"{operand.name} of {label(node)} is a vector")
        self._end(node, at, index, fold)

    def _normalization(self, node: Node, index: Ints, fold: Fold) -> None:
        at = 2 if node.op == "SkipLayerNormalization" else 1
        self._end(node, at, index, fold)
        self._addend(node, at + 1, index, fold)

    def _by_channel(self, node: Node, index: Ints, fold: Fold) -> None:
        """BatchNormalization and InstanceNormalization, whose channels are axis 1."""
        shape = self._shape(node.inputs[0])
        if shape is None or operators.is_training(node):
            raise Refused(f"the rank of {node.inputs[0].name} is not known, or {label(node)} trains")
        channels = _along(index, len(shape) - 1, node)
        self._end(node, 1, channels, fold)
        self._addend(node, 2, channels, fold)

    # rules: element-wise operators

    def _sum(self, node: Node, index: Ints, fold: Fold) -> None:
        for at, tensor in enumerate(node.inputs):
            if isinstance(tensor, Constant):
                self._edit(node, at, index, fold)
            else:
                self._through(node, at, index, fold)

    def _product(self, node: Node, index: Ints, fold: Fold) -> None:
        """A constant with one value a channel takes the factors in; else the first factor that can."""
        for at, tensor in enumerate(node.inputs):
            divisor = node.op == "Div" and at == 1
            if isinstance(tensor, Constant) and _fits(index, tensor.shape):
                self._end(node, at, index, fold, inverse=divisor)
                return
        reasons = []
        for at in [at for at, tensor in enumerate(node.inputs) if not isinstance(tensor, Constant)]:
            if node.op == "Div" and at == 1:
                break
            trial = Fold()
            try:
                self._through(node, at, index, trial)
            except Refused as refusal:
                reasons.append(str(refusal))
                continue
            fold.edits += trial.edits
            fold.ends += trial.ends
            return
        raise Refused(reasons[0] if reasons else f"no factor passes {node.op} {label(node)}")

    def _homogeneous(self, node: Node, index: Ints, fold: Fold) -> None:
        """f(x / s) = f(x) / s for s > 0."""
        if operators.is_training(node):
            raise Refused(f"{label(node)} is, or may be, in training mode")
        self._through(node, 0, index, fold)

    # rules: operators that move elements

    def _pool(self, node: Node, index: Ints, fold: Fold) -> None:
        shape = self._shape(node.inputs[0])
        if shape is None:
            raise Refused(f"the rank of {node.inputs[0].name} is not known")
        _along(index, len(shape) - 1, node)
        self._through(node, 0, index, fold)

    def _pad(self, node: Node, index: Ints, fold: Fold) -> None:
        amounts = node.inputs[1] if len(node.inputs) > 1 else None
        value = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        if not isinstance(amounts, Constant) or (len(node.inputs) > 3 and not node.inputs[3].is_empty()):
            raise Refused(f"what {label(node)} adds is not a constant input")
        filled = node.attrs.get("mode", "constant") == "constant" and value is not None
        if filled and not (isinstance(value, Constant) and not value.values.any()):
            raise Refused(f"{label(node)} adds other values than zero")
        padded = np.abs(amounts.values.reshape(2, -1)).max(axis=0)[-index.ndim :]
        if any(pads and size > 1 for pads, size in zip(padded, index.shape[-len(padded) :], strict=True)):
            raise Refused(f"{label(node)} adds channels")
        self._through(node, 0, index, fold)

    def _transpose(self, node: Node, index: Ints, fold: Fold) -> None:
        shape = self._shape(node.inputs[0])
        perm = node.attrs.get("perm") or (None if shape is None else list(reversed(range(len(shape)))))
        if perm is None:
            raise Refused(f"the rank of {node.inputs[0].name} is not known")
        whole = index.reshape((1,) * (len(perm) - index.ndim) + index.shape)
        self._through(node, 0, whole.transpose(np.argsort(perm)), fold)

    def _reshape(self, node: Node, index: Ints, fold: Fold) -> None:
        """The last axes of the output that hold the channels must be the last axes of the input, cut otherwise."""
        before, after = self._shape(node.inputs[0]), self._shape(node.outputs[0])
        block = _trimmed(index)
        sizes = _sizes(block, after)
        if before is None or sizes is None:
            raise Refused(f"the shapes around {node.op} {label(node)} are not known")
        count, taken = int(np.prod(sizes)), 0
        while taken < len(before) and int(np.prod(_ints(before[len(before) - taken :]))) < count:
            taken += 1
            if not _ints(before[-taken:]):
                raise Refused(f"the shapes around {node.op} {label(node)} are not known")
        inner = _ints(before[len(before) - taken :])
        if int(np.prod(inner)) != count:
            raise Refused(f"{node.op} {label(node)} mixes the channels")
        self._through(node, 0, _compressed(np.broadcast_to(block, sizes).reshape(inner)), fold)


def _along(index: Ints, place: int, node: Node) -> Ints:
    """The channels of `index`, all of which lie along the axis `place` from the end (1 is the last)."""
    if place < 1 or index.ndim < place or index.shape[-place] != index.size:
        raise Refused(f"the channels are not those of {node.op} {label(node)}")
    return index.reshape(-1)


def _fits(index: Ints, shape: tuple[int, ...]) -> bool:
    """Whether a constant of that shape has a value of its own for each channel."""
    if len(shape) < index.ndim:
        index = _trimmed(index)
    return len(shape) >= index.ndim and all(
        size in (1, there) for size, there in zip(index.shape[::-1], shape[::-1], strict=False)
    )


def _trimmed(index: Ints) -> Ints:
    """Without axes of length 1 in front."""
    leading = next((at for at, size in enumerate(index.shape) if size != 1), index.ndim - 1)
    return index.reshape(index.shape[leading:])


def _ints(shape: tuple[Any, ...]) -> list[int]:
    """The dims when all are known, else none."""
    return [int(dim) for dim in shape] if all(isinstance(dim, int) for dim in shape) else []


def _sizes(block: Ints, shape: tuple[Any, ...] | None) -> list[int] | None:
    """The lengths of the last axes that the channels lie in; None when one is not known or another."""
    dims: list[Any] = [None] * block.ndim if shape is None else list(shape[len(shape) - block.ndim :])
    sizes = [own if own != 1 else dim for own, dim in zip(block.shape, dims, strict=True)] if dims else []
    if len(sizes) != block.ndim or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    return [int(size) for size in sizes]


def _compressed(index: Ints) -> Ints:
    """With length 1 where all positions along an axis belong to one channel."""
    for axis in range(index.ndim):
        first = index.take([0], axis=axis)
        if np.array_equal(index, np.broadcast_to(first, index.shape)):
            index = first
    return index


_Rule = Callable[[Rescaler, Node, Ints, Fold], None]
_TABLE: dict[_Rule, str] = {
    Rescaler._conv: "Conv ConvTranspose",
    Rescaler._gemm: "Gemm",
    Rescaler._matmul: "MatMul",
    Rescaler._normalization: "LayerNormalization RMSNormalization SimplifiedLayerNormalization",
    Rescaler._by_channel: "BatchNormalization InstanceNormalization",
    Rescaler._sum: "Add Sub",
    Rescaler._product: "Mul Div",
    Rescaler._homogeneous: "Relu LeakyRelu PRelu Identity Dropout Neg",
    Rescaler._pool: "MaxPool AveragePool GlobalAveragePool GlobalMaxPool",
    Rescaler._pad: "Pad",
    Rescaler._transpose: "Transpose",
    Rescaler._reshape: "Reshape Flatten Squeeze Unsqueeze",
}
_RULES: dict[tuple[str, str], _Rule] = {
    **{("", operator): rule for rule, line in _TABLE.items() for operator in line.split()},
    ("com.microsoft", "SkipLayerNormalization"): Rescaler._normalization,
}
