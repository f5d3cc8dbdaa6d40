"""Reductions inside If, Loop and Scan bodies, and the way their figures take out of them.

Per tensor four scalars: minimum, maximum, sum of magnitudes (also the only one of the three that reliably spreads NaN)
and number of elements. They are gathered into four vectors that leave through added outputs of the body:

    If      each branch returns its own vectors, and neutral values in the places of the other branch
    Loop    loop-carried state, combined in every iteration by Min, Max, Add, Add
    Scan    the same, as state variables

The vectors of a nested body are part of its parent's. Bodies of other nodes (SequenceMap) and of local functions offer
no such way out; their tensors are not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxopt.graph.names import Names
from onnxopt.graph.operators import opset_of
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable


@dataclass(frozen=True)
class Figure:
    """One of the four statistics: the operator that combines two of them, the value that changes nothing, its type."""

    name: str
    combine: str
    neutral: float
    dtype: type[np.generic]


FIGURES = (
    Figure("minimum", "Min", np.inf, np.float32),
    Figure("maximum", "Max", -np.inf, np.float32),
    Figure("absolutes", "Add", 0.0, np.float64),
    Figure("count", "Add", 0, np.int64),
)
# One tensor per figure, each scalar or a vector with one entry per tensor measured.
Bundle = tuple[Variable, ...]


# The nodes whose bodies let further outputs out.
_OPEN = frozenset({("", "If"), ("", "Loop"), ("", "Scan")})


class BodyInstrument:
    """Adds the reductions for `wanted`, tensors of inner bodies of `model`, which is changed in place.

    vectors: per node of the main graph that holds such bodies the four outputs it got, and the tensors that their
    entries measure.
    """

    def __init__(self, model: Model, wanted: Collection[Variable], names: Names):
        self.model = model
        self.names = names
        self.vectors: list[tuple[Bundle, list[Variable]]] = []
        self._homes = homes(model, wanted)
        self._homes.pop(model.graph, None)
        if not self._homes:
            return
        for node in list(model.graph.nodes):
            tensors: list[Variable] = []
            vectors = self._leave(node, tensors)
            if vectors is not None:
                self.vectors.append((vectors, tensors))

    def _add(
        self, body: Graph, op: str, inputs: Sequence[Variable | Constant], dtype: object, **attrs: object
    ) -> Variable:
        output = Variable(self.names.tensor(f"calibration_{op.lower()}"), dtype=dtype)
        node = Node(op=op, name=self.names.node(f"calibration_{op.lower()}"), attrs=attrs)
        node.inputs = list(inputs)
        node.outputs = [output]
        body.nodes.append(node)
        return output

    def _constant(self, values: npt.NDArray[np.generic]) -> Constant:
        return Constant(self.names.tensor("calibration_constant"), TensorData.from_array(values))

    def _reduce(self, body: Graph, tensor: Variable) -> Bundle:
        """Four scalars of one tensor, in the types of FIGURES."""
        if tensor.dtype is None or np.dtype(tensor.dtype) != np.float32:
            tensor = self._add(body, "Cast", [tensor], np.float32, to=1)
        low = self._add(body, "ReduceMin", [tensor], np.float32, keepdims=0)
        high = self._add(body, "ReduceMax", [tensor], np.float32, keepdims=0)
        absolutes = self._add(body, "ReduceL1", [tensor], np.float32, keepdims=0)
        absolutes = self._add(body, "Cast", [absolutes], np.float64, to=11)
        count = self._add(body, "Size", [tensor], np.int64)
        bundle = (low, high, absolutes, count)
        for scalar in bundle:
            scalar.shape = []
        return bundle

    def _leave(self, node: Node, tensors: list[Variable]) -> Bundle | None:
        """Bring the statistics of the bodies in `node` out of it; appends what they measure to `tensors`."""
        if node.kind not in _OPEN:
            return None
        bodies = list(node.graphs())
        inside: list[tuple[Graph, Bundle | None, int]] = []
        for body in bodies:
            before = len(tensors)
            bundle = self._vectors(body, tensors)
            inside.append((body, bundle, len(tensors) - before))
        if all(bundle is None for _, bundle, _ in inside):
            return None
        if node.op == "If":
            return self._leave_if(node, inside)
        return self._leave_loop(node, *inside[0])

    def _vectors(self, body: Graph, tensors: list[Variable]) -> Bundle | None:
        """Four vectors of everything measured in `body` and the bodies within it."""
        parts: list[Bundle] = []
        axis = self._constant(np.array([0], np.int64))
        for tensor in self._homes.get(body, []):
            scalars = self._reduce(body, tensor)
            parts.append(
                tuple(self._add(body, "Unsqueeze", [s, axis], s.dtype) for s in scalars)
                if self.model.opset >= 13
                else tuple(self._add(body, "Unsqueeze", [s], s.dtype, axes=[0]) for s in scalars)
            )
            tensors.append(tensor)
        for node in list(body.nodes):
            vectors = self._leave(node, tensors)
            if vectors is not None:
                parts.append(vectors)
        if not parts:
            return None
        return tuple(
            self._add(body, "Concat", [part[i] for part in parts], figure.dtype, axis=0)
            for i, figure in enumerate(FIGURES)
        )

    def _leave_if(self, node: Node, inside: list[tuple[Graph, Bundle | None, int]]) -> Bundle:
        total = sum(size for _, _, size in inside)
        start = 0
        for body, bundle, size in inside:
            for i, figure in enumerate(FIGURES):
                before = self._constant(np.full(start, figure.neutral, figure.dtype))
                after = self._constant(np.full(total - start - size, figure.neutral, figure.dtype))
                middle = [] if bundle is None else [bundle[i]]
                merged = self._add(body, "Concat", [before, *middle, after], figure.dtype, axis=0)
                merged.shape = [total]
                body.outputs.append(merged)
            start += size
        return self._node_outputs(node, total)

    def _leave_loop(self, node: Node, body: Graph, bundle: Bundle | None, total: int) -> Bundle:
        """State variables of a Loop, whose body inputs start with (iteration, condition), or of a Scan."""
        assert bundle is not None
        loop = node.op == "Loop"
        scanned = int(node.attrs.get("num_scan_inputs", 0))
        states = len(node.inputs) - (2 if loop else scanned)
        node_at, inner_in, inner_out = (2 + states, 2 + states, 1 + states) if loop else (states, states, states)
        outputs = self._node_outputs(node, total, at=states)
        for i, figure in enumerate(FIGURES):
            initial = self._constant(np.full(total, figure.neutral, figure.dtype))
            state = Variable(self.names.tensor(f"calibration_{figure.name}"), figure.dtype, [total])
            updated = self._add(body, figure.combine, [state, bundle[i]], figure.dtype)
            updated.shape = [total]
            node.inputs.insert(node_at + i, initial)
            body.inputs.insert(inner_in + i, state)
            body.outputs.insert(inner_out + i, updated)
        body.listed_inputs = list(body.inputs)  # written in this order: the position is the meaning
        return outputs

    def _node_outputs(self, node: Node, total: int, at: int | None = None) -> Bundle:
        outputs = [Variable(self.names.tensor(f"calibration_{f.name}"), f.dtype, [total]) for f in FIGURES]
        position = len(node.outputs) if at is None else at
        for i, output in enumerate(outputs):
            node.outputs.insert(position + i, output)
        return tuple(outputs)


def homes(model: Model, wanted: Collection[Variable]) -> dict[Graph, list[Variable]]:
    """The body in which each wanted tensor is produced, or is an input."""
    found: dict[Graph, list[Variable]] = {}
    for body in model.bodies():
        owned = [*body.inputs, *(output for node in body.nodes for output in node.outputs)]
        mine = [tensor for tensor in owned if tensor in wanted]
        if mine:
            found[body] = mine
    return found


def closed(body: Graph) -> str | None:
    """Why nothing in `body` can be measured; None where it can."""
    if body.function is not None:
        return "is in a local function"
    inner = body
    while inner.owner is not None and inner.parent is not None:
        if inner.owner.kind not in _OPEN:
            return f"is in the body of a {inner.owner.op}, which is not measured"
        if inner.owner.op == "Scan" and opset_of(inner.parent) < 9:  # it works on batches, and so would its states
            return "is in the body of a Scan of opset 8, which is not measured"
        inner = inner.parent
    return None
