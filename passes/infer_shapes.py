"""Write types and shapes of inner tensors into the file, for viewers and tools that do not infer them.

What follows from the declared inputs, by onnx's shape inference, stands in `value_info` after it, in all bodies.
Descriptions that the file has are left as they are, and so are tensors of which nothing follows. Lengths that inference
only gave a name of its own stay open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnx import ValueInfoProto, helper

from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Graph, Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip

# How onnx's shape inference names a length that it knows nothing of.
_PLACEHOLDER = "unk__"


@dataclass(frozen=True)
class InferShapes(Pass):
    """Write types and shapes of inner tensors into the file."""

    name: ClassVar[str] = "infer_shapes"

    @property
    def effect(self) -> Effect:
        """Descriptions compute nothing."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Describe what is known and not described."""
        model.normalize()
        facts = known(model)
        changes: list[Change] = []
        skipped: list[Skip] = []
        for body in model.bodies():
            if body.function is not None:
                if body is body.function:
                    skipped.append(Skip(body.name, "tensors of a local function take the types of each call"))
                continue
            new = _descriptions(body, facts)
            if new:
                body.value_infos = [*body.value_infos, *new]
                changes.append(Change("described", body.name, f"{len(new)} tensors", len(new)))
        return PassResult(changes, skipped)


def _descriptions(body: Graph, facts: dict[int, Fact]) -> list[tuple[Any, ValueInfoProto]]:
    """(tensor, description) of each tensor that nodes of the body make and nothing describes yet, in their order."""
    given = {id(tensor) for tensor, _ in body.value_infos} | {id(tensor) for tensor in body.outputs}
    found = []
    for node in body.nodes:
        for tensor in node.outputs:
            fact = facts.get(id(tensor), Fact())
            if tensor.is_empty() or id(tensor) in given or fact.dtype is None or fact.shape is None:
                continue
            dims = [None if isinstance(dim, str) and dim.startswith(_PLACEHOLDER) else dim for dim in fact.shape]
            kind = helper.np_dtype_to_tensor_dtype(fact.dtype)
            tensor.info = helper.make_tensor_value_info(tensor.name, kind, dims)
            found.append((tensor, tensor.info))
    return found
