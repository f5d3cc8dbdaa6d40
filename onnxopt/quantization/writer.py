"""Writing quantized forms into a model: Q/DQ pairs, int8 weights, int32 biases, and int8 storage of float weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxopt.graph.edit import inner_bodies, replace_inputs, replace_outputs
from onnxopt.graph.names import Names
from onnxopt.graph.sort import sort_nodes
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable
from onnxopt.numerics.affine import FloatArray, QParams, activation_qparams, quantize
from onnxopt.quantization.islands import Islands
from onnxopt.quantization.layers import Layer
from onnxopt.quantization.storage import Stored

AnyArray = npt.NDArray[np.generic]
FLOAT = 1  # TensorProto.FLOAT


class QdqWriter:
    """Adds nodes to the bodies of one model. Call `finish` once at the end: it sorts and drops what nobody reads."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._names = Names(model)
        self._inner = inner_bodies(model)
        self._touched: dict[int, Graph] = {}
        self._made: dict[tuple[int, ...], Variable] = {}
        self._params: dict[tuple[bytes, bytes], tuple[Constant, Constant]] = {}
        self._replaced: list[Constant] = []

    def constant(self, base: str, values: AnyArray) -> Constant:
        """A new constant under a free name; the export puts it where its readers are."""
        return Constant(self._names.tensor(base), TensorData.from_array(values))

    def node(self, body: Graph, op: str, inputs: Sequence[Variable | Constant], base: str, **attrs: object) -> Variable:
        """A new node at the end of `body`; returns its output, called `base` or nearly so."""
        output = Variable(self._names.tensor(base))
        node = Node(op=op, name=self._names.node(f"{base}_{op}"), attrs=attrs)
        node.inputs = list(inputs)
        node.outputs = [output]
        body.nodes.append(node)
        self._touched[id(body)] = body
        return output

    def variable(self, base: str, like: Variable, dtype: np.dtype[np.generic]) -> Variable:
        """A new tensor with the shape of `like`, called `base` or nearly so, for a node to make."""
        return Variable(self._names.tensor(base), dtype, like.shape)

    def make(
        self, body: Graph, op: str, inputs: Sequence[Variable | Constant], output: Variable, **attrs: object
    ) -> None:
        """A new node at the end of `body` that makes the present tensor `output`."""
        node = Node(op=op, name=self._names.node(f"{output.name}_{op}"), attrs=attrs)
        node.inputs, node.outputs = list(inputs), [output]
        body.nodes.append(node)
        self._touched[id(body)] = body

    def pair(self, tensor: Variable, body: Graph, params: QParams) -> Variable:
        """`tensor` through QuantizeLinear and DequantizeLinear in `body`: one pair per tensor and body."""
        key = (id(tensor), id(body))
        if key not in self._made:
            scale, zero = self._scale_and_zero(tensor.name, params)
            codes = self.node(body, "QuantizeLinear", [tensor, scale, zero], f"{tensor.name}_codes")
            codes.dtype, codes.shape = params.dtype, tensor.shape
            restored = self.node(body, "DequantizeLinear", [codes, scale, zero], f"{tensor.name}_dequantized")
            restored.dtype, restored.shape = np.dtype(np.float32), tensor.shape
            self._made[key] = restored
        return self._made[key]

    def _scale_and_zero(self, base: str, params: QParams) -> tuple[Constant, Constant]:
        key = (params.scale.tobytes(), bytes(str(params.dtype), "ascii") + params.zero_point.tobytes())
        if key not in self._params:
            self._params[key] = (
                self.constant(f"{base}_scale", params.scale),
                self.constant(f"{base}_zero_point", params.zero_point),
            )
        return self._params[key]

    def dequantize(self, body: Graph, codes: Constant, scales: Constant, zeros: Constant, axis: int) -> Variable:
        """Per-channel DequantizeLinear of a weight or bias in `body`, one node per constant and body."""
        key = (id(codes), id(body))
        if key not in self._made:
            output = self.node(body, "DequantizeLinear", [codes, scales, zeros], f"{codes.name}_dequantized", axis=axis)
            output.dtype, output.shape = np.dtype(np.float32), list(codes.shape)
            self._made[key] = output
        return self._made[key]

    def number(self, node: Node, at: int, body: Graph, dtype: np.dtype[np.generic]) -> None:
        """Replace a single number that an integer operator reads by its code behind a DequantizeLinear."""
        constant = node.inputs[at]
        value = float(constant.values.item())
        params = activation_qparams(value, value, dtype)
        scale, zero = self._scale_and_zero(constant.name, params)
        codes = self.constant(f"{constant.name}_codes", quantize(constant.values, params))
        restored = self.node(body, "DequantizeLinear", [codes, scale, zero], f"{constant.name}_dequantized")
        self.set_input(node, at, restored, body)

    def store(self, found: Stored, codes: Constant, scales: Constant, between: bool) -> None:
        """Let a float node read int8 codes [shape of the weight] times scales [broadcastable to it].

        Cast and Mul, which the runtime folds when it loads the model; a table's rows are gathered first; `between` two
        tensors of codes DequantizeLinear, which keeps the runtime from quantizing the weight by itself.
        """
        node, body = found.node, found.body
        if node.op == "Gather":
            self._store_rows(node, body, codes, scales)
            return
        if between:
            vector = self.constant(f"{found.weight.name}_scale", scales.values.reshape(-1))
            zeros = self.constant(f"{found.weight.name}_zero_point", np.zeros(vector.shape, np.int8))
            self.set_input(node, found.at, self.dequantize(body, codes, vector, zeros, found.kept[0]), body)
            return
        key = (id(codes), id(body), id(scales))
        if key not in self._made:
            values = self.node(body, "Cast", [codes], f"{codes.name}_cast", to=FLOAT)
            self._made[key] = self.node(body, "Mul", [values, scales], f"{codes.name}_scaled")
        self.set_input(node, found.at, self._made[key], body)

    def _store_rows(self, node: Node, body: Graph, codes: Constant, scales: Constant) -> None:
        indices, axis, output = node.inputs[1], node.attrs.get("axis", 0), node.outputs[0]
        picked = self.node(body, "Gather", [codes, indices], f"{output.name}_rows", axis=axis)
        factors = self.node(body, "Gather", [scales, indices], f"{output.name}_scales", axis=axis)
        values = self.node(body, "Cast", [picked], f"{output.name}_cast", to=FLOAT)
        product = Node(op="Mul", name=self._names.node(f"{output.name}_Mul"))
        self.remove(node, body)
        product.inputs, product.outputs = [values, factors], [output]
        body.nodes.append(product)

    def spell_out(self, node: Node, body: Graph) -> None:
        """Write a Relu or Clip as Max and Min of constants, the same values.

        Behind a MatMul or Gemm that leaves the integers, a Relu or Clip keeps the runtime (1.32) from using the integer
        kernel at all: its pattern then asks for a QuantizeLinear.
        """
        bounds = [("Max", 1), ("Min", 2)]
        if node.op == "Relu":
            node.inputs.append(self.constant(f"{node.outputs[0].name}_zero", np.array(0, np.float32)))
        given = [(op, node.inputs[at]) for op, at in bounds if at < len(node.inputs) and not node.inputs[at].is_empty()]
        if not given:
            node.op, node.inputs = "Identity", [node.inputs[0]]
            return
        tensor, output = node.inputs[0], node.outputs[0]
        self.remove(node, body)
        for op, bound in given[:-1]:
            tensor = self.node(body, op, [tensor, bound], f"{output.name}_{op.lower()}")
        op, bound = given[-1]
        last = Node(op=op, name=self._names.node(f"{output.name}_{op}"))
        last.inputs, last.outputs = [tensor, bound], [output]
        body.nodes.append(last)

    def set_input(self, node: Node, at: int, tensor: Variable | Constant, body: Graph) -> None:
        """Replace one input of a node; constants that lose their last reader go at the end."""
        while len(node.inputs) <= at:
            node.inputs.append(Variable.empty())
        old = node.inputs[at]
        if isinstance(old, Constant):
            self._replaced.append(old)
        node.inputs[at] = tensor
        self._touched[id(body)] = body

    def replace_chain(self, layer: Layer, bias: tuple[AnyArray, FloatArray] | None) -> None:
        """Let the layer's node make `layer.raw` from `layer.activation` itself: a Pad before and the chain behind go.

        bias: its int32 codes and their scales, or None.
        """
        node, body = layer.node, layer.body
        if layer.pad is not None:
            node.attrs["pads"] = layer.padding()
            node.inputs[0] = layer.activation
            if not layer.pad.outputs[0].outputs:
                self.remove(layer.pad, body)
        for follower in layer.chain:
            self.remove(follower, body)
        if bias is None:
            node.outputs = [layer.raw]
            return
        codes = self.constant(f"{layer.weight.name}_bias_codes", bias[0])
        scales = self.constant(f"{layer.weight.name}_bias_scale", bias[1])
        zeros = self.constant(f"{layer.weight.name}_bias_zero_point", np.zeros(layer.channels, np.int32))
        restored = self.dequantize(body, codes, scales, zeros, 0)
        if node.op != "MatMul":
            self.set_input(node, 2, restored, body)
            node.outputs = [layer.raw]
            return
        if node.outputs[0] is layer.raw:
            node.outputs = [Variable(self._names.tensor(f"{layer.raw.name}_product"))]
        add = Node(op="Add", name=self._names.node(f"{layer.raw.name}_Add"))
        add.inputs, add.outputs = [node.outputs[0], restored], [layer.raw]
        body.nodes.append(add)

    def connect(self, tensor: Variable, body: Graph, island: Islands, params: QParams) -> None:
        """Put Q and DQ on `tensor`, for the readers that take codes; for all where an integer kernel produces it."""
        restored = self.pair(tensor, body, params)
        quantizer = restored.inputs[0].inputs[0].inputs[0]
        if tensor in island.produced:
            replace_inputs(tensor, restored)
            replace_outputs(tensor, restored, self._inner)
            quantizer.inputs[0] = tensor
            return
        for node in {id(reader): reader for reader in tensor.outputs}.values():
            if node in island.takers:
                for at, given in enumerate(node.inputs):
                    if given is tensor:
                        node.inputs[at] = restored

    def remove(self, node: Node, body: Graph) -> None:
        """Unwire a node that has been replaced; it leaves the body in `finish`."""
        self._replaced += [tensor for tensor in node.inputs if isinstance(tensor, Constant)]
        node.inputs.clear()
        node.outputs.clear()
        self._touched[id(body)] = body

    def finish(self) -> None:
        """Sort the touched bodies; drop removed nodes and the constants that lost their last reader."""
        for body in self._touched.values():
            body.nodes = [node for node in body.nodes if node.inputs or node.outputs]
            sort_nodes(body)
        outputs = {id(tensor) for body in self._model.bodies() for tensor in body.outputs}
        gone = {id(old) for old in self._replaced if not old.outputs and id(old) not in outputs}
        for body in self._model.bodies():
            if any(id(constant) in gone for constant in body.initializers):
                body.initializers = [constant for constant in body.initializers if id(constant) not in gone]
