"""Which quantized layers the runtime really runs on integers: read from the graph that it optimizes.

A layer that fused is gone from there; in its place stands one of the runtime's integer kernels. A layer that did not is
still a float operator, and what it reads still comes out of a DequantizeLinear. The runtime renames what it rewrites,
so such an operator is known by its name, by the tensor it makes, or else by the stored codes that it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from onnxopt.graph.edit import label
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.quantization.coded import FLOAT_LAYERS, INTEGER_LAYERS, CodedLayer, Form, coded_layers, decoded_inputs
from onnxopt.report import KernelFigures, UnfusedLayer
from onnxopt.target import resolve

_TO_CODES = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
_EIGHT_BITS = ("int8", "uint8")
# what the runtime puts behind a layer that it runs in another layout; the tensor behind it has the old name
_REORDERS = frozenset({"ReorderOutput", "Transpose"})


def kernel_figures(result: Model, optimized: Model) -> KernelFigures:
    """What became of the quantized layers of `result`. optimized: `runtime.optimized.optimized_graph(result)`."""
    layers = list(coded_layers(result))
    left = _Left(layers)
    kernels: Counter[str] = Counter()
    floats, between = 0, []
    for body, node in _nodes(optimized):
        if _is_kernel(node):
            kernels[node.op] += 1
        elif node.op in FLOAT_LAYERS or node.op == "Gather":
            floats += left.take(node)
        elif _between_codes(node, body):
            between.append(label(node))
    ops = Counter(node.op for _, node in _nodes(optimized))
    running = sum(count for op, count in kernels.items() if op in INTEGER_LAYERS)
    return KernelFigures(
        layers=len(layers) + left.strangers,
        integer=min(len(layers) + left.strangers - len(left.unfused), running),
        kernels=dict(sorted(kernels.items(), key=lambda entry: (-entry[1], entry[0]))),
        unfused=tuple(left.unfused),
        float_layers=floats,
        between_codes=tuple(between),
        quantize_nodes=sum(ops[op] for op in _TO_CODES),
        dequantize_nodes=ops["DequantizeLinear"],
    )


class _Left:
    """The layers found among the float operators of the optimized graph.

    strangers: operators that read stored codes and are no layer of the model, as where a local function was inlined.
    """

    def __init__(self, layers: list[CodedLayer]) -> None:
        self.unfused: list[UnfusedLayer] = []
        self.strangers = 0
        self._waiting: dict[str, list[CodedLayer]] = {}
        self._seen: set[int] = set()
        self._by_codes: dict[str, list[CodedLayer]] = {}
        for layer in layers:
            for name in {layer.node.name, *(tensor.name for tensor in layer.node.outputs)} - {""}:
                self._waiting.setdefault(name, []).append(layer)
            for name in layer.weight.names if layer.weight is not None else ():
                self._by_codes.setdefault(name, []).append(layer)

    def take(self, node: Node) -> bool:
        """Note the layer that this operator is; True where it is a float one that nobody quantized."""
        activation, weights = decoded_inputs(node)
        layer = self._layer(node, [name for codes in weights for name in sorted(codes.names)])
        stored = any(codes.constant for codes in weights)
        if layer is None and not stored:
            return node.op in FLOAT_LAYERS
        if activation is None and not stored:
            # what it read was folded when the model was loaded: it runs as the float layer that it was
            return True
        if layer is not None:
            self._seen.add(id(layer))
            self.unfused.append(UnfusedLayer(layer.name, layer.node.op, _reason(layer)))
        else:
            self.strangers += 1
            self.unfused.append(UnfusedLayer(label(node), node.op, _EVERY_RUN))
        return False

    def _layer(self, node: Node, codes: list[str]) -> CodedLayer | None:
        made = [tensor.name for tensor in node.outputs]
        behind = [
            tensor.name
            for output in node.outputs
            for reader in output.outputs
            if reader.op in _REORDERS
            for tensor in reader.outputs
        ]
        for table, names in ((self._waiting, [node.name, *made, *behind]), (self._by_codes, codes)):
            for name in names:
                for layer in table.get(name, ()):
                    if id(layer) not in self._seen:
                        return layer
        return None


_EVERY_RUN = "its weight is dequantized at every run"


def _reason(layer: CodedLayer) -> str:
    """Why a layer is still there, as far as its surroundings in the model tell."""
    if layer.form is Form.WEIGHTS:
        return _EVERY_RUN
    for codes in (layer.activation, layer.weight):
        if codes is not None and codes.dtype not in _EIGHT_BITS:
            return f"no integer kernel takes {codes.dtype} codes"
    if layer.node.op in ("ConvTranspose", "LSTM", "GRU", "RNN"):
        return f"{layer.node.op} has no integer kernel"
    followed = _followed(layer)
    if followed[-1:] != ["QuantizeLinear"]:
        if layer.node.op == "Conv":
            return "its output is not quantized"
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if isinstance(bias, Constant) and layer.node.op == "Gemm":
            return "its bias is float and its output is not quantized"
    if layer.activation is not None and layer.activation.dtype == "int8" and resolve().activation == np.uint8:
        return "it reads int8 codes, and the kernels of this processor take uint8"
    if len(followed) > 1:
        return f"the codes of its output do not imply the {followed[0]} in front of them"
    return "the runtime has no integer kernel for it as it stands"


def _followed(layer: CodedLayer) -> list[str]:
    """The operators behind it as long as each is the only reader: Relu or Clip, and what ends them."""
    found: list[str] = []
    tensor = layer.node.outputs[0]
    while len(tensor.outputs) == 1 and not any(tensor is output for output in layer.body.outputs):
        found.append(tensor.outputs[0].op)
        if found[-1] not in ("Relu", "Clip"):
            break
        tensor = tensor.outputs[0].outputs[0]
    return found


def _is_kernel(node: Node) -> bool:
    return node.op in INTEGER_LAYERS or node.op.startswith("QLinear")


def _between_codes(node: Node, body: Graph) -> bool:
    """Whether a float operator reads nothing but dequantized codes and leads to nothing but codes."""
    read = [tensor for tensor in node.inputs if isinstance(tensor, Variable) and not tensor.is_empty()]
    made = [tensor for tensor in node.outputs if not tensor.is_empty()]
    if not read or not made or node.op in ("DequantizeLinear", *_TO_CODES):
        return False
    if any(tensor is output for tensor in made for output in body.outputs):
        return False
    readers = [reader for tensor in made for reader in tensor.outputs]
    return (
        bool(readers)
        and all(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in read)
        and all(reader.op == "QuantizeLinear" for reader in readers)
    )


def _nodes(model: Model) -> Iterator[tuple[Graph, Node]]:
    for body in model.bodies():
        if body.function is None:
            yield from ((body, node) for node in body.nodes)
