"""Which operators may compute in float16, by onnx's schemas, by what is known of them, and by measured ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxopt.calibration import Statistics
from onnxopt.graph import operators
from onnxopt.graph.shapes import Fact
from onnxopt.model import Constant, Model, Node, Variable
from onnxopt.quantization.coded import is_quantized
from onnxopt.quantization.half import FLOAT32, HalfFormat, counts_exactly, trouble

# How much larger than the measured values those of other inputs may be.
MARGIN = 4.0
# Operators that take any type of float at their only input and give none: they read what is there.
ANY_READER = frozenset({"ArgMax", "ArgMin", "Cast", "IsInf", "IsNaN", "NonZero", "Shape", "Size"})
_COMPARING = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# Inputs of these whose type is another than the output's stay float32: coordinates, sizes, a ratio. The float inputs of
# all other operators change together, even where the schema lets them differ.
_APART = frozenset({"Dropout", "GridSample", "OneHot", "Resize", "Upsample"})
_COORDINATES = "its coordinates need more digits than float16 has"
_STAY = {
    "CumSum": "it adds up a whole axis, one rounding after the other",
    "DFT": "it adds up a whole axis of squares and phases",
    "STFT": "it adds up a whole window of squares and phases",
    "MaxRoiPool": _COORDINATES,
    "RoiAlign": _COORDINATES,
    "MeanVarianceNormalization": "its definition holds float32 constants",
    "Det": "its products cancel",
    "NegativeLogLikelihoodLoss": "it is a loss",
    "SoftmaxCrossEntropyLoss": "it is a loss",
}
# Sums and sums of squares on the way to their outputs, which a float16 accumulator would have to hold.
_SUMS = frozenset({"AveragePool", "GlobalAveragePool", "LpPool", "Mean", "ReduceL1", "ReduceMean", "ReduceSum", "Sum"})
_NORMS = frozenset({"GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization", "RMSNormalization"})
_SQUARES = _NORMS | {"GlobalLpPool", "LpNormalization", "MeanVarianceNormalization", "ReduceL2", "ReduceSumSquare"}
_LAYERS = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
# Behind these absolute errors of the input are bounded relative errors of the output.
_SETTLED = frozenset({"Exp", "LogSoftmax", "Sigmoid", "Softmax", "Softplus"})
_ANGLES = frozenset({"Cos", "Sin", "Tan"})
# These need their input exactly and use it themselves; others of the kind keep it in float32 by their definition.
_SENSITIVE = _ANGLES | {"Log"}
# Sin, Cos and Tan of larger angles than this lose what float16 has no digits for.
LARGE_ANGLE = 16.0


@dataclass(frozen=True)
class Ports:
    """Positions of a node's inputs and outputs that become float16 together."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Types:
    """Element types of a model's tensors, as certain as inference makes them."""

    def __init__(self, facts: dict[int, Fact]) -> None:
        self._facts = facts

    def of(self, tensor: Variable | Constant) -> np.dtype[Any] | None:
        """The element type, None when it is not known."""
        if isinstance(tensor, Constant):
            return tensor.dtype
        found = self._facts.get(id(tensor), Fact()).dtype
        if found is not None:
            return found
        return None if tensor.dtype is None else np.dtype(tensor.dtype)

    def rank(self, tensor: Variable | Constant) -> int | None:
        """Number of axes, None when it is not known."""
        if isinstance(tensor, Constant):
            return len(tensor.shape)
        shape = self._facts.get(id(tensor), Fact()).shape
        return None if shape is None else len(shape)

    def floats(self, tensors: list[Any]) -> dict[int, Any]:
        """Position -> tensor, of those that are float32."""
        return {at: each for at, each in enumerate(tensors) if not each.is_empty() and self.of(each) == FLOAT32}


def ports(node: Node, opset: int, types: Types) -> Ports | str:
    """What of a node would become float16; or why nothing can, whatever its values are."""
    if node.kind[0] != "":
        return f"it is of domain {node.kind[0]}, whose types are not known"
    if any(True for _ in node.graphs()):
        return "what goes into its bodies and comes out of them stays float32"
    if is_quantized(node):
        return "it makes or takes integer codes"
    if operators.is_training(node):
        return "it is in training mode"
    if node.op.startswith("Scatter") and node.attrs.get("reduction", "none") != "none":
        return "the runtime has no float16 kernel for a Scatter that reduces, and finds out when it runs"
    if node.op in _STAY:
        return _STAY[node.op]
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return f"opset {opset} does not define it"
    return _by_schema(node, schema, opset, types)


