"""Fuse sums and products with one number per channel into the layer beside them.

Behind a layer, with s and t along its output channels:   (W x + b) s + t = (W s) x + (b s + t)
Before a layer, with s along its input channels:          W (x s) + b = (W s) x + b

    Before                               After
    t = Conv(x, W, b)                    y = Conv(x, W', b')
    u = Mul(t, s)    s: float[C,1,1]
    y = Add(u, c)    c: float[C,1,1]

Layers: Conv, ConvTranspose, Gemm, and MatMul by a constant, which takes factors only. A BatchNormalization that such a
step kept from its layer goes in after it. Sums before a layer stay: x - mean may cancel digits that W x and W mean have
lost. Everything is computed in float64 and rounded once. Weights that another layer reads too stay, for a second copy
of them would make the model larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxopt.graph import label, operators
from onnxopt.model import Constant, Model, Node
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, REST, Make, Match, Rule, View, constant, op, rewrite, tensor
from onnxopt.rewriting.view import is_given

Doubles = NDArray[np.float64]
_LAYERS = "Conv|ConvTranspose|Gemm|MatMul"


@dataclass(frozen=True)
class FuseMulAdd(Pass):
    """Fuse Mul, Add, Sub and Div by one number per channel into the layer beside them."""

    name: ClassVar[str] = "fuse_mul_add"
    prepare: ClassVar[tuple[str, ...]] = ("fold_constants",)

    @property
    def effect(self) -> Effect:
        """Products are associated differently."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies."""
        return rewrite(model, [_Behind(), _Before()], context)


@dataclass(frozen=True)
class _Step:
    """x * scale + shift, each one number or one per channel."""

    scale: Doubles
    shift: Doubles

    @property
    def only_shifts(self) -> bool:
        return bool(np.all(self.scale == 1))


def _step(node: Node, c: Constant, axis: int, rank: int) -> _Step | None:
    """What a node does with the constant c, whose values lie along `axis`; None where they lie otherwise."""
    shape = (*[1] * (rank - len(c.shape)), *c.shape)
    if len(shape) != rank or any(dim != 1 for at, dim in enumerate(shape) if at != axis) or c.dtype.kind != "f":
        return None
    values = np.asarray(c.values.astype(np.float64).reshape(-1))
    first = node.inputs[0] is c
    one, zero = np.ones(1), np.zeros(1)
    if node.op == "Mul":
        return _Step(values, zero)
    if node.op == "Add":
        return _Step(one, values)
    if node.op == "Sub":
        return _Step(-one, values) if first else _Step(one, -values)
    return None if first or not np.all(np.abs(values) > 0) else _Step(1 / values, zero)


def _normalization(node: Node) -> _Step | None:
    """What a BatchNormalization does; None in training, or where its variance is not positive."""
    if operators.is_training(node) or node.attrs.get("spatial", 1) != 1:
        return None
    scale, bias, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:])
    spread = variance + float(np.float32(node.attrs.get("epsilon", 1e-5)))
    if not np.all(spread > 0):
        return None
    factor = np.asarray(scale / np.sqrt(spread))
    return _Step(factor, np.asarray(bias - mean * factor))


class _Behind(Rule):
    """A layer and what follows it."""

    pattern = (
        op("Mul|Add", op(_LAYERS, name="layer"), constant("c")),
        op("Sub|Div", op(_LAYERS, name="layer"), constant("c")),
        op("Sub", constant("c"), op(_LAYERS, name="layer")),
        op("BatchNormalization", op(_LAYERS, name="layer"), constant(), constant(), constant(), constant()),
    )
    done = "fused"

    def check(self, found: Match, view: View) -> str | None:
        return _as_reason(_fused_behind(found, view))

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return _renewed(found["layer"], found["layer"].inputs[0], _fused_behind(found, view), make)


class _Before(Rule):
    """A layer and what precedes it."""

    pattern = op(
        _LAYERS.replace("ConvTranspose|", ""),
        op("Mul|Div", tensor("x"), constant("c"), name="step"),
        constant("weights"),
        REST,
    )
    done = "fused"

    def check(self, found: Match, view: View) -> str | None:
        return _as_reason(_fused_before(found, view))

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return _renewed(found.root, found["x"], _fused_before(found, view), make)


# new weights and bias, None for what stays; or the reason why not
_Fused = tuple[NDArray[Any] | None, NDArray[Any] | None] | str


def _as_reason(fused: _Fused) -> str | None:
    return fused if isinstance(fused, str) else None


def _fused_behind(found: Match, view: View) -> _Fused:
    layer: Node = found["layer"]
    weights, rank = layer.inputs[1], view.rank(layer.outputs[0])
    if not isinstance(weights, Constant) or weights.dtype.kind != "f":
        return LOOKS_ALIKE
    if layer.op in ("Conv", "ConvTranspose"):
        rank = len(weights.shape)
    if rank is None or rank < 2:
        return LOOKS_ALIKE
    group = int(layer.attrs.get("group", 1))
    channels, shape = _output_channels(layer, weights, group)
    axis = 1 if "Conv" in layer.op else rank - 1
    if found.root.op == "BatchNormalization":
        step = _normalization(found.root) if axis == 1 and view.opset(found.root) >= 7 else None
    else:
        step = _step(found.root, found["c"], axis, rank) if found["c"].dtype == weights.dtype else None
    if step is None or max(step.scale.size, step.shift.size) not in (1, channels):
        return LOOKS_ALIKE
    if not np.all(np.isfinite([*step.scale, *step.shift])):
        return f"what follows {layer.op} {label(layer)} is not finite"
    if layer.op == "MatMul":
        if not bool(np.all(step.shift == 0)):
            return LOOKS_ALIKE
        if len(weights.shape) != 2:
            return f"the weights of MatMul {label(layer)} are no matrix"
    bias = _bias(layer)
    if bias is None:
        return f"the bias of {layer.op} {label(layer)} is not constant"
    if bias.ndim > 1 and bias.shape[0] > 1:
        return f"the addend of {layer.op} {label(layer)} differs by row"
    scale = np.broadcast_to(step.scale, (channels,))
    shifted = np.broadcast_to(bias.reshape(-1) * step.scale + step.shift, (channels,))
    new = None if step.only_shifts else _scaled(weights, scale, shape, group if layer.op == "ConvTranspose" else 1)
    return _rounded(layer, new, None if layer.op == "MatMul" else shifted, weights)


