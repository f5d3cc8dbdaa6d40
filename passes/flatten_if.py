"""Put the branch that is always taken in the place of its If.

    Before                                                      After
    y = If(true) {then_branch: {p = Relu(x)}, else_branch: ...}      y = Relu(x)

A branch is also taken always where the other one gives a tensor of a rank that what reads it can't take: a recurrent
layer takes three axes, whatever the condition was. Nodes, initializers and descriptions of the branch move to the body
that holds the If; where names would meet, those of the branch change.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, Make, Match, Rule, View, op, rewrite
from onnxopt.rewriting.view import integers, is_given


@dataclass(frozen=True)
class FlattenIf(Pass):
    """Put the branch that is always taken in the place of its If."""

    name: ClassVar[str] = "flatten_if"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)

    @property
    def effect(self) -> Effect:
        """The same nodes run."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Flatten in all bodies, within flattened branches too."""
        return rewrite(model, [_OneWayIf(model)], context)


class _OneWayIf(Rule):
    """If(true, A, B) = A."""

    pattern = op("If")
    copies = True
    done = "flattened"

    def __init__(self, model: Model) -> None:
        self.model = model
        # what conditions must be wherever a body runs: (condition, value, body)
        self.forced: list[tuple[Any, bool, Graph]] = []

    @cached_property
    def names(self) -> Counter[str]:
        """How often each name of a tensor is given."""
        return Counter(tensor.name for body in self.model.bodies() for tensor in _defined(body))

    @cached_property
    def node_names(self) -> Counter[str]:
        """How often each name of a node is given."""
        return Counter(node.name for body in self.model.bodies() for node in body.nodes)

    def check(self, found: Match, view: View) -> str | None:
        return LOOKS_ALIKE if self._taken(found.root, view) is None else None

    def _taken(self, node: Node, view: View) -> bool | None:
        condition = node.inputs[0]
        if isinstance(condition, Constant):
            return bool(condition.values.reshape(-1)[0]) if condition.data.size == 1 else None
        source, negated = _source(condition, view)
        body = view.body(node)
        enclosing = {id(each) for each in body.ancestors()}
        for known, value, where in self.forced:
            if known is source and id(where) in enclosing:
                return value != negated
        forced = _forced(node, view)
        if forced is not None:
            self.forced.append((source, forced != negated, body))
        return forced

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        node = found.root
        taken = node.attrs["then_branch" if self._taken(node, view) else "else_branch"]
        self._rename(taken, make)
        view.body(node).value_infos += taken.value_infos
        results = list(taken.outputs)
        for body in (node.attrs["then_branch"], node.attrs["else_branch"]):
            view.edits.forget(body)
        make.nodes += taken.nodes
        taken.nodes, taken.outputs = [], []
        return results

    def _rename(self, branch: Graph, make: Make) -> None:
        for tensor in _defined(branch):
            if self.names[tensor.name] > 1:
                self.names[tensor.name] -= 1
                tensor.name = make.edits.names.tensor(tensor.name)
        for node in branch.nodes:
            if node.name and self.node_names[node.name] > 1:
                self.node_names[node.name] -= 1
                node.name = make.edits.names.node(node.name)


def _source(condition: Any, view: View) -> tuple[Any, bool]:
    """The tensor that a condition is a copy of, and whether it is negated on the way."""
    negated = False
    while (node := view.maker(condition, "Identity|Cast|Not")) is not None:
        if node.op == "Cast" and view.dtype(node.inputs[0]) != np.dtype(bool):
            break
        condition, negated = node.inputs[0], negated != (node.op == "Not")
    return condition, negated


def _defined(body: Graph) -> list[Any]:
    made = [tensor for node in body.nodes for tensor in node.outputs if not tensor.is_empty()]
    return [*body.inputs, *body.initializers, *made]


def _forced(node: Node, view: View) -> bool | None:
    """What the condition must be for the outputs to have the ranks that they are read with; None where either may be.

    Only readers beside the If count: they run whenever it does.
    """
    branches = node.attrs["then_branch"], node.attrs["else_branch"]
    for at, tensor in enumerate(node.outputs):
        needed = None if tensor.is_empty() else _needed_rank(tensor, view.body(node), view)
        if needed is None:
            continue
        ranks = [view.rank(branch.outputs[at]) for branch in branches]
        if None not in ranks and (ranks[0] == needed) != (ranks[1] == needed):
            return ranks[0] == needed
    return None


def _needed_rank(tensor: Any, body: Graph, view: View) -> int | None:
    """The rank that a reader of the tensor, in the same body, can take alone; None where none says."""
    offset = 0
    while True:
        readers = [node for node in tensor.outputs if view.edits.home.get(id(node)) is body and node.kind[0] == ""]
        for node in readers:
            rank = _taken_rank(node, tensor)
            if rank is not None:
                return rank - offset
        step = next((node for node in readers if node.op == "Unsqueeze" and node.inputs[0] is tensor), None)
        axes = None if step is None else integers(step, 1, "axes")
        if step is None or axes is None:
            return None
        offset += len(axes)
        tensor = step.outputs[0]


def _taken_rank(node: Node, tensor: Any) -> int | None:
    if node.op in ("LSTM", "GRU", "RNN"):
        return 3 if any(is_given(node, at) and node.inputs[at] is tensor for at in (0, 5, 6)) else None
    if node.op == "Conv" and node.inputs[0] is tensor and isinstance(node.inputs[1], Constant):
        return len(node.inputs[1].shape)
    return 2 if node.op == "Gemm" and tensor in node.inputs[:2] else None
