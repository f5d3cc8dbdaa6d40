"""Store weights with many zeros smaller, without changing a bit of them.

    bitmask    one bit a weight, then the values that are not zero:     1/32 + density of float32, any density below .97
    sparse     `sparse_initializer`, an int64 index for each value:     3 x density of float32, pays below 1/3

A bitmask is written in standard operators, which the runtime folds when it loads the model: the file is smaller, what
runs is the dense weight, and the outputs and latency are those of the dense model. Where few of the values that stay
differ (a palette, see `share`), they are stored as codes too. Each tensor gets the smallest form that is allowed.

Zeros come from `prune_weights`, or from training. Nothing here makes a model faster: kernels of CPUs multiply zeros as
fast as other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnxopt.encoding import Form, Masked, MaskedPalette, Sparse, described, smallest, store
from onnxopt.encoding.forms import LEAST_BYTES, MOST_MASKED, nonzero
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option

FORMS = ("bitmask", "sparse")
# Bytes that the runtime needs for each weight while it unpacks a bitmask, measured on onnxruntime 1.32.
_UNPACKING = 27


@dataclass(frozen=True)
class Sparsify(Pass):
    """Store weights with many zeros as a bitmask and the other values."""

    name: ClassVar[str] = "sparsify"
    prepare: ClassVar[tuple[str, ...]] = ("convert_opset",)

    forms: tuple[str, ...] = option(("bitmask",), "forms to choose from: bitmask, sparse (few tools read it)")
    only: tuple[str, ...] = option((), "names or patterns of the nodes whose weights may be stored; default all")
    exclude: tuple[str, ...] = option((), "names or patterns of nodes whose weights stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = next((form for form in self.forms if form not in FORMS), None)
        if unknown is not None:
            raise UsageError(f"pass {self.name!r}: unknown form {unknown!r}", did_you_mean(unknown, FORMS))
        if not self.forms:
            raise UsageError(f"pass {self.name!r}: no form is named", f"use one or both of: {', '.join(FORMS)}")

    @property
    def effect(self) -> Effect:
        """What is computed from the stored form are the same bits."""
        return Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Store each constant that has zeros in the smallest form, where that saves bytes."""
        Selection(self.only, self.exclude).check(model, self.name)
        skipped: list[Skip] = []
        wanted: dict[Constant, Form] = {}
        for constant in self._candidates(model, skipped):
            mask, sparse = "bitmask" in self.forms, "sparse" in self.forms
            form = smallest(constant.data, palette=True, mask=mask, sparse=sparse, name=constant.name)
            if isinstance(form, (Masked, MaskedPalette, Sparse)):
                wanted[constant] = form
            else:
                skipped.append(Skip(constant.name, self._too_dense(constant, form)))
        stored = store(model, wanted)
        skipped += [Skip(constant.name, reason) for constant, reason in stored.left.items()]
        changes = [
            Change("stored", constant.name, f"{described(form)}: {stored.saved[constant]} bytes less")
            for constant, form in wanted.items()
            if constant in stored.saved
        ]
        done = {constant: form for constant, form in wanted.items() if constant in stored.saved}
        return PassResult(changes, skipped, _notes(done))

    def _candidates(self, model: Model, skipped: list[Skip]) -> Iterator[Constant]:
        selection = Selection(self.only, self.exclude)
        for constant in list(model.constants()):
            data = constant.data
            if data.nbytes < LEAST_BYTES or data.dtype.kind == "O" or not constant.outputs:
                continue
            if data.sparse is not None:
                skipped.append(Skip(constant.name, "it is a sparse tensor already"))
                continue
            readers = list(constant.outputs)
            reason = next((reason for node in readers if (reason := selection.refuses(node)) is not None), None)
            foreign = next((node for node in readers if node.kind[0] != ""), None)
            if reason is None and foreign is not None:
                reason = f"{foreign.kind[0]}.{foreign.op} reads it, whose kernel may need a constant"
            if reason is not None:
                skipped.append(Skip(constant.name, reason))
                continue
            yield constant

    def _too_dense(self, constant: Constant, form: Form | None) -> str:
        density = float(nonzero(constant.values).mean()) if constant.data.dtype.itemsize in (1, 2, 4, 8) else 1.0
        if density < 0.97 and constant.data.size > MOST_MASKED:
            return f"it has {constant.data.size} elements: unpacking more than {MOST_MASKED} takes too much memory"
        if form is not None:
            return f"{described(form)} is smaller: store it with share:mode=unique"
        return f"{1 - density:.1%} of its values are zero, too few to save bytes"


def _notes(done: dict[Constant, Form]) -> list[str]:
    notes = []
    masked = [form.mask.size for form in done.values() if isinstance(form, (Masked, MaskedPalette))]
    if masked:
        most = _UNPACKING * max(masked) / 1e6
        notes.append(
            f"loading takes longer, and up to {most:.0f} MB more memory for a moment; running is as with dense weights"
        )
    if any(isinstance(form, Sparse) for form in done.values()):
        notes.append(
            "onnxruntime reads sparse initializers; onnx's shape inference stops at them, and its version converter, "
            "its reference evaluator, onnxoptimizer and onnxscript can't read them: keep this pass last"
        )
    return notes
