"""A small builder of networks with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper


class Net:
    """Collects nodes and weights; every call returns the name of what it made."""

    def __init__(self, seed: int = 0, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def value(self, array: Any) -> str:
        """A new initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weights(self, *shape: int) -> str:
        """A new random float initializer."""
        spread = np.sqrt(2 / max(1, int(np.prod(shape[1:]))))
        return self.value((self.rng.standard_normal(shape) * spread).astype(np.float32))

    def ints(self, *values: int) -> str:
        """A new int64 initializer of rank 1."""
        return self.value(np.array(values, np.int64))

    def call(self, op: str, *inputs: str, **attrs: Any) -> str:
        """A node with one output."""
        return self.calls(op, 1, *inputs, **attrs)[0]

    def calls(self, op: str, count: int, *inputs: str, **attrs: Any) -> list[str]:
        """A node with several outputs."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"n{len(self.nodes)}_{op}", **attrs))
        return names

    def conv(self, x: str, inner: int, outer: int, size: int = 3, **attrs: Any) -> str:
        """A convolution that keeps the spatial size, with bias."""
        attrs.setdefault("pads", [size // 2] * 4)
        groups = attrs.get("group", 1)
        return self.call("Conv", x, self.weights(outer, inner // groups, size, size), self.weights(outer), **attrs)

    def conv1(self, x: str, inner: int, outer: int) -> str:
        """A convolution of width 1 over one axis, with bias."""
        return self.call("Conv", x, self.weights(outer, inner, 1), self.weights(outer))

    def linear(self, x: str, inner: int, outer: int) -> str:
        """MatMul and Add."""
        return self.call("Add", self.call("MatMul", x, self.weights(inner, outer)), self.weights(outer))

    def relu(self, x: str) -> str:
        """Relu."""
        return self.call("Relu", x)

    def positive(self, *shape: int) -> str:
        """A new initializer of values from 0.5 on."""
        return self.value(np.abs(self.rng.standard_normal(shape)).astype(np.float32) + 0.5)

    def model(
        self, y: str, x_shape: Sequence[Any], y_shape: Sequence[Any], kind: int = TensorProto.FLOAT
    ) -> ModelProto:
        """The finished model from x to y."""
        self.nodes.append(helper.make_node("Identity", [y], ["y"], name="out"))
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", kind, x_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
            self.constants,
        )
        imports = [helper.make_opsetid("", self.opset)]
        if any(node.domain == "com.microsoft" for node in self.nodes):
            imports.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=imports, ir_version=11 if self.opset > 21 else 8)


IMAGE = ("N", 3, 8, 8)
