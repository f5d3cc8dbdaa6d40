"""Fuse the small nodes that exporters write for hard swish and hard sigmoid.

    Before                                     After
    a = Add(x, 3)    c = Clip(a, 0, 6)         h = HardSigmoid(x) {alpha: 1/6, beta: 1/2}
    m = Mul(x, c)    y = Div(m, 6)             y = Mul(x, h)

and  Div(Clip(Add(x, 3), 0, 6), 6)  becomes one HardSigmoid, wherever it stands. Dividing may be multiplying by 1/6, and
it may come before the product. Float32 only: two passes over a tensor in place of four, rounded in other places. (Hard
swish: Howard et al. 2019, arXiv 1905.02244, section 5.2.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from onnx import AttributeProto

from onnxopt.graph import Names, NodeEdits, label
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip

# a factor is a sixth when it is as near as float32 comes, in digits that exporters write
_SIXTH = 1 / 6
_NEAR = 1e-6


@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """Fuse Add, Clip, Mul and Div into the HardSigmoid that they are."""

    name: ClassVar[str] = "fuse_hard_swish"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)

    @property
    def effect(self) -> Effect:
        """The same value, rounded in other places."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies."""
        model.normalize()
        changes: list[Change] = []
        skipped: list[Skip] = []
        outputs = {id(tensor) for body in model.bodies() for tensor in body.outputs}
        names = Names(model)
        for body in list(model.bodies()):
            members, edits = {id(node) for node in body.nodes}, NodeEdits(body)
            for clip in [node for node in body.nodes if node.kind == ("", "Clip") and _bounds(node) == (0.0, 6.0)]:
                source = _shifted(clip)
                if source is None:
                    continue
                found = _Chain(members, outputs).scaled(clip, source)
                if isinstance(found, str):
                    skipped.append(Skip(label(clip), found))
                    continue
                changes.append(_fuse(clip, source, found, edits, names))
            edits.write()
        return PassResult(changes, skipped)


@dataclass(frozen=True)
class _Scaled:
    """What follows a Clip, in order: nodes that go. product: whether the source is multiplied in."""

    nodes: tuple[Node, ...]
    product: bool


@dataclass(frozen=True)
class _Chain:
    """Follows tensors that one node of the body reads, and nothing else."""

    members: set[int]
    outputs: set[int]

    def scaled(self, clip: Node, source: Variable) -> _Scaled | str:
        """The division by 6 behind a Clip, with a product with the source before or none; in words, what is missing."""
        shift = clip.inputs[0].inputs[0]
        if self._reader(shift.outputs[0]) is not clip:
            return "what it clips is read elsewhere too"
        reader = self._reader(clip.outputs[0])
        if reader is None:
            return "its result is read elsewhere too"
        if _divides(reader, clip.outputs[0]):
            return _Scaled((reader,), product=False)
        if reader.kind != ("", "Mul") or source not in reader.inputs:
            return f"{reader.op} {label(reader)} follows, neither a product with its source nor a division by 6"
        division = self._reader(reader.outputs[0])
        if division is None or not _divides(division, reader.outputs[0]):
            return "its product with its source is not divided by 6"
        return _Scaled((reader, division), product=True)

    def _reader(self, tensor: Variable) -> Node | None:
        if id(tensor) in self.outputs or len(tensor.outputs) != 1 or id(tensor.outputs[0]) not in self.members:
            return None
        reader: Node = tensor.outputs[0]
        return reader


def _bounds(clip: Node) -> tuple[float | None, float | None]:
    """Lower and upper bound of a Clip, None where there is none or it is not known. Attributes before opset 11."""
    found: list[float | None] = []
    for at, name in ((1, "min"), (2, "max")):
        given = clip.attrs.get(name)
        if given is not None:
            found.append(None if isinstance(given, AttributeProto) else float(given))
        else:
            found.append(_number(clip.inputs[at]) if at < len(clip.inputs) else None)
    return found[0], found[1]


def _shifted(clip: Node) -> Variable | None:
    """x where the Clip reads x + 3."""
    add = next(iter(clip.inputs[0].inputs), None)
    if add is None or add.kind != ("", "Add"):
        return None
    for at in (0, 1):
        if _number(add.inputs[at]) == 3.0 and isinstance(add.inputs[1 - at], Variable):
            source: Variable = add.inputs[1 - at]
            return source
    return None


def _divides(node: Node, tensor: Variable) -> bool:
    """Whether the node is tensor / 6."""
    if node.kind == ("", "Div"):
        return node.inputs[0] is tensor and _number(node.inputs[1]) == 6.0
    if node.kind != ("", "Mul"):
        return False
    other = _number(node.inputs[1] if node.inputs[0] is tensor else node.inputs[0])
    return other is not None and abs(other / _SIXTH - 1) < _NEAR


def _number(tensor: Any) -> float | None:
    """The value of a float32 constant of one element that has no more axes than what it is combined with may have."""
    if not isinstance(tensor, Constant) or tensor.dtype != np.float32 or tensor.data.size != 1 or len(tensor.shape) > 1:
        return None
    return float(tensor.values.reshape(-1)[0])


def _fuse(clip: Node, source: Variable, found: _Scaled, edits: NodeEdits, names: Names) -> Change:
    shift = clip.inputs[0].inputs[0]
    output = found.nodes[-1].outputs[0]
    name = label(clip)
    going = ", ".join(f"{node.op} {label(node)}" for node in (shift, *found.nodes))
    gate = (
        Variable(names.tensor(f"{output.name}_gate"), dtype=output.dtype, shape=output.shape)
        if found.product
        else output
    )
    last = found.nodes[-1]
    sigmoid = Node(
        "HardSigmoid", names.node(f"{name}_HardSigmoid"), {"alpha": float(np.float32(1 / 6)), "beta": 0.5}, [source]
    )
    added = [sigmoid]
    if found.product:
        added.append(Node("Mul", names.node(f"{name}_Mul"), inputs=[source, gate]))
    edits.insert_before(last, added)
    last.outputs = []
    sigmoid.outputs = [gate]
    if found.product:
        added[-1].outputs = [output]
    for node in reversed((shift, clip, *found.nodes)):
        edits.remove(node)
    return Change("fused", name, f"with {going} into HardSigmoid")
