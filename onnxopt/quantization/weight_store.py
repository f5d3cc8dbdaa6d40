"""Storing float weights as codes: how each is coded, what pays, and the biases that make good for it.

One engine for every format. What a weight becomes is chosen by its place and by what is to be saved:

    file      constants -> Cast -> Mul -> ... -> operator     folded when the model is loaded: float speed and memory
    memory    constants -> DequantizeLinear -> MatMul          a kernel that reads codes (MatMulNBits): less memory,
                                                               faster than float for single rows, slower for many
    tables    Gather picks rows of codes, which are scaled after it, whatever is to be saved
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Requests, Statistics
from onnxopt.calibration.moments import affordable, second_moments
from onnxopt.graph.edit import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.numerics.affine import FloatArray
from onnxopt.numerics.blocks import Blocks, Levels, Scaling, Wide, feedback_round, output_error, refined, searched
from onnxopt.numerics.formats import INT8, Format
from onnxopt.numerics.weights import mean_output_error, quantize_kept, quantize_layer_weight, trouble
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.quantization import storage
from onnxopt.quantization.coded import left_as_quantized
from onnxopt.quantization.layers import channel_axis, layout_of, shared_tensors
from onnxopt.quantization.storage import Stored
from onnxopt.quantization.weight_nodes import InBlocks, PerChannel, WeightNodes, has_int4
from onnxopt.quantization.writer import QdqWriter
from onnxopt.target import Target

# Inputs that share a scale; fewer of them than half a block would cost more in scales than 4 bits save.
BLOCK = 32
# Bytes of the nodes that make a float weight of blocks, more than Cast and Mul take, as measured on saved models.
_UNPACKING_INT4, _UNPACKING_BYTES = 260, 1040
_UNPACKING_OPSET = 11
# What a user may ask to save.
SAVE = ("auto", "file", "memory")

Coded = PerChannel | InBlocks


@dataclass(frozen=True)
class Storing:
    """What is wanted of stored weights.

    form: of weights with one scale for each output. bits: below 8, codes in blocks of `block` inputs where a weight is
    wide enough for them. memory: save memory too, not only the file. power_of_two: scales are. feedback: round with
    second moments of inputs where they are known. correct_bias: take mean errors out of biases. all_weights: store
    every weight that pays; else only those that the runtime would round by itself. plain_scales: all are positive.
    """

    form: Format = INT8
    bits: int = 8
    block: int = BLOCK
    memory: bool = False
    power_of_two: bool = False
    feedback: bool = True
    correct_bias: bool = True
    all_weights: bool = True
    plain_scales: bool = False

    @property
    def levels(self) -> Levels:
        """Of codes in blocks."""
        return Levels.signed(self.bits)


def saves_memory(save: str, target: Target) -> bool:
    """Whether kernels should read codes; save: one of SAVE. auto: where the target's runtime folds no constants."""
    return save == "memory" or (save == "auto" and not target.folds)


def requests(model: Model, storing: Storing, selection: Selection) -> Requests:
    """Second moments for weights that are rounded with them, means for biases that can take an error."""
    wanted = [found for found in storage.find_stored(model) if selection.refuses(found.node) is None]
    fed = [
        found.node
        for found in wanted
        if storing.feedback and _in_blocks(model, found, storing) and _has_gram(model, found)
    ]
    mine = {found.node for found in wanted if storing.correct_bias}
    biased = {node: tensor for node, tensor in biased_inputs(model).items() if node in mine}
    means = dict.fromkeys((tensor, channel_axis(node)) for node, tensor in biased.items())
    return Requests(grams=tuple(affordable(fed)), channel_means=tuple(means))


def biased_inputs(model: Model) -> dict[Node, Variable]:
    """Convs and Gemms of the main graph, which have a place for a bias, and what their weight multiplies."""
    return {
        node: node.inputs[0]
        for node in model.graph.nodes
        if node.kind in (("", "Conv"), ("", "Gemm")) and isinstance(node.inputs[0], Variable)
        if not node.attrs.get("transA", 0) and node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
    }


