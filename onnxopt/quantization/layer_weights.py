"""Constants seen as the weights of layers, what is known of the inputs that they multiply, and biases for mean errors.

What every pass needs that changes weights and knows E[x x^T] of what they multiply: with statistics of layers that read
one constant joined, and the mean part of what is lost put into biases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.calibration import Moments, Requests, Statistics
from onnxopt.calibration.gram import patches_of
from onnxopt.calibration.moments import affordable, second_moments
from onnxopt.calibration.requests import Channels
from onnxopt.graph import label
from onnxopt.graph.biases import BiasSlot, bias_slot
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.numerics.blocks import Wide
from onnxopt.quantization.storage import Stored
from onnxopt.quantization.writer import QdqWriter

RECURRENT = ("LSTM", "GRU", "RNN")
FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """A constant and all layers that read it in the same way: a matrix [R, K], R outputs that sum up K inputs."""

    constant: Constant
    readers: list[Stored]

    @property
    def node(self) -> Node:
        """The first reader."""
        return self.readers[0].node

    @property
    def place(self) -> str:
        """How reports name it."""
        return place(self.readers[0])

    @property
    def parts(self) -> int:
        """Groups of a Conv, whose rows have second moments of their own."""
        return int(self.node.attrs.get("group", 1)) if self.node.op == "Conv" else 1

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """Where each input of the matrix stands in the weight."""
        return np.arange(self.readers[0].view.inputs)

    def matrix(self) -> Wide:
        """[R, K] float64, rows of one group after those of another."""
        return np.asarray(self.readers[0].view.matrix(self.constant.values).astype(np.float64)[:, self.order])

    def stored(self, matrix: npt.NDArray[Any], dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """The constant's values, or others of its shape, from a matrix [R, K]; dtype: by default the constant's."""
        back = np.empty_like(matrix)
        back[:, self.order] = matrix
        return self.readers[0].view.back(back).astype(self.constant.dtype if dtype is None else dtype)

    def has_one_form(self) -> bool:
        """Whether all readers see the same matrix."""
        return len({(found.view, type(self)(self.constant, [found]).parts) for found in self.readers}) == 1


@dataclass(frozen=True)
class Known:
    """What is known of what a weight multiplies; None where it is not. With `seconds` there are `powers`.

    seconds: E[x x^T] of each part, [parts, K, K]. powers: their diagonals, [parts, K].
    """

    seconds: Wide | None = None
    powers: Wide | None = None


class LayerInputs:
    """Statistics of what weights multiply, and where the mean part of errors can go. bias: whether it may."""

    def __init__(self, statistics: Statistics | None, shared: set[int], bias: bool = True) -> None:
        """shared: ids of tensors that more than nodes of their own body read (`layers.shared_tensors`)."""
        self._statistics = statistics
        self._shared = shared
        self._bias = bias and statistics is not None

    def slots(self, weight: LayerWeight) -> dict[Node, BiasSlot]:
        """Where the mean part of the error of each reader can go."""
        if not self._bias:
            return {}
        found = {each.node: bias_slot(each.node, self._shared) for each in weight.readers if each.at == 1}
        return {node: slot for node, slot in found.items() if slot is not None and self.mean(weight, node) is not None}

    def known(self, weight: LayerWeight, slots: Collection[Node]) -> Known:
        """Second moments of the inputs, without the mean where a bias takes its part; of all readers together."""
        if self._statistics is None:
            return Known()
        order, readers = weight.order, [found.node for found in weight.readers]
        seconds = second_moments(self._statistics, readers, slots)
        if seconds is not None and (len(seconds), len(seconds[0])) == (weight.parts, len(order)):
            turned = np.stack([second[np.ix_(order, order)] for second in seconds])
            return Known(turned, np.einsum("pkk->pk", turned).copy())
        powers = []
        for found in weight.readers:
            moments = self._channel_moments(found)
            if moments is not None:
                power = moments.variance if found.node in slots else moments.mean_square
                powers.append(_spread(power, weight))
        return Known(None, np.mean(powers, axis=0)) if powers else Known()

    def mean(self, weight: LayerWeight, node: Node) -> Wide | None:
        """E[x] of each part, [parts, K], of what the weight multiplies in one of its readers."""
        if self._statistics is None:
            return None
        gram = self._statistics.gram(node)
        if gram is not None:
            return np.asarray(gram.mean[:, weight.order])
        moments = self._channel_moments(next(found for found in weight.readers if found.node is node))
        return None if moments is None else _spread(moments.mean, weight)

    def correct(self, writer: QdqWriter, weight: LayerWeight, lost: Wide, slots: Mapping[Node, BiasSlot]) -> bool:
        """Add what the mean inputs lose, lost E[x] with lost [R, K], to the readers' biases; whether there are any."""
        bodies: dict[Node, Graph] = {found.node: found.body for found in weight.readers}
        for node, slot in slots.items():
            mean = self.mean(weight, node)
            assert mean is not None
            parts = zip(np.split(lost, weight.parts), mean, strict=True)
            amounts = np.concatenate([part @ middle for part, middle in parts])
            bias = writer.constant(f"{weight.constant.name}_bias", slot.plus(amounts, weight.constant.dtype))
            writer.set_input(slot.node, slot.at, bias, bodies[node])
        return bool(slots)

    def _channel_moments(self, found: Stored) -> Moments | None:
        channels = fed(found)
        return None if channels is None or self._statistics is None else self._statistics.channel_moments(*channels)


def input_requests(model: Model, weights: Collection[LayerWeight], grams: bool = True) -> Requests:
    """Second moments of what weights multiply, as far as they are affordable; of the rest those of channels.

    grams: false asks for channels alone.
    """
    main = [found for weight in weights for found in weight.readers if found.body is model.graph]
    squares = dict.fromkeys(affordable(found.node for found in main if grams and has_gram(found)))
    rest = [channels for found in main if found.node not in squares and (channels := fed(found)) is not None]
    return Requests(grams=tuple(squares), channel_moments=tuple(dict.fromkeys(rest)))


def has_gram(found: Stored) -> bool:
    """Whether rows of the input times the weight are what the layer computes (`onnxopt.calibration.gram`)."""
    is_layer = found.node.op in ("Conv", "Gemm") or (found.node.op == "MatMul" and found.at == 1)
    return is_layer and len(found.view.grid) == 2 and not isinstance(patches_of(found.node), str)


def fed(found: Stored) -> Channels | None:
    """The tensor of the main graph whose channels a weight multiplies, and their axis; None for a Gather's table."""
    node, source, axis = found.node, found.node.inputs[0], -1
    if node.op in ("Conv", "ConvTranspose"):
        axis = 1
    elif node.op == "MatMul" and found.at == 0:
        source, axis = node.inputs[1], -2
    elif node.op == "Gemm" and node.attrs.get("transA", 0):
        axis = 0
    if not isinstance(source, Variable) or node.op == "Gather" or (node.op in RECURRENT and found.at != 1):
        return None
    return source, axis


def place(found: Stored) -> str:
    """How reports name one input of one node."""
    return f"{label(found.node)}, weight {found.weight.name}"


def _spread(channels: Wide, weight: LayerWeight) -> Wide:
    """[parts, K] of figures of input channels, in the order of the matrix."""
    if weight.node.op != "Conv":
        return channels[None]
    kernel = int(np.prod(weight.constant.shape[2:]))
    return np.repeat(channels.reshape(weight.parts, -1), kernel, axis=1)[:, weight.order]
