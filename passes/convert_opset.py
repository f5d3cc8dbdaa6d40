"""Raise the version of the default operator set, node by node.

    Before (opset 12)                       After (opset 13)
    y = Squeeze(x) {axes: [0, 2]}           y = Squeeze(x, axes)        axes: int64[2] = {0, 2}

Only nodes whose operator changed its meaning or form in between are touched: `_RULES` at the end of this file lists
them. All other changes of operators between opsets 7 and 23 take old nodes as they are: more types, negative axes, new
attributes and inputs with neutral defaults (onnx's docs/Changelog.md; a test holds the table against onnx's schemas).
Names, weights, metadata, docs, symbolic dims and the nodes of other domains stay as they are. If, Loop and Scan bodies
and local functions are raised along. The IR version rises only where the operator set asks for it. Nothing is lowered.

Each rule brings a node from the version before to its version and keeps the bits of onnxruntime's results: Upsample and
the Resize of opset 10 place samples asymmetrically and take the floor (the ceiling, where they shrink: `Resize` in
onnxruntime/core/providers/cpu/tensor/upsamplebase.h), and Softmax before opset 13 normalizes over all trailing axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, OperatorSetIdProto, helper

from onnxopt.errors import PassError
from onnxopt.graph import Names, label
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Function, Graph, Model, Node, Variable
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, option

_DEFAULT = ("", "ai.onnx")
OLDEST, NEWEST = 7, 23
# From here on onnxruntime's AveragePool is another kernel, which adds in another order.
_OTHER_KERNELS = 19
# From here on a Reshape can be told that a 0 in its target means a length of 0, not one to copy.
_ALLOWZERO = 14
_NORMALIZATIONS = ("Hardmax", "LogSoftmax", "Softmax")


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Raise the model to a newer version of the standard operator set."""

    name: ClassVar[str] = "convert_opset"
    opset: int = option(13, "the least version wanted", minimum=13, maximum=NEWEST)

    @property
    def effect(self) -> Effect:
        """The same operators under new rules of writing; new kernels may add in another order."""
        return Effect.EXACT if self.opset < _OTHER_KERNELS else Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Raise the main graph with its bodies, then each function. Raises PassError naming what can't be raised."""
        model.normalize()
        before = model.opset
        target = _ALLOWZERO if self.opset < _ALLOWZERO and _restores_shapes(model) else self.opset
        raiser = _Raiser(model, target)
        if "" in model.opset_imports and before < target:
            for body in [body for body in model.bodies() if body.function is None]:
                raiser.body(body, before)
            model.opset = target
            raiser.changes.append(Change("raised", "opset", f"{before} -> {target}"))
            _raise_ir_version(model)
        for function in model.functions:
            raiser.function(function)
        return PassResult(raiser.changes)


def _restores_shapes(model: Model) -> bool:
    """Whether a normalization from before opset 13 will need the shape of a tensor back that may have no elements."""
    facts: dict[int, Fact] | None = None
    for body in model.bodies():
        version = (body.function and _version(body.function)) or model.opset
        for node in body.nodes:
            if version < 13 and node.kind[0] == "" and node.op in _NORMALIZATIONS:
                facts = known(model) if facts is None else facts
                shape = facts.get(id(node.inputs[0]), Fact()).shape
                never_empty = shape is not None and all(isinstance(dim, int) and dim > 0 for dim in shape)
                if not never_empty and not _over_one_axis(node, shape):
                    return True
    return False


def _over_one_axis(node: Node, shape: tuple[Any, ...] | None) -> bool:
    """Whether all axes from `axis` on, of which the old rule speaks, are that one and axes of length 1."""
    axis = int(node.attrs.get("axis", 1))
    return axis == -1 or (shape is not None and all(dim == 1 for dim in shape[axis % max(len(shape), 1) + 1 :]))


def _version(function: Function) -> int | None:
    return next((int(e.version) for e in function.import_domains or [] if e.domain in _DEFAULT), None)


def _raise_ir_version(model: Model) -> None:
    needed = helper.find_min_ir_version_for(list(model.carrier.opset_import), ignore_unknown=True)
    if needed <= model.ir_version:
        return
    if model.ir_version < 4:
        # until IR 3 every initializer was listed as an input; from IR 4 on that would make it overridable
        model.graph.listed_inputs = [item for item in model.graph.listed_inputs if not isinstance(item, Constant)]
    model.ir_version = needed


