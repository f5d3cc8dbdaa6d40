"""Store weights once that are equal, or that follow from each other.

    equal         y = Gemm(x, w), z = Gemm(y, v)   ->   z = Gemm(y, w)              v: the same bytes
    transposed    e = Gather(w, i), y = MatMul(x, v)   ->   y = MatMul(x, Transpose(w))      v: w transposed
    scaled        y = MatMul(x, v)   ->   y = MatMul(x, Mul(w, 0.125))             v: w * 0.125, bit for bit
    near          v and w within `tolerance` of their mean, which both become

Equal: element type, shape and every stored byte agree; -0.0 is not 0.0, and NaNs count by their payload. Samples of the
contents find candidates, and reading them decides; see `onnxopt.duplicates`.

What a Transpose or Mul behind a weight makes is the same to the bit. Runtimes compute it once, when they load the
model, and store it again: the file shrinks, neither memory nor speed change. That is `file`, the default, for it
promises as much as merging equal ones does. `absorb` saves the memory as well, where readers can do the rest
themselves: a Gemm by transB and alpha, a Gather along the other axis. Gemm may then add up in another order, so this is
rounding, and a Gather of columns is slower than one of rows.

Constants of If, Loop and Scan bodies take part: what siblings share moves to the body that encloses both. A local
function is a world of its own, in which only equal ones are merged. Graph outputs, overridable initializers and what a
quantization annotation names stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnxopt.duplicates import WAYS, Near, Relation, Rewirer, equal_groups, near_groups, related_groups
from onnxopt.duplicates.rewiring import NODE_BYTES, Refused
from onnxopt.graph import replace_inputs
from onnxopt.graph.edit import named_elsewhere
from onnxopt.model import Constant, Graph, Model, TensorData
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option


@dataclass(frozen=True)
class Dedup(Pass):
    """Store weights once that are equal, transposed, scaled, or nearly equal."""

    name: ClassVar[str] = "dedup"
    min_bytes: int = option(16, "leave constants smaller than this alone", minimum=0)
    transposed: str = option(
        "file", "W and its transpose: off; file: one is computed at load; absorb: by readers; all: either", choices=WAYS
    )
    scaled: str = option("file", "W and an exact multiple of it: off, file, absorb or all, as above", choices=WAYS)
    tolerance: float = option(
        0.0, "merge what is nearly equal: largest |difference| / |W| of a tensor, 0 for none", minimum=0.0, maximum=0.5
    )

    @property
    def effect(self) -> Effect:
        """Exact; rounding where readers add up in another order, lossy where values change."""
        if self.tolerance:
            return Effect.LOSSY
        return Effect.ROUNDING if {self.transposed, self.scaled} & {"absorb", "all"} else Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Merge within the main graph with its bodies, and equal ones within each function."""
        model.normalize()
        kept = named_elsewhere(model)
        changes: list[Change] = []
        skipped: list[Skip] = []
        _merge_equal(model, self.min_bytes, kept, changes, skipped)
        turned, scaled = self.transposed != "off", self.scaled != "off"
        if turned or scaled or self.tolerance:
            model.normalize()
            found = _Related(model, Rewirer(model, turned=self.transposed, scaled=self.scaled), kept)
            found.constants = _weights(model, max(self.min_bytes, NODE_BYTES), kept)
            if turned or scaled:
                found.merge_exact(turned=turned, scaled=scaled)
            if self.tolerance:
                found.merge_near(self.tolerance, turned=turned, scaled=scaled)
            found.rewirer.finish()
            changes += found.changes
            skipped += found.skipped
        return PassResult(changes, skipped)


@dataclass(frozen=True, eq=False)
class _Overridable:
    """The default of an input, which whoever runs the model may replace."""

    name: str
    data: TensorData


def _merge_equal(
    model: Model, min_bytes: int, kept: dict[int, str], changes: list[Change], skipped: list[Skip]
) -> None:
    """Make the readers of equal constants read the first of them."""
    removed: set[int] = set()
    for group in _equal(model, min_bytes):
        free: list[Constant] = []
        for item in group:
            if isinstance(item, Constant) and id(item) not in kept:
                free.append(item)
            else:
                reason = kept.get(id(item), "whoever runs the model may override it: it is an input")
                skipped.append(Skip(item.name, f"{reason}; {len(group) - 1} more hold the same"))
        for duplicate in free[1:]:
            replace_inputs(duplicate, free[0])
            detail = f"into {free[0].name}: {duplicate.data.nbytes} bytes"
            changes.append(Change("merged", duplicate.name, detail))
            removed.add(id(duplicate))
    if removed:
        for body in model.bodies():
            body.initializers = [constant for constant in body.initializers if id(constant) not in removed]


