"""16-bit floats into a model: weights only, or a mixed graph with the weights that are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph.edit import label
from onnxopt.graph.selection import Selection
from onnxopt.model import Model, Node
from onnxopt.passbase import Change, Context, PassResult, Skip
from onnxopt.quantization import half, half_graph
from onnxopt.quantization.half import HalfFormat, Halves
from onnxopt.quantization.writer import QdqWriter
from onnxopt.target import Target

# A graph that comes out too far from the original is tried with each of so many stretches of nodes in float32.
STRETCHES = 8
SENSITIVE = "its stretch of the graph costs the most accuracy"


@dataclass(frozen=True)
class Settings:
    """What a pass decides.

    form: the 16-bit format. compute: "half" for a mixed graph, "float" for weights only, "auto" for what the target
    computes in. selection: names the nodes left as they are. keep_ops: operator types that compute in float32.
    min_sqnr: dB at the outputs below which stretches of a mixed graph return to float32.
    """

    form: HalfFormat
    compute: str = "auto"
    selection: Selection = field(default_factory=Selection)
    keep_ops: tuple[str, ...] = ()
    min_sqnr: float = 50.0

    def computes_half(self, target: Target) -> bool:
        """Whether the graph itself becomes 16-bit on this target."""
        if self.compute == "auto":
            return target.half_compute and self.form is half.FP16
        return self.compute == "half"


def requests(model: Model, settings: Settings) -> Requests | None:
    """Ranges for a mixed graph; nothing for weights only. "auto" is taken for a mixed graph: see `Pass.for_target`."""
    if settings.compute == "float" or half.half_already(model) is not None or half.quantized_node(model) is not None:
        return None
    return half_graph.requests(model)


def convert(model: Model, context: Context, settings: Settings) -> PassResult:
    """Rewrite the model; one that holds 16-bit floats already is left as it is."""
    narrow = half.half_already(model)
    if narrow is not None:
        return PassResult(skipped=[Skip(narrow, "is a 16-bit float already: the model is left as it is")])
    if settings.form is half.BF16 and model.opset < 13:
        return PassResult(skipped=[Skip("opset", f"{model.opset} has no Cast of bfloat16; 13 has")])
    model.normalize()
    if not settings.computes_half(context.target):
        return _stored(model, settings)
    coded = half.quantized_node(model)
    if coded is None:
        half_graph.drop_casts_to_itself(model)
        sensitive, notes = _sensitive(model, context, settings)
        result = _mixed(model, settings, context.statistics, sensitive)
        return PassResult(result.changes, result.skipped, [*result.notes, *notes])
    result = _stored(model, settings)
    reason = f"{coded.op} makes or takes integer codes; the integer kernels of a quantized model need float32 around"
    note = "the model is quantized: nothing computes in 16 bits"
    return PassResult(result.changes, [Skip(label(coded), reason), *result.skipped], [*result.notes, note])


def _stored(model: Model, settings: Settings) -> PassResult:
    """Weights only."""
    left_out = half.excluded(model, settings.selection)
    halves = Halves(settings.form, QdqWriter(model))
    changes, skipped = half.store(model, halves, left_out)
    halves.writer.finish()
    model.normalize()
    return PassResult(changes, skipped, [f"{len(changes)} weights stored as {settings.form.name}"])


def _mixed(model: Model, settings: Settings, statistics: Statistics | None, sensitive: dict[Node, str]) -> PassResult:
    """A mixed graph, and storage for the weights that float32 nodes read."""
    left_out = half.excluded(model, settings.selection)
    halves = Halves(settings.form, QdqWriter(model))
    kept = {**dict.fromkeys(left_out, "it is excluded"), **sensitive}
    mixed = half_graph.plan(model, settings.form, statistics, kept, settings.keep_ops)
    changes: list[Change] = half_graph.Writer(model, mixed, halves).write()
    stored, skipped = half.store(model, halves, left_out)
    halves.writer.finish()
    model.normalize()
    where = f"{len(mixed.nodes)} nodes compute in {settings.form.name}, {len(mixed.kept)} in float32"
    notes = [f"{where}, {len(stored)} weights of these stored as {settings.form.name}"]
    if statistics is None:
        notes.append("no real inputs: only weights were held against the format's range, not what nodes compute")
    return PassResult(changes + stored, [*half_graph.skips(mixed), *skipped], notes)


def _sensitive(model: Model, context: Context, settings: Settings) -> tuple[dict[Node, str], list[str]]:
    """Nodes that return to float32 for the sake of `min_sqnr`, the best stretch first, and what is to be said of it."""
    floats = [tensor for tensor in model.graph.outputs if tensor.dtype in (np.float32, np.float64)]
    if context.compare is None or not floats:
        return {}, []
    compare = context.compare

    def trial(kept: set[int]) -> float:
        clone = model.clone()
        statistics = None if context.statistics is None else context.statistics.moved(clone.tensors)
        _mixed(clone.model, settings, statistics, {node: SENSITIVE for at, node in _numbered(clone.model, kept)})
        return compare(clone.model)

    kept: set[int] = set()
    score = first = trial(kept)
    if score >= settings.min_sqnr:
        return {}, []
    goal = min(settings.min_sqnr, trial(set(range(model.node_count()))) - 1.0)
    if score >= goal:
        return {}, [f"{first:.1f} dB at the outputs, which rounded weights alone cost too"]
    stretches = _stretches(model)
    while stretches and score < goal:
        scores = [trial(kept | stretch) for stretch in stretches]
        score = max(scores)
        kept |= stretches.pop(scores.index(score))
    note = f"{first:.1f} dB at the outputs, {score:.1f} with {len(kept)} nodes returned to float32"
    return {node: SENSITIVE for _, node in _numbered(model, kept)}, [note]


def _numbered(model: Model, chosen: set[int]) -> list[tuple[int, Node]]:
    nodes = [node for body in model.bodies() for node in body.nodes]
    return [(at, node) for at, node in enumerate(nodes) if at in chosen]


def _stretches(model: Model) -> list[set[int]]:
    count = model.node_count()
    bounds = [count * part // STRETCHES for part in range(STRETCHES + 1)]
    return [set(range(low, high)) for low, high in pairwise(bounds) if high > low]