def store(model: Model, context: Context, storing: Storing, selection: Selection) -> PassResult:
    """Store the selected weights of a model that pay for it."""
    before = left_as_quantized(model)
    writer = QdqWriter(model)
    run = WeightStore(model, writer, storing, context.statistics, context.target.saturates, biased_inputs(model))
    wanted: list[Stored] = []
    for found in storage.find_stored(model):
        reason = selection.refuses(found.node) or _too_old(model, storing)
        if reason is None:
            wanted.append(found)
        else:
            run.skipped.append(Skip(_place(found), reason))
    run.run(wanted, context.progress)
    writer.finish()
    kinds = Counter(change.detail.split(",")[0] for change in run.changes)
    notes = [f"weights stored: {', '.join(f'{number} {kind}' for kind, number in kinds.items()) or 'none'}"]
    notes += before
    if context.statistics is None and (storing.bits < 8 and storing.feedback):
        notes.append("no real inputs: weights are rounded without knowing what they multiply")
    return PassResult(run.changes, run.skipped, notes)


@dataclass
class WeightStore:
    """One run over one model. changes, skipped, stored: grow; `writer.finish` is left to the caller.

    saturates: whether pairs of codes must be bounded where the runtime may run them on integers after all. inputs:
    nodes whose bias may be corrected, and the tensor whose mean tells by how much. coded: (uid of a weight, axes that
    keep a scale) -> int8 codes that the model holds anyway, with a scale for each index of the one axis.
    """

    model: Model
    writer: QdqWriter
    storing: Storing
    statistics: Statistics | None
    saturates: bool
    inputs: dict[Node, Variable] = field(default_factory=dict)
    coded: dict[tuple[int, tuple[int, ...]], tuple[Constant, FloatArray]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outputs = shared_tensors(self.model)
        self._nodes = WeightNodes(self.writer, self.model, self.storing.memory, self.storing.block)
        self._coded: dict[tuple[object, ...], tuple[Coded, FloatArray]] = {}

    @property
    def stored(self) -> int:
        """How many weights were coded."""
        return len(self._coded)

    def run(self, wanted: Sequence[Stored], progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        """Code the weights that pay, and those the runtime would round worse.

        A weight pays when all that read it take codes: its float values would stay in the file for anything else.
        """
        weights: dict[Constant, list[Stored]] = {}
        for found in wanted:
            weights.setdefault(found.weight, []).append(found)
        for done, (weight, readers) in enumerate(weights.items()):
            progress(done, len(weights))
            between = [found for found in readers if self._between(found)]
            pays = self.storing.all_weights and storage.saved_bytes(readers, self._bytes) > 0
            if not between and not pays:
                continue
            reason = trouble(weight.values)
            chosen: list[Stored] = []
            if reason is None:
                reason = (
                    storage.stays_float(weight, {found.place for found in readers}, self._outputs) if pays else None
                )
                chosen = readers if pays and reason is None else between
            for found in chosen:
                self._store(found, found in between, [other for other in chosen if other.view == found.view])
            if reason is not None:
                self._report_unstored([found for found in readers if found not in chosen], f"its weight {reason}")
        self._report_other_types()

    def _between(self, found: Stored) -> bool:
        """Whether codes between codes are to be kept from the runtime; older models have no scales per channel."""
        return self.model.opset >= INT8.opset and storage.between_codes(found.node)

    def _bytes(self, found: Stored) -> int:
        """Of codes and scales of one weight."""
        if not _in_blocks(self.model, found, self.storing):
            return storage.eight_bit_bytes(found)
        return _block_bytes(self.model, found, self.storing)

    def _store(self, found: Stored, between: bool, sharers: Sequence[Stored]) -> None:
        in_blocks = _in_blocks(self.model, found, self.storing) and not between
        kind = self._nodes.kind(found, in_blocks, any(other.node.op == "Gather" for other in sharers))
        own_type = found.node.op == "Gather" and self.storing.form.dtype != np.int8
        axes = found.view if in_blocks else found.kept
        key = (found.weight.data.uid, axes, between, kind, own_type)
        if key not in self._coded:
            self._coded[key] = self._code(found, between, kind, sharers)
        coded, values = self._coded[key]
        place = _place(found)  # another node may stand there soon
        detail = coded.detail + (" rows" if found.node.op == "Gather" else "")
        if self._correct(found, values):
            detail += ", bias corrected"
        self._nodes.store(found, coded, between)
        self.changes.append(Change("stored", place, detail))

    def _code(self, found: Stored, between: bool, kind: str, sharers: Sequence[Stored]) -> tuple[Coded, FloatArray]:
        """The codes as constants, and the weight that they stand for."""
        weight, name = found.weight.values, found.weight.name
        if kind != "plain":
            blocks, how = self._blocks(found, sharers, half=kind == "file" and _in_half(weight))
            return self._nodes.in_blocks(found, blocks, kind, how), found.view.back(blocks.values())
        given = self.coded.get((found.weight.data.uid, found.kept))
        if given is not None and not between:
            scales = given[1].reshape(found.scale_shape)
            values = np.asarray(given[0].values.astype(np.float32) * scales)
            return PerChannel(given[0], self.writer.constant(f"{name}_scale", scales), INT8.name), values
        # the runtime's Gather knows no 8-bit floats, its integer kernels no scale but int8's
        form = self.storing.form
        if form.dtype != np.int8 and (between or found.node.op == "Gather"):
            form = INT8
        if between and self.saturates and found.node.op in ("Conv", "Gemm"):
            layer = quantize_layer_weight(
                weight, layout_of(found.node), bounded=True, bits=form.bits, power_of_two=self.storing.power_of_two
            )
            codes: npt.NDArray[Any] = layer.codes
            scales = layer.scales.reshape(found.scale_shape)
        else:
            codes, scales = quantize_kept(weight, found.kept, form, self.storing.power_of_two)
        coded = PerChannel(
            self.writer.constant(f"{name}_codes", codes), self.writer.constant(f"{name}_scale", scales), form.name
        )
        return coded, np.asarray(codes.astype(np.float32) * scales)

    def _blocks(self, found: Stored, sharers: Sequence[Stored], half: bool) -> tuple[Blocks, str]:
        """Codes in blocks, and how they were rounded: with second moments where that leaves a smaller error."""
        matrix, size = found.view.matrix(found.weight.values), self.storing.block
        scaling = Scaling(self.storing.levels, half, negative=not self.storing.plain_scales)
        seconds = self._second_moments(found, sharers)
        if seconds is None:
            return searched(matrix, size, scaling), "scales searched"
        best = []
        for part, second in zip(np.split(matrix, len(seconds)), seconds, strict=True):
            plain = searched(part, size, scaling, np.diagonal(second))
            fed = refined(part, second, feedback_round(part, second, size, scaling), scaling)
            errors = [output_error(part, each.values(), second) for each in (fed, plain)]
            best.append(fed if errors[0] <= errors[1] else plain)
        codes, scales = (np.concatenate([getattr(each, what) for each in best]) for what in ("codes", "scales"))
        return Blocks(codes, scales, size), "rounded with error feedback"

    def _second_moments(self, found: Stored, sharers: Sequence[Stored]) -> list[Wide] | None:
        """E[x x^T] of each group, over all that read the weight in the same way."""
        if self.statistics is None or not self.storing.feedback:
            return None
        seconds = second_moments(self.statistics, [other.node for other in sharers])
        return seconds if seconds is not None and len(seconds[0]) == found.view.inputs else None

    def _correct(self, found: Stored, rounded: FloatArray) -> bool:
        """Take the mean error of a stored weight out of its Conv's or Gemm's bias, where the input's mean is known."""
        node, measured = found.node, self.inputs.get(found.node)
        if measured is None or not self.storing.correct_bias or self.statistics is None:
            return False
        mean = self.statistics.channel_mean(measured, channel_axis(node))
        given = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        if mean is None or not (given is None or isinstance(given, Constant)):
            return False
        layout = layout_of(node)
        bias = np.zeros(found.weight.shape[layout.axis], np.float32) if given is None else given.values
        if given is None and storage.saved_bytes([found], self._bytes) < bias.nbytes + storage.NODE_BYTES:
            return False
        group = int(node.attrs.get("group", 1))
        error = mean_output_error(found.weight.values, rounded, layout, group, mean)
        corrected = self.writer.constant(f"{found.weight.name}_bias", (bias - error).astype(np.float32))
        self.writer.set_input(node, 2, corrected, found.body)
        return True

    def _report_unstored(self, readers: list[Stored], reason: str) -> None:
        """One entry for each reader that has none yet for the same reason."""
        known = {(skip.node, skip.reason) for skip in self.skipped}
        self.skipped += [Skip(_place(found), reason) for found in readers if (label(found.node), reason) not in known]

    def _report_other_types(self) -> None:
        """Weights that would pay if they were float32."""
        if not self.storing.all_weights:
            return
        named = {skip.node for skip in self.skipped}
        for found in storage.find_other_floats(self.model):
            pays = storage.saved_bytes([found], self._bytes) > 0
            if pays and not named & {label(found.node), _place(found)}:
                self._report_unstored([found], f"its weight is {found.weight.dtype}, not float32")


def _too_old(model: Model, storing: Storing) -> str | None:
    """Why the model's version of ONNX can't hold the codes."""
    form, what = storing.form, "scales per channel" if storing.form.dtype == np.int8 else storing.form.name
    if model.opset < form.opset and (storing.memory or form.dtype != np.int8):
        return f"operator set {model.opset} has no {what}; {form.opset} has"
    if storing.bits < 8 and model.opset < _UNPACKING_OPSET:
        return f"operator set {model.opset} has no BitShift, which unpacks 4-bit codes; {_UNPACKING_OPSET} has"
    return None


def _in_blocks(model: Model, found: Stored, storing: Storing) -> bool:
    """Whether a weight is coded in blocks: it is wide enough, rows of a table can be packed, and int8 takes no less."""
    if storing.bits >= 8 or found.view.inputs < storing.block:
        return False
    if found.node.op == "Gather" and found.view.inputs % (2 * storing.block) != 0:
        return False
    return _block_bytes(model, found, storing) <= storage.eight_bit_bytes(found)


def _block_bytes(model: Model, found: Stored, storing: Storing) -> int:
    """Of codes in blocks, scales, and of the nodes that unpack them beyond those of int8."""
    rows = int(found.weight.data.size) // found.view.inputs
    blocks = -(-found.view.inputs // storing.block)
    nodes = 0 if storing.memory else _UNPACKING_INT4 if has_int4(model) else _UNPACKING_BYTES
    return rows * blocks * (storing.block * storing.bits // 8 + 2) + nodes


def _in_half(weight: FloatArray) -> bool:
    """Whether float16 holds the scales of 4-bit codes, to 0.2 % of the largest."""
    largest = float(max(weight.max(initial=0.0), -weight.min(initial=0.0))) / 8
    return largest == 0.0 or 2.0**-16 <= largest <= float(np.finfo(np.float16).max)


def _has_gram(model: Model, found: Stored) -> bool:
    is_layer = found.node.op in ("Conv", "Gemm") or (found.node.op == "MatMul" and found.at == 1)
    return is_layer and len(found.view.grid) == 2 and found.body is model.graph


def _place(found: Stored) -> str:
    return f"{label(found.node)}, weight {found.weight.name}"
