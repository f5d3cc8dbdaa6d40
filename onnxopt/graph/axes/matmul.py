"""Rules of matrix products: Gemm, MatMul with weights on either side, and MatMul of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import Axis
from onnxopt.graph.axes.maps import Array, AxisMaps, Product, Reader, is_constant, register
from onnxopt.graph.axes.weights import add_to_bias, bias_known, bias_of, forget, has_weights, produce, unfused
from onnxopt.graph.edit import label
from onnxopt.model import Node


@register("Gemm")
@register("FusedGemm", domain="com.microsoft")
def gemm(node: Node, maps: AxisMaps) -> None:
    """alpha A B + beta C with constant B [K, N] (or [N, K]): sums over A's axis 1 (or 0), makes output axis 1."""
    data, weights = node.inputs[:2]
    c_shape = _shape(node, 2)
    if not has_weights(weights) or not bias_known(node, 2) or len(c_shape) > 2:
        maps.freeze_node(node, "Gemm without constant weights and bias is not followed")
        return
    transposed = bool(node.attrs.get("transB", 0))
    summed = 0 if node.attrs.get("transA", 0) else 1
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    out = weights.shape[0 if transposed else 1]
    read, passing = maps.of(data).get(summed), maps.of(data).get(1 - summed)
    rows_per_row = len(c_shape) == 2 and c_shape[0] != 1
    spread: Callable[[Array], Array] = lambda w: (w if transposed else w.T)[None, :, :, None]  # noqa: E731
    if read is not None:
        gather: Callable[[Array, Array], Array] = lambda new, _old: (  # noqa: E731
            new[0, :, :, 0] if transposed else new[0, :, :, 0].T
        )
        scale = alpha / beta if beta else None
        usable = scale is not None and not rows_per_row
        fold = (lambda amounts: add_to_bias(node, 2, out, amounts * scale)) if usable else None
        maps.readers.append(Reader(node, 1, read, 1, spread, gather, fold))
        maps.parameter(node, 1, 1 if transposed else 0, read.channels)
    if rows_per_row:
        signal, scales = maps.signals.new(out), np.ones(out)
        produced = maps.produce(node, signal, scales)
    else:
        bias = bias_of(node, 2, out) * beta
        produced = produce(node, maps, spread(weights.values) * np.float64(alpha), read, bias, True)
    if len(c_shape) and c_shape[-1] == out:
        maps.parameter(node, 2, -1, produced.channels)
    maps.parameter(node, 1, 0 if transposed else 1, produced.channels)
    result = {1: unfused(node, maps, produced)}
    if passing is not None and not rows_per_row:
        result[0] = forget(passing, maps)
    maps.set(node.outputs[0], result)


@register("MatMul")
def matmul(node: Node, maps: AxisMaps) -> None:
    """x [..., K] times constant [K, N]; two variables tie the axis they are summed over."""
    left, right = node.inputs
    if is_constant(left) and is_constant(right):
        return
    if has_weights(right) and len(right.shape) >= 2 and maps.rank(left) is not None:
        _weights(node, maps, 1)
    elif has_weights(left) and len(left.shape) >= 2 and maps.rank(right) is not None:
        _weights(node, maps, 0)
    elif is_constant(left) or is_constant(right):
        maps.freeze_node(node, "MatMul with these constant operands is not followed")
    else:
        variables(node, maps)


def _weights(node: Node, maps: AxisMaps, at: int, factor: float = 1.0) -> None:
    """Input `at` holds weights [.., K, N] on the right or [.., N, K] on the left; the other is read over K."""
    weights, data = node.inputs[at], node.inputs[1 - at]
    rank, places = len(data.shape), len(weights.shape)
    if rank < 2:
        maps.freeze_node(node, "MatMul of a vector is not followed")
        return
    # the data's axis that is summed over, and the one that passes
    summed, passing = (rank - 1, rank - 2) if at == 1 else (rank - 2, rank - 1)
    inner, outer = (places - 2, places - 1) if at == 1 else (places - 1, places - 2)
    read = maps.of(data).get(summed)
    spread, gather = _matrices(at)
    if read is not None:
        maps.readers.append(Reader(node, at, read, 1, spread, gather, None, 1 - at))
        maps.parameter(node, at, inner, read.channels)
    count = weights.shape[outer]
    single = weights.data.size == count * weights.shape[inner]
    produced = produce(node, maps, spread(weights.values) * factor, read, np.zeros(count), single, weights)
    maps.parameter(node, at, outer, produced.channels)
    whole = max(rank, places)
    result = {whole - rank + axis: found for axis, found in _batches(node, maps, at).items()}
    if passing in maps.of(data):
        result[whole - rank + passing] = forget(maps.of(data)[passing], maps)
    result[whole - rank + summed] = produced
    maps.set(node.outputs[0], result)


