"""Fuse inference-mode BatchNormalization into the layer before it.

With s = scale / sqrt(variance + epsilon), along the layer's output channels:

    BatchNormalization(W * x + b) = (W * s) * x + ((b - mean) * s + bias)

    Before                                        After
    t = Conv(x, W, b)                             y = Conv(x, W', b')
    y = BatchNormalization(t, scale, bias, mean, variance)

Layers: Conv (any group), ConvTranspose (any group), Gemm, and MatMul of rank 2, which gets an Add; an Add of a constant
per channel may stand between. Everything is computed in float64 and rounded once. A scale of exactly 0 gives weights of
exactly 0. A layer whose result somebody else reads, or whose weights are not constant, is left alone; weights shared
with other layers are copied, not changed for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto

from onnxopt.graph import Names, NodeEdits, drop_unused, label, operators
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Graph, Model, Node
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class FuseBn(Pass):
    """Fuse BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it."""

    name: ClassVar[str] = "fuse_bn"

    @property
    def effect(self) -> Effect:
        """Products are associated differently."""
        return Effect.ROUNDING

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse in all bodies, chains of normalizations too."""
        model.normalize()
        fuser = _Fuser(model)
        changes: list[Change] = []
        skipped: list[Skip] = []
        read = [constant for constant in model.constants() if constant.outputs]
        for body in list(model.bodies()):
            fuser.edits = NodeEdits(body)
            for node in _in_chain_order(body):
                name = label(node)
                try:
                    changes.append(Change("fused", name, f"into {fuser.fuse(node, body)}"))
                except _Refused as refusal:
                    skipped.append(Skip(name, str(refusal)))
            fuser.edits.write()
        drop_unused(read, model)
        return PassResult(changes, skipped)


class _Refused(Exception):
    """Why a BatchNormalization stays."""


@dataclass(frozen=True)
class _Site:
    """A BatchNormalization `node`, the layer it reads from and the Add between them, if there is one."""

    body: Graph
    node: Node
    layer: Node
    add: Node | None

    def __str__(self) -> str:
        return f"{self.layer.op} {label(self.layer)}"


@dataclass(frozen=True)
class _Affine:
    """What a BatchNormalization does to a channel: (x - mean) * scale + bias."""

    scale: Doubles
    mean: Doubles
    bias: Doubles

    def __call__(self, x: Doubles) -> Doubles:
        return np.asarray((x - self.mean) * self.scale + self.bias)


def _in_chain_order(body: Graph) -> list[Node]:
    """The normalizations, each after one it reads from: the first of a chain is fused first."""
    found = [node for node in body.nodes if node.kind == ("", "BatchNormalization")]
    among = {id(node) for node in found}
    order: dict[int, Node] = {}
    for node in found:
        chain = [node]
        while (source := _producer(chain[-1])) is not None and id(source) in among and id(source) not in order:
            if any(source is other for other in chain):
                break
            chain.append(source)
        order.update((id(each), each) for each in reversed(chain))
    return list(order.values())


def _producer(node: Node, at: int = 0) -> Node | None:
    source = node.inputs[at].inputs if len(node.inputs) > at else []
    return source[0] if source else None


