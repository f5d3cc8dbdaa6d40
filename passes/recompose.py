"""Make one operator of the small ones that exporters write for it.

    LayerNormalization (opset 17)    (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias, over the last axis
    Gelu (opset 20)                  x / 2 * (1 + erf(x / sqrt(2))), and its approximation by tanh
    Softmax (opset 13)               e / sum(e) with e = exp(x - max(x))
    HardSigmoid                      clip(x * a + b, 0, 1)
    LeakyRelu, PRelu                 relu(x) - a * relu(-x)

    Before                                                     After
    d = Sub(x, ReduceMean(x))    v = ReduceMean(Pow(d, 2))     y = LayerNormalization(x, w, b)
    n = Div(d, Sqrt(Add(v, e)))  y = Add(Mul(n, w), b)

Float32 only: operators on narrower types keep more digits between their steps. `contrib=true` also takes the Gelu that
onnxruntime has for opsets before 20, which other runtimes do not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxopt.model import Constant, Model, Node
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.rewriting import LOOKS_ALIKE, REST, Make, Match, Rule, View, any_of, constant, number, op, rewrite, tensor
from onnxopt.rewriting.pattern import scalar
from onnxopt.rewriting.shapes import spreads_over
from onnxopt.rewriting.view import integers

x = tensor("x")
# constants are written with about six digits
_NEAR = 1e-5


@dataclass(frozen=True)
class Recompose(Pass):
    """Make one LayerNormalization, Gelu, Softmax, HardSigmoid or PRelu of the small nodes that stand for it."""

    name: ClassVar[str] = "recompose"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)
    contrib: bool = option(False, "before opset 20, write the Gelu that onnxruntime alone knows")

    @property
    def effect(self) -> Effect:
        """The same value, rounded in other places."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Recompose in all bodies."""
        result = rewrite(model, [_LayerNorm(), _Gelu(self.contrib), _Softmax(), _HardSigmoid(), _LeakyRelu()], context)
        if any(node.kind == ("com.microsoft", "Gelu") for body in model.bodies() for node in body.nodes):
            model.import_opset("com.microsoft", model.opset_imports.get("com.microsoft", 1))
        return result


class _Recomposing(Rule):
    done = "recomposed"


def _is_float32(found: Match, view: View) -> bool:
    return view.dtype(found["x"]) == np.dtype(np.float32)


def _along_last(node: Node, view: View) -> bool:
    """Whether a reduction goes along the last axis alone and keeps it."""
    axes, rank = integers(node, 1, "axes"), view.rank(node.inputs[0])
    if rank is None or axes is None or len(axes) != 1 or node.attrs.get("keepdims", 1) != 1:
        return False
    return axes[0] in (-1, rank - 1)


class _LayerNorm(_Recomposing):
    """See above; the product with a scale and the sum with a bias may be missing."""

    _centred = op("Sub", x, op("ReduceMean", x, REST, name="mean"), name="centred")
    _square = any_of(op("Pow", _centred, number(2)), op("Mul", _centred, _centred))
    _variance = op("ReduceMean", _square, REST, name="variance")
    _normal = op("Div", _centred, op("Sqrt", op("Add", _variance, constant("epsilon"))))
    _scaled = op("Mul", _normal, constant("scale"))
    pattern = op("Add", _scaled, constant("bias"))

    def check(self, found: Match, view: View) -> str | None:
        if view.opset(found.root) < 17:
            return "LayerNormalization exists from opset 17 on: convert_opset:opset=17"
        shape = view.shape(found["x"])
        if not _is_float32(found, view) or shape is None or scalar(found["epsilon"]) is None:
            return "its type is not float32, or its rank is not known"
        if not (_along_last(found["mean"], view) and _along_last(found["variance"], view)):
            return "it does not go along the last axis"
        flat = all(found[name].shape == found["scale"].shape for name in ("scale", "bias"))
        return (
            None if flat and found["scale"].shape == (shape[-1],) else "its scale and bias are no vectors of one length"
        )

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        epsilon = scalar(found["epsilon"])
        return make("LayerNormalization", found["x"], found["scale"], found["bias"], axis=-1, epsilon=epsilon)


