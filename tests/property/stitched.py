"""Whole graphs stitched together from the one-node models that onnx tests operators with.

Several of them stand in one graph. Where the output of one has the type and shape of another's input, it mostly feeds
it, often through nodes that do nothing or undo each other; what is left of inputs is an input, a default value that may
be overridden, or a constant. So some two hundred operators meet in orders that nobody thought of.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from tests.conformance.corpus import Case, cases

_LEAST_OPSET = 7
OPSETS = (17, 18, 20, 21, 22, 23)
_LARGEST = 4096  # elements of one tensor
# these draw numbers, or hold what only a whole model of theirs has
_LEFT_OUT = ("Bernoulli", "Dropout", "Multinomial", "Random", "Optional", "Sequence", "Loop", "Scan", "If", "String")

Arrays = dict[str, np.ndarray]


@cache
def pieces() -> tuple[Case, ...]:
    """One-node models of tensors of numbers, with inputs and outputs known, in operator sets that stand together."""
    return tuple(case for case in cases() if _fits(case))


def operators() -> set[str]:
    """The operators among the pieces."""
    return {node.op_type for case in pieces() for node in case.model.graph.node}


def _fits(case: Case) -> bool:
    model = case.model
    if len(model.graph.node) != 1 or model.functions or case.inputs is None or case.golden is None:
        return False
    if [entry.domain for entry in model.opset_import] != [""] or model.opset_import[0].version < _LEAST_OPSET:
        return False
    if any(model.graph.node[0].op_type.startswith(word) for word in _LEFT_OUT):
        return False
    values = [*case.inputs.values(), *case.golden]
    return all(isinstance(each, np.ndarray) and each.dtype.kind in "fiub" and each.size <= _LARGEST for each in values)


class Stitcher:
    """One graph, by seed. `model` is it, `feeds` are its inputs."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.nodes: list[NodeProto] = []
        self.made: list[tuple[str, np.ndarray]] = []  # what may feed others
        self.constants: Arrays = {}
        self.overridable: Arrays = {}
        self.feeds: Arrays = {}
        self.opset = self.random.choice(OPSETS)
        for number in range(self.random.randint(2, 7)):
            self._add(number)
        self.model = self._model()

    def _add(self, number: int) -> None:
        usable = _of_opset(self.opset)
        case = self.random.choice(usable)
        [node] = case.model.graph.node
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"n{number}_{node.op_type}" if self.random.random() < 0.8 else ""
        given = case.inputs or {}
        names = {name: self._source(f"i{number}_{at}", value) for at, (name, value) in enumerate(given.items())}
        results = [info.name for info in case.model.graph.output]
        outputs = {name: f"o{number}_{at}" for at, name in enumerate(results)}
        for at, name in enumerate(node.input):
            copy.input[at] = names.get(name, "")
        for at, name in enumerate(node.output):
            copy.output[at] = outputs.get(name, "")
        self.nodes.append(copy)
        for name, value in zip(results, case.golden or (), strict=True):
            self.made.append((outputs[name], np.asarray(value)))

    def _source(self, name: str, value: np.ndarray) -> str:
        fitting = [made for made, array in self.made if array.dtype == value.dtype and array.shape == value.shape]
        if fitting and value.dtype.kind == "f" and self.random.random() < 0.7:
            return self._through(self.random.choice(fitting), value.ndim, name)
        kind = self.random.random()
        if kind < 0.45:
            self.feeds[name] = value
        elif kind < 0.6:
            self.overridable[name] = value
        else:
            self.constants[name] = value
        return self._through(name, value.ndim, f"{name}_in") if self.random.random() < 0.2 else name

    def _through(self, tensor: str, rank: int, base: str) -> str:
        """The tensor behind nodes that leave it as it is."""
        way = self.random.randint(0, 5)
        if way == 0:
            return tensor
        if way == 1:
            return self._node("Identity", [tensor], f"{base}_same")
        if way == 2 and rank > 1:
            order = self.random.sample(range(rank), rank)
            back = [order.index(axis) for axis in range(rank)]
            turned = self._node("Transpose", [tensor], f"{base}_turned", perm=order)
            return self._node("Transpose", [turned], f"{base}_back", perm=back)
        if way == 3:
            shape = self._node("Shape", [tensor], f"{base}_shape")
            return self._node("Reshape", [tensor, shape], f"{base}_reshaped")
        if way == 4:
            self.constants[f"{base}_axes"] = np.array([0], np.int64)
            wide = self._node("Unsqueeze", [tensor, f"{base}_axes"], f"{base}_wide")
            return self._node("Squeeze", [wide, f"{base}_axes"], f"{base}_narrow")
        return self._node("Concat", [tensor], f"{base}_alone", axis=0) if rank else tensor

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}_node", **attributes))
        return output

    def _model(self) -> ModelProto:
        read = {name for node in self.nodes for name in node.input}
        results = [(name, value) for name, value in self.made if name not in read or self.random.random() < 0.3]
        given = self.feeds | self.overridable
        graph = helper.make_graph(
            self.nodes,
            "stitched",
            [_info(name, value) for name, value in given.items()],
            [_info(name, None, value) for name, value in results],
            [numpy_helper.from_array(value, name) for name, value in (self.overridable | self.constants).items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        model.metadata_props.add(key="made", value="stitched")
        return model


@cache
def _of_opset(opset: int) -> tuple[Case, ...]:
    """Pieces whose operators `opset` has, with the inputs and attributes that their tests use."""
    return tuple(case for case in pieces() if _known(case.model.graph.node[0], opset))


def _known(node: NodeProto, opset: int) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    enough = len(node.input) <= schema.max_input and len(node.output) <= schema.max_output
    return enough and all(attribute.name in schema.attributes for attribute in node.attribute)


def _info(name: str, value: np.ndarray | None, like: np.ndarray | None = None) -> Any:
    """Inputs are described in full, outputs by their type alone where the shape hangs on values."""
    array = value if value is not None else like
    assert array is not None
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, array.shape if value is not None else [None] * array.ndim)