def _equal(model: Model, min_bytes: int) -> list[list[Constant | _Overridable]]:
    """Constants of equal content, two and more each, outer bodies first, in the order of the file."""
    alike: dict[tuple[Any, ...], list[Constant | _Overridable]] = {}
    for body in model.bodies():
        defaults = [_Overridable(tensor.name, data) for tensor, data, _ in body.defaults]
        items: list[Constant | _Overridable] = [*body.initializers, *defaults]
        for item in items:
            data = item.data
            if data.nbytes >= min_bytes:
                key = (_world(body), str(data.dtype), data.shape, data.sparse is None)
                alike.setdefault(key, []).append(item)
    return [group for candidates in alike.values() if len(candidates) > 1 for group in equal_groups(candidates)]


def _world(body: Graph) -> int:
    """What bounds the sharing of names: the function the body belongs to, else the main graph."""
    return id(body.function)


def _weights(model: Model, min_bytes: int, kept: dict[int, str]) -> list[Constant]:
    """Distinct constants outside of functions, large enough to pay for a node; first those that can't be replaced."""
    found: dict[int, Constant] = {}
    for body in model.bodies():
        for constant in body.initializers if body.function is None else ():
            if constant.data.nbytes >= min_bytes and (constant.data.uid not in found or id(constant) in kept):
                found[constant.data.uid] = constant
    return sorted(found.values(), key=lambda constant: id(constant) not in kept)


class _Related:
    """Merges constants that follow from each other."""

    def __init__(self, model: Model, rewirer: Rewirer, kept: dict[int, str]) -> None:
        self.model, self.rewirer, self.kept = model, rewirer, kept
        self.constants: list[Constant] = []
        self.changes: list[Change] = []
        self.skipped: list[Skip] = []

    def merge_exact(self, *, turned: bool, scaled: bool) -> None:
        """Those that are equal to the bit once turned or multiplied."""
        order = sorted(self.constants, key=lambda each: self._inclination(each))
        gone: set[int] = set()
        for relations in related_groups(order, turned=turned, scaled=scaled):
            gone |= {id(relation.duplicate) for relation in relations if self._apply(relation)}
        self.constants = [constant for constant in self.constants if id(constant) not in gone]

    def merge_near(self, tolerance: float, *, turned: bool, scaled: bool) -> None:
        """Those that lie within the tolerance of their mean."""
        free = [constant for constant in self.constants if id(constant) not in self.kept]
        groups = near_groups(free, tolerance, turned=turned, scaled=scaled, admits=self._admits)
        for near in groups:
            self._store(near)

    def _inclination(self, constant: Constant) -> tuple[bool, tuple[int, int], bool]:
        """What is kept comes first: what can't go, what readers can't do without, tables that rows are read of."""
        is_table = any(node.op == "Gather" for node in constant.outputs)
        return id(constant) not in self.kept, self.rewirer.ease(constant), not is_table

    def _apply(self, relation: Relation) -> bool:
        duplicate = relation.duplicate
        if id(duplicate) in self.kept:
            self.skipped.append(Skip(duplicate.name, f"it is {relation}, but {self.kept[id(duplicate)]}"))
            return False
        try:
            how = self.rewirer.apply(relation)
        except Refused as refusal:
            self.skipped.append(Skip(duplicate.name, f"it is {relation}, but {refusal}"))
            return False
        kind = "transposed" if relation.turned else "scaled" if relation.scale is not None else "merged"
        error = f", relative error {relation.error:.2g}" if relation.error else ""
        detail = f"{relation}{error}, {how}: {duplicate.data.nbytes} bytes"
        self.changes.append(Change("approximated" if relation.error else kind, duplicate.name, detail))
        return True

    def _admits(self, relation: Relation) -> bool:
        """Whether the readers of a nearly equal one could do with another; said before any value changes."""
        try:
            self.rewirer.check(relation)
        except Refused as refusal:
            detail = f"it is nearly {relation}, but {refusal}"
            self.skipped.append(Skip(relation.duplicate.name, detail))
            return False
        return True

    def _store(self, near: Near) -> None:
        near.kept.values = near.values
        self.changes.append(Change("averaged", near.kept.name, f"relative error {near.error:.2g}"))
        for relation in near.relations:
            self._apply(relation)
