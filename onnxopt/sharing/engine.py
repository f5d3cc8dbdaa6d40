"""Codebooks for one weight after the other, the biases that make good for errors, and how all of it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxopt.calibration import Requests
from onnxopt.encoding import MaskedPalette, Palette, Stored, described, find_palette, smallest, store
from onnxopt.encoding.forms import MOST_MASKED
from onnxopt.graph.biases import BiasSlot
from onnxopt.graph.selection import Selection
from onnxopt.model import Model, Node
from onnxopt.numerics.blocks import Wide
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.quantization.coded import left_as_quantized
from onnxopt.quantization.layer_weights import Known, LayerInputs, input_requests
from onnxopt.quantization.layers import shared_tensors
from onnxopt.quantization.writer import QdqWriter
from onnxopt.sharing.codebooks import Form, common_book, relative_error, shared, vectors_fit
from onnxopt.sharing.tying import tie
from onnxopt.sharing.weights import Shareable, find_shareable, finite

FINE_BITS = 8
_MASKED_WORTH = 0.9  # of the bytes of a palette, which a bitmask of its indices has to come below
_WORTH = 0.75  # of the bytes of floats: more than that is not worth 8 bits


@dataclass(frozen=True)
class Sharing:
    """What is wanted.

    bits: of an index. unique: only tensors that have few distinct values as they are, at most 256. group: outputs that
    share a codebook, 0 for as many as keep codebooks small. vector: weights that one index stands for. common: one
    codebook for all tensors. fine: so large a share of all weights gets 8 bits. feedback: make good for errors in other
    weights; bias: in biases. plain: leave floats. tied: distance up to which two tensors become one.
    """

    bits: int = 4
    unique: bool = False
    group: int = 0
    vector: int = 1
    common: bool = False
    fine: float = 0.0
    feedback: bool = True
    bias: bool = True
    plain: bool = False
    tied: float = 0.0
    selection: Selection = field(default_factory=Selection)

    @property
    def entries(self) -> int:
        """Of a codebook."""
        return int(1 << self.bits)


def requests(model: Model, sharing: Sharing) -> Requests:
    """Second moments of what weights multiply, as far as they are affordable; of the rest those of channels."""
    if sharing.unique:
        return Requests()
    found, _ = find_shareable(model, sharing.selection, not sharing.plain)
    weights = [weight for each in found if (weight := each.weight) is not None]
    return input_requests(model, weights, sharing.feedback)


def share(model: Model, context: Context, sharing: Sharing) -> PassResult:
    """Share values among the weights of a model, in place."""
    model.normalize()
    notes = left_as_quantized(model)
    if context.statistics is None and not sharing.unique:
        notes.append("no real inputs: codebooks fit the weights alone, and no weight makes good for another")
    run = _Run(model, sharing, context)
    run.share()
    return PassResult(run.changes, run.skipped, [*run.notes(), *notes])


@dataclass(frozen=True, eq=False)
class _Made:
    """What one content becomes. exact: not a bit is lost. how: in words."""

    found: Shareable
    palette: Palette
    how: str
    exact: bool = False


@dataclass
class _Run:
    """One run over one model; changes and skipped grow."""

    model: Model
    sharing: Sharing
    context: Context
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inputs = LayerInputs(self.context.statistics, shared_tensors(self.model), self.sharing.bias)
        self._before = self._after = 0

    def share(self) -> None:
        """All tensors that may."""
        if self.sharing.tied and not self.sharing.unique:
            self.changes += tie(self.model, self.context, self.sharing.selection, self.sharing.tied)
        candidates, self.skipped = find_shareable(self.model, self.sharing.selection, not self.sharing.plain)
        made: list[_Made] = []
        lossy: list[Shareable] = []
        for found in candidates:
            exact = self._exact(found)
            reason = None if exact is not None else self._refused(found)
            if exact is not None:
                made.append(_Made(found, exact, f"{described(exact)}, no bit is lost", exact=True))
            elif reason is not None:
                self.skipped.append(Skip(found.place, reason))
            else:
                lossy.append(found)
        self._write([*made, *self._lossy(lossy)])

    def _exact(self, found: Shareable) -> Palette | None:
        """A palette without loss: of no more bits than asked for, or any where nothing else is wanted."""
        if not self.sharing.unique:
            return find_palette(found.constant.values, self.sharing.entries)
        form = smallest(found.constant.data, palette=True, mask=False, name=found.constant.name)
        return form if isinstance(form, Palette) else find_palette(found.constant.values)

    def _lossy(self, wanted: Sequence[Shareable]) -> list[_Made]:
        """All of these at `bits`; then those of most error for their bytes again at 8 bits, as far as wanted."""
        book = self._common(wanted)
        made = {}
        for done, found in enumerate(wanted):
            self.context.progress(done, len(wanted))
            made[found] = _Made(found, *shared(found, self._form, self._known(found), book))
        if book is not None or self.sharing.bits >= FINE_BITS:
            return list(made.values())
        for found in self._fine(list(made.values())):
            made[found] = _Made(found, *shared(found, self._fine_form, self._known(found)))
        return list(made.values())

    def _fine(self, made: Sequence[_Made]) -> list[Shareable]:
        """Those of most relative error for their size that hold at most a share `fine` of all elements."""
        room = self.sharing.fine * sum(each.found.constant.data.size for each in made)
        errors = {each.found: relative_error(each.found, each.palette, self._known(each.found)) for each in made}
        chosen = []
        for found in sorted(errors, key=lambda found: errors[found] / found.constant.data.size, reverse=True):
            data = found.constant.data
            if data.size <= room and _least_bytes(found, self._fine_form) < _WORTH * data.nbytes:
                room -= data.size
                chosen.append(found)
        return chosen

    def notes(self) -> list[str]:
        """What became of the tensors' bytes."""
        stored = sum(change.kind == "values shared" for change in self.changes)
        if not stored:
            return []
        told = f"{stored} tensors: {self._before:,} bytes as floats, {self._after:,} as indices and codebooks"
        if self.sharing.plain:
            return [f"{told}; stored as floats, so that only a compressed copy (zip) is smaller"]
        return [f"{told}; onnxruntime makes floats of them when it loads the model, so it runs no faster"]

    @property
    def _form(self) -> Form:
        sharing = self.sharing
        return Form(sharing.entries, sharing.group, sharing.vector, sharing.feedback, self.context.seed)

    @property
    def _fine_form(self) -> Form:
        return Form(1 << FINE_BITS, feedback=self.sharing.feedback)

    def _refused(self, found: Shareable) -> str | None:
        """Why a tensor keeps its values, when it has too many for a palette without loss."""
        if not found.readers:
            return "no layer multiplies by it, and it has too many distinct values to lose none"
        if self.sharing.unique:
            return "it has more than 256 distinct values, and no few for each channel"
        if not finite(found.constant):
            return "it holds NaN or infinity"
        size, dense = _least_bytes(found, self._form), found.constant.data.nbytes
        if size >= dense:
            return f"codebook and indices would take {size:,} bytes, it takes {dense:,}"
        return None

    def _common(self, wanted: Sequence[Shareable]) -> Wide | None:
        pool = [(found, self._known(found)) for found in wanted] if self.sharing.common else []
        return common_book(pool, self.sharing.entries) if pool else None

    def _known(self, found: Shareable) -> Known:
        weight = found.weight
        return Known() if weight is None else self._inputs.known(weight, self._inputs.slots(weight))

    def _write(self, made: Sequence[_Made]) -> None:
        """Put the palettes into the model, and the mean part of what they lose into biases."""
        slots = [self._slots(each) for each in made]
        stored = Stored() if self.sharing.plain else self._store(made)
        writer = QdqWriter(self.model)
        for each, mine in zip(made, slots, strict=True):
            constants, weight = each.found.constants, each.found.weight
            reason = next((stored.left[constant] for constant in constants if constant in stored.left), None)
            if reason is not None:
                self.skipped.append(Skip(each.found.place, reason))
                continue
            values = each.palette.values()
            if weight is not None and mine:
                lost = weight.matrix() - weight.readers[0].view.matrix(values).astype(np.float64)
                self._inputs.correct(writer, weight, lost, mine)
            if self.sharing.plain:
                for constant in constants:
                    constant.values = values
            self._tell(each, bool(mine), stored)
        writer.finish()

    def _store(self, made: Sequence[_Made]) -> Stored:
        """Write the forms, zeros as a bitmask where that is smaller."""
        masked = {each: mask for each in made if (mask := _mask(each.palette)) is not None}
        first = store(self.model, {c: masked.get(each, each.palette) for each in made for c in each.found.constants})
        palettes = {c: each.palette for each in masked for c in each.found.constants if c in first.left}
        if not palettes:
            return first
        second = store(self.model, palettes)
        left = {c: reason for c, reason in (first.left | second.left).items() if c not in second.saved}
        return Stored(first.saved | second.saved, left)

    def _slots(self, made: _Made) -> dict[Node, BiasSlot]:
        weight = made.found.weight
        return {} if made.exact or weight is None else self._inputs.slots(weight)

    def _tell(self, made: _Made, corrected: bool, stored: Stored) -> None:
        palette = made.palette
        books = (
            f"{palette.groups} codebooks of {palette.entries}" if palette.groups > 1 else f"{palette.entries} entries"
        )
        constant = made.found.constant
        before = constant.data.nbytes
        after = before - stored.saved.get(constant, before - palette.nbytes)
        detail = made.how if made.exact else f"{books}, {made.how}" + ", bias" * corrected
        self.changes.append(Change("values shared", made.found.place, f"{detail}: {before:,} bytes to {after:,}"))
        self._before, self._after = self._before + before, self._after + after


def _least_bytes(found: Shareable, form: Form) -> int:
    """Of indices and one codebook, without nodes."""
    constant, width = found.constant, form.vector if vectors_fit(found, form.vector) else 1
    bits = int(form.entries - 1).bit_length()
    return -(-int(constant.data.size) // width * bits // 8) + form.entries * width * int(constant.dtype.itemsize)


def _mask(palette: Palette) -> MaskedPalette | None:
    """The palette with a bitmask of its most common indices, where that takes clearly less than without.

    Unpacking one takes time and memory when the model is loaded.
    """
    if palette.indices.size > MOST_MASKED:
        return None
    masked = MaskedPalette.of(palette)
    return masked if masked.nbytes < _MASKED_WORTH * palette.nbytes else None
