"""Remove nodes that give out what they are given.

    Before                                   After
    a = Identity(x)                          y = Relu(x)
    b = Reshape(a, s)   s: the shape of a
    c = Mul(b, one)
    y = Relu(c)

Besides Identity these are Cast to the type that a tensor has; Reshape, Flatten, Squeeze, Unsqueeze, Expand to the
shape that it has; Transpose, Pad, Slice, Split, Concat, Tile, Resize that move nothing; Dropout outside of training;
Sum, Mean, Min, Max of one tensor; Clip of integers without bounds; Not and Neg twice; products with 1, quotients by 1,
the first power, sums with zero. x + 0.0 is 0.0 where x is -0.0, and the runtime's power drops the sign of NaN: these
stay unless `signed_zeros=false`; x + -0.0 and x - 0.0 go in any case. A node between an input and an output of the
model stays: it gives the output its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxopt.graph import operators
from onnxopt.model import Constant, Model, Node
from onnxopt.passbase import Context, Effect, Pass, PassResult, option
from onnxopt.rewriting import LOOKS_ALIKE, REST, Make, Match, Rule, View, constant, op, rewrite, tensor
from onnxopt.rewriting.shapes import same_elements_in_place
from onnxopt.rewriting.view import integers, is_given, values

x = tensor("x")


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Remove nodes that give out what they are given."""

    name: ClassVar[str] = "eliminate_identity"
    signed_zeros: bool = option(True, "keep sums with 0.0, which make 0.0 of -0.0, and first powers, for NaN")

    @property
    def effect(self) -> Effect:
        """The same bits, but for the sign of zeros where that may go."""
        return Effect.EXACT if self.signed_zeros else Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Remove in all bodies."""
        return rewrite(model, [*_RULES, _SumWithZero(self.signed_zeros), _FirstPower(self.signed_zeros)], context)


class _Removing(Rule):
    done = "removed"

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return found["x"]


class _Identity(_Removing):
    """Identity(x) = x."""

    pattern = op("Identity", x)


class _CastToOwnType(_Removing):
    """Cast(x) = x where x has that type already."""

    pattern = op("Cast|CastLike", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        before, after = view.dtype(found["x"]), view.dtype(found.root.outputs[0])
        return None if before is not None and before == after else LOOKS_ALIKE


class _ToOwnShape(_Removing):
    """Reshape(x) = x, and the like, where x has that shape already."""

    pattern = op("Reshape|Flatten|Squeeze|Unsqueeze|Expand", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        result = found.root.outputs[0]
        if view.same_shape(found["x"], result):
            return None
        if found.root.op == "Expand":
            return LOOKS_ALIKE
        target = values(found.root.inputs[1]) if found.root.op == "Reshape" and is_given(found.root, 1) else None
        filled = target is not None and -1 in target  # the runtime takes no -1 where there may be no elements
        same = same_elements_in_place(view.shape(found["x"]), view.shape(result), filled)
        return None if same else LOOKS_ALIKE


class _TransposeOfNothing(_Removing):
    """Transpose(x) = x where every axis stays."""

    pattern = op("Transpose", x)

    def check(self, found: Match, view: View) -> str | None:
        rank = view.rank(found["x"])
        order = found.root.attrs.get("perm")
        stays = order == sorted(order) if order is not None else rank in (0, 1)
        return None if stays else LOOKS_ALIKE


class _PadOfNothing(_Removing):
    """Pad(x) = x where all pads are 0."""

    pattern = op("Pad", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        pads = integers(found.root, 1, "pads")
        return None if pads is not None and not any(pads) else LOOKS_ALIKE


class _SliceOfAll(_Removing):
    """Slice(x) = x where each axis is taken from its begin to its end in steps of 1."""

    pattern = op("Slice", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        node, shape = found.root, view.shape(found["x"])
        starts, ends = integers(node, 1, "starts"), integers(node, 2, "ends")
        if starts is None or ends is None:
            return LOOKS_ALIKE
        axes = integers(node, 3, "axes") if is_given(node, 3) or "axes" in node.attrs else list(range(len(starts)))
        steps = integers(node, 4, "steps") if is_given(node, 4) else [1] * len(starts)
        if axes is None or steps is None or any(step != 1 for step in steps) or any(starts):
            return LOOKS_ALIKE
        whole = all(
            end >= _INT32_MAX or (end > 0 and _is_within(shape, axis, end))
            for axis, end in zip(axes, ends, strict=True)
        )
        return None if whole else LOOKS_ALIKE


_INT32_MAX = 2**31 - 1


def _is_within(shape: Any, axis: int, end: int) -> bool:
    length = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    return isinstance(length, int) and length <= end


class _SplitIntoOne(_Removing):
    """Split(x) = x where it has one output."""

    pattern = op("Split", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        return None if len(found.root.outputs) == 1 else LOOKS_ALIKE


class _OfOneTensor(_Removing):
    """Concat(x) = Sum(x) = Mean(x) = Min(x) = Max(x) = x."""

    pattern = op("Concat|Sum|Mean|Min|Max", x)


class _TileOnce(_Removing):
    """Tile(x) = x where it is repeated once along each axis."""

    pattern = op("Tile", x, constant("repeats"))

    def check(self, found: Match, view: View) -> str | None:
        return None if bool(np.all(found["repeats"].values == 1)) else LOOKS_ALIKE


class _ResizeToOwnSize(_Removing):
    """Resize(x) = x where it takes the nearest element at a scale of 1. Other modes add 0 times a neighbour."""

    pattern = op("Resize|Upsample", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        node = found.root
        if node.attrs.get("mode", "nearest") != "nearest":
            return LOOKS_ALIKE
        if node.attrs.get("coordinate_transformation_mode", "half_pixel") not in _KEEPING_PLACES:
            return LOOKS_ALIKE
        scales = node.attrs.get("scales") if node.op == "Upsample" and "scales" in node.attrs else _scales(node)
        whole = scales is not None and len(scales) > 0 and all(scale == 1 for scale in scales)
        return (
            None
            if whole or (is_given(node, 3) and _all_known_equal(found["x"], node.outputs[0], view))
            else LOOKS_ALIKE
        )


_KEEPING_PLACES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")


def _scales(node: Node) -> list[float] | None:
    at = 1 if node.op == "Upsample" or len(node.inputs) == 2 else 2
    found = values(node.inputs[at]) if is_given(node, at) else None
    return None if found is None else [float(scale) for scale in found.reshape(-1)]


def _all_known_equal(one: Any, other: Any, view: View) -> bool:
    shape = view.shape(one)
    return shape is not None and all(isinstance(dim, int) for dim in shape) and shape == view.shape(other)


class _DropoutInInference(_Removing):
    """Dropout(x) = x outside of training, where nobody reads its mask."""

    pattern = op("Dropout", x, REST)

    def check(self, found: Match, view: View) -> str | None:
        if operators.is_training(found.root) or view.opset(found.root) < 7:
            return "it is, or may be, in training mode"
        if any(view.edits.is_used(mask) for mask in found.root.outputs[1:]):
            return "its mask is read"
        return None


class _ClipToNothing(_Removing):
    """Clip(x) = x without bounds, for integers; floats that are infinite become finite."""

    pattern = op("Clip", x)

    def check(self, found: Match, view: View) -> str | None:
        dtype = view.dtype(found["x"])
        return None if view.opset(found.root) >= 12 and dtype is not None and dtype.kind in "iu" else LOOKS_ALIKE


class _Twice(_Removing):
    """Not(Not(x)) = Neg(Neg(x)) = x."""

    pattern = (op("Not", op("Not", x)), op("Neg", op("Neg", x)))
    shared = True


class _ByOne(_Removing):
    """x * 1 = x / 1 = x."""

    pattern = (op("Mul", x, constant("c")), op("Div", x, constant("c")))

    def check(self, found: Match, view: View) -> str | None:
        return None if _is_filled(found, view, 1.0) else LOOKS_ALIKE


class _FirstPower(_Removing):
    """x ** 1 = x."""

    pattern = op("Pow", x, constant("c"))

    def __init__(self, signed_zeros: bool) -> None:
        self.signed_zeros = signed_zeros

    def check(self, found: Match, view: View) -> str | None:
        if not _is_filled(found, view, 1.0):
            return LOOKS_ALIKE
        dtype = view.dtype(found["x"])
        exact = dtype is not None and dtype.kind in "iu" and dtype.itemsize <= 4  # powers are computed in float64
        return "it drops the sign of NaN (signed_zeros=true)" if self.signed_zeros and not exact else None


class _SumWithZero(_Removing):
    """x + 0 = x - 0 = x."""

    pattern = (op("Add", x, constant("c")), op("Sub", x, constant("c")))

    def __init__(self, signed_zeros: bool) -> None:
        self.signed_zeros = signed_zeros

    def check(self, found: Match, view: View) -> str | None:
        if not _is_filled(found, view, 0.0):
            return LOOKS_ALIKE
        zeros = found["c"].values
        if zeros.dtype.kind in "iu":
            return None
        neutral = bool(np.all(np.signbit(zeros.astype(np.float64)) == (found.root.op == "Add")))
        return "it makes 0.0 of -0.0 (signed_zeros=true)" if self.signed_zeros and not neutral else None


def _is_filled(found: Match, view: View, number: float) -> bool:
    """Whether c holds nothing but `number` and adds no axis to x and no length to one of them."""
    c: Constant = found["c"]
    x_dtype, shape = view.dtype(found["x"]), view.shape(found["x"])
    if c.dtype.kind not in "fiu" or (found.root.op != "Pow" and x_dtype != c.dtype):
        return False
    if c.data.size == 0:
        return False
    if not _fits(c.shape, shape):
        return False
    return bool(np.all(c.values.astype(np.float64) == number))


def _fits(given: tuple[int, ...], shape: Any) -> bool:
    if not given:
        return True
    if shape is None or len(given) > len(shape):
        return False
    return all(length in (1, dim) for length, dim in zip(given[::-1], shape[::-1], strict=False))


_RULES: tuple[Rule, ...] = (
    _Identity(),
    _CastToOwnType(),
    _ToOwnShape(),
    _TransposeOfNothing(),
    _PadOfNothing(),
    _SliceOfAll(),
    _SplitIntoOne(),
    _OfOneTensor(),
    _TileOnce(),
    _ResizeToOwnSize(),
    _DropoutInInference(),
    _ClipToNothing(),
    _Twice(),
    _ByOne(),
)