def _by_schema(node: Node, schema: Any, opset: int, types: Types) -> Ports | str:
    able = {each.type_param_str for each in schema.type_constraints if "tensor(float16)" in each.allowed_type_strs}
    reads = _type_names(node.inputs, schema.inputs)
    makes = _type_names(node.outputs, schema.outputs)
    unknown = [
        tensor.name
        for names, tensors in ((reads, node.inputs), (makes, node.outputs))
        for at, tensor in enumerate(tensors)
        if not tensor.is_empty() and names[at] in able and types.of(tensor) is None
    ]
    if unknown:
        return f"the element type of {unknown[0]} is not known"
    inputs, outputs = types.floats(node.inputs), types.floats(node.outputs)
    chosen = {makes[at] for at in outputs}
    if not chosen:
        if node.op not in _COMPARING:
            return "it has no float32 output"
        chosen = {reads[at] for at in inputs}
    if not chosen <= able:
        return f"{node.op} of opset {opset} has an output that is never float16"
    if node.op not in _APART:
        chosen = able
    taken = tuple(at for at in inputs if reads[at] in chosen)
    given = tuple(at for at in outputs if makes[at] in chosen)
    if not {makes[at] for at in given} <= {reads[at] for at in taken}:
        return "an attribute decides the type of its output"
    return Ports(taken, given)


def _type_names(tensors: list[Any], formals: Any) -> list[str]:
    """The schema's name of each tensor's type; the last formal parameter stands for all that follow."""
    names = [str(formal.type_str) for formal in formals]
    return [names[min(at, len(names) - 1)] if names else "" for at in range(len(tensors))]


def delicate(model: Model, types: Types, angle: Callable[[Node], bool]) -> dict[Node, str]:
    """Nodes whose values are needed more exactly than float16 is, with the reason.

    Those that compute with lengths of axes; and what leads, up to the layer before, into integers, logarithms,
    coordinates or large angles (`angle` says of a Sin, Cos or Tan whether its are).
    """
    found = dict.fromkeys(_sizes(model), "it computes with lengths of axes")
    for body in model.bodies():
        for node in body.nodes:
            for at, reason in _exact_inputs(node, types, angle):
                if node.op in _SENSITIVE:
                    found.setdefault(node, f"its input {reason}")
                if at < len(node.inputs):
                    _mark_sources(node.inputs[at], f"its output {reason}", found)
    return found


def moved_batches(model: Model, types: Types) -> dict[Node, str]:
    """Transpose and MatMul of a matrix between which no Cast may come, with the reason.

    onnxruntime 1.32 takes a Transpose that moves the first axis of a batch next to the last into the MatMul; where a
    Cast stands between them and the other operand is a matrix, its highest level of optimization crashes.
    """
    found: dict[Node, str] = {}
    for body in model.bodies():
        for node in body.nodes:
            if node.kind != ("", "MatMul"):
                continue
            for tensor, other in (node.inputs, reversed(node.inputs)):
                way = [node, *_behind(tensor)]
                if _moves_batch(way[-1]) and (types.rank(other) or 0) < 3:
                    found |= dict.fromkeys(way, "the runtime crashes on a Cast between Transpose and MatMul")
    return found


def _behind(tensor: Variable | Constant) -> list[Node]:
    """The producers of a tensor, up to the first that is no Identity."""
    found: list[Node] = []
    while tensor.inputs:
        found.append(tensor.inputs[0])
        if found[-1].op != "Identity":
            break
        tensor = found[-1].inputs[0]
    return found


def _moves_batch(node: Node) -> bool:
    perm = list(node.attrs.get("perm", ()))
    return node.op == "Transpose" and len(perm) > 2 and perm[:-2] == list(range(1, len(perm) - 1))


