"""Lengths that onnx's shape inference leaves open although they follow from the graph.

Exporters compute target shapes at run time, `Concat(batch, tokens, -1, 32)` or `Where(dims == -1, 1, dims)`: inference
then knows the rank at most. Here such vectors are evaluated entry by entry as far as they are constant, and the -1 of a
Reshape is what its other lengths leave. What weights multiply has as many elements as they have rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from onnx import GraphProto, NodeProto, ValueInfoProto, helper, numpy_helper

# a length: a number, a name that stands for one number throughout, or nothing known
Length = int | str | None
Entries = list[int | None]

_MOST_ENTRIES = 16
_DEEPEST = 40


def shape_hints(graph: GraphProto) -> list[ValueInfoProto]:
    """Shapes of tensors that nodes make of which more is certain than `graph` describes."""
    view = _View(graph)
    found: dict[str, ValueInfoProto] = {}
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in _CONTRIBUTED:
            _note(found, view, node.output[0], _CONTRIBUTED[node.op_type](view, node), view.dtypes.get(node.input[0]))
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Loop":
            for name, lengths, kind in _looped(view, node):
                _note(found, view, name, lengths, kind)
        derive = _DERIVED.get(node.op_type)
        if derive is not None:
            same = view.dtypes.get(node.input[0]) if derive is _like_first else None
            _note(found, view, node.output[0], derive(view, node), same)
        asked = _ASKED.get(node.op_type)
        if asked is not None and node.input[0] in view.makers:
            _note(found, view, node.input[0], asked(view, node))
    return list(found.values())


def _note(
    found: dict[str, ValueInfoProto], view: _View, name: str, lengths: list[Length] | None, dtype: int | None = None
) -> None:
    old, kind = view.shapes.get(name), view.dtypes.get(name) or dtype
    if lengths is None or name in found or not kind or (old is not None and len(old) != len(lengths)):
        return
    if old is None or any(isinstance(n, int) and not isinstance(o, int) for n, o in zip(lengths, old, strict=True)):
        # names that inference invented mean something else in its next run
        lasting = [not str(length).startswith("unk__") and (dtype or isinstance(length, int)) for length in lengths]
        dims = [length if keeps else None for length, keeps in zip(lengths, lasting, strict=True)]
        found[name] = helper.make_tensor_value_info(name, kind, dims)


class _View:
    """What a graph says of its tensors' shapes and, for short vectors of integers, values."""

    def __init__(self, graph: GraphProto) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes: dict[str, list[Length]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self.dtypes: dict[str, int] = {}
        for info in (*graph.input, *graph.value_info, *graph.output):
            kind = info.type.tensor_type
            self.dtypes[info.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[info.name] = [_length(dim) for dim in kind.shape.dim]
        self._entries: dict[str, Entries | None] = {}

    def entries(self, name: str, depth: int = 0) -> Entries | None:
        """The entries of a vector or scalar of integers or booleans, None for those not known; None if no such."""
        if name not in self._entries:
            self._entries[name] = self._find(name, depth) if depth < _DEEPEST else None
        return self._entries[name]

    def _find(self, name: str, depth: int) -> Entries | None:
        if name in self.constants:
            return _values(self.constants[name])
        node = self.makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return self._unknown(name)
        if node.op_type == "Constant":
            tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            return _values(tensors[0]) if tensors else self._unknown(name)
        if node.op_type == "Shape":
            shape = self.shapes.get(node.input[0])
            whole = shape is not None and not node.attribute and len(shape) <= _MOST_ENTRIES
            return [d if isinstance(d, int) else None for d in shape] if whole and shape is not None else None
        parts = [self.entries(given, depth + 1) if given else None for given in node.input]
        rule = _ENTRYWISE.get(node.op_type)
        result = rule(node, parts) if rule is not None else None
        return result if result is not None else self._unknown(name)

    def _unknown(self, name: str) -> Entries | None:
        """As many unknown entries as the tensor has, where that is known."""
        shape = self.shapes.get(name)
        if shape == []:
            return [None]
        if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > _MOST_ENTRIES:
            return None
        return [None] * shape[0]


def _length(dim: Any) -> Length:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return str(dim.dim_param) or None


def _values(tensor: Any) -> Entries | None:
    count = prod(tensor.dims)
    if len(tensor.dims) > 1 or count > _MOST_ENTRIES or tensor.external_data or tensor.data_type not in (6, 7, 9):
        return None
    return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


def _concat(_node: NodeProto, parts: list[Entries | None]) -> Entries | None:
    joined: Entries = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined


def _gather(_node: NodeProto, parts: list[Entries | None]) -> Entries | None:
    data, picked = parts[:2]
    if data is None or picked is None:
        return None
    inside = [at is not None and -len(data) <= at < len(data) for at in picked]
    return [data[at] if ok and at is not None else None for at, ok in zip(picked, inside, strict=True)]


def _slice(_node: NodeProto, parts: list[Entries | None]) -> Entries | None:
    data, bounds = parts[0], parts[1:3]
    step = parts[4] if len(parts) > 4 else [1]
    if data is None or len(bounds) < 2 or any(b is None or len(b) != 1 or b[0] is None for b in (*bounds, step)):
        return None
    begin, end, by = ((part or [None])[0] for part in (*bounds, step))
    return data[begin:end:by]


def _same(_node: NodeProto, parts: list[Entries | None]) -> Entries | None:
    return parts[0]


def _fill(node: NodeProto, parts: list[Entries | None]) -> Entries | None:
    if parts[0] is None or len(parts[0]) != 1 or not isinstance(parts[0][0], int) or parts[0][0] > _MOST_ENTRIES:
        return None
    zero: Entries = [0]
    value = next((_values(attribute.t) for attribute in node.attribute if attribute.name == "value"), zero)
    return value * parts[0][0] if value else None


def _pointwise(function: Callable[..., int | None]) -> Callable[[NodeProto, list[Entries | None]], Entries | None]:
    def apply(_node: NodeProto, parts: list[Entries | None]) -> Entries | None:
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        count = max(len(part) for part in known)
        if any(len(part) not in (1, count) for part in known):
            return None
        columns = [part * count if len(part) == 1 else part for part in known]
        return [function(*row) for row in zip(*columns, strict=True)]

    return apply


def _where(chosen: int | None, one: int | None, other: int | None) -> int | None:
    if chosen is None:
        return one if one == other else None
    return one if chosen else other


def _both(function: Callable[[int, int], int]) -> Callable[[int | None, int | None], int | None]:
    return lambda one, other: None if one is None or other is None else function(one, other)


_ENTRYWISE: dict[str, Callable[[NodeProto, list[Entries | None]], Entries | None]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "ConstantOfShape": _fill,
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Identity", "Reshape", "Cast"), _same),
    "Where": _pointwise(_where),
    "Equal": _pointwise(_both(lambda one, other: int(one == other))),
    "Add": _pointwise(_both(lambda one, other: one + other)),
    "Sub": _pointwise(_both(lambda one, other: one - other)),
    "Mul": _pointwise(_both(lambda one, other: one * other)),
}


def _reshaped(view: _View, node: NodeProto) -> list[Length] | None:
    """The target's numbers; its -1 where all other lengths of the output stand among the input's."""
    entries = view.entries(node.input[1])
    if entries is None:
        return None
    copies = not any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
    before, after = view.shapes.get(node.input[0]), view.shapes.get(node.output[0])
    lengths: list[Length] = []
    for at, entry in enumerate(entries):
        described = after[at] if after is not None and len(after) == len(entries) else None
        if entry is not None and entry > 0:
            lengths.append(entry)
        elif entry == 0 and copies and before is not None and at < len(before):
            lengths.append(before[at])
        else:
            lengths.append(described)
    missing = [at for at, entry in enumerate(entries) if entry == -1 and not isinstance(lengths[at], int)]
    if before is None or len(missing) != 1 or None in before:
        return lengths
    rest = [length for at, length in enumerate(lengths) if at != missing[0]]
    left = Counter(length for length in before if isinstance(length, str))
    asked = Counter(length for length in rest if isinstance(length, str))
    if None in rest or left != asked:
        return lengths
    total, known = (prod(length for length in part if isinstance(length, int)) for part in (before, rest))
    if known and total % known == 0:
        lengths[missing[0]] = total // known
    return lengths


def _expanded(view: _View, node: NodeProto) -> list[Length] | None:
    """Numbers above 1 of the target, and lengths of the data where the target asks for no more."""
    entries, shape = view.entries(node.input[1]), view.shapes.get(node.input[0])
    if entries is None or shape is None:
        return None
    rank = max(len(entries), len(shape))
    own: list[Length] = [*[1] * (rank - len(shape)), *shape]
    asked: Entries = [*[1] * (rank - len(entries)), *entries]
    return [_broadcast(length, entry) for length, entry in zip(own, asked, strict=True)]


def _broadcast(length: Length, entry: int | None) -> Length:
    if entry == 1:
        return length
    if entry is not None and entry > 1:
        return entry
    return length if isinstance(length, int) and length > 1 else None


def _filled(view: _View, node: NodeProto) -> list[Length] | None:
    entries = view.entries(node.input[0])
    return None if entries is None else [entry if entry is not None and entry >= 0 else None for entry in entries]


def _like_first(view: _View, node: NodeProto) -> list[Length] | None:
    return view.shapes.get(node.input[0])


_DERIVED: dict[str, Callable[[_View, NodeProto], list[Length] | None]] = {
    # functions, which onnx infers by their bodies when it can; the runtime writes LayerNormalization into any opset
    **dict.fromkeys(
        (
            "GroupNormalization",
            "LayerNormalization",
            "MeanVarianceNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
        ),
        _like_first,
    ),
    "Reshape": _reshaped,
    "Expand": _expanded,
    "ConstantOfShape": _filled,
}


def _multiplied(view: _View, node: NodeProto) -> list[Length] | None:
    """MatMul with a matrix of weights: the last axis has as many elements as it has rows."""
    shape, weights = view.shapes.get(node.input[0]), view.constants.get(node.input[1])
    if not shape or weights is None or len(weights.dims) != 2:
        return None
    return [*shape[:-1], weights.dims[0]]


def _convolved(view: _View, node: NodeProto) -> list[Length] | None:
    """Conv: each group of channels has as many as its filters."""
    shape, weights = view.shapes.get(node.input[0]), view.constants.get(node.input[1])
    if not shape or len(shape) < 3 or weights is None:
        return None
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return [shape[0], weights.dims[1] * groups, *shape[2:]]


def _scaled(view: _View, node: NodeProto) -> list[Length] | None:
    """LayerNormalization over the last axis: as many elements as factors."""
    shape, factors = view.shapes.get(node.input[0]), view.constants.get(node.input[1])
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
    if (
        not shape
        or factors is None
        or len(factors.dims) != 1
        or factors.dims[0] < 2
        or axis not in (-1, len(shape) - 1)
    ):
        return None
    return [*shape[:-1], factors.dims[0]]


_ASKED: dict[str, Callable[[_View, NodeProto], list[Length] | None]] = {
    "Conv": _convolved,
    "LayerNormalization": _scaled,
    "MatMul": _multiplied,
}


def _mixed_values(view: _View, node: NodeProto) -> list[Length] | None:
    """MultiHeadAttention: as many tokens as queries, each as wide as a value."""
    shapes = [view.shapes.get(name) for name in (*node.input[:3], "", "")[:3]]
    query, value = shapes[0], shapes[2]
    return [*query[:2], value[2]] if query and value and len(query) == len(value) == 3 else None


def _mixed_projections(view: _View, node: NodeProto) -> list[Length] | None:
    """Attention with weights [K, 3 H D]: the last third of their columns, unless it says otherwise."""
    data, weights = view.shapes.get(node.input[0]), view.shapes.get(node.input[1])
    sizes = next((attribute.ints for attribute in node.attribute if attribute.name == "qkv_hidden_sizes"), None)
    if data is None or len(data) != 3 or weights is None or not isinstance(weights[-1], int):
        return None
    return [*data[:2], sizes[2] if sizes else weights[-1] // 3]


def _filtered(view: _View, node: NodeProto) -> list[Length] | None:
    data, weights = view.shapes.get(node.input[0]), view.shapes.get(node.input[1])
    return None if data is None or weights is None else [data[0], weights[0], *[None] * (len(data) - 2)]


def _product(view: _View, node: NodeProto) -> list[Length] | None:
    """FusedMatMul: a batch of matrices, either transposed first."""
    left, right = view.shapes.get(node.input[0]), view.shapes.get(node.input[1])
    flags = {attribute.name for attribute in node.attribute if attribute.name.startswith("trans") and attribute.i}
    if left is None or right is None or min(len(left), len(right)) < 2 or flags - {"transA", "transB"}:
        return None
    rank = max(len(left), len(right))
    one, other = ([*[1] * (rank - len(shape)), *shape] for shape in (left, right))
    batch = [a if b in (1, a) else b if a == 1 else None for a, b in zip(one[:-2], other[:-2], strict=True)]
    return [*batch, one[-1] if "transA" in flags else one[-2], other[-2] if "transB" in flags else other[-1]]


# Operators of the runtime, of which onnx's inference knows nothing.
_CONTRIBUTED: dict[str, Callable[[_View, NodeProto], list[Length] | None]] = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization"), _like_first),
    "Attention": _mixed_projections,
    "FusedConv": _filtered,
    "FusedMatMul": _product,
    "MultiHeadAttention": _mixed_values,
}


def _looped(view: _View, node: NodeProto) -> Iterator[tuple[str, list[Length], int]]:
    """(output, its lengths, element type) of a Loop: states as the body leaves them, sequences with steps in front."""
    body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    states = len(node.input) - 2
    for at, name in enumerate(node.output):
        left = body.output[at + 1].type.tensor_type
        if not name or not left.HasField("shape"):
            continue
        lengths = [_length(dim) for dim in left.shape.dim]
        if at >= states:
            yield name, [None, *lengths], left.elem_type
            continue
        entered = body.input[at + 2].type.tensor_type
        start = view.shapes.get(node.input[at + 2])
        before = [_length(dim) for dim in entered.shape.dim] if entered.HasField("shape") else start
        if start is not None and before is not None and len(start) == len(before) == len(lengths):
            rows = zip(start, before, lengths, strict=True)
            yield (
                name,
                [one if isinstance(one, int) and one == two == new else None for one, two, new in rows],
                (left.elem_type),
            )