def _output_channels(layer: Node, weights: Constant, group: int) -> tuple[int, tuple[int, ...]]:
    """How many output channels a layer has, and the shape in which numbers of them multiply its weights."""
    rank = len(weights.shape)
    if layer.op == "Conv":
        return weights.shape[0], (-1, *[1] * (rank - 1))
    if layer.op == "ConvTranspose":
        return weights.shape[1] * group, (group, 1, -1, *[1] * (rank - 2))
    if layer.op == "Gemm" and layer.attrs.get("transB", 0):
        return weights.shape[0], (-1, 1)
    return weights.shape[-1], (1, -1)


def _scaled(weights: Constant, scale: Doubles, shape: tuple[int, ...], group: int) -> Doubles:
    values = np.asarray(weights.values.astype(np.float64))
    if group > 1 or len(shape) > values.ndim:
        parts = values.reshape(group, values.shape[0] // group, *values.shape[1:])
        return np.asarray((parts * scale.reshape(shape)).reshape(values.shape))
    return np.asarray(values * scale.reshape(shape))


def _fused_before(found: Match, view: View) -> _Fused:
    layer, weights = found.root, found["weights"]
    rank = len(weights.shape) if layer.op == "Conv" else view.rank(found["x"])
    if rank is None or rank < 2 or weights.dtype.kind != "f" or found["c"].dtype != weights.dtype:
        return LOOKS_ALIKE
    if layer.op != "Conv" and len(weights.shape) != 2:
        return LOOKS_ALIKE
    shape, axis = view.shape(found["x"]), 1 if layer.op == "Conv" else rank - 1
    step = _step(found["step"], found["c"], axis, rank)
    if step is None or shape is None or len(shape) != rank or layer.attrs.get("transA", 0):
        return LOOKS_ALIKE
    group = int(layer.attrs.get("group", 1))
    channels = _input_channels(layer, weights, group)
    if step.scale.size != 1 and not step.scale.size == channels == shape[axis]:
        return LOOKS_ALIKE
    values = np.asarray(weights.values.astype(np.float64))
    along = _along_inputs(layer, values, np.broadcast_to(step.scale, (channels,)), group)
    return _rounded(layer, np.asarray(values * along), None, weights)


def _input_channels(layer: Node, weights: Constant, group: int) -> int:
    if layer.op == "Conv":
        return weights.shape[1] * group
    return weights.shape[1 if layer.attrs.get("transB", 0) else 0]


def _along_inputs(layer: Node, values: Doubles, numbers: Doubles, group: int) -> Doubles:
    """Numbers of input channels in a shape that multiplies the weights."""
    if layer.op != "Conv":
        return numbers.reshape((1, -1) if layer.attrs.get("transB", 0) else (-1, 1))
    by_group = numbers.reshape(group, values.shape[1])
    rows = np.repeat(by_group, values.shape[0] // group, axis=0)
    return rows.reshape(values.shape[0], values.shape[1], *[1] * (values.ndim - 2))


def _bias(layer: Node) -> Doubles | None:
    """The addend of a layer, beta included; None where it is computed."""
    if not is_given(layer, 2):
        return np.zeros(1)
    given = layer.inputs[2]
    if not isinstance(given, Constant):
        return None
    return np.asarray(given.values.astype(np.float64) * float(layer.attrs.get("beta", 1.0)))


def _rounded(layer: Node, weights: Doubles | None, bias: Doubles | None, old: Constant) -> _Fused:
    if weights is not None and len(old.outputs) > 1:
        return f"the weights of {layer.op} {label(layer)} are read elsewhere too"
    results: list[NDArray[Any] | None] = []
    for each in (weights, bias):
        with np.errstate(over="ignore"):
            rounded = None if each is None else np.asarray((each + 0.0).astype(old.dtype))
        if rounded is not None and not np.all(np.isfinite(rounded.astype(np.float64))):
            return f"the fused numbers of {layer.op} {label(layer)} do not fit into {old.dtype}"
        results.append(rounded)
    return results[0], results[1]


def _renewed(layer: Node, x: Any, fused: _Fused, make: Make) -> Any:
    assert not isinstance(fused, str)
    weights, bias = fused
    inputs = [x, layer.inputs[1] if weights is None else make.constant(weights, f"{layer.inputs[1].name}_fused")]
    if bias is not None:
        inputs.append(make.constant(bias, f"{label(layer)}_bias"))
    else:
        inputs += [tensor for tensor in layer.inputs[2:] if not tensor.is_empty()]
    return make.like(layer, *inputs, **({"beta": None} if bias is not None and "beta" in layer.attrs else {}))