class _Gelu(_Recomposing):
    """x / 2 * (1 + erf(x / sqrt(2))), or with tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))."""

    _root = any_of(op("Div", x, number(math.sqrt(2), _NEAR)), op("Mul", x, number(math.sqrt(0.5), _NEAR)))
    _erf = op("Add", op("Erf", _root, name="erf"), number(1))
    _cube = any_of(op("Pow", x, number(3)), op("Mul", x, op("Mul", x, x)))
    _inner = op("Add", x, op("Mul", _cube, number(0.044715, _NEAR)))
    _tanh = op("Add", op("Tanh", op("Mul", _inner, number(math.sqrt(2 / math.pi), _NEAR))), number(1))
    _gate = any_of(_erf, _tanh)
    _half = any_of(op("Mul", x, number(0.5)), op("Div", x, number(2)))
    pattern = (
        op("Mul", x, op("Mul", _gate, number(0.5))),
        op("Mul", op("Mul", x, _gate), number(0.5)),
        op("Div", op("Mul", x, _gate), number(2)),
        op("Mul", _half, _gate),
    )

    def __init__(self, contrib: bool) -> None:
        self.contrib = contrib

    def check(self, found: Match, view: View) -> str | None:
        if not _is_float32(found, view):
            return "its type is not float32"
        if view.opset(found.root) >= 20 or (self.contrib and found.get("erf") is not None):
            return None
        return "Gelu exists from opset 20 on: convert_opset:opset=20"

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        if view.opset(found.root) < 20:
            return make("Gelu", found["x"], domain="com.microsoft")
        return make("Gelu", found["x"], approximate="none" if found.get("erf") is not None else "tanh")


class _Softmax(_Recomposing):
    """exp(x - max(x)) / sum(exp(x - max(x)))."""

    _exp = op("Exp", op("Sub", x, op("ReduceMax", x, REST, name="max")), name="exp")
    pattern = op("Div", _exp, op("ReduceSum", _exp, REST, name="sum"))

    def check(self, found: Match, view: View) -> str | None:
        rank, axes = view.rank(found["x"]), [_axis(found[name]) for name in ("max", "sum")]
        if view.opset(found.root) < 13 or not _is_float32(found, view) or rank is None or None in axes:
            return LOOKS_ALIKE
        return None if len({axis % rank for axis in axes if axis is not None}) == 1 else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make("Softmax", found["x"], axis=_axis(found["sum"]))


def _axis(node: Node) -> int | None:
    axes = integers(node, 1, "axes")
    return axes[0] if axes is not None and len(axes) == 1 and node.attrs.get("keepdims", 1) == 1 else None


class _HardSigmoid(_Recomposing):
    """clip(x * a + b, 0, 1)."""

    _line = op("Add", op("Mul|Div", x, constant("a"), name="slope"), constant("b"))
    pattern = op("Clip", _line, REST, name="clip")

    def check(self, found: Match, view: View) -> str | None:
        numbers = [scalar(found[name]) for name in ("a", "b")]
        if None in numbers or not _is_float32(found, view) or found["slope"].inputs[0] is found["a"]:
            return LOOKS_ALIKE
        return None if _bounds(found["clip"]) == (0.0, 1.0) else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        slope, shift = scalar(found["a"]), scalar(found["b"])
        assert slope is not None
        return make("HardSigmoid", found["x"], alpha=1 / slope if found["slope"].op == "Div" else slope, beta=shift)


def _bounds(clip: Node) -> tuple[float | None, float | None]:
    if "min" in clip.attrs or "max" in clip.attrs:
        return clip.attrs.get("min"), clip.attrs.get("max")
    given = [scalar(tensor) for tensor in clip.inputs[1:3]]
    return (given[0], given[1]) if len(given) == 2 else (None, None)


class _LeakyRelu(_Recomposing):
    """relu(x) + a * relu(-x), where a is the slope below zero with its sign turned."""

    _below = any_of(
        op("Mul", op("Relu", op("Neg", x)), constant("a")),
        op("Mul", op("Relu", op("Neg", x)), op("Neg", constant("a"), name="turned")),
    )
    pattern = (op("Add", op("Relu", x), _below), op("Sub", op("Relu", x), _below, name="minus"))

    def check(self, found: Match, view: View) -> str | None:
        fits = spreads_over(found["a"].shape, view.shape(found["x"]))
        return None if fits and _is_float32(found, view) and view.opset(found.root) >= 9 else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        turns = (found.get("turned") is not None) + (found.get("minus") is not None)
        a: Constant = found["a"]
        slope = np.asarray(a.values if turns % 2 else -a.values)
        number = scalar(a)
        if number is not None:
            return make("LeakyRelu", found["x"], alpha=float(slope.reshape(-1)[0]))
        return make("PRelu", found["x"], make.constant(slope, f"{a.name}_slope"))