class _Raiser:
    """Brings nodes of one model to a version."""

    def __init__(self, model: Model, target: int) -> None:
        self.model, self.target = model, target
        self.names = Names(model)
        self.facts = known(model) if model.opset < target else {}
        self.changes: list[Change] = []
        self._constants: dict[Any, Constant] = {}

    def function(self, function: Function) -> None:
        """Raise a function by its own import of the default operator set."""
        imports = function.import_domains or []
        version = _version(function)
        if version is None or version >= self.target:
            return
        for body in [body for body in self.model.bodies() if body.function is function]:
            self.body(body, version)
        function.import_domains = [
            OperatorSetIdProto(domain=entry.domain, version=self.target if entry.domain in _DEFAULT else entry.version)
            for entry in imports
        ]
        self.changes.append(Change("raised", f"function {function.name}", f"{version} -> {self.target}"))

    def body(self, body: Graph, version: int) -> None:
        """Raise the nodes of one body, without those of the bodies within, from `version`."""
        for node in [node for node in body.nodes if node.kind[0] == ""]:
            if version < OLDEST:
                raise PassError(
                    f"the model uses opset {version}; what {node.op} {label(node)} meant before opset 7 can't be told",
                    "export the model again, or convert it with onnx.version_converter first",
                )
            self._node(node, body, version)

    def _node(self, node: Node, body: Graph, version: int) -> None:
        for step in range(version + 1, self.target + 1):
            rule = _RULES.get((node.op, step))
            if rule is None:
                continue
            if any(isinstance(value, AttributeProto) for value in node.attrs.values()):
                raise _stuck(node, step, "an attribute of it is a parameter of its function")
            self.changes.append(Change("rewritten", label(node), f"{node.op} for opset {step}"))
            rule(_Site(self, node, body, step))

    def constant(self, values: NDArray[Any], role: str, node: Node, body: Graph) -> Constant:
        """A constant of these values, one for all nodes that share names."""
        key = (id(body.function), str(values.dtype), values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = Constant(self.names.tensor(f"{label(node)}_{role}"), values)
        return self._constants[key]


def _stuck(node: Node, version: int, why: str) -> PassError:
    return PassError(
        f"{node.op} {label(node)} can't be brought to opset {version}: {why}",
        "export the model again with a newer opset",
    )


@dataclass(frozen=True)
class _Site:
    """A node on its way to `version`."""

    raiser: _Raiser
    node: Node
    body: Graph
    version: int

    def fact(self, tensor: Any) -> Fact:
        """What is known of a tensor; its description in the file counts where inference says nothing."""
        if isinstance(tensor, Constant):
            return Fact(tensor.dtype, tensor.shape)
        found = self.raiser.facts.get(id(tensor), Fact())
        return Fact(found.dtype if found.dtype is not None else tensor.dtype, found.shape)

    def stuck(self, why: str) -> PassError:
        return _stuck(self.node, self.version, why)

    def give(self, at: int, values: Any, role: str, dtype: Any = np.int64) -> None:
        """Put a constant at an input position, leaving positions before it empty."""
        while len(self.node.inputs) <= at:
            self.node.inputs.append(Variable.empty())
        self.node.inputs[at] = self.raiser.constant(np.array(values, dtype), role, self.node, self.body)

    def to_input(self, attribute: str, at: int, dtype: Any = np.int64) -> None:
        """Make an input of an attribute, if it is there."""
        if attribute in self.node.attrs:
            self.give(at, self.node.attrs.pop(attribute), attribute, dtype)

    def scalar_to_input(self, attribute: str, at: int) -> None:
        """Make an input of a float attribute, in the type of the node's first input."""
        if attribute not in self.node.attrs:
            return
        dtype = self.fact(self.node.inputs[0]).dtype
        if dtype is None:
            raise self.stuck(f"the element type of {self.node.inputs[0].name} is not known")
        self.give(at, self.node.attrs.pop(attribute), attribute, dtype)

    def used(self, at: int) -> bool:
        """Whether an optional output is there."""
        return len(self.node.outputs) > at and not self.node.outputs[at].is_empty()


def _batch_normalization_9(site: _Site) -> None:
    if site.node.attrs.pop("spatial", 1) != 1:
        raise site.stuck("it normalizes every position by itself (spatial=0)")


def _batch_normalization_14(site: _Site) -> None:
    if any(site.used(at) for at in range(1, 5)):
        raise site.stuck("it is in training mode")
    site.node.outputs = [site.node.outputs[0]]


def _scan_9(site: _Site) -> None:
    raise site.stuck("the Scan of opset 8 has a batch axis, which later ones have not")


def _upsample_9(site: _Site) -> None:
    site.to_input("scales", 1, np.float32)


def _upsample_10(site: _Site) -> None:
    site.node.op = "Resize"


def _dropout_12(site: _Site) -> None:
    if site.used(1):
        raise site.stuck("onnxruntime's mask is all false before and all true after")
    site.to_input("ratio", 1, np.float32)


def _slice_10(site: _Site) -> None:
    for at, attribute in enumerate(("starts", "ends", "axes"), 1):
        site.to_input(attribute, at)


def _top_k_10(site: _Site) -> None:
    site.give(1, [site.node.attrs.pop("k")], "k")


def _clip_11(site: _Site) -> None:
    site.scalar_to_input("min", 1)
    site.scalar_to_input("max", 2)


def _pad_11(site: _Site) -> None:
    site.to_input("pads", 1)
    if site.node.attrs.get("value", 0.0) == 0.0 and "value" in site.node.attrs:
        site.node.attrs.pop("value")
    site.scalar_to_input("value", 2)


def _resize_11(site: _Site) -> None:
    node = site.node
    scales = node.inputs[1]
    rounding = "floor"
    if node.attrs.get("mode", "nearest") == "nearest" and node.op == "Resize":
        if isinstance(scales, Constant):
            shrinks, grows = bool(np.any(scales.values < 1)), bool(np.any(scales.values > 1))
            if shrinks and grows:
                raise site.stuck("it shrinks along one axis and grows along another, rounding differently")
            rounding = "ceil" if shrinks else "floor"
        elif not _was_upsample(site):
            raise site.stuck("its scales are not constant, and rounding depends on whether they shrink")
        node.attrs["nearest_mode"] = rounding
    node.attrs["coordinate_transformation_mode"] = "asymmetric"
    node.inputs = [node.inputs[0], Variable.empty(), scales]


def _was_upsample(site: _Site) -> bool:
    proto = site.node.proto
    return proto is not None and proto.op_type == "Upsample"


def _scatter_11(site: _Site) -> None:
    site.node.op = "ScatterElements"


def _normalization_13(site: _Site) -> None:
    """Softmax, LogSoftmax, Hardmax: over all axes from `axis` on before, over `axis` alone after."""
    node, body = site.node, site.body
    axis = int(node.attrs.get("axis", 1))
    if _over_one_axis(node, site.fact(node.inputs[0]).shape):
        node.attrs["axis"] = axis
        return
    names, x, y = site.raiser.names, node.inputs[0], node.outputs[0]
    flat, done, dims = (Variable(names.tensor(f"{label(node)}_{role}")) for role in ("flat", "flat_result", "shape"))
    measure = Node("Shape", names.node(f"{label(node)}_shape_of"), inputs=[x], outputs=[dims])
    flatten = Node("Flatten", names.node(f"{label(node)}_flatten"), {"axis": axis}, inputs=[x], outputs=[flat])
    node.inputs, node.outputs = [flat], [done]
    node.attrs["axis"] = -1
    zeros = {"allowzero": 1} if site.raiser.target >= _ALLOWZERO else {}
    reshape = Node("Reshape", names.node(f"{label(node)}_reshape"), zeros, inputs=[done, dims], outputs=[y])
    at = next(index for index, other in enumerate(body.nodes) if other is node)
    body.nodes[at : at + 1] = [measure, flatten, node, reshape]


def _axes_to_input(site: _Site) -> None:
    if not site.node.attrs.get("axes", True):
        site.node.attrs.pop("axes")  # an empty list means what no list means
    site.to_input("axes", 1)


def _split_13(site: _Site) -> None:
    site.to_input("split", 1)


def _split_18(site: _Site) -> None:
    if len(site.node.inputs) < 2 or site.node.inputs[1].is_empty():
        site.node.attrs["num_outputs"] = len(site.node.outputs)


def _roi_align_16(site: _Site) -> None:
    site.node.attrs["coordinate_transformation_mode"] = "output_half_pixel"


def _dft_20(site: _Site) -> None:
    site.give(2, site.node.attrs.pop("axis", 1), "axis")


def _grid_sample_20(site: _Site) -> None:
    mode = site.node.attrs.get("mode", "bilinear")
    site.node.attrs["mode"] = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)


