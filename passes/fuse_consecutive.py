"""Make one node of two of a kind that follow each other.

    Before                                        After
    a = Transpose(x) {perm: [0, 2, 3, 1]}         y = Transpose(x) {perm: [1, 0, 2]}
    b = Transpose(a) {perm: ...}

Transpose, Reshape (with Flatten, Squeeze and Unsqueeze), Cast, Pad, Slice, Concat, Clip and Relu, Unsqueeze of a
Gather. Two Casts become one only where the first one loses nothing: what went through an integer or a narrower type was
changed by that. What else reads the result in the middle keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxopt.graph import label
from onnxopt.model import Constant, Model, Node
from onnxopt.passbase import Context, Effect, Pass, PassResult
from onnxopt.rewriting import LOOKS_ALIKE, REST, Make, Match, Rule, View, constant, op, rewrite, tensor
from onnxopt.rewriting.shapes import reshape_target
from onnxopt.rewriting.view import integers, is_given, values

x = tensor("x")


@dataclass(frozen=True)
class FuseConsecutive(Pass):
    """Make one node of two of a kind: Transposes, Reshapes, Casts, Pads, Slices, Concats, Clips, Relus."""

    name: ClassVar[str] = "fuse_consecutive"

    @property
    def effect(self) -> Effect:
        """Elements are moved once instead of twice; bounds are compared once."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies."""
        return rewrite(model, _RULES, context)


class _Fusing(Rule):
    done = "fused"
    shared = True


class _Transposes(_Fusing):
    """Transpose(Transpose(x, p), q) = Transpose(x, p[q])."""

    pattern = op("Transpose", op("Transpose", x, name="first"))

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        first, second = found["first"].attrs.get("perm"), found.root.attrs.get("perm")
        if first is None and second is None:
            return found["x"]
        order = first or list(range(len(second)))[::-1]
        order = [order[axis] for axis in second] if second else order[::-1]
        return found["x"] if order == sorted(order) else make.like(found.root, found["x"], perm=order)


class _Reshapes(_Fusing):
    """Reshape(Reshape(x)) = Reshape(x), of whatever kind they are, where the result's shape can be told."""

    pattern = op(
        "Reshape|Flatten|Squeeze|Unsqueeze", op("Reshape|Flatten|Squeeze|Unsqueeze", x, REST, name="first"), REST
    )

    def check(self, found: Match, view: View) -> str | None:
        if view.opset(found.root) < 5:
            return LOOKS_ALIKE
        target = reshape_target(view.shape(found["x"]), view.shape(found.root.outputs[0]))
        return (
            None if target is not None else f"the shape behind {label(found['first'])} is open in more than one length"
        )

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        target = reshape_target(view.shape(found["x"]), view.shape(found.root.outputs[0]))
        assert target is not None
        return make("Reshape", found["x"], make.integers(target, f"{label(found.root)}_shape"))


class _Casts(_Fusing):
    """Cast(Cast(x, wider), to) = Cast(x, to)."""

    pattern = op("Cast", op("Cast", x, name="first"))

    def check(self, found: Match, view: View) -> str | None:
        types = view.dtype(found["x"]), view.dtype(found["first"].outputs[0]), view.dtype(found.root.outputs[0])
        if None in types:
            return "a type is not known"
        start, middle, end = (np.dtype(each) for each in types)
        if start == middle:
            return None
        if not _holds_all(middle, start):
            return f"the way from {start} over {middle} to {end} may change values"
        # what happens to floats beyond the range of an integer depends on the type they come from
        if start.kind not in "biu" and end.kind in "iu":
            return f"floats out of the range of {end} would become something else"
        return None

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        if view.dtype(found["x"]) == view.dtype(found.root.outputs[0]):
            return found["x"]
        return make.like(found.root, found["x"])


