"""One model looked at: sizes, signature, operators, weights, multiply-accumulates, and what passes could win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxopt.encoding import parameters
from onnxopt.errors import UsageError
from onnxopt.graph import infer
from onnxopt.graph.input_shapes import with_input_shapes
from onnxopt.graph.macs import LAYERS, layer_macs, static_shape
from onnxopt.inspection.estimates import estimates
from onnxopt.inspection.record import (
    ElementType,
    Inspection,
    LargeTensor,
    MacFacts,
    Sidecar,
    TensorFacts,
)
from onnxopt.inspection.trials import folded
from onnxopt.inspection.weights import Values, distinct_contents, look_at
from onnxopt.model import Constant, Model, Node, TensorData
from onnxopt.model import files as model_files

_LARGEST = 10


def inspect_model(model: Model, path: Path | None = None, refused: str = "") -> Inspection:
    """Everything about one model. path: its file, of which `model` is the content. `model` is left alone.

    refused: why the runtime can't load it; then nothing is inferred and no pass is tried.
    """
    copy = model.clone().model
    if not refused:
        infer(copy)
    values = look_at(copy)
    sidecars = tuple(_sidecars(model, path)) if path is not None else ()
    return Inspection(
        path=str(path) if path is not None else None,
        file_bytes=_file_bytes(model, path) + sum(each.bytes for each in sidecars),
        sidecars=sidecars,
        producer=f"{model.carrier.producer_name} {model.carrier.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets=dict(sorted(model.opset_imports.items())),
        inputs=tuple(_ends(model, model.graph.inputs)),
        outputs=tuple(_ends(model, model.graph.outputs)),
        nodes=model.node_count(),
        bodies=sum(body.parent is not None for body in model.bodies()),
        functions=len(model.functions),
        operators=_operators(model),
        parameters=parameters(model),
        weight_bytes=model.nbytes(),
        element_types=_element_types(model),
        largest=_largest(copy, values),
        macs=_macs(copy, trials=not refused),
        estimates=tuple(estimates(copy, values, trials=not refused)),
        metadata=model.metadata,
        notes=tuple(_notes(model, refused)),
    )


def _file_bytes(model: Model, path: Path | None) -> int:
    if path is not None:
        return path.stat().st_size
    if model.nbytes() <= model_files.INLINE_LIMIT:
        return int(model.to_proto().ByteSize())
    return int(model.skeleton()[0].ByteSize()) + model.nbytes()


def _sidecars(model: Model, path: Path) -> Iterator[Sidecar]:
    """Files beside the model and what of them no tensor reads, gaps for alignment included."""
    read: dict[str, list[tuple[int, int]]] = {}
    for data in _stored(model):
        place = data.place(path.parent)
        if place is not None:
            read.setdefault(place[0], []).append((place[1], place[1] + place[2]))
    for name, stretches in sorted(read.items()):
        size = (path.parent / name).stat().st_size
        yield Sidecar(name, size, size - _covered(stretches))


def _covered(stretches: list[tuple[int, int]]) -> int:
    total = end = 0
    for start, stop in sorted(stretches):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _stored(model: Model) -> Iterator[TensorData]:
    yield from (constant.data for constant in model.constants())
    yield from (data for body in model.bodies() for _, data, _ in body.defaults)


def _ends(model: Model, tensors: Any) -> Iterator[TensorFacts]:
    defaults = {id(tensor) for tensor, _, _ in model.graph.defaults}
    for tensor in tensors:
        infos = model.graph.output_infos.get(tensor.name, [getattr(tensor, "info", None)])
        kind = infos[0].type.WhichOneof("value") if infos[0] is not None else None
        dtype = tensor.dtype.name if tensor.dtype is not None else kind or ""
        dims = None if tensor.shape is None else tuple(tensor.shape)
        yield TensorFacts(tensor.name, "string" if dtype == "object" else dtype, dims, id(tensor) in defaults)


def operator_name(node: Node) -> str:
    """The operator's type, with its domain in front where that is not the default one."""
    domain, op = node.kind
    return f"{domain}.{op}" if domain else op


def _operators(model: Model) -> dict[str, int]:
    found = Counter(operator_name(node) for body in model.bodies() for node in body.nodes)
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def _element_types(model: Model) -> tuple[ElementType, ...]:
    found: dict[str, list[TensorData]] = {}
    for data in _stored(model):
        name = "string" if data.dtype.kind == "O" else data.dtype.name
        found.setdefault(f"{name}, sparse" if data.sparse is not None else name, []).append(data)
    rows = [
        ElementType(name, len(group), sum(data.size for data in group), sum(data.stored_nbytes for data in group))
        for name, group in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.dtype)))


def _largest(model: Model, values: dict[int, Values]) -> tuple[LargeTensor, ...]:
    contents = sorted(distinct_contents(model).values(), key=lambda entry: -entry[1].stored_nbytes)
    return tuple(_large(constant, data, values.get(data.uid)) for constant, data in contents[:_LARGEST])


def _large(constant: Constant, data: TensorData, seen: Values | None) -> LargeTensor:
    dtype = "string" if data.dtype.kind == "O" else data.dtype.name
    zeros = None if seen is None else seen.zeros / seen.elements
    distinct = seen.distinct if seen is not None and seen.whole else None
    return LargeTensor(constant.name, dtype, data.shape, data.stored_nbytes, zeros, distinct)


def _macs(model: Model, trials: bool) -> MacFacts:
    layers = _layers(model)
    counts = [_count(node) for node in layers]
    unknown = sum(count is None for count in counts)
    found = sum(count or 0 for count in counts)
    if not unknown:
        return MacFacts(found, len(layers), 0)
    lengths = {
        (dim if isinstance(dim, str) and dim != "?" else f"{tensor.name}[{at}]"): None
        for tensor in model.graph.inputs
        for at, dim in enumerate(tensor.shape or ())
        if not isinstance(dim, int)
    }
    total = _total_with_ones(model) if trials else None
    if not lengths and total is not None:
        return MacFacts(total, len(layers), 0)
    return MacFacts(found, len(layers), unknown, total, tuple(lengths))


def _layers(model: Model) -> list[Node]:
    bodies = [body for body in model.bodies() if body.function is None]
    return [node for body in bodies for node in body.nodes if node.op in LAYERS and node.kind[0] == ""]


def _total_with_ones(model: Model) -> int | None:
    """Of all layers, with every open length of the inputs as 1 and what then is constant computed; None: not known."""
    defaults = {id(tensor) for tensor, _, _ in model.graph.defaults}
    ones = {
        tensor.name: [dim if isinstance(dim, int) else 1 for dim in tensor.shape]
        for tensor in model.graph.inputs
        if tensor.shape is not None and tensor.dtype is not None and id(tensor) not in defaults
    }
    try:
        fixed = folded(with_input_shapes(model, ones))
    except UsageError:
        return None
    if fixed is None:
        return None
    infer(fixed)
    counts = [_count(node) for node in _layers(fixed)]
    return None if any(count is None for count in counts) else sum(count or 0 for count in counts)


def _count(node: Node) -> int | None:
    """None for shapes that contradict each other too: an inspected model need not be right."""
    try:
        return layer_macs(node, static_shape)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError):
        return None


def _notes(model: Model, refused: str) -> Iterator[str]:
    if refused:
        yield f"no pass was tried and no shape inferred: {refused}"
    if any(node.op in ("Loop", "Scan") and node.kind[0] == "" for body in model.bodies() for node in body.nodes):
        yield "bodies of Loop and Scan count once, however often they run"
    if model.functions:
        yield "multiply-accumulates within local functions are not counted"
