"""Saturation of the result's products on x86 without VNNI: predicted from the weights, measured on feeds.

`onnxopt.numerics.saturation` models the kernel bit by bit, so both can be told on any machine. Of large layers a
part of the output positions is computed, spread evenly; the figures say how many outputs were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxopt.calibration.gram import Patches
from onnxopt.feeds import Sample
from onnxopt.model import Constant, Model, Node
from onnxopt.numerics.saturation import Layout, kernel_order, pairs_at_risk, saturates, saturation_loss
from onnxopt.pipeline.proof.exposed import exposing, grouped, sizes
from onnxopt.quantization.coded import CodedLayer, Form, coded_layers, decoded, decoded_inputs
from onnxopt.report import SaturationFigures, SaturationRisk
from onnxopt.runtime import Array

# products of pairs that are computed for one layer and feed
_PRODUCTS = 1 << 22
_FEWEST_ROWS = 8
_MEMORY = 256 << 20
_EIGHT_BITS = ("int8", "uint8")
_MULTIPLYING = frozenset(
    {"Conv", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"}
) | {"MatMulIntegerToFloat"}
# kernels that make codes of their activation themselves: the positions of their weights
_HIDDEN = {"DynamicQuantizeMatMul": (1,), "DynamicQuantizeLSTM": (1, 2)}
Codes8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]


@dataclass(eq=False)
class _Suspect:
    """A layer that can saturate. shape: of its weight. weight: codes [N, K] in kernel order. pairs: those at risk."""

    layer: CodedLayer
    shape: tuple[int, ...]
    weight: Int8
    pairs: int
    largest: int = -1
    outputs: int = 0
    differing: int = 0

    @property
    def zero_point(self) -> int | None:
        """The code that stands for zero, which is what a Conv pads with; None where the model computes it."""
        zero = self.layer.activation.zero_point if self.layer.activation is not None else None
        if isinstance(zero, Constant):
            return int(zero.values.reshape(-1)[0])
        return 0 if zero is None or self.layer.layout is not Layout.CONV else None

    def look(self, activation: Array) -> None:
        """Compute outputs both ways for the codes that one feed gave. Signed codes run as unsigned ones, 128 higher."""
        shift = 128 if activation.dtype == np.int8 else 0
        values = activation.astype(np.float32) + np.float32(shift)
        self.largest = max(self.largest, int(values.max(initial=-1)))
        groups = _rows(self.layer.node, self.shape, values, (self.zero_point or 0) + shift)
        each = len(self.weight) // len(groups)
        for number, rows in enumerate(groups):
            weight = self.weight[number * each : (number + 1) * each]
            loss = saturation_loss(self._some(rows), weight)
            self.outputs += loss.size
            self.differing += int(np.count_nonzero(loss))

    def _some(self, rows: Codes8) -> Codes8:
        wanted = max(_FEWEST_ROWS, _PRODUCTS // max(1, self.pairs))
        if len(rows) <= wanted:
            return rows
        return rows[np.linspace(0, len(rows) - 1, wanted).astype(np.intp)]

    def figures(self) -> SaturationRisk:
        """What was predicted and measured."""
        layer = self.layer
        if self.largest < 0:
            return SaturationRisk(layer.name, layer.node.op)
        reachable = bool(pairs_at_risk(self.weight, self.largest).any())
        return SaturationRisk(layer.name, layer.node.op, self.largest, reachable, self.outputs, self.differing)


def saturation_figures(result: Model, feeds: Sequence[Sample], threads: int = 1) -> SaturationFigures:
    """The layers whose codes can saturate, and the outputs for which they do on the feeds.

    The model runs unoptimized, where codes and products are exact. Raises PassError where a run fails.
    """
    checked = unread = 0
    risks: list[_Suspect | SaturationRisk] = []
    for layer in coded_layers(result):
        if layer.node.op in _HIDDEN:
            checked += 1
            risks += [SaturationRisk(layer.name, layer.node.op)] if _hidden_risk(layer.node) else []
        elif _multiplies_codes(layer):
            weight = _weight(layer)
            checked, unread = (checked, unread + 1) if weight is None else (checked + 1, unread)
            risks += [] if weight is None else _suspected(layer, weight)
    seen = _measure(result, [risk for risk in risks if isinstance(risk, _Suspect)], feeds, threads)
    figures = (risk.figures() if isinstance(risk, _Suspect) else risk for risk in risks)
    return SaturationFigures(checked, unread, tuple(figures), seen)


def _multiplies_codes(layer: CodedLayer) -> bool:
    """Whether an integer kernel multiplies 8-bit codes in it."""
    if layer.activation is None or layer.node.op not in _MULTIPLYING:
        return False
    return layer.activation.dtype in _EIGHT_BITS


def _weight(layer: CodedLayer) -> Array | None:
    """The codes of its weight; none at all, [0, 0], where both operands are unsigned codes that never saturate.

    None where they can't be read, or are multiplied from the left, where the kernel pairs them otherwise.
    """
    first = decoded(layer.node.inputs[0]) if layer.form is Form.STATIC else None
    if first is not None and first.constant:
        return None
    weight = layer.weight_codes()
    if weight is not None:
        fits = weight.ndim == 2 or layer.layout is Layout.CONV
        return weight if fits else None
    others = decoded_inputs(layer.node)[1] if layer.form is Form.STATIC else []
    unsigned = bool(others) and all(codes.dtype == "uint8" for codes in others)
    return np.zeros((0, 0), np.uint8) if unsigned else None


def _suspected(layer: CodedLayer, weight: Array) -> list[_Suspect | SaturationRisk]:
    """The layer, where its weights can saturate for some codes."""
    depthwise = layer.layout is Layout.CONV and _groups(layer.node) == len(weight) and weight.shape[1:2] == (1,)
    if weight.dtype != np.int8 or (depthwise and len(weight) > 1) or not weight.size:
        return []
    codes: Int8 = weight.astype(np.int8)
    if not saturates(codes, layer.layout):
        return []
    ordered: Int8 = kernel_order(codes, layer.layout).astype(np.int8)
    return [_Suspect(layer, codes.shape, ordered, int(pairs_at_risk(ordered).sum()))]


def _hidden_risk(node: Node) -> bool:
    """Whether weights that a kernel multiplies with codes of its own making can saturate: [.., K, N] each."""
    for at in _HIDDEN[node.op]:
        weight = node.inputs[at] if at < len(node.inputs) else None
        if isinstance(weight, Constant) and weight.dtype == np.int8 and len(weight.shape) >= 2:
            matrices = weight.values.reshape(-1, *weight.shape[-2:])
            if any(saturates(np.asarray(matrix, np.int8), Layout.ROWS) for matrix in matrices):
                return True
    return False


def _measure(result: Model, suspects: Sequence[_Suspect], feeds: Sequence[Sample], threads: int) -> int:
    """Run the feeds for the layers whose codes can be had; returns on how many feeds."""
    reading: dict[str, list[_Suspect]] = {}
    for suspect in suspects:
        activation = suspect.layer.activation
        if activation is not None and suspect.layer.body is result.graph and suspect.zero_point is not None:
            reading.setdefault(activation.tensor.name, []).append(suspect)
    if not reading or not feeds:
        return 0
    for group in grouped(list(reading), sizes(result, list(reading), feeds[0].inputs), _MEMORY):
        session = exposing(result, group, threads)
        for sample in feeds:
            for name, codes in session.run(sample.inputs).items():
                for suspect in reading[name]:
                    suspect.look(codes)
    return len(feeds)


def _groups(node: Node) -> int:
    return int(node.attrs.get("group", 1))


def _rows(node: Node, shape: tuple[int, ...], values: npt.NDArray[np.float32], zero_point: int) -> list[Codes8]:
    """What each group of a layer multiplies: codes [M, K] in the order of the kernel, with zero-points as padding."""
    if "Conv" not in node.op:
        transposed = bool(node.attrs.get("transA", 0))
        return [np.asarray(Patches(transposed=transposed).rows(values)[0], np.uint8)]
    kernel = shape[2:]
    ones = (1,) * len(kernel)
    patches = Patches(
        groups=_groups(node),
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", ones)),
        dilations=tuple(node.attrs.get("dilations", ones)),
        pads=tuple(node.attrs.get("pads", (0, 0) * len(kernel))),
        auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
    )
    rows = patches.rows(values - np.float32(zero_point)) + zero_point
    ordered = rows.reshape(*rows.shape[:2], shape[1], -1).swapaxes(2, 3)
    return list(ordered.reshape(rows.shape).astype(np.uint8))
