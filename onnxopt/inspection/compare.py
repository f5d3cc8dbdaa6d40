"""From two models to how they differ: bodies, nodes, weights, signature, metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxopt.graph.edit import label
from onnxopt.graph.operators import opset_of
from onnxopt.inspection.difference import (
    Difference,
    Edit,
    NodeEdit,
    NodeFacts,
    Totals,
    ValueEdit,
    WeightEdit,
    WeightFacts,
)
from onnxopt.inspection.inspect import operator_name
from onnxopt.inspection.matching import Pairs, match_bodies
from onnxopt.inspection.numbers import attribute_key, captured, explicit
from onnxopt.model import Constant, Function, Graph, Model, Node, TensorData
from onnxopt.model.collection import collection_paused

# elements of two weights that are held against each other at a time
_CHUNK = 1 << 20
# characters of an attribute that are shown
_SHOWN = 60


def compare_models(one: Model, other: Model, paths: tuple[Path | None, Path | None] = (None, None)) -> Difference:
    """How `other` (B, after) differs from `one` (A, before). Neither is changed. Raises ModelError for a cycle.

    Descriptions of inner tensors and doc strings of nodes are not looked at.
    """
    with collection_paused():
        return _compared(one, other, paths)


def _compared(one: Model, other: Model, paths: tuple[Path | None, Path | None]) -> Difference:
    differ = _Differ()
    outside = _ends(one.graph.inputs, other.graph.inputs)
    differ.edits += [*_signature(one, other), *_defaults(one, other)]
    differ.bodies(one.graph, other.graph, outside, "")
    differ.functions(one, other)
    weights = differ.weights(one, other)
    return Difference(
        before=str(paths[0]) if paths[0] is not None else None,
        after=str(paths[1]) if paths[1] is not None else None,
        totals=(_totals(one), _totals(other)),
        equal_nodes=differ.equal,
        equal_weights=weights.equal,
        renamed=differ.renamed + weights.renamed,
        edits=tuple(differ.edits),
        added=tuple(differ.added),
        removed=tuple(differ.removed),
        changed=tuple(differ.changed),
        weights_added=tuple(weights.added),
        weights_removed=tuple(weights.removed),
        weights_changed=tuple(weights.changed),
    )


def _totals(model: Model) -> Totals:
    constants = list(model.constants())
    return Totals(model.node_count(), len(constants), sum(constant.data.stored_nbytes for constant in constants))


def _ends(mine: Sequence[Any], theirs: Sequence[Any]) -> dict[int, Any]:
    """Inputs by name; those without a namesake by their place among these."""
    named = {tensor.name: tensor for tensor in theirs}
    found = {id(tensor): named[tensor.name] for tensor in mine if tensor.name in named}
    known = {tensor.name for tensor in mine}
    rest = [tensor for tensor in mine if tensor.name not in named], [t for t in theirs if t.name not in known]
    if len(rest[0]) == len(rest[1]):
        found.update((id(here), there) for here, there in zip(*rest, strict=True))
    return found


def _signature(one: Model, other: Model) -> Iterator[Edit]:
    for what, sides in (
        ("input", (_described(one, one.graph.inputs), _described(other, other.graph.inputs))),
        ("output", (_described(one, one.graph.outputs), _described(other, other.graph.outputs))),
        ("operator set", tuple(_texts(model.opset_imports) for model in (one, other))),
        ("metadata", (one.metadata, other.metadata)),
        ("model", (_fields(one), _fields(other))),
    ):
        yield from _edits(what, sides[0], sides[1])
    for what in ("inputs", "outputs"):
        names = [[tensor.name for tensor in getattr(model.graph, what)] for model in (one, other)]
        if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
            yield Edit("changed", f"order of {what}", "", ", ".join(names[0]), ", ".join(names[1]))


def _defaults(one: Model, other: Model) -> Iterator[Edit]:
    """Values that inputs have where the caller gives none."""
    sides = [{tensor.name: data for tensor, data, _ in model.graph.defaults} for model in (one, other)]
    for name in [name for name in sides[0] if name in sides[1]]:
        before, after = sides[0][name], sides[1][name]
        alike = _stored_as(before) == _stored_as(after) and before.shape == after.shape
        if not (alike and before.equal_to([after])[0]):
            figures = _figures(before, after)
            told = "" if figures is None else f"differs by at most {figures[1]:.3g}"
            yield Edit("changed", "default value of input", name, "", told)


def _edits(what: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Edit]:
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            yield Edit("removed", what, name, before[name])
        elif name not in before:
            yield Edit("added", what, name, "", after[name])
        elif before[name] != after[name]:
            yield Edit("changed", what, name, before[name], after[name])


def _described(model: Model, tensors: Sequence[Any]) -> dict[str, str]:
    defaults = {id(tensor) for tensor, _, _ in model.graph.defaults}
    return {tensor.name: _kind(model, tensor) + (", default" if id(tensor) in defaults else "") for tensor in tensors}


def _kind(model: Model, tensor: Any) -> str:
    if tensor.dtype is None:
        infos = model.graph.output_infos.get(tensor.name, [getattr(tensor, "info", None)])
        kind = infos[0].type.WhichOneof("value") if infos[0] is not None else None
        return (kind or "of unknown type").removesuffix("_type")
    dims = "" if tensor.shape is None else f"[{','.join('?' if dim is None else str(dim) for dim in tensor.shape)}]"
    return f"{_dtype(tensor.dtype)}{dims}"


def _dtype(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "O" else dtype.name


def _texts(numbers: Mapping[str, int]) -> dict[str, str]:
    return {name or "ai.onnx": str(number) for name, number in numbers.items()}


def _fields(model: Model) -> dict[str, str]:
    carrier = model.carrier
    return {
        "IR version": str(model.ir_version),
        "producer": f"{carrier.producer_name} {carrier.producer_version}".strip(),
        "domain": str(carrier.domain),
        "model version": str(carrier.model_version),
        "doc string": str(carrier.doc_string),
        "graph name": str(model.graph.name),
        "graph doc string": str(model.graph.doc_string or ""),
    }


@dataclass
class _Weights:
    added: list[WeightFacts] = field(default_factory=list)
    removed: list[WeightFacts] = field(default_factory=list)
    changed: list[WeightEdit] = field(default_factory=list)
    equal: int = 0
    renamed: int = 0


@dataclass
class _Differ:
    """Collects differences, body by body."""

    edits: list[Edit] = field(default_factory=list)
    added: list[NodeFacts] = field(default_factory=list)
    removed: list[NodeFacts] = field(default_factory=list)
    changed: list[NodeEdit] = field(default_factory=list)
    equal: int = 0
    renamed: int = 0
    # id(constant of A), id(constant of B) -> both, in the order they were met; None where a body gives one out
    _pairs: dict[tuple[int, int], tuple[Constant, Constant]] = field(default_factory=dict)

    def functions(self, one: Model, other: Model) -> None:
        """Match local functions by domain, name and overload."""
        sides = [{_function_name(function): function for function in model.functions} for model in (one, other)]
        for name in dict.fromkeys([*sides[0], *sides[1]]):
            mine, theirs = sides[0].get(name), sides[1].get(name)
            if mine is not None and theirs is not None:
                outside = {id(here): there for here, there in zip(mine.inputs, theirs.inputs, strict=False)}
                signatures = [f"{len(each.inputs)} inputs, {len(each.outputs)} outputs" for each in (mine, theirs)]
                if signatures[0] != signatures[1]:
                    self.edits.append(Edit("changed", "function", name, *signatures))
                imports = [
                    {(e.domain or "ai.onnx"): str(e.version) for e in f.import_domains or []} for f in (mine, theirs)
                ]
                self.edits += _edits(f"operator set of function {name}", *imports)
                self.bodies(mine, theirs, outside, f"function {name}")
            elif mine is not None:
                self.edits.append(Edit("removed", "function", name, f"{len(mine.nodes)} nodes"))
                self._whole(mine, self.removed, f"function {name}")
            elif theirs is not None:
                self.edits.append(Edit("added", "function", name, "", f"{len(theirs.nodes)} nodes"))
                self._whole(theirs, self.added, f"function {name}")

    def bodies(self, one: Graph, other: Graph, outside: Mapping[int, Any], where: str) -> None:
        """Match two bodies and note how they differ; then the bodies within matched nodes."""
        pairs = match_bodies(one, other, outside)
        opsets = opset_of(one), opset_of(other)
        for node in one.nodes:
            twin = pairs.nodes.get(id(node))
            if twin is None:
                self.removed.append(_node_facts(node, where))
                self._inner(node, self.removed, where)
            else:
                self._node(node, twin, pairs, opsets, where)
        for node in other.nodes:
            if id(node) not in pairs.taken:
                self.added.append(_node_facts(node, where))
                self._inner(node, self.added, where)
        self._outputs(one, other, pairs, where)

    def _inner(self, node: Node, into: list[NodeFacts], where: str) -> None:
        for name, body in _bodies(node):
            self._whole(body, into, _place(where, node, name))

    def _whole(self, body: Graph, into: list[NodeFacts], where: str) -> None:
        for node in body.nodes:
            into.append(_node_facts(node, where))
            self._inner(node, into, where)

    def _node(self, node: Node, twin: Node, pairs: Pairs, opsets: tuple[int, int], where: str) -> None:
        attributes = tuple(_attribute_edits(node, twin, opsets))
        inputs = tuple(self._input_edits(node, twin, pairs))
        outputs = tuple(_output_edits(node, twin))
        renamed = node.name != twin.name or any(
            mine.name != theirs.name for mine, theirs in zip(node.outputs, twin.outputs, strict=False)
        )
        self.renamed += renamed
        if attributes or inputs or outputs:
            after = label(twin) if label(twin) != label(node) else ""
            self.changed.append(NodeEdit(label(node), operator_name(node), where, after, attributes, inputs, outputs))
        else:
            self.equal += 1
        theirs = dict(_bodies(twin))
        for name, body in _bodies(node):
            if name in theirs:
                outside = {id(t): pairs.tensors[id(t)] for t in captured(body) if id(t) in pairs.tensors}
                outside.update((id(here), there) for here, there in zip(body.inputs, theirs[name].inputs, strict=False))
                self.bodies(body, theirs[name], outside, _place(where, node, name))
            else:
                self._whole(body, self.removed, _place(where, node, name))
        mine = dict(_bodies(node))
        for name, body in theirs.items():
            if name not in mine:
                self._whole(body, self.added, _place(where, twin, name))

    def _input_edits(self, node: Node, twin: Node, pairs: Pairs) -> Iterator[ValueEdit]:
        for at in range(max(len(node.inputs), len(twin.inputs))):
            mine = node.inputs[at] if at < len(node.inputs) else None
            theirs = twin.inputs[at] if at < len(twin.inputs) else None
            if not self._same_input(mine, theirs, pairs):
                yield ValueEdit(f"input {at}", _source(mine), _source(theirs))

    def _same_input(self, mine: Any, theirs: Any, pairs: Pairs) -> bool:
        """Whether both read the same; two constants are one weight, whose values are compared later."""
        absent = [tensor is None or tensor.is_empty() for tensor in (mine, theirs)]
        if any(absent):
            return all(absent)
        if isinstance(mine, Constant) and isinstance(theirs, Constant):
            self._pairs[id(mine), id(theirs)] = mine, theirs
            return True
        if isinstance(mine, Constant) or isinstance(theirs, Constant):
            return False
        if id(mine) in pairs.tensors:
            return pairs.tensors[id(mine)] is theirs
        # neither is known: an outer tensor that was not matched, or one that nothing makes
        return not mine.inputs and not theirs.inputs and mine.name == theirs.name

    def _outputs(self, one: Graph, other: Graph, pairs: Pairs, where: str) -> None:
        """What the body gives out: by name for the main graph, by position elsewhere."""
        if one.parent is None and not one.is_function:
            named = {tensor.name: tensor for tensor in other.outputs}
            ends = [(tensor, named[tensor.name]) for tensor in one.outputs if tensor.name in named]
        else:
            ends = list(zip(one.outputs, other.outputs, strict=False))
            if len(one.outputs) != len(other.outputs):
                counts = [f"{len(body.outputs)} outputs" for body in (one, other)]
                self.edits.append(Edit("changed", "body", where, *counts))
        for mine, theirs in ends:
            if not self._same_input(mine, theirs, pairs):
                what = f"output of {where}" if where else "output"
                self.edits.append(Edit("changed", what, mine.name, _source(mine), _source(theirs)))

    def weights(self, one: Model, other: Model) -> _Weights:
        """Hold the values of matched weights against each other; the others are matched by name, then by content."""
        found = _Weights()
        places = [_constants(model) for model in (one, other)]
        mine = {id(pair[0]) for pair in self._pairs.values()}
        theirs = {id(pair[1]) for pair in self._pairs.values()}
        rest = [constant for key, (constant, _) in places[0].items() if key not in mine]
        free = {key: constant for key, (constant, _) in places[1].items() if key not in theirs}
        for key in (_by_name, _by_content):
            keyed: dict[Any, list[Constant]] = {}
            for constant in free.values():
                keyed.setdefault(key(constant), []).append(constant)
            for constant in list(rest):
                twins = keyed.get(key(constant))
                if twins:
                    twin = twins.pop(0)
                    self._pairs[id(constant), id(twin)] = constant, twin
                    rest.remove(constant)
                    del free[id(twin)]
        told: set[int] = set()
        for here, there in self._pairs.values():
            where = places[0].get(id(here), (here, ""))[1]
            edit = _weight_edit(here, there, where)
            if edit is not None:
                found.changed.append(edit)
            elif id(here) not in told:
                found.equal += 1
                found.renamed += here.name != there.name
            told.add(id(here))
        found.removed = [_weight_facts(constant, places[0][id(constant)][1]) for constant in rest]
        found.added = [_weight_facts(constant, places[1][id(constant)][1]) for constant in free.values()]
        return found


def _function_name(function: Function) -> str:
    overload = f":{function.overload}" if function.overload else ""
    return f"{function.domain}.{function.name}{overload}"


def _imports(function: Function) -> dict[str, str]:
    return {entry.domain or "ai.onnx": str(entry.version) for entry in function.import_domains or []}


def _constants(model: Model) -> dict[int, tuple[Constant, str]]:
    found: dict[int, tuple[Constant, str]] = {}
    for body in model.bodies():
        where = f"function {_function_name(body.function)}" if body.function is not None else ""
        if body.parent is not None:
            where = f"{where}, {body.name}" if where else f"body {body.name}"
        found.update((id(constant), (constant, where)) for constant in body.initializers)
    return found


def _by_name(constant: Constant) -> Any:
    return constant.name


def _by_content(constant: Constant) -> Any:
    return str(constant.data.dtype), constant.data.shape, constant.data.fingerprint()


def _bodies(node: Node) -> Iterator[tuple[str, Graph]]:
    for name, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{at}]", body) for at, body in enumerate(value) if isinstance(body, gs.Graph))


def _place(where: str, node: Node, attribute: str) -> str:
    here = f"{attribute} of {label(node)}"
    return f"{where}, {here}" if where else here


def _node_facts(node: Node, where: str) -> NodeFacts:
    inputs = tuple(tensor.name for tensor in node.inputs)
    return NodeFacts(label(node), operator_name(node), inputs, tuple(tensor.name for tensor in node.outputs), where)


def _source(tensor: Any) -> str:
    """What a tensor is, for a reader: its name and what makes it."""
    if tensor is None or tensor.is_empty():
        return ""
    if isinstance(tensor, Constant):
        return f"{tensor.name} (a weight)"
    producer = tensor.inputs[0] if tensor.inputs else None
    return f"{tensor.name} (from {producer.op})" if producer is not None else f"{tensor.name}"


def _attribute_edits(node: Node, twin: Node, opsets: tuple[int, int]) -> Iterator[ValueEdit]:
    given = [explicit(side, opset) for side, opset in zip((node, twin), opsets, strict=True)]
    for name in sorted({*given[0], *given[1]}):
        before, after = node.attrs.get(name), twin.attrs.get(name)
        if _holds_bodies(before) or _holds_bodies(after):
            if (name in node.attrs) != (name in twin.attrs):
                yield ValueEdit(name, *("a body" if name in side.attrs else "" for side in (node, twin)))
        elif name not in node.attrs or name not in twin.attrs or attribute_key(before) != attribute_key(after):
            yield ValueEdit(name, *(_shown(side.attrs[name]) if name in side.attrs else "" for side in (node, twin)))


def _holds_bodies(value: Any) -> bool:
    return isinstance(value, gs.Graph) or (isinstance(value, list) and bool(value) and isinstance(value[0], gs.Graph))


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size > 8:
        return f"{_dtype(value.dtype)}{list(value.shape)}"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = " ".join(str(value).split())
    if isinstance(value, float):
        text = f"{value:.9g}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _output_edits(node: Node, twin: Node) -> Iterator[ValueEdit]:
    """Outputs that only one of both has."""
    for at in range(max(len(node.outputs), len(twin.outputs))):
        names = [side.outputs[at].name if at < len(side.outputs) else "" for side in (node, twin)]
        if bool(names[0]) != bool(names[1]):
            yield ValueEdit(f"output {at}", *names)


def _weight_facts(constant: Constant, where: str) -> WeightFacts:
    data = constant.data
    return WeightFacts(constant.name, _dtype(data.dtype), data.shape, data.stored_nbytes, where)


def _weight_edit(here: Constant, there: Constant, where: str) -> WeightEdit | None:
    """None where type, dims and every stored byte are equal."""
    one, other = here.data, there.data
    alike = _stored_as(one) == _stored_as(other)
    if alike and one.shape == other.shape and one.equal_to([other])[0]:
        return None
    figures = _figures(one, other)
    if alike and figures is not None and figures[0] == 0:
        return None
    differing, largest, relative = figures or (None, None, None)
    return WeightEdit(
        name=here.name,
        name_after=there.name,
        dtype=_stored_as(one),
        dtype_after=_stored_as(other),
        dims=one.shape,
        dims_after=other.shape,
        bytes=one.stored_nbytes,
        bytes_after=other.stored_nbytes,
        differing=differing,
        max_abs=largest,
        relative=relative,
        body=where,
    )


def _stored_as(data: TensorData) -> str:
    return _dtype(data.dtype) + (", sparse" if data.sparse is not None else "")


def _figures(one: TensorData, other: TensorData) -> tuple[float, float, float] | None:
    """(share of differing elements, largest difference, relative error); None where they can't be subtracted."""
    if one.shape != other.shape or not one.size or "O" in (one.dtype.kind, other.dtype.kind):
        return None
    sides = [data.array().reshape(-1) for data in (one, other)]
    if any(side.dtype.kind == "c" for side in sides):
        return None
    differing, largest, lost, held = 0, 0.0, 0.0, 0.0
    with np.errstate(all="ignore"):
        for start in range(0, one.size, _CHUNK):
            a, b = (np.asarray(side[start : start + _CHUNK]) for side in sides)
            wide: list[NDArray[np.float64]] = [part.astype(np.float64) for part in (a, b)]
            # NaNs at the same place are no difference
            apart = np.where((wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1])), 0.0, wide[1] - wide[0])
            differing += int(np.count_nonzero(_differ(a, b) if a.dtype == b.dtype else apart))
            largest = max(largest, float(np.max(np.abs(apart), initial=0.0)))
            lost += float(np.sum(apart * apart))
            held += float(np.sum(np.square(np.nan_to_num(wide[0]))))
    relative = float(np.sqrt(lost / held)) if held else (np.inf if lost else 0.0)
    return differing / one.size, largest, float(relative)


def _differ(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the bits of two arrays of one element type differ, NaNs aside."""
    bits = [np.ascontiguousarray(side).view(f"u{side.dtype.itemsize}") for side in (a, b)]
    return np.asarray((bits[0] != bits[1]) & ~((a != a) & (b != b)))
