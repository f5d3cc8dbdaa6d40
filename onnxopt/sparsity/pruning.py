"""Zeros for one weight after the other, and the biases that make good for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model
from onnxopt.numerics.blocks import Wide, output_error
from onnxopt.numerics.sparsity import Groups, Share, kept_by, lamp_scores, refitted, sparse_gpt, wanda_scores
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.quantization.coded import left_as_quantized
from onnxopt.quantization.layer_weights import RECURRENT, Known, LayerInputs, input_requests
from onnxopt.quantization.layers import shared_tensors
from onnxopt.quantization.writer import QdqWriter
from onnxopt.sparsity.weights import Prunable, find_prunable

CRITERIA = ("auto", "magnitude", "wanda", "sparsegpt", "least_squares")
_NAMED = 3  # nodes named in a note


@dataclass(frozen=True)
class Threshold:
    """Weights of at most this size go; relative: as a share of the largest of the tensor."""

    size: float
    relative: bool = False


Wanted = Share | Groups | Threshold


@dataclass(frozen=True)
class Pruning:
    """What is wanted.

    wanted: what goes of each weight; with `by_all`, a share of all together. criterion: one of CRITERIA. bias: the mean
    part of errors goes into biases. refit: weights that stay may change. depthwise: zero those of depthwise Convs too.
    """

    wanted: Wanted
    by_all: bool = False
    criterion: str = "auto"
    bias: bool = True
    refit: bool = True
    depthwise: bool = False
    selection: Selection = field(default_factory=Selection)

    @property
    def by_size(self) -> bool:
        """Whether |w| alone says what goes."""
        return self.criterion == "magnitude" or isinstance(self.wanted, Threshold)

    @property
    def mends(self) -> bool:
        """Whether weights that stay make good for those that go."""
        return self.refit and self.criterion not in ("magnitude", "wanda")


def requests(model: Model, pruning: Pruning) -> Requests:
    """Second moments of what weights multiply, as far as they are affordable; of the rest those of channels."""
    if pruning.criterion == "magnitude" and not pruning.bias:
        return Requests()
    weights, _ = find_prunable(model, pruning.selection, pruning.depthwise)
    return input_requests(model, weights, pruning.mends)


def prune_weights(model: Model, context: Context, pruning: Pruning) -> PassResult:
    """Zero weights in place."""
    notes = left_as_quantized(model)
    if context.statistics is None and pruning.criterion != "magnitude":
        notes.append("no real inputs: weights go by size alone, and none makes good for them")
    weights, skipped = find_prunable(model, pruning.selection, pruning.depthwise)
    run = _Run(model, pruning, context.statistics, skipped)
    run.prune(weights, context)
    return PassResult(run.changes, run.skipped, [*run.notes(), *notes])


@dataclass
class _Run:
    """One run over one model; changes and skipped grow."""

    model: Model
    pruning: Pruning
    statistics: Statistics | None
    skipped: list[Skip]
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._writer = QdqWriter(self.model)
        self._inputs = LayerInputs(self.statistics, shared_tensors(self.model), self.pruning.bias)
        self._before = self._after = self._total = 0
        self._emptied: dict[str, tuple[int, int]] = {}

    def prune(self, weights: Sequence[Prunable], context: Context) -> None:
        """Zero what is wanted of all these weights."""
        shares = self._shares(weights) if self.pruning.by_all else {}
        for done, weight in enumerate(weights):
            context.progress(done, len(weights))
            self._prune(weight, shares.get(weight, self.pruning.wanted))
        self._writer.finish()

    def notes(self) -> list[str]:
        """Zeros won, what they are good for, and whole channels among them."""
        if not self.changes:
            return []
        share = self._after / self._total
        told = f"{self._after:,} of {self._total:,} weights in {len(self.changes)} tensors are zero ({share:.1%})"
        notes = [f"{told}, {self._before:,} were before"]
        notes.append(
            "onnxruntime stores zeros and computes with them: the file keeps its size and runs no faster;"
            " only a compressed copy (zip) is smaller"
        )
        if self.pruning.wanted == Groups(2, 4):
            notes.append(
                "2:4: NVIDIA GPUs from Ampere on have kernels that skip such zeros, where TensorRT chooses them"
            )
        if self._emptied:
            outputs, inputs = (sum(counts[at] for counts in self._emptied.values()) for at in (0, 1))
            names = ", ".join(list(self._emptied)[:_NAMED]) + (", ..." if len(self._emptied) > _NAMED else "")
            notes.append(f"{outputs} output and {inputs} input channels became zero ({names}): run prune after this")
        return notes

    def _shares(self, weights: Sequence[Prunable]) -> dict[Prunable, Wanted]:
        """How much of each goes, if the smallest scores of all go (`lamp_scores`)."""
        scores = []
        for weight in weights:
            matrix, known = weight.matrix(), self._inputs.known(weight, self._inputs.slots(weight))
            parts = enumerate(np.split(matrix, weight.parts))
            scores.append(lamp_scores(np.concatenate([self._scores(p, known, at)[0] for at, p in parts])).ravel())
        if not scores:
            return {}
        total = np.concatenate(scores)
        assert isinstance(self.pruning.wanted, Share)
        limit = np.partition(total, gone := self.pruning.wanted.count(total.size))[gone]
        return {
            weight: Share(int((mine < limit).sum()) / mine.size) for weight, mine in zip(weights, scores, strict=True)
        }

    def _prune(self, weight: Prunable, wanted: Wanted) -> None:
        matrix = weight.matrix()
        if isinstance(wanted, Groups):
            wanted = Groups(wanted.kept, wanted.of, weight.stretch)
        elif isinstance(wanted, Threshold) and wanted.relative:
            wanted = Threshold(wanted.size * float(np.abs(matrix).max()))
        parts = np.split(matrix, weight.parts)
        smallest = np.concatenate([_kept(np.abs(part), wanted) for part in parts])
        if not matrix[~smallest].any():
            share = 1 - np.count_nonzero(matrix) / matrix.size
            none = "no weight is that small" if isinstance(wanted, Threshold) else "it has too few inputs for that"
            reason = none if smallest.all() else f"{share:.1%} of it are zero already, as many as asked for"
            self.skipped.append(Skip(weight.place, reason))
            return
        slots = self._inputs.slots(weight)
        known = self._inputs.known(weight, slots)
        made = [self._pruned(part, wanted, known, at) for at, part in enumerate(parts)]
        values = weight.stored(np.concatenate([found for found, _ in made]))
        how = " and ".join(dict.fromkeys(how for _, how in made))
        pruned = Prunable(Constant(weight.constant.name, values), weight.readers).matrix()
        corrected = self._inputs.correct(self._writer, weight, matrix - pruned, slots)
        before, zeros = (int(each.size - np.count_nonzero(each)) for each in (matrix, pruned))
        pattern = f", {wanted.kept}:{wanted.of}" if isinstance(wanted, Groups) else ""
        detail = f"{zeros / matrix.size:.1%} of {matrix.size:,} zero{pattern}, {how}" + ", bias" * corrected
        self.changes.append(Change("weights zeroed", weight.place, detail, zeros - before))
        self._before, self._after, self._total = self._before + before, self._after + zeros, self._total + matrix.size
        gained = np.subtract(weight.empty_channels(pruned), weight.empty_channels(matrix))
        if gained.any() and weight.node.op not in RECURRENT:
            self._emptied[label(weight.node)] = (int(gained[0]), int(gained[1]))
        weight.constant.values = values

    def _pruned(self, part: Wide, wanted: Wanted, known: Known, at: int) -> tuple[Wide, str]:
        """One part with its zeros, and how they were chosen: of what the criterion names that with the least error."""
        scores, how = self._scores(part, known, at)
        kept = _kept(scores, wanted)
        plain = np.where(kept, part, 0.0)
        if known.seconds is None or not self.pruning.mends:
            return plain, how
        second, criterion, found = known.seconds[at], self.pruning.criterion, [(plain, how)]
        if criterion in ("auto", "least_squares"):
            found.append((refitted(part, plain, kept, second), f"{how} and least squares"))
        if criterion in ("auto", "sparsegpt") and not isinstance(wanted, Threshold):
            swept = sparse_gpt(part, second, wanted)
            if criterion == "sparsegpt":
                found.append((swept, "SparseGPT"))
            else:
                found.append((refitted(part, swept, swept != 0, second), "SparseGPT and least squares"))
        return min(found, key=lambda made: output_error(part, made[0], second))

    def _scores(self, part: Wide, known: Known, at: int) -> tuple[Wide, str]:
        """What the smallest of go, and its name."""
        if known.powers is None or self.pruning.by_size:
            return np.abs(part), "magnitude"
        return wanda_scores(part, known.powers[at]), "Wanda"


def _kept(scores: Wide, wanted: Wanted) -> npt.NDArray[np.bool_]:
    return np.asarray(scores > wanted.size) if isinstance(wanted, Threshold) else kept_by(scores, wanted)