_MANTISSA = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def _holds_all(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether each value of `narrow` is one of `wide`: of booleans, integers and the common floats."""
    if narrow.kind == "b":
        return wide.kind in "iuf" or wide.name in _MANTISSA
    if wide.kind == "b" or "O" in (wide.kind, narrow.kind):
        return False
    if narrow.kind in "iu" and wide.kind in "iu":
        return bool(np.can_cast(narrow, wide))
    if narrow.kind in "iu" and wide.name in _MANTISSA:
        return bool(8 * narrow.itemsize - (narrow.kind == "i") <= _MANTISSA[wide.name]) and wide.name != "float16"
    if narrow.name in _MANTISSA and wide.name in _MANTISSA:
        return narrow == wide or (wide.name in ("float32", "float64") and _MANTISSA[narrow.name] < _MANTISSA[wide.name])
    return False


class _Pads(_Fusing):
    """Pad(Pad(x, p), q) = Pad(x, p + q) of the same constant."""

    pattern = op("Pad", op("Pad", x, REST, name="first"), REST)

    def check(self, found: Match, view: View) -> str | None:
        first, second = found["first"], found.root
        if any(pad.attrs.get("mode", "constant") != "constant" for pad in (first, second)):
            return LOOKS_ALIKE
        amounts = [integers(pad, 1, "pads") for pad in (first, second)]
        if (
            any(each is None or min(each, default=0) < 0 for each in amounts)
            or is_given(first, 3)
            or is_given(second, 3)
        ):
            return "its pads are not constant, crop, or are given by axes"
        fill = _fill(first), _fill(second)
        return None if None not in fill and fill[0] == fill[1] else "they do not pad with the same constant"

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        amounts = [np.asarray(integers(pad, 1, "pads"), np.int64) for pad in (found["first"], found.root)]
        pads = amounts[0] + amounts[1]
        if "pads" in found.root.attrs:
            return make.like(found.root, found["x"], pads=pads.tolist())
        return make.like(found.root, found["x"], make.integers(pads), *found.root.inputs[2:3])


def _fill(pad: Node) -> bytes | None:
    """What a Pad fills with, as bytes: 0.0 and -0.0 differ."""
    if not is_given(pad, 2):
        return np.float64(pad.attrs.get("value", 0.0)).tobytes()
    given = values(pad.inputs[2])
    return None if given is None or given.size != 1 else given.astype(np.float64).tobytes()


class _Slices(_Fusing):
    """Slice(Slice(x)) = Slice(x) along the axes of both, which differ."""

    pattern = op("Slice", op("Slice", x, REST, name="first"), REST)

    def check(self, found: Match, view: View) -> str | None:
        if view.opset(found.root) < 10:
            return LOOKS_ALIKE
        both = [_slices(node) for node in (found["first"], found.root)]
        rank = view.rank(found["x"])
        if rank is None or None in both:
            return "their bounds are not constant"
        axes = [axis % rank for one in both if one is not None for axis in one[2]]
        return None if len(set(axes)) == len(axes) else "both cut along one axis"

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        first, second = _slices(found["first"]), _slices(found.root)
        assert first is not None
        assert second is not None
        joined = [[*one, *other] for one, other in zip(first, second, strict=True)]
        inputs = [make.integers(each) for each in joined]
        return make("Slice", found["x"], *(inputs if any(step != 1 for step in joined[3]) else inputs[:3]))


def _slices(node: Node) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """(starts, ends, axes, steps) of a Slice of opset 10 and later; None where they are computed."""
    if any(is_given(node, at) and not isinstance(node.inputs[at], Constant) for at in range(1, 5)):
        return None
    starts, ends = integers(node, 1, ""), integers(node, 2, "")
    if starts is None or ends is None:
        return None
    axes = integers(node, 3, "") if is_given(node, 3) else list(range(len(starts)))
    steps = integers(node, 4, "") if is_given(node, 4) else [1] * len(starts)
    return None if axes is None or steps is None else (starts, ends, axes, steps)


class _Concats(_Fusing):
    """Concat(Concat(a, b), c) = Concat(a, b, c) along the same axis."""

    pattern = op("Concat")
    shared = False

    def check(self, found: Match, view: View) -> str | None:
        return None if self._inner(found.root, view) else LOOKS_ALIKE

    def _inner(self, node: Node, view: View) -> list[Node]:
        rank = view.rank(node.outputs[0])
        candidates = [view.maker(each, "Concat") for each in node.inputs if view.is_read_once(each)]
        return [
            inner
            for inner in candidates
            if inner is not None
            and view.body(inner) is view.body(node)
            and _same_axis(inner.attrs.get("axis", 1), node.attrs.get("axis", 1), rank)
        ]

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        inner = {id(node.outputs[0]): node for node in self._inner(found.root, view)}
        parts = [
            part for each in found.root.inputs for part in (inner[id(each)].inputs if id(each) in inner else [each])
        ]
        return make.like(found.root, *parts)


def _same_axis(one: int, other: int, rank: int | None) -> bool:
    return one == other or (rank is not None and one % rank == other % rank)


class _Clips(_Fusing):
    """Clip(Clip(x, a, b), c, d) = Clip(x, Clip(a, c, d), Clip(b, c, d)); Relu is a Clip from 0 on."""

    pattern = (
        op("Clip", op("Clip|Relu", x, REST, name="first"), REST),
        op("Relu", op("Clip|Relu", x, REST, name="first")),
    )

    def check(self, found: Match, view: View) -> str | None:
        dtype = view.dtype(found["x"])
        if dtype is None:
            return "its type is not known"
        first, second = (_bounds(node, dtype) for node in (found["first"], found.root))
        if first is None or second is None:
            return "a bound is not constant"
        if not (first[0] <= first[1] and second[0] <= second[1]):
            return "a lower bound lies above the upper one"
        if any(bound == 0 and np.signbit(bound) for bound in (*first, *second)):
            return "a bound is -0.0, of which the runtime may make 0.0"
        if _merged(first, second) == (0, 0):
            return "nothing but 0.0 is left, and the runtime would keep -0.0"
        if found.root.op == found["first"].op == "Relu":
            return None
        old = (view.opset(found.root) < 12 and dtype.kind != "f") or dtype.name == "bfloat16"
        return LOOKS_ALIKE if old or view.opset(found.root) < 11 else None

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        if found.root.op == found["first"].op == "Relu":
            return make.like(found.root, found["x"])
        dtype = view.dtype(found["x"])
        assert dtype is not None
        first, second = (_bounds(node, dtype) for node in (found["first"], found.root))
        assert first is not None
        assert second is not None
        pairs = zip(_merged(first, second), _limits(dtype), strict=True)
        inputs = [None if bound == limit else make.constant(np.array(bound, dtype)) for bound, limit in pairs]
        return make("Clip", found["x"], *(inputs if inputs[1] is not None else inputs[:1]))


def _merged(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The bounds of both, one after the other."""
    low, high = (min(max(bound, second[0]), second[1]) for bound in first)
    return low, high


def _limits(dtype: np.dtype) -> tuple[float, float]:
    """What a Clip without bounds clips to: infinities become finite."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def _bounds(node: Node, dtype: np.dtype) -> tuple[float, float] | None:
    """The bounds of a Relu or a Clip; None where they are computed or NaN."""
    if node.op == "Relu":
        return 0.0, np.inf
    found: list[float] = []
    for at, name, absent in zip((1, 2), ("min", "max"), _limits(dtype), strict=True):
        if name in node.attrs:
            found.append(float(node.attrs[name]))
        elif not is_given(node, at):
            found.append(absent)
        else:
            given = values(node.inputs[at])
            if given is None or given.size != 1 or np.isnan(given.astype(np.float64)).any():
                return None
            found.append(given.reshape(-1)[0].item())
    return found[0], found[1]


class _UnsqueezedGather(_Fusing):
    """Unsqueeze(Gather(x, i), 0) = Gather(x, [i]) of a vector x."""

    pattern = op("Unsqueeze", op("Gather", x, constant("at"), name="first"), REST)
    shared = False

    def check(self, found: Match, view: View) -> str | None:
        if found["at"].shape != () or view.rank(found["x"]) != 1:
            return LOOKS_ALIKE
        return None if integers(found.root, 1, "axes") in ([0], [-1]) else LOOKS_ALIKE

    def rewrite(self, found: Match, make: Make, view: View) -> Any:
        return make("Gather", found["x"], make.constant(found["at"].values.reshape(1)), axis=0)


_RULES: tuple[Rule, ...] = (
    _Transposes(),
    _Casts(),
    _Pads(),
    _Slices(),
    _Concats(),
    _Clips(),
    _UnsqueezedGather(),
    _Reshapes(),
)
