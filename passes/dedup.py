"""Store equal weights once.

Two constants are merged when their element type, shape and every stored byte agree: -0.0 is not 0.0, and NaNs count by
their payload. Samples of the contents find candidates, hashes (each content once) part many of them, and two contents
are compared byte by byte before they are merged.

    Before                                  After
    y = Gemm(x, w)    w: float[64,64]       y = Gemm(x, w)    w: float[64,64]
    z = Gemm(y, v)    v: the same bytes     z = Gemm(y, w)

Constants of If, Loop and Scan bodies take part: what siblings share moves to the body that encloses both. A local
function is a world of its own. Graph outputs, overridable initializers and what a quantization annotation names stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxopt.graph import replace_inputs
from onnxopt.model import Constant, Graph, Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option


@dataclass(frozen=True)
class Dedup(Pass):
    """Store weights that are equal byte by byte once."""

    name: ClassVar[str] = "dedup"
    min_bytes: int = option(16, "leave constants smaller than this alone", minimum=0)

    @property
    def effect(self) -> Effect:
        """Readers get the same bytes."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Merge equal constants within the main graph with its bodies, and within each function."""
        model.normalize()
        kept = _named_elsewhere(model)
        changes: list[Change] = []
        skipped: list[Skip] = []
        removed: set[int] = set()
        for group in _groups(model, self.min_bytes):
            free = [constant for constant in group if id(constant) not in kept]
            skipped += [Skip(constant.name, kept[id(constant)]) for constant in group if id(constant) in kept]
            for duplicate in free[1:]:
                changes.append(_merge(duplicate, free[0]))
                removed.add(id(duplicate))
        for body in model.bodies():
            body.initializers = [constant for constant in body.initializers if id(constant) not in removed]
        return PassResult(changes, skipped)


def _named_elsewhere(model: Model) -> dict[int, str]:
    """Constants that something besides a node refers to, and what."""
    kept: dict[int, str] = {}
    for body in model.bodies():
        for tensor in body.outputs:
            kept[id(tensor)] = f"it is an output of graph {body.name!r}"
        annotations = getattr(body.proto, "quantization_annotation", ())
        named = {entry.value for item in annotations for entry in item.quant_parameter_tensor_names}
        for constant in body.initializers:
            if constant.name in named:
                kept[id(constant)] = "a quantization annotation names it"
    return kept


def _groups(model: Model, min_bytes: int) -> list[list[Constant]]:
    """Constants of equal content, two and more each, outer bodies first, in the order of the file."""
    alike: dict[tuple[Any, ...], list[Constant]] = {}
    for body in model.bodies():
        for constant in body.initializers:
            data = constant.data
            if data.nbytes >= min_bytes:
                alike.setdefault((*_world(body), str(data.dtype), data.shape, data.sparse is None), []).append(constant)
    return [group for candidates in alike.values() if len(candidates) > 1 for group in _equal(candidates)]


def _world(body: Graph) -> tuple[int]:
    """What bounds the sharing of names: the function the body belongs to, else the main graph."""
    return (id(body.function),)


def _equal(constants: list[Constant]) -> Iterator[list[Constant]]:
    """Groups of two and more constants whose bytes are equal.

    Samples tell most large contents apart, so that only what may be equal is read; where more than two contents may be,
    hashes keep the comparisons few.
    """
    for alike in _parted(constants, lambda constant: constant.data.fingerprint()):
        many = len({constant.data.uid for constant in alike}) > 2
        for group in _parted(alike, lambda constant: constant.data.digest()) if many else [alike]:
            yield from _compared(group)


def _parted(constants: list[Constant], key: Callable[[Constant], bytes]) -> list[list[Constant]]:
    parts: dict[bytes, list[Constant]] = {}
    for constant in constants:
        parts.setdefault(key(constant), []).append(constant)
    return [part for part in parts.values() if len(part) > 1]


def _compared(constants: list[Constant]) -> list[list[Constant]]:
    groups: list[list[Constant]] = []
    group_of: dict[int, list[Constant]] = {}
    for constant in constants:
        data = constant.data
        if data.uid not in group_of:
            same = (members for members in groups if members[0].data.same_content(data))
            group_of[data.uid] = next(same, [])
            if not group_of[data.uid]:
                groups.append(group_of[data.uid])
        group_of[data.uid].append(constant)
    return [members for members in groups if len(members) > 1]


def _merge(duplicate: Constant, kept: Constant) -> Change:
    replace_inputs(duplicate, kept)
    return Change("merged", duplicate.name, f"into {kept.name}: {duplicate.data.nbytes} bytes")
