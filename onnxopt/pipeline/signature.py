"""What changes a model's signature before any pass runs; its result is what the passes are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnxopt.errors import UsageError
from onnxopt.graph.input_shapes import Dim, shown, with_input_shapes
from onnxopt.graph.part import part_of
from onnxopt.model import Model

# "x:1,3,224,224", several of these, or {"x": (1, 3, 224, 224)}
ShapesLike: TypeAlias = str | Iterable[str] | Mapping[str, Sequence[Dim]] | None
# "a,b", several of these, or None for what the model has
NamesLike: TypeAlias = str | Iterable[str] | None
_FORM = "write NAME:1,3,224,224, with -1 for a length that stays open, or a name for it"


@dataclass(frozen=True)
class SignatureChange:
    """Where a part is cut out of a model, and the dims its inputs then get. Empty: the model stays as it is."""

    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    shapes: Mapping[str, tuple[Dim, ...]] | None = None

    @staticmethod
    def of(inputs: NamesLike, outputs: NamesLike, shapes: ShapesLike) -> SignatureChange:
        """From what a user wrote. Raises UsageError for what can't be read."""
        return SignatureChange(_names(inputs), _names(outputs), parse_shapes(shapes) or None)

    def __bool__(self) -> bool:
        return self.inputs is not None or self.outputs is not None or bool(self.shapes)

    def apply(self, model: Model) -> tuple[Model, tuple[str, ...]]:
        """The changed model, `model` being left alone, and what was changed in words. Raises UsageError."""
        told: list[str] = []
        if self.inputs is not None or self.outputs is not None:
            model = part_of(model, self.inputs, self.outputs)
            ends = (", ".join(tensor.name for tensor in side) for side in (model.graph.inputs, model.graph.outputs))
            told.append("the part from {} to {}".format(*ends))
        if self.shapes:
            before = {tensor.name: tensor.shape for tensor in model.graph.inputs}
            model = with_input_shapes(model, self.shapes)
            told += [
                f"input {tensor.name}: {shown(before[tensor.name])} -> {shown(tensor.shape)}"
                for tensor in model.graph.inputs
                if before[tensor.name] != tensor.shape
            ]
        return model, tuple(told)


def parse_shapes(shapes: ShapesLike) -> dict[str, tuple[Dim, ...]]:
    """Input name -> dims. Raises UsageError for what is no shape, and for an input that is given twice."""
    if shapes is None:
        return {}
    if isinstance(shapes, Mapping):
        return {name: tuple(_checked(name, dim) for dim in dims) for name, dims in shapes.items()}
    found: dict[str, tuple[Dim, ...]] = {}
    for text in [shapes] if isinstance(shapes, str) else shapes:
        name, colon, dims = text.rpartition(":")
        if not colon or not name:
            raise UsageError(f"input shape {text!r} names no input", _FORM)
        if name in found:
            raise UsageError(f"the shape of input {name!r} is given twice", "give it once")
        words = [word.strip() for word in dims.strip().removeprefix("[").removesuffix("]").split(",")]
        found[name] = () if words == [""] else tuple(_dim(name, word) for word in words)
    return found


def _dim(name: str, word: str) -> Dim:
    if word.removeprefix("-").isdigit() and word.isascii():
        return _checked(name, int(word))
    if word == "?":
        return None
    if not word or any(mark in word for mark in " []:"):
        raise UsageError(f"input {name!r}: {word!r} is no length", _FORM)
    return word


def _checked(name: str, dim: Dim) -> Dim:
    if dim == -1:
        return None
    if isinstance(dim, bool) or not isinstance(dim, (int, str, type(None))):
        raise UsageError(f"input {name!r}: {dim!r} is no length", _FORM)
    if isinstance(dim, int) and not 0 < dim < 1 << 63:
        raise UsageError(f"input {name!r}: a length of {dim} is out of range", _FORM)
    return dim


def _names(names: NamesLike) -> tuple[str, ...] | None:
    if names is None:
        return None
    texts = [names] if isinstance(names, str) else list(names)
    return tuple(word.strip() for text in texts for word in text.split(",") if word.strip())
