"""Leave out optional inputs that hold what an operator assumes without them.

    Before                                               After
    s = Concat([2], Shape(x)[0:1], [128])                y = GRU(x, w, r, b)
    h = Expand(0.0, s)
    y = GRU(x, w, r, b, , h)

Recurrent layers start from zeros where no initial state is given, a Slice goes in steps of 1, a Pad fills with zero.
That a tensor is zero is seen through Expand, ConstantOfShape and whatever moves its elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxopt.model import Constant, Model, Variable
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, Make, Match, Rule, View, op, rewrite
from onnxopt.rewriting.view import is_given

_MOVING = "Expand|Slice|Reshape|Transpose|Unsqueeze|Squeeze|Flatten|Tile|Identity|Gather"
_DEEPEST = 16


@dataclass(frozen=True)
class EliminateDefaultInputs(Pass):
    """Leave out optional inputs that hold what an operator assumes without them."""

    name: ClassVar[str] = "eliminate_default_inputs"

    @property
    def effect(self) -> Effect:
        """Operators see the same values."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Look at all bodies."""
        return rewrite(model, [_ZeroState(), _StepsOfOne(), _ZeroFill()], context)


class _ZeroState(Rule):
    """GRU(x, ..., zeros) = GRU(x, ...)."""

    pattern = op("GRU|RNN|LSTM")
    done = "shortened"

    def check(self, found: Match, view: View) -> str | None:
        return None if any(_is_zero(found.root.inputs[at], view) for at in _states(found.root)) else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        node = found.root
        gone = [at for at in _states(node) if _is_zero(node.inputs[at], view)]
        inputs = [None if at in gone or tensor.is_empty() else tensor for at, tensor in enumerate(node.inputs)]
        while inputs and inputs[-1] is None:
            inputs.pop()
        made = make.several(node.op, *inputs, outputs=len(node.outputs), **node.attrs)
        used = [view.edits.is_used(old) for old in node.outputs]
        make.nodes[-1].outputs = [new if wanted else Variable.empty() for new, wanted in zip(made, used, strict=True)]
        return [new if wanted else None for new, wanted in zip(made, used, strict=True)]


def _states(node: Any) -> list[int]:
    return [at for at in ((5, 6) if node.op == "LSTM" else (5,)) if is_given(node, at)]


class _StepsOfOne(Rule):
    """Slice(x, starts, ends, axes, ones) = Slice(x, starts, ends, axes)."""

    pattern = op("Slice")
    done = "shortened"

    def check(self, found: Match, view: View) -> str | None:
        steps = found.root.inputs[4] if is_given(found.root, 4) else None
        return None if isinstance(steps, Constant) and bool(np.all(steps.values == 1)) else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        inputs = [None if tensor.is_empty() else tensor for tensor in found.root.inputs[:4]]
        return make.like(found.root, *(inputs if inputs[3] is not None else inputs[:3]))


class _ZeroFill(Rule):
    """Pad(x, pads, 0) = Pad(x, pads)."""

    pattern = op("Pad")
    done = "shortened"

    def check(self, found: Match, view: View) -> str | None:
        if not is_given(found.root, 2) or is_given(found.root, 3):
            return LOOKS_ALIKE
        return None if _is_zero(found.root.inputs[2], view) else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make.like(found.root, *found.root.inputs[:2])


def _is_zero(tensor: Any, view: View) -> bool:
    """Whether all elements are certainly 0.0 (and not -0.0)."""
    for _ in range(_DEEPEST):
        if isinstance(tensor, Constant):
            return tensor.data.size > 0 and tensor.dtype.kind in "fiu" and not any(tensor.data.raw_bytes())
        filled = view.maker(tensor, "ConstantOfShape")
        if filled is not None:
            value = filled.attrs.get("value")
            return value is None or (isinstance(value, np.ndarray) and not any(value.tobytes()))
        node = view.maker(tensor, _MOVING)
        if node is None:
            return False
        tensor = node.inputs[0]
    return False
