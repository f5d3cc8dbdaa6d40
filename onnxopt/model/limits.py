"""What a model may ask for, counted on the parsed file before memory is taken for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from onnxopt.errors import LimitError, ModelError, UsageError, did_you_mean
from onnxopt.model import stored
from onnxopt.model.importer import is_constant

# protobuf refuses messages nested deeper than 100; a body within a body takes three levels
DEEPEST = 31
# what is computed may be this many times as large as what the model holds and is given
AMPLIFICATION = 64
_MANY = 1 << 62
_VERSIONS = range(1 << 31)
_OFF = "if you trust the model, repeat with --limits off"

FunctionKey: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True)
class Limits:
    """Limits on a model that may come from anybody; None is no limit.

    tensor_bytes, total_bytes: bytes of one stored tensor and of all, sub-byte types packed. nodes: of all bodies, every
    call of a local function counted as the nodes it stands for. depth: bodies within bodies. functions: of the model.
    computed_bytes: bytes of one tensor that the graph computes or is given, or that a sparse tensor fills, as far as
    shapes tell; larger ones are accepted up to 64 times the bytes the model holds and is given. memory_bytes, seconds:
    of the process in which onnxruntime meets the model first; larger models are allowed more.
    """

    name: str
    tensor_bytes: int | None
    total_bytes: int | None
    nodes: int | None
    depth: int
    functions: int | None
    computed_bytes: int | None
    memory_bytes: int | None
    seconds: float | None

    @classmethod
    def of(cls, limits: LimitsLike) -> Limits:
        """The limits of that name. Raises UsageError for an unknown one."""
        if isinstance(limits, Limits):
            return limits
        if limits not in PRESETS:
            raise UsageError(f"unknown limits {limits!r}", did_you_mean(str(limits), PRESETS))
        return PRESETS[limits]

    def computed(self, held: int) -> int | None:
        """Bytes that one computed tensor may have in a model that holds, and is given, `held` bytes."""
        return None if self.computed_bytes is None else max(self.computed_bytes, AMPLIFICATION * held)


LimitsLike: TypeAlias = str | Limits

DEFAULT = Limits(
    name="default",
    tensor_bytes=64 << 30,
    total_bytes=256 << 30,
    nodes=5_000_000,
    depth=DEEPEST,
    functions=10_000,
    computed_bytes=512 << 20,
    memory_bytes=1536 << 20,
    seconds=40.0,
)
STRICT = Limits(
    name="strict",
    tensor_bytes=1 << 30,
    total_bytes=2 << 30,
    nodes=100_000,
    depth=8,
    functions=1_000,
    computed_bytes=128 << 20,
    memory_bytes=1 << 30,
    seconds=15.0,
)
OFF = Limits("off", None, None, None, DEEPEST, None, None, None, None)
PRESETS = {limits.name: limits for limits in (DEFAULT, STRICT, OFF)}


@dataclass
class _Root:
    """A graph or function: its own nodes, bodies within included, and how often it calls each function."""

    where: str
    # whether its weights may lie in other files
    external: bool
    nodes: int = 0
    calls: Counter[FunctionKey] = field(default_factory=Counter)


def check_limits(proto: ModelProto, limits: Limits) -> None:
    """Refuse a model that contradicts itself or asks for more than `limits` allow; takes time by nodes and tensors.

    Raises ModelError for versions, dims and values that make no sense, for functions that call each other in a circle
    and for values in other files where none may be; LimitError for sizes, counts and depth.
    """
    _check_versions(proto)
    _at_most(len(proto.functions), limits.functions, "the model", "local functions")
    functions = {(_domain(item.domain), item.name, item.overload): item for item in proto.functions}
    roots: dict[Any, _Root] = {}
    total = 0
    for key, body, root in _roots(proto):
        roots[key] = root
        for inner, inside in _bodies(body, root.where, limits.depth):
            total += _check_body(inner, inside, root, functions, limits)
            _at_most(total, limits.total_bytes, "the model", "bytes of tensors")
    _check_nodes(roots, limits)


def _check_versions(proto: ModelProto) -> None:
    imports = [*proto.opset_import, *(entry for function in proto.functions for entry in function.opset_import)]
    for entry in imports:
        if entry.version not in _VERSIONS:
            raise ModelError(
                f"the opset version {entry.version} of domain {entry.domain or 'ai.onnx'!r} makes no sense",
                "export the model again; the file is damaged or made to do harm",
            )
    if proto.ir_version not in _VERSIONS:
        raise ModelError(f"the IR version {proto.ir_version} makes no sense", "export the model again")


def _roots(proto: ModelProto) -> Iterator[tuple[Any, Any, _Root]]:
    """(key, body, what is counted of it) of the main graph, every function, and the graphs of training information."""
    yield "graph", proto.graph, _Root(f"graph {proto.graph.name!r}", external=True)
    for at, function in enumerate(proto.functions):
        key = (_domain(function.domain), function.name, function.overload)
        yield key, function, _Root(f"function {function.name or at!r}", external=True)
    for at, training in enumerate(proto.training_info):
        for part in ("initialization", "algorithm"):
            # nothing reads training information, so nothing would look where its files lie
            yield (at, part), getattr(training, part), _Root(f"the {part} of training_info", external=False)


def _bodies(root: Any, where: str, deepest: int) -> Iterator[tuple[Any, str]]:
    """The body and all bodies within it, each with its name in words."""
    waiting = [(root, where, 0)]
    while waiting:
        body, name, depth = waiting.pop()
        yield body, name
        for node in body.node:
            for attribute in node.attribute:
                for inner in held_graphs(attribute):
                    if depth >= deepest:
                        raise _too_deep(deepest, node)
                    waiting.append(
                        (inner, f"the body {attribute.name!r} of node {node.name or node.op_type!r}", depth + 1)
                    )


def held_graphs(attribute: AttributeProto) -> list[GraphProto]:
    """Every graph in an attribute, whatever its kind says it is."""
    graphs = list(attribute.graphs)
    return [attribute.g, *graphs] if attribute.HasField("g") else graphs


def _too_deep(deepest: int, node: NodeProto) -> LimitError:
    remedy = "flatten the model's control flow; protobuf reads no deeper" if deepest >= DEEPEST else _OFF
    return LimitError(
        f"node {node.name or node.op_type!r} nests bodies more than {deepest} deep, which is the limit", remedy
    )


def _check_body(body: Any, where: str, root: _Root, functions: dict[FunctionKey, Any], limits: Limits) -> int:
    """Bytes of the tensors in one body, without the bodies within; counts its nodes in `root`."""
    total = 0
    _check_names(_names(body), where)
    for tensor in body.initializer if isinstance(body, GraphProto) else ():
        total += _check_tensor(tensor, f"initializer {tensor.name!r} of {where}", limits, external=root.external)
    for sparse in body.sparse_initializer if isinstance(body, GraphProto) else ():
        total += _check_sparse(sparse, f"sparse initializer {sparse.values.name!r} of {where}", limits)
    for node in body.node:
        key = (_domain(node.domain), node.op_type, node.overload)
        if key in functions:
            root.calls[key] += 1
        else:
            root.nodes += 1
        _check_names((node.name, *key, *node.input, *node.output), where)
        for attribute in node.attribute:
            _check_names((attribute.name, attribute.ref_attr_name), where)
            if _may_hold_tensors(attribute):
                total += _check_attribute(node, attribute, where, limits, external=root.external)
    return total


def _names(body: Any) -> Iterator[str | bytes]:
    yield body.name
    if not isinstance(body, GraphProto):
        yield from (body.domain, body.overload, *body.input, *body.output)
        return
    yield from (info.name for infos in (body.input, body.output, body.value_info) for info in infos)
    yield from (tensor.name for tensor in body.initializer)
    yield from (sparse.values.name for sparse in body.sparse_initializer)


def _check_names(names: Iterable[str | bytes], where: str) -> None:
    """protobuf gives a name that is no UTF-8 as bytes, and takes it back from nobody."""
    for name in names:
        if isinstance(name, bytes):
            raise no_text(f"{where}: the name {name[:50]!r}")


def no_text(what: str) -> ModelError:
    """The error for text that is no UTF-8."""
    return ModelError(f"{what} is no UTF-8", "export the model again; the file is damaged or made to do harm")


def _may_hold_tensors(attribute: AttributeProto) -> bool:
    """Whatever the attribute's kind says it is."""
    return bool(
        attribute.HasField("t") or attribute.HasField("sparse_tensor") or attribute.tensors or attribute.sparse_tensors
    )


