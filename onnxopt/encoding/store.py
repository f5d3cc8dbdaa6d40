"""Putting stored forms into a model: which of a tensor's forms is smallest, and whether it may stand there at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxopt.encoding.chain import Chains, obstacle
from onnxopt.encoding.forms import Form, Masked, MaskedPalette, Sparse, file_bytes
from onnxopt.graph import replace_inputs
from onnxopt.graph.edit import named_elsewhere
from onnxopt.graph.operators import opset_of
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable

# The first IR version with sparse initializers (onnx, docs/IR.md), and the types in which onnxruntime 1.32 reads them.
_SPARSE_IR = 6
_SPARSE_TYPES = frozenset({"float32", "float16", "float64", "int8", "uint8", "int32"})


@dataclass(frozen=True)
class Stored:
    """What became of tensors, two of which may have one name in two branches: bytes saved, about; why it stays."""

    saved: dict[Constant, int] = field(default_factory=dict)
    left: dict[Constant, str] = field(default_factory=dict)


def store(model: Model, wanted: Mapping[Constant, Form]) -> Stored:
    """Replace constants by what computes them from a smaller form, which is equal bit for bit.

    Constants that share one content share one form. Left dense, with the reason: outputs of bodies, what a quantization
    annotation names, constants of local functions, and whatever would not save bytes.
    """
    model.normalize()
    stored = Stored()
    kept = kept_dense(model)
    homes = {id(constant): body for body in model.bodies() for constant in body.initializers}
    chains = Chains(model)
    new: dict[int, list[Node]] = {}
    gone: set[int] = set()
    written: dict[tuple[int, int], Variable] = {}
    for constant, form in wanted.items():
        body = homes[id(constant)]
        reason = kept.get(id(constant)) or _obstacle(form, body, model)
        saved = constant.data.stored_nbytes - file_bytes(form, constant.name)
        if reason is None and saved <= 0:
            reason = f"{described(form)} would not be smaller than its {constant.data.stored_nbytes} bytes"
        if reason is not None:
            stored.left[constant] = reason
            continue
        stored.saved[constant] = saved
        if isinstance(form, Sparse):
            sparse = Constant(constant.name, TensorData.from_sparse(form.proto(constant.name)))
            replace_inputs(constant, sparse)
            body.initializers = [sparse if other is constant else other for other in body.initializers]
            continue
        key = (constant.data.uid, id(body))
        if key not in written:
            nodes = chains.write(constant, form, body)
            new.setdefault(id(body), []).extend(nodes)
            written[key] = nodes[-1].outputs[0]
        replace_inputs(constant, written[key])
        gone.add(id(constant))
    for body in model.bodies():
        if id(body) in new:
            body.nodes = new[id(body)] + body.nodes
            body.initializers = [constant for constant in body.initializers if id(constant) not in gone]
    model.normalize()
    return stored


def kept_dense(model: Model) -> dict[int, str]:
    """Constants that something besides a node of a graph refers to, and what: they must stay constants."""
    kept = named_elsewhere(model)
    for body in model.bodies():
        if body.function is not None:
            kept |= {id(constant): "it belongs to a local function" for constant in body.initializers}
    return kept


def _obstacle(form: Form, body: Graph, model: Model) -> str | None:
    """Why a form can't be written where a constant stands, None where it can."""
    if not isinstance(form, Sparse):
        return obstacle(form, opset_of(body))
    if body.parent is not None:
        return "sparse initializers stand in the main graph only"
    if model.ir_version < _SPARSE_IR:
        return f"sparse initializers begin with IR version {_SPARSE_IR}, the model has {model.ir_version}"
    if form.dense.dtype.name not in _SPARSE_TYPES:
        return f"the runtime reads no sparse initializers of type {form.dense.dtype.name}"
    return None


def described(form: Form) -> str:
    """A form in a few words."""
    if isinstance(form, Sparse):
        return "a sparse initializer"
    if isinstance(form, Masked):
        return f"a bitmask and {form.density:.0%} of the values"
    if isinstance(form, MaskedPalette):
        return f"{described(form.palette)}, a bitmask and {form.density:.0%} of the indices"
    groups = f" for each of {form.groups} groups" if form.groups > 1 else ""
    width = f" of {form.width} values" if form.width > 1 else ""
    return f"a palette of {form.entries} entries{width}{groups}"
