"""Put the branch that is always taken in the place of its If.

    Before                                                      After
    y = If(true) {then_branch: {p = Relu(x)}, else_branch: ...}      y = Relu(x)

Nodes, initializers and descriptions of the branch move to the body that holds the If; where names would meet, those of
the branch change.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxopt.model import Graph, Model
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, Make, Match, Rule, View, constant, op, rewrite


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
        return rewrite(model, [_ConstantIf(model)], context)


class _ConstantIf(Rule):
    """If(true, A, B) = A."""

    pattern = op("If", constant("condition"))
    copies = True
    done = "flattened"

    def __init__(self, model: Model) -> None:
        self.names = Counter(tensor.name for body in model.bodies() for tensor in _defined(body))

    def check(self, found: Match, view: View) -> str | None:
        return None if found["condition"].data.size == 1 else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        taken = bool(found["condition"].values.reshape(-1)[0])
        branch = found.root.attrs["then_branch" if taken else "else_branch"]
        self._rename(branch, make)
        outer = view.body(found.root)
        outer.value_infos += branch.value_infos
        results = list(branch.outputs)
        for body in (found.root.attrs["then_branch"], found.root.attrs["else_branch"]):
            view.edits.forget(body)
        make.nodes += branch.nodes
        branch.nodes, branch.outputs = [], []
        return results

    def _rename(self, branch: Graph, make: Make) -> None:
        for tensor in _defined(branch):
            if self.names[tensor.name] > 1:
                self.names[tensor.name] -= 1
                tensor.name = make.edits.names.tensor(tensor.name)


def _defined(body: Graph) -> list[Any]:
    made = [tensor for node in body.nodes for tensor in node.outputs if not tensor.is_empty()]
    return [*body.inputs, *body.initializers, *made]
