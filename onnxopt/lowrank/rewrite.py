"""The nodes that compute a layer in pieces.

The node of the layer stays as the last piece, with its name, bias and whatever follows it, so that what the runtime
fuses behind it stays fused: an activation, an Add of a residual, the Add that is a MatMul's bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxopt.graph.edit import insert_before, label
from onnxopt.graph.names import Names
from onnxopt.lowrank.forms import FACTORS, STRIPS, Form
from onnxopt.lowrank.layers import Kind, Layer
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable
from onnxopt.numerics.lowrank import Wide
from onnxopt.quantization.storage import Stored


@dataclass(frozen=True, eq=False)
class Split:
    """A layer in pieces. last: the constant of the last piece; handed: what each reader's last piece reads."""

    layer: Layer
    form: Form
    last: Constant
    handed: dict[Node, Variable]


class Rewriter:
    """Splits layers of a model in place."""

    def __init__(self, model: Model) -> None:
        self._names = Names(model)
        self._opset = model.opset

    def split(self, layer: Layer, form: Form, factors: Sequence[Wide]) -> Split:
        """Put the pieces in place of the layer, wherever it is read. factors: `Splitter.factors`."""
        handed: dict[Node, Variable] = {}
        constants = [self._constant(layer, piece, values) for piece, values in self._values(layer, form, factors)]
        for reader in layer.readers:
            handed[reader.node] = self._rewire(layer, form, reader, constants)
        return Split(layer, form, constants[-1], handed)

    def _values(self, layer: Layer, form: Form, factors: Sequence[Wide]) -> list[tuple[str, Wide]]:
        """Pieces, first to last, and the values of their constants."""
        first, last = factors[0], factors[-1]
        if layer.kind is Kind.CONV:
            return self._kernels(layer, form, factors)
        if layer.kind is Kind.TABLE:
            return [("first", first[0].T), ("last", last[0].T)]
        if layer.kind is Kind.GATES:
            return [("first", first[0].T), ("last", last[0].reshape(*layer.weight.shape[:2], -1))]
        if layer.kind is Kind.COLUMNS:
            return [("first", first[0]), ("last", last[0])]
        turned = bool(layer.node.attrs.get("transB", 0)) if layer.node.op == "Gemm" else False
        return [("first", first[0].T), ("last", last[0] if turned else last[0].T)]

    def _kernels(self, layer: Layer, form: Form, factors: Sequence[Wide]) -> list[tuple[str, Wide]]:
        first, last, kernel = factors[0], factors[-1], layer.kernel
        ones = (1,) * len(kernel)
        if form.name == FACTORS:
            groups, rank = first.shape[:2]
            return [
                ("first", first.reshape(groups * rank, -1, *kernel)),
                ("last", last.reshape(layer.outputs, rank, *ones)),
            ]
        if form.name == STRIPS:
            return [("first", first[:, :, :, None]), ("last", last[:, :, None, :])]
        core = factors[1]
        return [
            ("first", first.reshape(*first.shape, *ones)),
            ("core", core.reshape(*core.shape[:2], *kernel)),
            ("last", last.reshape(*last.shape, *ones)),
        ]

    def _constant(self, layer: Layer, piece: str, values: Wide) -> Constant:
        stored = np.ascontiguousarray(values).astype(layer.weight.dtype)
        return Constant(self._names.tensor(f"{layer.weight.name}_{piece}"), TensorData.from_array(stored))

    def _rewire(self, layer: Layer, form: Form, reader: Stored, constants: Sequence[Constant]) -> Variable:
        if layer.kind is Kind.CONV:
            return self._convolve(layer, form, reader, constants)
        if layer.kind is Kind.TABLE:
            return self._look_up(layer, reader, constants)
        node, (first, last) = reader.node, constants
        if layer.kind is Kind.COLUMNS:
            middle = self._piece(reader, layer, "MatMul", [first, node.inputs[1]], "first")
            node.inputs[0], node.inputs[1] = last, middle
            return middle
        if node.op == "Gemm" and node.attrs.get("transA", 0):
            # Gemm asks for a C before operator set 11
            zeros = [] if self._opset >= 11 else [self._zeros(layer)]
            middle = self._piece(reader, layer, "Gemm", [node.inputs[0], first, *zeros], "first", transA=1)
            node.attrs["transA"] = 0
        else:
            middle = self._piece(reader, layer, "MatMul", [node.inputs[0], first], "first")
        node.inputs[0], node.inputs[1] = middle, last
        return middle

    def _convolve(self, layer: Layer, form: Form, reader: Stored, constants: Sequence[Constant]) -> Variable:
        node, kernel = reader.node, layer.kernel
        own = {key: value for key, value in node.attrs.items() if key in _OF_KERNEL}
        at = {"kernel_shape": list(kernel), **own}
        group = {"group": layer.groups} if layer.groups > 1 else {}
        point: dict[str, Any] = {"kernel_shape": [1] * len(kernel), **group}
        if form.name == FACTORS:
            middle = self._piece(reader, layer, "Conv", [node.inputs[0], constants[0]], "first", **at, **group)
            last = point
        elif form.name == STRIPS:
            tall = _along(at, 0)
            middle = self._piece(reader, layer, "Conv", [node.inputs[0], constants[0]], "first", **tall)
            last = _along(at, 1)
        else:
            inner = self._piece(reader, layer, "Conv", [node.inputs[0], constants[0]], "first", **point)
            middle = self._piece(reader, layer, "Conv", [inner, constants[1]], "core", **at)
            last = point
        for key in (*_OF_KERNEL, "kernel_shape", "group"):
            node.attrs.pop(key, None)
        node.attrs.update(last)
        node.inputs[0], node.inputs[1] = middle, constants[-1]
        return middle

    def _look_up(self, layer: Layer, reader: Stored, constants: Sequence[Constant]) -> Variable:
        """The Gather looks up shorter rows, and a MatMul behind it makes them long again."""
        node, body = reader.node, reader.body
        output = node.outputs[0]
        middle = self._variable(layer, output.name, "first")
        node.inputs[0] = constants[0]
        node.outputs = [middle]
        last = Node("MatMul", self._names.node(f"{label(node)}_last"))
        last.inputs, last.outputs = [middle, constants[1]], [output]
        at = next(index for index, other in enumerate(body.nodes) if other is node)
        body.nodes.insert(at + 1, last)
        return middle

    def _piece(self, reader: Stored, layer: Layer, op: str, inputs: list[Any], piece: str, **attrs: Any) -> Variable:
        """A new node before the reader's; returns its output."""
        made = Node(op, self._names.node(f"{label(reader.node)}_{piece}"), attrs=attrs)
        output = self._variable(layer, reader.node.outputs[0].name or label(reader.node), piece)
        made.inputs, made.outputs = inputs, [output]
        body: Graph = reader.body
        insert_before(reader.node, [made], body)
        return output

    def _variable(self, layer: Layer, base: str, piece: str) -> Variable:
        return Variable(self._names.tensor(f"{base}_{piece}"), layer.weight.dtype, None)

    def _zeros(self, layer: Layer) -> Constant:
        return Constant(self._names.tensor(f"{layer.weight.name}_zero"), np.zeros(1, layer.weight.dtype))


_OF_KERNEL = ("pads", "strides", "dilations", "auto_pad")


def _along(attributes: dict[str, Any], axis: int) -> dict[str, Any]:
    """What of the attributes of a kernel over two axes belongs to one over `axis` alone."""
    found = dict(attributes)
    for key in ("kernel_shape", "strides", "dilations"):
        if key in found:
            found[key] = [int(size) if at == axis else 1 for at, size in enumerate(found[key])]
    if "pads" in found:
        found["pads"] = [int(size) if at % 2 == axis else 0 for at, size in enumerate(found["pads"])]
    return found