def _group_normalization_21(site: _Site) -> None:
    shape = site.fact(site.node.inputs[0]).shape
    groups = int(site.node.attrs["num_groups"])
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
        raise site.stuck("its number of channels is not known")
    for at, role in ((1, "scale"), (2, "bias")):
        tensor = site.node.inputs[at]
        if not isinstance(tensor, Constant):
            raise site.stuck(f"its {role} is not constant")
        site.give(at, np.repeat(tensor.values, shape[1] // groups), role, tensor.dtype)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_RULES: dict[tuple[str, int], Callable[[_Site], None]] = {
    ("BatchNormalization", 9): _batch_normalization_9,
    ("Scan", 9): _scan_9,
    ("Upsample", 9): _upsample_9,
    ("Slice", 10): _slice_10,
    ("TopK", 10): _top_k_10,
    ("Upsample", 10): _upsample_10,
    ("Clip", 11): _clip_11,
    ("Pad", 11): _pad_11,
    ("Resize", 11): _resize_11,
    ("Scatter", 11): _scatter_11,
    ("Dropout", 12): _dropout_12,
    **{(op, 13): _normalization_13 for op in _NORMALIZATIONS},
    **{(op, 13): _axes_to_input for op in ("ReduceSum", "Squeeze", "Unsqueeze")},
    ("Split", 13): _split_13,
    ("BatchNormalization", 14): _batch_normalization_14,
    ("RoiAlign", 16): _roi_align_16,
    **{(f"Reduce{kind}", 18): _axes_to_input for kind in _REDUCTIONS},
    ("Split", 18): _split_18,
    ("DFT", 20): _dft_20,
    ("GridSample", 20): _grid_sample_20,
    ("GroupNormalization", 21): _group_normalization_21,
}
