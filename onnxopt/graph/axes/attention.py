"""Rules of fused attention operators: heads, or the dims within all heads, can be cut.

A tensor [.., H D] holds H heads of D dims. With `maps.split` "outer" the D dims of a head are tied and whole heads go,
else the dims d of all heads are tied: queries and keys then lose the same dims, values others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxopt.graph.axes.axis import Axis, Floats, Ints, Mask
from onnxopt.graph.axes.maps import AxisMaps, Keep, Product, Reader, is_constant, register
from onnxopt.graph.axes.weights import bias_known, bias_of, forget, has_weights, produce
from onnxopt.graph.edit import label
from onnxopt.model import Node


def _tie_heads(maps: AxisMaps, channels: Ints, heads: int) -> None:
    """Tie what goes together of [H D] channels."""
    grid = channels.reshape(heads, -1)
    grid = grid if maps.split == "outer" else grid.T
    for other in grid.T[1:]:
        maps.channels.tie(grid[:, 0], other)


def _tie_operands(node: Node, maps: AxisMaps, parts: list[Ints], heads: list[int], dead: Mask | None = None) -> None:
    """Tie queries, keys and values of a node; where query heads share key heads, all of these go together.

    dead: queries or keys that are zero in every head, so that nothing is lost with them.
    """
    query, key = parts[:2]
    if maps.split == "outer":
        fewest = min(heads)
        for part, count in zip(parts, heads, strict=True):
            _tie_heads(maps, part, count)
            leads = part.reshape(count, -1)[:, 0].reshape(fewest, -1)
            for column in leads.T:
                maps.channels.tie(query.reshape(fewest, -1)[:, 0], column)
        return
    for part, count in zip(parts, heads, strict=True):
        _tie_heads(maps, part, count)
    maps.channels.tie(query.reshape(heads[0], -1)[0], key.reshape(heads[1], -1)[0])
    needed = np.ones(len(query), np.bool_) if dead is None else ~dead
    maps.products.append(Product(query, needed, node, ((0, 2), (1, 2))))


def _dead(query: Axis, key: Axis, heads: list[int], biases: list[Floats]) -> Mask:
    """Channels of the queries whose product is zero: they are, or the keys' are; shared keys serve several heads."""
    zero = [axis.zero & (bias == 0) for axis, bias in zip((query, key), biases, strict=True)]
    keys = zero[1].reshape(heads[1], -1).repeat(heads[0] // heads[1], axis=0).reshape(-1)
    return np.asarray(zero[0] | keys)


def _heads_left(maps: AxisMaps, channels: Ints, heads: int, keep: Keep) -> int:
    return int(keep(channels.reshape(heads, -1)[:, 0]).sum()) if maps.split == "outer" else heads


def _write_scale(node: Node, size: int) -> None:
    """The factor of the scores, which follows from the size of a head unless it is written out."""
    if not node.attrs.get("scale", 0):
        node.attrs["scale"] = float(1 / np.sqrt(size))


def _freeze(node: Node, maps: AxisMaps, reason: str) -> None:
    for tensor in node.inputs:
        maps.freeze(tensor, label(node), reason)


def _extra(node: Node, first: int) -> bool:
    """Whether any of the inputs from `first` on is given, or any output but the first."""
    return any(not tensor.is_empty() for tensor in (*node.inputs[first:], *node.outputs[1:]))


@register("MultiHeadAttention", domain="com.microsoft")
def multi_head(node: Node, maps: AxisMaps) -> None:
    """query, key and value [B, S, H D], bias [3 H D], padding mask and a bias of the scores [B or 1, H or 1, S, S]."""
    operands = [maps.of(tensor).get(2) for tensor in node.inputs[:3] if maps.rank(tensor) == 3]
    heads = int(node.attrs["num_heads"])
    scores: Any = node.inputs[5] if len(node.inputs) > 5 else None
    plain = scores is None or scores.is_empty() or (scores.shape is not None and scores.shape[1] == 1)
    known = [axis for axis in operands if axis is not None]
    if len(known) < 3 or not bias_known(node, 3) or _extra(node, 6) or not plain:
        _freeze(node, maps, "MultiHeadAttention with an operand that can't be cut, a past or a bias of each head")
        return
    query, key, value = known
    parts = [query.channels, key.channels, value.channels]
    widths = np.cumsum([len(part) for part in parts])
    biases = np.split(bias_of(node, 3, int(widths[-1])), widths[:-1])
    _tie_operands(node, maps, parts, [heads] * 3, _dead(query, key, [heads] * 2, biases[:2]))
    maps.parameter(node, 3, 0, np.concatenate(parts))
    _rewrite_heads(node, maps, parts[0], heads, "num_heads")
    # what was zero stays zero unless a bias is added first
    scale = np.where(value.zero & (biases[2] == 0), 0.0, 1.0)
    maps.set(node.outputs[0], {2: value.known(maps.signals.new(len(value)), scale)})


def _rewrite_heads(node: Node, maps: AxisMaps, channels: Ints, heads: int, *names: str) -> None:
    size = len(channels) // heads

    def rewrite(keep: Keep) -> None:
        _write_scale(node, size)
        node.attrs.update(dict.fromkeys(names, _heads_left(maps, channels, heads, keep)))

    maps.on_cut(rewrite, channels)


@register("Attention", domain="com.microsoft")
def packed_attention(node: Node, maps: AxisMaps) -> None:
    """Input [B, S, K] by weights [K, 3 H D] with bias: queries, keys and values side by side."""
    data, weights = node.inputs[0], node.inputs[1]
    for number, axis in maps.of(data).items():
        if number != 2 or not has_weights(weights):
            maps.freeze_axis(axis, label(node), "Attention needs all of it")
    if not has_weights(weights) or not bias_known(node, 2):
        return
    read = maps.of(data).get(2)
    heads = int(node.attrs["num_heads"])
    total = weights.shape[1]
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", [])] or [total // 3] * 3
    spread: Callable[[Any], Any] = lambda w: w.T[None, :, :, None]  # noqa: E731
    if read is not None:
        maps.readers.append(Reader(node, 1, read, 1, spread, lambda new, _old: new[0, :, :, 0].T, None))
        maps.parameter(node, 1, 0, read.channels)
    produced = produce(node, maps, spread(weights.values), read, bias_of(node, 2, total), True)
    maps.parameter(node, 1, 1, produced.channels)
    maps.parameter(node, 2, -1, produced.channels)
    bounds = np.cumsum([0, *sizes])
    parts = [produced.channels[bounds[at] : bounds[at + 1]] for at in range(3)]
    if _extra(node, 4) or node.attrs.get("do_rotary", 0):
        maps.freeze_axis(produced, label(node), "Attention with a past, a bias of the scores or rotation")
        return
    if maps.split == "outer":
        _tie_operands(node, maps, parts, [heads] * 3)
    else:
        # queries and keys are made within the node: no product of tensors that could be masked; they stay
        _tie_heads(maps, parts[2], heads)
        maps.freeze_axis(
            Axis(np.concatenate(parts[:2]), *_nothing(maps, len(parts[0]) + len(parts[1]))),
            label(node),
            "Attention multiplies queries and keys over it",
        )

    def rewrite(keep: Keep) -> None:
        _write_scale(node, sizes[0] // heads)
        node.attrs["num_heads"] = _heads_left(maps, parts[0], heads, keep)
        node.attrs["qkv_hidden_sizes"] = [int(keep(part).sum()) for part in parts]

    maps.on_cut(rewrite, produced.channels)
    value = produced.take(slice(bounds[2], bounds[3]))
    maps.set(node.outputs[0], {2: forget(value, maps)})


def _nothing(maps: AxisMaps, count: int) -> tuple[Ints, Any]:
    return maps.signals.new(count), np.ones(count)


@register("Attention")
def attention(node: Node, maps: AxisMaps) -> None:
    """Q, K, V [B, H, S, D], or [B, S, H D] with the numbers of heads as attributes; masks [.., 1, S, S]."""
    if not maps.tracks(node):
        return
    mask: Any = node.inputs[3] if len(node.inputs) > 3 else None
    plain = mask is None or mask.is_empty() or (mask.shape is not None and (len(mask.shape) < 3 or mask.shape[-3] == 1))
    if maps.rank(node.inputs[0]) not in (3, 4) or _extra(node, 4) or not plain:
        _freeze(node, maps, "Attention with a past, a mask of each head or operands of unknown rank")
        return
    if mask is not None and not is_constant(mask):
        maps.freeze(mask, label(node), "it masks the scores")
    if maps.rank(node.inputs[0]) == 3:
        _flat_attention(node, maps)
    else:
        _headed_attention(node, maps)


def _flat_attention(node: Node, maps: AxisMaps) -> None:
    known = [axis for tensor in node.inputs[:3] if (axis := maps.of(tensor).get(2)) is not None]
    if len(known) < 3:
        _freeze(node, maps, "Attention with an operand that can't be cut")
        return
    shared = int(node.attrs["kv_num_heads"])
    heads = [int(node.attrs["q_num_heads"]), shared, shared]
    parts = [axis.channels for axis in known]
    still = [np.zeros(len(part)) for part in parts[:2]]
    _tie_operands(node, maps, parts, heads, _dead(known[0], known[1], heads, still))
    _rewrite_heads(node, maps, parts[0], heads[0], "q_num_heads")
    _rewrite_heads(node, maps, parts[1], heads[1], "kv_num_heads")
    value = known[2]
    result = forget(value, maps)
    # query heads share value heads: each head of the output has the dims of its value head
    places = np.arange(len(value)).reshape(shared, -1).repeat(heads[0] // shared, axis=0).reshape(-1)
    repeated = result.take(places)
    maps.set(node.outputs[0], {2: repeated.known(maps.signals.new(len(places)), np.where(repeated.zero, 0.0, 1.0))})


def _headed_attention(node: Node, maps: AxisMaps) -> None:
    query, key, value = (maps.of(tensor) for tensor in node.inputs[:3])
    result: dict[int, Axis] = {}
    heads = [axes.get(1) for axes in (query, key, value)]
    found = [axis for axis in heads if axis is not None]
    if len(found) == 3 and len({len(axis) for axis in found}) == 1:
        for axis in found[1:]:
            maps.channels.tie(found[0].channels, axis.channels)
        result[1] = forget(found[0], maps)
    else:
        for axis in found:
            maps.freeze_axis(axis, label(node), "Attention pairs it with heads that can't be cut")
    dims = query.get(3), key.get(3)
    if dims[0] is not None and dims[1] is not None:
        size = len(dims[0])
        maps.channels.tie(dims[0].channels, dims[1].channels)
        needed = ~(dims[0].zero | dims[1].zero)
        maps.products.append(Product(dims[0].channels, needed, node, ((0, 3), (1, 3))))
        maps.on_cut(lambda _keep: _write_scale(node, size), dims[0].channels)
    else:
        for dim in dims:
            if dim is not None:
                maps.freeze_axis(dim, label(node), "Attention multiplies it with an axis that can't be cut")
    if 3 in value:
        result[3] = forget(value[3], maps)
    maps.set(node.outputs[0], result)
