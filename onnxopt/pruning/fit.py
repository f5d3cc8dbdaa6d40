"""New weights for layers whose inputs go: what stays makes up for what is gone.

    refit        W_S + W_D A, b + W_D c     the best linear prediction of x_D from x_S (`numerics.elimination`)
    mean fold    W_S,         b + W_D m     x_D is taken for its mean
    neither      W_S,         b             x_D is taken for zero

Only values change here: weights on channels that go are zero then, so that the model computes what it will compute
without them, and can be judged before anything is cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnxopt.calibration.channels import Moments
from onnxopt.graph.axes import AxisMaps, Product, Reader
from onnxopt.graph.axes.axis import Floats, Mask
from onnxopt.graph.edit import drop_unused, insert_before, remove_node
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.numerics.elimination import RIDGE, damped, prediction
from onnxopt.pruning.groups import Group
from onnxopt.pruning.order import kept
from onnxopt.pruning.reads import Read, Slot, energy, slot_of

# how the weights that stay make up for those that go
REFIT, MEAN_FOLD, NOTHING = "refit", "mean fold", "nothing"


class Fitting:
    """Applies removals to the values of a model, and takes them back.

    trust: for how many rows of the moments each row counts. Shrinking by the number of rows is safe and may be too
    much; which trust is best is found on feeds that are not fitted to.
    """

    trust: float = 1.0

    def __init__(self, model: Model, maps: AxisMaps, reads: Iterable[Read], moments: Mapping[Read, Moments]) -> None:
        self.model, self._maps = model, maps
        reads = list(reads)
        self._moments = _shared(reads, moments)
        self._readers: dict[int, list[Read]] = defaultdict(list)
        self._first: dict[int, Constant] = {}
        for read in reads:
            self._readers[id(read.reader)].append(read)
            self._first[id(read.reader)] = read.node.inputs[read.reader.index]
        self._slots: dict[int, Slot | None] = {}
        self._given: dict[int, Floats] = {}  # what the bias took, by reader [groups, rows]
        self._undo: list[Callable[[], None]] = []
        self._masks: list[Callable[[], None]] = []
        self._made: list[Constant] = []

    def apply(self, gone: set[int], how: str, groups: Sequence[Group] = ()) -> None:
        """Zero what `gone` contribute and make up for it. groups: whose products of two tensors are masked as well."""
        for reads in self._readers.values():
            if any(not kept(read.roots, gone).all() for read in reads):
                self._fit(reads, gone, how)
        for product in {id(product): product for group in groups for product in group.products}.values():
            self._mask(product, gone)

    def restore(self, mark: int = 0) -> None:
        """Undo everything that was applied, or what was since `mark`."""
        while len(self._undo) > mark:
            self._undo.pop()()
        if mark == 0:
            self._unmask()

    def mark(self) -> int:
        """A place for `restore` to come back to."""
        return len(self._undo)

    def keep(self) -> None:
        """What was applied to weights and biases stays; factors of products are no longer masked."""
        self._undo.clear()
        self._unmask()
        self._share()

    def is_shared(self, read: Read) -> bool:
        """Whether other layers read the same weights."""
        first = self._first[id(read.reader)]
        return sum(other is first for other in self._first.values()) > 1

    def _share(self) -> None:
        """Layers that read one constant and were given the same values read one constant again."""
        made: dict[tuple[int, bytes], Constant] = {}
        for reads in self._readers.values():
            reader = reads[0].reader
            now = reader.node.inputs[reader.index]
            key = id(self._first[id(reader)]), np.asarray(now.values).tobytes()
            reader.node.inputs[reader.index] = made.setdefault(key, now)

    def clean(self) -> None:
        """Take values that were tried and not kept out of the model."""
        drop_unused(self._made, self.model)
        self._made.clear()

    def has_slot(self, read: Read) -> bool:
        """Whether the layer can take a constant."""
        return self._slot(read.reader) is not None

    def energy(self, read: Read) -> Floats:
        """W^T W [K, K] of the weights that a layer had at first."""
        return energy(self._spread(read.reader, self._first[id(read.reader)])[read.group])

    def first_fit(self, read: Read, keep: Mask) -> Floats:
        """T [K, kept] with x ~ T x_S: what stays as it is, what goes as it is predicted from that."""
        found = np.zeros((len(keep), int(keep.sum())))
        found[keep, np.arange(found.shape[1])] = 1.0
        moments = self._moments.get(read)
        if moments is not None and not keep.all() and keep.any():
            found[~keep] = prediction(self._trusted(moments, self.has_slot(read)), keep)
        return found

    def transform(self, read: Read, keep: Mask, estimate: Floats, offset: Floats) -> None:
        """Give a layer W T [rows, kept] and b + W c, of the weights and the bias that it had at first.

        estimate: T [K, kept]; offset: c [K], for layers that can take a constant.
        """
        reader = read.reader
        weights = self._spread(reader, reader.node.inputs[reader.index])
        first = self._spread(reader, self._first[id(reader)])[read.group]
        own = np.broadcast_to(reader.own, weights.shape)[read.group] if reader.own is not None else np.False_
        moved = np.where(own, 0.0, first)
        weights[read.group] = np.where(own & keep[None, :, None], first, 0.0)
        weights[read.group][:, keep] += np.einsum("rdk,ds->rsk", moved, estimate)
        amounts = np.array(self._given.get(id(reader), np.zeros(weights.shape[:2])))
        amounts[read.group] = np.einsum("rdk,d->r", moved, offset)
        self._write(reader, weights, amounts)

    def _slot(self, reader: Reader) -> Slot | None:
        if id(reader) not in self._slots:
            self._slots[id(reader)] = slot_of(reader, self.model)
        return self._slots[id(reader)]

    def _spread(self, reader: Reader, constant: Constant) -> Floats:
        return np.array(reader.spread(np.asarray(constant.values)), np.float64)

    def _fit(self, reads: Sequence[Read], gone: set[int], how: str) -> None:
        reader = reads[0].reader
        slot = self._slot(reader)
        weights = self._spread(reader, reader.node.inputs[reader.index])
        moved = np.where(reader.own, 0.0, weights) if reader.own is not None else weights
        amounts = np.zeros(weights.shape[:2])
        for read in reads:
            keep = kept(read.roots, gone)
            amounts[read.group] = self._fit_one(read, keep, weights[read.group], moved[read.group], how, slot)
        self._write(reader, weights, amounts)

    def _write(self, reader: Reader, weights: Floats, amounts: Floats) -> None:
        """Set the weights of a layer, and what its bias takes in all; `restore` undoes it."""
        node, slot = reader.node, self._slot(reader)
        nodes = [node] if slot is None or slot.node is node else [node, slot.node]
        before = [(each, list(each.inputs)) for each in nodes]
        given = self._given.get(id(reader))

        def undo() -> None:
            for each, inputs in before:
                each.inputs.clear()
                each.inputs.extend(inputs)
            if given is None:
                self._given.pop(id(reader), None)
            else:
                self._given[id(reader)] = given

        self._undo.append(undo)
        known = {id(tensor) for each in nodes for tensor in each.inputs}
        old = node.inputs[reader.index]
        node.inputs[reader.index] = Constant(old.name, reader.gather(weights, old.values).astype(old.dtype))
        added = amounts if given is None else amounts - given
        if slot is not None and added.any():
            slot.add(added.reshape(-1))
            self._given[id(reader)] = amounts
        new = (tensor for each in nodes for tensor in each.inputs if id(tensor) not in known)
        self._made += [tensor for tensor in new if isinstance(tensor, Constant)]

    def _fit_one(self, read: Read, keep: Mask, weights: Floats, moved: Floats, how: str, slot: Slot | None) -> Floats:
        """Change `weights` [rows, K, taps] in place; returns what the bias takes [rows]."""
        taken = np.array(moved[:, ~keep])
        weights[:, ~keep] = 0
        moments = self._moments.get(read)
        if moments is None or how == NOTHING or keep.all():
            return np.zeros(len(weights))
        means = moments.mean[~keep]
        if how == REFIT and keep.any():
            share = prediction(self._trusted(moments, slot is not None), keep)
            weights[:, keep] += np.einsum("rdk,ds->rsk", taken, share)
            means = means - share @ moments.mean[keep]
        return np.einsum("rdk,d->r", taken, means) if slot is not None else np.zeros(len(weights))

    def _trusted(self, moments: Moments, centred: bool) -> Floats:
        """What to predict by: covariances as far as they were seen, about the means or, where none fits in, about 0."""
        found = damped(moments.covariance, round(moments.rows * self.trust))
        if centred:
            return found
        mean = moments.mean
        return np.asarray(found + np.outer(mean, mean) + RIDGE * np.mean(mean**2) * np.eye(len(mean)))

    def _mask(self, product: Product, gone: set[int]) -> None:
        """Zero channels in one factor of a product, for a trial."""
        node = product.node
        if node is None or not product.factors or kept(self._maps.channels.roots(product.channels), gone).all():
            return
        index, at = product.factors[0]
        tensor = node.inputs[index]
        keep = kept(self._maps.channels.roots(self._maps.of(tensor)[at].channels), gone)
        shape = [-1 if axis == at else 1 for axis in range(len(tensor.shape))]
        dtype = tensor.dtype if tensor.dtype is not None else np.dtype(np.float32)
        mask = Constant(f"{tensor.name}_kept", keep.reshape(shape).astype(dtype))
        masked = Variable(f"{tensor.name}_masked", dtype, list(tensor.shape))
        body = next(body for body in self.model.bodies() if any(other is node for other in body.nodes))
        mul = Node("Mul", f"{tensor.name}_mask")
        insert_before(node, [mul], body)
        mul.inputs, mul.outputs = [tensor, mask], [masked]
        node.inputs[index] = masked

        def undo() -> None:
            node.inputs[index] = tensor
            remove_node(mul, body)

        self._masks.append(undo)
        self._made.append(mask)

    def _unmask(self) -> None:
        while self._masks:
            self._masks.pop()()


def _shared(reads: Iterable[Read], moments: Mapping[Read, Moments]) -> dict[Read, Moments]:
    """Readers of one constant must get the same weights, so they are fitted to what all of them see."""
    found = dict(moments)
    by_constant: dict[tuple[int, int, bytes], list[Read]] = defaultdict(list)
    for read in reads:
        if read in found:
            by_constant[id(read.node.inputs[read.reader.index]), read.group, read.roots.tobytes()].append(read)
    for sharing in by_constant.values():
        if len(sharing) > 1:
            joined = found[sharing[0]]
            for read in sharing[1:]:
                joined = joined.joined(found[read])
            found.update(dict.fromkeys(sharing, joined))
    return found
