"""Second moments of what a layer's weight multiplies: the matrix E[x x^T] that rounding, pruning and low rank need.

A row x holds the inputs of one output position. For MatMul and Gemm it is a row of the left operand. For Conv it is the
patch under the kernel, in the order of the weight's own axes (input channel of the group, then kernel position), zeros
where the kernel reaches into the padding; so `weight.reshape(outputs, -1) @ x` is the output without bias. A grouped
Conv has one matrix a group. Of large inputs only some positions are taken, spread evenly and chosen by the shape alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxopt.model import Constant, Node

POSITIONS = 64  # output positions of a Conv for each item of the batch
ROWS = 256  # rows of a MatMul or Gemm, and positions of a tensor's channels, for each item of the batch
_GOLDEN = (math.sqrt(5) - 1) / 2

Rows = npt.NDArray[np.float64]


class Cutter(Protocol):
    """Cuts rows [groups, rows, K] float64 out of a tensor; batch: items that it holds along its first axis."""

    def rows(self, activation: npt.NDArray[np.float32], batch: int = 1) -> Rows:
        """The rows, [groups, rows, K]."""
        ...


@dataclass(frozen=True)
class ChannelRows:
    """One row for each position of a tensor: what all channels of `axis` hold there."""

    axis: int

    def rows(self, activation: npt.NDArray[np.float32], batch: int = 1) -> Rows:
        """[1, rows, channels]; of each item of the batch at most ROWS, evenly spread."""
        lines = np.moveaxis(activation, self.axis, -1)
        each = math.prod(lines.shape[:-1])
        lines = lines.reshape(each, -1)
        items = batch if batch > 0 and each % batch == 0 else 1
        each //= items
        if each > ROWS:
            lines = lines.reshape(items, each, -1)[:, spread(each, ROWS)].reshape(-1, lines.shape[-1])
        return lines[None].astype(np.float64)


@dataclass(frozen=True)
class Patches:
    """How the rows of a layer are cut out of its input.

    kernel: empty for MatMul and Gemm. channels: input channels of one group, where known. transposed: Gemm's transA.
    """

    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    transposed: bool = False

    def rows(self, activation: npt.NDArray[np.float32], batch: int = 1) -> Rows:
        """[groups, rows, inputs] float64 of an input of the layer; batch: items that it holds along its first axis."""
        return self._patches(activation) if self.kernel else self._lines(activation, batch)[None]

    def _lines(self, activation: npt.NDArray[np.float32], batch: int) -> Rows:
        values = activation.T if self.transposed else activation
        lines = values.reshape(-1, values.shape[-1])
        items = batch if batch > 0 and len(lines) % batch == 0 and not self.transposed else 1
        each = len(lines) // items if items else 0
        if each <= ROWS:
            return lines.astype(np.float64)
        chosen = spread(each, ROWS)
        return lines.reshape(items, each, -1)[:, chosen].reshape(-1, lines.shape[-1]).astype(np.float64)

    def _patches(self, activation: npt.NDArray[np.float32]) -> Rows:
        items, channels = activation.shape[:2]
        begins, ends = self._padding(activation.shape[2:])
        padded = np.pad(activation, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        positions = tuple((n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, self.strides, strict=True))
        chosen = np.unravel_index(spread(math.prod(positions), POSITIONS), positions)
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, padded.ndim)))
        places = tuple(at * stride for at, stride in zip(chosen, self.strides, strict=True))
        dilated = tuple(slice(None, None, step) for step in self.dilations)
        at: tuple[Any, ...] = (slice(None), slice(None), *places, *dilated)
        patches = windows[at]  # [items, channels, chosen, kernel...]
        grouped = patches.reshape(items, self.groups, channels // self.groups, len(chosen[0]), -1)
        rows = grouped.transpose(1, 0, 3, 2, 4).reshape(self.groups, items * len(chosen[0]), -1)
        return np.asarray(rows, np.float64)

    def _padding(self, sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Zeros before and after each position axis (ONNX, operator Conv, auto_pad)."""
        rank = len(sizes)
        if self.auto_pad in ("NOTSET", ""):
            return list(self.pads[:rank]), list(self.pads[rank:])
        if self.auto_pad == "VALID":
            return [0] * rank, [0] * rank
        begins, ends = [], []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            begins.append(small if self.auto_pad == "SAME_UPPER" else large)
            ends.append(large if self.auto_pad == "SAME_UPPER" else small)
        return begins, ends


def patches_of(node: Node) -> Patches | str:
    """How to cut the rows of this layer; in words, why it has none."""
    if node.kind[0] != "" or node.op not in ("Conv", "MatMul", "Gemm"):
        return f"is a {node.op}, no Conv, MatMul or Gemm"
    if node.op != "Conv":
        return Patches(transposed=bool(node.attrs.get("transA", 0)) if node.op == "Gemm" else False)
    weight = node.inputs[1]
    shape = weight.shape if isinstance(weight, Constant) else None
    kernel = tuple(node.attrs.get("kernel_shape") or (shape[2:] if shape else ()))
    if not kernel:
        return "has a kernel of unknown size"
    ones = [1] * len(kernel)
    return Patches(
        groups=int(node.attrs.get("group", 1)),
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", ones)),
        dilations=tuple(node.attrs.get("dilations", ones)),
        pads=tuple(node.attrs.get("pads", [0] * (2 * len(kernel)))),
        auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
    )


def spread(total: int, wanted: int) -> npt.NDArray[np.intp]:
    """At most `wanted` of the indices below `total`, ascending and evenly spread without a period.

    Multiples of the golden ratio modulo 1 (Weyl's equidistribution; no other ratio spreads more evenly), so that no row
    or column of a picture is preferred.
    """
    if total <= wanted:
        return np.arange(total)
    places = np.arange(1, wanted + 1) * _GOLDEN % 1.0
    return np.unique((places * total).astype(np.intp))
