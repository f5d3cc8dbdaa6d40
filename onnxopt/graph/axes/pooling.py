"""Rules of operators that work within each channel: pooling, resizing, per-channel and per-token reductions."""

from __future__ import annotations

from onnxopt.graph.axes.axis import Axis
from onnxopt.graph.axes.maps import AxisMaps, is_constant, numbers, register
from onnxopt.graph.axes.normalization import only_over
from onnxopt.graph.axes.targets import Entry, entries, follow
from onnxopt.graph.edit import label
from onnxopt.model import Node


@register("MaxPool", "GlobalMaxPool")
def max_pool(node: Node, maps: AxisMaps) -> None:
    """Keeps constants (padding is minus infinity) and positive factors."""
    axes = maps.of(node.inputs[0])
    if axes and maps.second_output(node):
        maps.freeze_node(node, f"the indices of {node.op} count over all channels")
        return
    maps.set(node.outputs[0], {axis: maps.positive(found) for axis, found in _only(axes, maps, node).items()})


@register("AveragePool", "GlobalAveragePool", "LpPool", "GlobalLpPool")
def average_pool(node: Node, maps: AxisMaps) -> None:
    """Linear; a constant stays one unless zeros of the padding are averaged in."""
    axes = _only(maps.of(node.inputs[0]), maps, node)
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if "Lp" in node.op:
        maps.set(node.outputs[0], {axis: maps.arbitrary(found) for axis, found in axes.items()})
        return
    keeps = not (padded and node.attrs.get("count_include_pad", 0)) and not node.attrs.get("ceil_mode", 0)
    maps.set(node.outputs[0], {axis: maps.linear(found, keeps) for axis, found in axes.items()})


def _only(axes: dict[int, Axis], maps: AxisMaps, node: Node) -> dict[int, Axis]:
    """Batch and channel axes pass; a tracked spatial axis is mixed by the window."""
    for axis, found in axes.items():
        if axis > 1:
            maps.freeze_axis(found, label(node), f"{node.op} mixes it")
    return {axis: found for axis, found in axes.items() if axis <= 1}


@register("Resize", "Upsample")
def resize(node: Node, maps: AxisMaps) -> None:
    """Interpolates along axes with a scale other than 1; target sizes of cut axes follow."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    kept = None if rank is None else _unscaled(node, maps, rank)
    if kept is None:
        maps.freeze_node(node, f"scales of {node.op} are not known before the run")
        return
    result: dict[int, Axis] = {}
    plain = node.attrs.get("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    for axis, found in axes.items():
        if axis not in kept:
            maps.freeze_axis(found, label(node), f"{node.op} interpolates along it")
            continue
        # outside the region that mode fills in a value of its own, which a zero channel takes too
        result[axis] = maps.linear(found, True) if plain else maps.arbitrary(found)
        entry = kept[axis]
        if entry is not None:
            follow(maps, node, entry, found.channels)
    maps.set(node.outputs[0], result)


def _unscaled(node: Node, maps: AxisMaps, rank: int) -> dict[int, Entry | None] | None:
    """The axes that keep their length, with the target size to rewrite where there is one; None when not known."""
    given = [int(axis) % rank for axis in node.attrs.get("axes", range(rank))]
    kept: dict[int, Entry | None] = dict.fromkeys(set(range(rank)) - set(given))
    scales = _scales(node, maps)
    if scales is not None:
        if len(scales) != len(given):
            return None
        return {**kept, **{axis: None for axis, scale in zip(given, scales, strict=True) if scale == 1}}
    sizes = entries(node, 3)
    policy = str(node.attrs.get("keep_aspect_ratio_policy", "stretch"))
    if sizes is None or len(sizes) != len(given) or policy != "stretch":
        return None
    shape = node.inputs[0].shape
    for axis, entry in zip(given, sizes, strict=True):
        tracked = maps.of(node.inputs[0]).get(axis)
        if entry.value is not None and entry.value == (len(tracked) if tracked is not None else shape[axis]):
            kept[axis] = entry
    return kept


def _scales(node: Node, maps: AxisMaps) -> list[float] | None:
    """Constant scales of the axes that are named, None where sizes are given or nothing is constant."""
    if "scales" in node.attrs:
        return [float(value) for value in node.attrs["scales"]]
    index = 1 if node.op == "Upsample" or maps.model.opset < 11 else 2
    if index >= len(node.inputs) or not is_constant(node.inputs[index]) or not node.inputs[index].data.size:
        return None
    return [float(value) for value in node.inputs[index].values.reshape(-1)]


@register(
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceProd",
    "ReduceLogSum",
    "ReduceLogSumExp",
)
def reduce(node: Node, maps: AxisMaps) -> None:
    """Over other axes each channel is reduced by itself; over the tracked axis the channels are mixed."""
    axes = maps.of(node.inputs[0])
    if not axes:
        return
    rank = maps.rank(node.inputs[0])
    given = node.attrs.get("axes") if "axes" in node.attrs else numbers(node.inputs, 1)
    if rank is None or (given is None and len(node.inputs) > 1 and not node.inputs[1].is_empty()):
        maps.freeze_node(node, f"axes of {node.op} are not known before the run")
        return
    everything = not node.attrs.get("noop_with_empty_axes", 0)
    reduced = {int(axis) % rank for axis in given} if given else set(range(rank)) if everything else set()
    keepdims = bool(node.attrs.get("keepdims", 1))
    result: dict[int, Axis] = {}
    for axis, found in axes.items():
        if axis in reduced:
            maps.freeze_axis(found, label(node), f"{node.op} mixes it")
            continue
        place = axis if keepdims else axis - sum(other < axis for other in reduced)
        result[place] = maps.linear(found, True) if node.op == "ReduceMean" else maps.arbitrary(found)
        if node.op == "ReduceSum":
            result[place] = maps.linear(found, False)
    maps.set(node.outputs[0], result)


@register("ArgMax", "ArgMin")
def arg_max(node: Node, maps: AxisMaps) -> None:
    """Which position of one axis is the largest, for every position of the others."""
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, f"rank of the input of {node.op} is unknown")
        return
    at = int(node.attrs.get("axis", 0)) % rank
    only_over(node, maps, {at}, "counts along it")
    if not node.attrs.get("keepdims", 1):
        axes = maps.of(node.outputs[0])
        maps.set(node.outputs[0], {axis - (axis > at): found for axis, found in axes.items()})


@register("TopK")
def top_k(node: Node, maps: AxisMaps) -> None:
    """The largest along one axis, for every position of the others."""
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, "rank of the input of TopK is unknown")
        return
    only_over(node, maps, {int(node.attrs.get("axis", -1)) % rank}, "counts along it")
    for tensor in node.outputs[1:]:
        maps.set(tensor, {axis: maps.arbitrary(found) for axis, found in maps.of(node.outputs[0]).items()})


@register("CumSum")
def cumulated(node: Node, maps: AxisMaps) -> None:
    """Sums up along one axis."""
    rank, at = maps.rank(node.inputs[0]), numbers(node.inputs, 1)
    if rank is None or at is None:
        maps.freeze_node(node, "the axis of CumSum is not constant")
        return
    only_over(node, maps, {at[0] % rank}, "sums along it")


@register("Trilu")
def triangle(node: Node, maps: AxisMaps) -> None:
    """Zeroes a triangle of the last two axes."""
    rank = maps.rank(node.inputs[0])
    if rank is None:
        maps.freeze_node(node, "rank of the input of Trilu is unknown")
        return
    only_over(node, maps, {rank - 2, rank - 1}, "treats its positions differently")