def _matrices(at: int) -> tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]:
    """(spread, gather) of weights [.., K, N] (or [.., N, K]): matrices of a batch are shown as taps."""
    order = (2, 1, 0) if at == 1 else (1, 2, 0)

    def spread(weights: Array) -> Array:
        return weights.reshape(-1, *weights.shape[-2:]).transpose(order)[None]

    def gather(new: Array, old: Array) -> Array:
        restored: Array = new[0].transpose(np.argsort(order)).reshape(old.shape)
        return restored

    return spread, gather


def _batches(node: Node, maps: AxisMaps, at: int) -> dict[int, Axis]:
    """The data's axes but the last two: they pass, and weights that differ along them are cut alike."""
    weights, data = node.inputs[at], node.inputs[1 - at]
    result: dict[int, Axis] = {}
    for axis, found in maps.of(data).items():
        if axis >= len(data.shape) - 2:
            continue
        own = axis - len(data.shape) + len(weights.shape)
        if own >= 0 and weights.shape[own] == len(found):
            maps.parameter(node, at, own, found.channels)
        elif own >= 0 and weights.shape[own] != 1:
            maps.freeze_axis(found, label(node), "MatMul broadcasts it")
            continue
        result[axis] = forget(found, maps)
    return result


def variables(node: Node, maps: AxisMaps, transposed: tuple[bool, bool] = (False, False)) -> None:
    """A product of two tensors: what is summed over is tied, and so are the axes that number the matrices.

    transposed: whether the last two axes of the left and of the right tensor are exchanged first.
    """
    left, right = node.inputs[:2]
    if not maps.tracks(node):
        return
    ranks = maps.rank(left), maps.rank(right)
    if ranks[0] is None or ranks[1] is None or min(ranks[0], ranks[1]) < 2:
        maps.freeze_node(node, "MatMul of vectors or of tensors of unknown rank is not followed")
        return
    rank = max(ranks[0], ranks[1])
    rows, summed = _last_two(ranks[0], transposed[0])
    other, columns = _last_two(ranks[1], transposed[1])
    _sum_over(node, maps, summed, other)
    result: dict[int, Axis] = {}
    for batch in range(rank - 2):
        found = _batch(node, maps, batch - rank + ranks[0], batch - rank + ranks[1])
        if found is not None:
            result[batch] = found
    if rows in maps.of(left):
        result[rank - 2] = forget(maps.of(left)[rows], maps)
    if columns in maps.of(right):
        result[rank - 1] = forget(maps.of(right)[columns], maps)
    maps.set(node.outputs[0], result)


def _last_two(rank: int, exchanged: bool) -> tuple[int, int]:
    return (rank - 1, rank - 2) if exchanged else (rank - 2, rank - 1)


def _sum_over(node: Node, maps: AxisMaps, left: int, right: int) -> None:
    one, other = maps.of(node.inputs[0]).get(left), maps.of(node.inputs[1]).get(right)
    if one is not None and other is not None:
        maps.channels.tie(one.channels, other.channels)
        needed = ~(one.zero | other.zero)
        maps.products.append(Product(one.channels, needed, node, ((0, left), (1, right))))
        return
    for axis in (one, other):
        if axis is not None:
            maps.freeze_axis(axis, label(node), "MatMul sums over it together with an axis that can't be cut")


def _batch(node: Node, maps: AxisMaps, left: int, right: int) -> Axis | None:
    """The axis that numbers matrices, at place `left` and `right` of the operands, negative where they lack it."""
    pair = [(tensor, place) for tensor, place in zip(node.inputs, (left, right), strict=False) if place >= 0]
    found = [axis for tensor, place in pair if (axis := maps.of(tensor).get(place)) is not None]
    rest = [tensor.shape[place] for tensor, place in pair if place not in maps.of(tensor)]
    if not found:
        return None
    if any(length != 1 for length in rest) or any(len(axis) != len(found[0]) for axis in found):
        for axis in found:
            maps.freeze_axis(axis, label(node), "MatMul pairs it with an axis that can't be cut")
        return None
    for axis in found[1:]:
        maps.channels.tie(found[0].channels, axis.channels)
    return forget(found[0], maps)


@register("FusedMatMul", domain="com.microsoft")
def fused_matmul(node: Node, maps: AxisMaps) -> None:
    """MatMul of two tensors, either transposed first, or with weights on the right, times a factor."""
    data, weights = node.inputs
    exchanged = [bool(node.attrs.get(name, 0)) for name in ("transA", "transB", "transBatchA", "transBatchB")]
    if has_weights(weights) and len(weights.shape) >= 2 and maps.rank(data) is not None and not any(exchanged):
        _weights(node, maps, 1, float(node.attrs.get("alpha", 1.0)))
    elif is_constant(data) or is_constant(weights) or any(exchanged[2:]):
        maps.freeze_node(node, "FusedMatMul with these constants or exchanged batches is not followed")
    else:
        variables(node, maps, (exchanged[0], exchanged[1]))


def _shape(node: Node, index: int) -> tuple[int, ...]:
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return ()
    shape: Any = node.inputs[index].shape
    return tuple(shape)