def _check_attribute(node: NodeProto, attribute: AttributeProto, where: str, limits: Limits, *, external: bool) -> int:
    name = f"attribute {attribute.name!r} of node {node.name or (node.output and node.output[0]) or node.op_type!r}"
    name = f"{name} in {where}"
    total = 0
    if attribute.HasField("t"):
        readable = external and attribute.name == "value" and is_constant(node)
        total += _check_tensor(attribute.t, name, limits, external=readable)
    if attribute.HasField("sparse_tensor"):
        total += _check_sparse(attribute.sparse_tensor, name, limits)
    total += sum(_check_tensor(tensor, name, limits, external=False) for tensor in attribute.tensors)
    total += sum(_check_sparse(sparse, name, limits) for sparse in attribute.sparse_tensors)
    return total


def _check_tensor(tensor: Any, where: str, limits: Limits, *, external: bool) -> int:
    nbytes = stored.check_tensor(tensor, where, external=external)
    _at_most(nbytes, limits.tensor_bytes, where, "bytes")
    return nbytes


def _check_sparse(sparse: Any, where: str, limits: Limits) -> int:
    held, filled = stored.check_sparse(sparse, where)
    _at_most(filled, limits.tensor_bytes, where, "bytes when filled")
    _at_most(filled, limits.computed(held), where, "bytes when filled")
    stored.check_indices(sparse, where)
    return filled


def _check_nodes(roots: dict[Any, _Root], limits: Limits) -> None:
    """Count nodes as if every call were replaced by its function; each function is counted once."""
    counted: dict[Any, int] = {}
    opened: set[Any] = set()
    waiting = list(roots)
    while waiting:
        key = waiting[-1]
        root = roots[key]
        missing = [callee for callee in root.calls if callee not in counted]
        if key in opened and missing:
            raise ModelError(
                f"{root.where} calls itself, directly or through others",
                "ONNX has no recursion: write the repetition as a Loop",
            )
        if missing:
            opened.add(key)
            waiting.extend(missing)
            continue
        inner = sum(times * counted[callee] for callee, times in root.calls.items())
        counted[key] = min(root.nodes + inner, _MANY)
        waiting.pop()
    for key, root in roots.items():
        _at_most(counted[key], limits.nodes, root.where, "nodes once its functions are expanded")


def _at_most(figure: int, limit: int | None, what: str, unit: str) -> None:
    if limit is None or figure <= limit:
        return
    told = f"more than {_MANY:,}" if figure >= _MANY else f"{figure:,}"
    raise LimitError(f"{what} has {told} {unit}; the limit is {limit:,}", _OFF)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def too_deep(what: str) -> ModelError:
    """The error for messages nested deeper than protobuf reads."""
    return ModelError(
        f"{what} is nested deeper than protobuf reads: 100 messages, or {DEEPEST} bodies within bodies",
        "flatten the model's control flow before exporting it",
    )