class _Fuser:
    """What fusing needs to know of the model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.names = Names(model)
        self.edits = NodeEdits(model.graph)
        self.outputs = {id(tensor) for body in model.bodies() for tensor in body.outputs}
        self._facts: dict[int, Fact] | None = None
        self._layers = {
            "Conv": self._conv,
            "ConvTranspose": self._conv_transpose,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
        }

    def fuse(self, node: Node, body: Graph) -> str:
        """Fuse one normalization; returns the name of the layer. Raises _Refused before anything is changed."""
        site = self._site(node, body)
        self._layers[site.layer.op](site, _affine(site))
        return label(site.layer)

    def _site(self, node: Node, body: Graph) -> _Site:
        if operators.is_training(node):
            raise _Refused("it is in training mode")
        layer, add = _producer(node), None
        if layer is not None and layer.kind == ("", "Add"):
            at = next((i for i, tensor in enumerate(layer.inputs) if isinstance(tensor, Constant)), None)
            layer, add = (layer, None) if at is None else (_producer(layer, 1 - at), layer)
        if layer is None or layer.domain not in (None, "", "ai.onnx") or layer.op not in self._layers:
            raise _Refused(f"what stands before it is {layer.op if layer else 'no node'}, no layer with weights")
        site = _Site(body, node, layer, add)
        for each in (layer, add):
            if each is not None and each not in self.edits:
                raise _Refused(f"{site} stands in another graph")
            if each is not None and (len(each.outputs[0].outputs) != 1 or id(each.outputs[0]) in self.outputs):
                raise _Refused(f"the result of {each.op} {label(each)} is used elsewhere too")
        for tensor in layer.inputs[1:]:
            if not tensor.is_empty() and not isinstance(tensor, Constant):
                raise _Refused(f"the weights of {site} are not constant ({tensor.name})")
        if any(isinstance(value, AttributeProto) for each in (node, layer) for value in each.attrs.values()):
            raise _Refused("an attribute is a parameter of the function it stands in")
        return site

    # the layers

    def _conv(self, site: _Site, affine: _Affine) -> None:
        weights = _weights(site.layer)
        _expect(weights.shape[0], affine)
        scaled = weights * affine.scale.reshape(-1, *[1] * (weights.ndim - 1))
        self._finish(site, scaled, affine(_bias(site.layer) + _addend(site, weights.ndim)))

    def _conv_transpose(self, site: _Site, affine: _Affine) -> None:
        weights = _weights(site.layer)  # [in channels, out channels / group, kernel...]
        group = int(site.layer.attrs.get("group", 1))
        _expect(weights.shape[1] * group, affine)
        by_group = weights.reshape(group, weights.shape[0] // group, *weights.shape[1:])
        scaled = by_group * affine.scale.reshape(group, 1, -1, *[1] * (weights.ndim - 2))
        bias = _bias(site.layer) + _addend(site, weights.ndim)
        self._finish(site, scaled.reshape(weights.shape), affine(bias))

    def _gemm(self, site: _Site, affine: _Affine) -> None:
        layer, weights = site.layer, _weights(site.layer)
        transposed = bool(layer.attrs.get("transB", 0))
        _expect(weights.shape[0 if transposed else 1], affine)
        bias = _bias(layer) * float(layer.attrs.get("beta", 1.0)) + _addend(site, 2)
        if bias.ndim == 2 and bias.shape[0] > 1 and bias.shape[1] != affine.scale.size:
            raise _Refused(f"the addend of {site} differs by row, not by channel")
        scaled = weights * (affine.scale[:, None] if transposed else affine.scale[None, :])
        self._finish(site, scaled, affine(bias))
        layer.attrs.pop("beta", None)

    def _matmul(self, site: _Site, affine: _Affine) -> None:
        weights = _weights(site.layer)
        if weights.ndim != 2 or len(self._shape(site.layer.inputs[0]) or ()) != 2:
            raise _Refused(f"{site} is not known to be of rank 2, where channels are columns")
        _expect(weights.shape[1], affine)
        scaled = _rounded(site, weights * affine.scale[None, :])
        shift = _rounded(site, affine(_addend(site, 2)))
        self._give(site.layer, 1, scaled, "weight")
        result = self._unwire(site)
        constant = Constant(self.names.tensor(f"{label(site.layer)}_bias"), shift)
        add = Node("Add", site.node.name, inputs=[site.layer.outputs[0], constant], outputs=[result])
        self.edits.insert_before(site.node, [add])

    def _shape(self, tensor: Any) -> tuple[Any, ...] | None:
        if self._facts is None:
            self.edits.write()
            self._facts = known(self.model)
        return self._facts.get(id(tensor), Fact()).shape

    # rewriting

    def _finish(self, site: _Site, weights: Doubles, bias: Doubles) -> None:
        """Give the layer its new weights and bias, and the normalization's output."""
        new_weights, new_bias = _rounded(site, weights), _rounded(site, bias)
        self._give(site.layer, 1, new_weights, "weight")
        self._give(site.layer, 2, new_bias, "bias")
        site.layer.outputs = [self._unwire(site)]

    def _unwire(self, site: _Site) -> Any:
        """Remove the normalization and the Add before it; returns the output that has lost its producer."""
        result = site.node.outputs[0]
        self.edits.remove(site.node)
        if site.add is not None:
            self.edits.remove(site.add)
        return result

    def _give(self, layer: Node, at: int, values: NDArray[Any], role: str) -> None:
        """Replace a constant input: in place where nobody else reads it, else by a constant of this layer's own."""
        present = layer.inputs[at] if len(layer.inputs) > at else None
        if isinstance(present, Constant) and len(present.outputs) == 1 and id(present) not in self.outputs:
            present.values = values
            return
        shared = isinstance(present, Constant)
        base = f"{present.name}_fused" if present is not None and shared else f"{label(layer)}_{role}"
        constant = Constant(self.names.tensor(base), values)
        if present is None:
            layer.inputs.append(constant)
        else:
            layer.inputs[at] = constant


