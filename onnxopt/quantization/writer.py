"""Writing quantized forms into a model: Q/DQ pairs, int8 weights, int32 biases, and int8 storage of float weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxopt.graph.edit import inner_bodies, replace_inputs, replace_outputs
from onnxopt.graph.names import Names
from onnxopt.graph.sort import sort_nodes
from onnxopt.model import Constant, Graph, Model, Node, TensorData, Variable
from onnxopt.numerics.affine import FloatArray, QParams, quantize
from onnxopt.quantization.islands import Islands
from onnxopt.quantization.layers import Layer

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
        self._coded: dict[tuple[int, int], tuple[Variable, Variable, Variable]] = {}
        self._params: dict[tuple[bytes, bytes], tuple[Constant, Constant]] = {}
        self._shared: dict[tuple[bytes, ...], Constant] = {}
        self._replaced: list[Constant] = []

    def constant(self, base: str, values: AnyArray) -> Constant:
        """A new constant under a free name; the export puts it where its readers are."""
        return Constant(self._names.tensor(base), TensorData.from_array(values))

    def shared(self, base: str, values: AnyArray) -> Constant:
        """A constant of these values; equal small ones are one constant."""
        key = (str(values.dtype).encode(), str(values.shape).encode(), values.tobytes())
        if key not in self._shared:
            self._shared[key] = self.constant(base, values)
        return self._shared[key]

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

    def dynamic(self, tensor: Variable, body: Graph) -> tuple[Variable, Variable, Variable]:
        """(uint8 codes, scale, zero-point) of `tensor`, found when the model runs: one node per tensor and body."""
        key = (id(tensor), id(body))
        if key not in self._coded:
            codes = self.node(body, "DynamicQuantizeLinear", [tensor], f"{tensor.name}_codes")
            scale = Variable(self._names.tensor(f"{tensor.name}_scale"), np.dtype(np.float32), [])
            zero = Variable(self._names.tensor(f"{tensor.name}_zero_point"), np.dtype(np.uint8), [])
            codes.dtype, codes.shape = np.dtype(np.uint8), tensor.shape
            codes.inputs[0].outputs = [codes, scale, zero]
            self._coded[key] = codes, scale, zero
        return self._coded[key]

    def _scale_and_zero(self, base: str, params: QParams) -> tuple[Constant, Constant]:
        key = (params.scale.tobytes(), bytes(str(params.dtype), "ascii") + params.zero_point.tobytes())
        if key not in self._params:
            self._params[key] = (
                self.constant(f"{base}_scale", params.scale),
                self.constant(f"{base}_zero_point", params.zero_point),
            )
        return self._params[key]

    def dequantize(self, body: Graph, codes: Constant, scales: Constant, zeros: Constant, axis: int) -> Variable:
        """DequantizeLinear of a weight or bias in `body`, one node per constant and body.

        scales: one per index of `axis`, or 0-d.
        """
        key = (id(codes), id(body))
        if key not in self._made:
            along = {"axis": axis} if scales.shape else {}
            output = self.node(body, "DequantizeLinear", [codes, scales, zeros], f"{codes.name}_dequantized", **along)
            output.dtype, output.shape = np.dtype(np.float32), list(codes.shape)
            self._made[key] = output
        return self._made[key]

    def number(self, node: Node, at: int, body: Graph, params: QParams) -> None:
        """Replace a single number that an integer operator reads by its code behind a DequantizeLinear."""
        constant = node.inputs[at]
        scale, zero = self._scale_and_zero(constant.name, params)
        codes = self.constant(f"{constant.name}_codes", quantize(constant.values, params))
        restored = self.node(body, "DequantizeLinear", [codes, scale, zero], f"{constant.name}_dequantized")
        self.set_input(node, at, restored, body)

    def replace(
        self, node: Node, body: Graph, op: str, inputs: Sequence[Variable | Constant], domain: str = "", **attrs: object
    ) -> None:
        """Another node makes the output of `node`, which goes."""
        output = node.outputs[0]
        self.remove(node, body)
        made = Node(op=op, name=self._names.node(f"{output.name}_{op}"), attrs=attrs, domain=domain or None)
        made.inputs, made.outputs = list(inputs), [output]
        body.nodes.append(made)

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

    def replace_chain(self, layer: Layer, bias: tuple[AnyArray, FloatArray] | None) -> Constant | None:
        """Let the layer's node make `layer.raw` from `layer.activation` itself: a Pad before and the chain behind go.

        bias: its int32 codes and their scales, one a channel or 0-d; or None.
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
            return None
        codes = self.constant(f"{layer.weight.name}_bias_codes", bias[0])
        scales = self.constant(f"{layer.weight.name}_bias_scale", bias[1])
        zeros = self.constant(f"{layer.weight.name}_bias_zero_point", np.zeros(scales.shape, np.int32))
        restored = self.dequantize(body, codes, scales, zeros, 0)
        if node.op != "MatMul":
            self.set_input(node, 2, restored, body)
            node.outputs = [layer.raw]
            return codes
        if node.outputs[0] is layer.raw:
            node.outputs = [Variable(self._names.tensor(f"{layer.raw.name}_product"))]
        add = Node(op="Add", name=self._names.node(f"{layer.raw.name}_Add"))
        add.inputs, add.outputs = [node.outputs[0], restored], [layer.raw]
        body.nodes.append(add)
        return codes

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

    def bound_codes(self, clip: Node, body: Graph, params: QParams) -> None:
        """Let a Clip whose output is connected bound codes instead of values: the same, for rounding keeps order.

        Q(Clip(x)) = Clip(Q(x), Q(low), Q(high)), and QuantizeLinear then stands right behind the layer.
        """
        restored = self._made[(id(clip.outputs[0]), id(body))]
        dequantizer = restored.inputs[0]
        codes = dequantizer.inputs[0]
        given = [clip.inputs[at] if at < len(clip.inputs) else Variable.empty() for at in (1, 2)]
        bounds = [
            self.shared(f"{clip.outputs[0].name}_bound", np.array(params.code(bound.values.item()), params.dtype))
            if isinstance(bound, Constant)
            else bound
            for bound in given
        ]
        bounded = self.node(body, "Clip", [codes, *bounds], f"{codes.name}_bounded")
        bounded.dtype, bounded.shape = codes.dtype, codes.shape
        dequantizer.inputs[0] = bounded
        codes.inputs[0].inputs[0] = clip.inputs[0]
        self.remove(clip, body)

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