def _exact_inputs(node: Node, types: Types, angle: Callable[[Node], bool]) -> list[tuple[int, str]]:
    if node.kind[0] != "":
        return []
    if node.op == "Cast":
        made = types.of(node.outputs[0])
        integers = made is not None and made.kind in "iu" and types.of(node.inputs[0]) == FLOAT32
        return [(0, "becomes integers")] if integers else []
    if node.op in _ANGLES:
        return [(0, "is a large angle")] if angle(node) else []
    table = {
        "Log": ((0, "goes into a logarithm, which shows what is below float16"),),
        "GridSample": ((1, "is coordinates"),),
        "RoiAlign": ((1, "is coordinates"),),
        "NonMaxSuppression": ((0, "is coordinates"),),
        "Resize": ((1, "decides sizes"), (2, "decides sizes")),
        "Upsample": ((1, "decides sizes"),),
        "Range": ((0, "decides sizes"), (1, "decides sizes"), (2, "decides sizes")),
    }
    return list(table.get(node.op, ()))


def _mark_sources(tensor: Variable | Constant, reason: str, found: dict[Node, str]) -> None:
    pending = list(tensor.inputs)
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node.op in _SETTLED:
            continue
        seen.add(node)
        found.setdefault(node, reason)
        if node.op not in _LAYERS:
            pending += [source for each in node.inputs for source in each.inputs]


def _sizes(model: Model) -> list[Node]:
    """Nodes that compute with lengths of axes as numbers: casts of what follows from shapes, and all on from there."""
    known: set[Variable] = set()
    sizes: set[Variable] = set()
    nodes: list[Node] = []
    for body in model.bodies():
        for node in body.nodes:
            given = [each for each in node.inputs if not each.is_empty() and not isinstance(each, Constant)]
            if node.op not in ("Shape", "Size") and not (
                operators.is_pure(node) and all(each in known for each in given)
            ):
                continue
            known.update(node.outputs)
            if (node.op == "Cast" and given) or any(each in sizes for each in given):
                sizes.update(node.outputs)
                nodes.append(node)
    return nodes


def unfit_constants(node: Node, taken: Ports, form: HalfFormat) -> str | None:
    """What a constant input of a node has against the format."""
    for at in taken.inputs:
        constant = node.inputs[at]
        if isinstance(constant, Constant):
            found = trouble(constant.values, form, counts_exactly(node, constant))
            if found is not None:
                return f"its constant {constant.name} {found}"
    return None


def unfit_ranges(node: Node, taken: Ports, form: HalfFormat, statistics: Statistics) -> str | None:
    """What the measured values of a node have against the format, sums and squares on their way included."""
    limit = form.largest / MARGIN
    reads = [node.inputs[at] for at in taken.inputs if not isinstance(node.inputs[at], Constant)]
    makes = [node.outputs[at] for at in taken.outputs]
    for tensor in (*reads, *makes):
        found = statistics.range(tensor)
        if found is None:
            reason = statistics.reason(tensor)
            return "no sample reached it" if reason is None else f"{tensor.name} {reason}"
        peak = max(-found.minimum, found.maximum)
        if peak > limit:
            return f"{tensor.name} reaches {peak:.3g}, too near to where {form.name} ends ({form.largest:.3g})"
        if 0 < peak < form.normal:
            return f"{tensor.name} never exceeds {peak:.1g}, where {form.name} loses digits"
    inner = _inner_peak(node, reads, makes, statistics)
    if inner > limit:
        return f"its sums may reach {inner:.3g}, too near to where {form.name} ends ({form.largest:.3g})"
    return None


def _inner_peak(node: Node, reads: list[Variable], makes: list[Variable], statistics: Statistics) -> float:
    """A bound of what is added up on the way, from measured values."""
    if not reads or not makes or node.op not in _SUMS | _SQUARES or node.attrs.get("stash_type", 0) == 1:
        return 0.0
    if node.op in ("LayerNormalization", "RMSNormalization") and "stash_type" not in node.attrs:
        return 0.0  # the definition computes them in float32
    before, after = statistics.range(reads[0]), statistics.range(makes[0])
    if before is None or after is None:
        return 0.0
    peak = max(-before.minimum, before.maximum)
    terms = max(1.0, before.count / max(after.count, 1))
    return float(terms * (peak * peak if node.op in _SQUARES else peak))