def _affine(site: _Site) -> _Affine:
    """The normalization's numbers; its attributes by the rules of opset 7 and later."""
    node = site.node
    if operators.opset_of(site.body) < 7:
        raise _Refused("before opset 7 its attributes mean something else")
    if node.attrs.get("spatial", 1) != 1:
        raise _Refused("it normalizes every position by itself (spatial=0)")
    if len(node.inputs) != 5 or not all(isinstance(tensor, Constant) for tensor in node.inputs[1:]):
        raise _Refused("its parameters are not constant")
    scale, bias, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:])
    spread = variance + float(np.float32(node.attrs.get("epsilon", 1e-5)))
    if not np.all(spread > 0):
        raise _Refused("its variance plus epsilon is not positive everywhere")
    return _Affine(scale / np.sqrt(spread), mean, bias)


def _weights(layer: Node) -> Doubles:
    return np.asarray(layer.inputs[1].values.astype(np.float64))


def _bias(layer: Node) -> Doubles:
    """The layer's addend, zero where it has none."""
    given = len(layer.inputs) > 2 and not layer.inputs[2].is_empty()
    return np.asarray(layer.inputs[2].values.astype(np.float64)) if given else np.zeros(1)


def _addend(site: _Site, rank: int) -> Doubles:
    """What the Add between adds to each channel (axis 1 of `rank`), [channels] or [1]; zero without an Add."""
    if site.add is None:
        return np.zeros(1)
    constant = next(tensor for tensor in site.add.inputs if isinstance(tensor, Constant))
    shape = (*[1] * (rank - len(constant.shape)), *constant.shape)
    if len(shape) != rank or any(dim != 1 for axis, dim in enumerate(shape) if axis != 1):
        raise _Refused(f"Add {label(site.add)} before it does not add one number per channel")
    return np.asarray(constant.values.astype(np.float64).reshape(-1))


def _expect(channels: int, affine: _Affine) -> None:
    if any(each.shape != (channels,) for each in (affine.scale, affine.mean, affine.bias)):
        raise _Refused(f"its parameters do not have the {channels} channels of the layer before it")


def _rounded(site: _Site, values: Doubles) -> NDArray[Any]:
    """`values` in the type of the layer's weights; -0.0, which a scale of 0 makes, becomes 0.0."""
    dtype = site.layer.inputs[1].dtype
    with np.errstate(over="ignore"):
        result = np.asarray((values + 0.0).astype(dtype))
    if not np.all(np.isfinite(result.astype(np.float64))):
        raise _Refused(f"the fused weights of {site} do not fit into {dtype}")
    return result
