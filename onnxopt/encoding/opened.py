"""Stored forms shown as the weights that they stand for while a pass runs, and put back behind it.

A weight that the pass left alone goes back into the very nodes it came from, and so does one that it stored itself in
a form that is no smaller. One that it changed, and what it made from them, is stored again where that loses no bit and
saves bytes; else it stays as the pass left it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxopt.encoding.find import forms
from onnxopt.encoding.forms import LEAST_BYTES, Form, as_bits, file_bytes
from onnxopt.encoding.store import kept_dense, store
from onnxopt.graph import detach, replace_inputs
from onnxopt.graph.extract import extract
from onnxopt.graph.operators import opset_of
from onnxopt.graph.shapes import Fact, known
from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.model.tensor_data import TensorData

# (model, values of its inputs) -> values of its outputs, as `Context.evaluate`
Evaluate = Callable[[ModelProto, dict[str, NDArray[Any]]], list[NDArray[Any]]]

# What decoding is made of: values are moved, and integers computed.
_MOVES = frozenset(
    {"Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat", "Identity", "Expand", "Flatten"}
)
_INTEGER = frozenset({"Add", "Sub", "Mul", "BitShift", "BitwiseAnd", "BitwiseOr", "CumSum"})
_CAST_TO: dict[object, np.dtype[Any]] = {6: np.dtype(np.int32), 7: np.dtype(np.int64)}  # of TensorProto.DataType
# A form holds codes, of these types; few bytes of them where one holds several, or one code stands for a vector.
_CODES = frozenset(map(np.dtype, (np.uint8, np.uint16, np.int8, np.int16, ml_dtypes.uint4, ml_dtypes.uint2)))
# Bytes besides its text that a name takes in a file, and a node or a constant besides its names and values.
_FRAME = 2
_ENTRY_BYTES = 10


@dataclass(frozen=True, eq=False)
class _Form:
    """A stored form that was opened: its nodes in order with what they read and make, and the constant shown.

    weight: about the bytes that it takes in a file.
    """

    body: Graph
    nodes: tuple[tuple[Node, tuple[Any, ...], tuple[Variable, ...]], ...]
    made: Variable
    shown: Constant
    data: TensorData
    read: tuple[tuple[Constant, TensorData], ...]
    weight: int

    @property
    def intact(self) -> bool:
        """Whether the weight, and what it is computed from, is what it was."""
        return self.shown.data is self.data and self.readable

    @property
    def readable(self) -> bool:
        """Whether what the weight is computed from is what it was."""
        return all(constant.data is data for constant, data in self.read)

    def gives(self, values: NDArray[Any] | None) -> bool:
        """Whether these are the weight's values, bit for bit."""
        held = self.data.array()
        if values is None or values.dtype != held.dtype or values.shape != held.shape:
            return False
        return bool(np.array_equal(as_bits(values), as_bits(held)))


class Opened:
    """The stored forms of a model, opened. `close` ends it; a model that was rolled back needs none.

    shared: open also what is another weight in another layout, as `dedup` leaves a transposed one.
    """

    def __init__(self, model: Model, evaluate: Evaluate, shared: bool = False) -> None:
        self._model, self._evaluate = model, evaluate
        self._forms: list[_Form] = []
        self._before: dict[int, tuple[Graph, list[Node], list[Node], list[Constant], list[Constant]]] = {}
        cones = list(_cones(model, shared))
        if not cones:
            return
        values = _decoded(cones, model, evaluate)
        cones = [cone for cone in cones if _smaller(cone, values.get(id(cone.made)))]
        self._uids = {constant.data.uid for constant in model.constants()}
        if cones:
            self._open(cones, values)
        self._uids |= {form.data.uid for form in self._forms}

    def __bool__(self) -> bool:
        return bool(self._forms)

    def _open(self, cones: list[_Cone], values: dict[int, NDArray[Any]]) -> None:
        before = {id(body): (body, list(body.nodes), list(body.initializers)) for body in self._model.bodies()}
        for cone in cones:
            shown = Constant(cone.made.name, TensorData.from_array(values[id(cone.made)]))
            wired = tuple((node, tuple(node.inputs), tuple(node.outputs)) for node in cone.nodes)
            held = tuple((constant, constant.data) for constant in cone.constants)
            self._forms.append(_Form(cone.body, wired, cone.made, shown, shown.data, held, cone.weight))
        # one form may read what another makes: all wiring is known before any of it is changed
        for form in self._forms:
            replace_inputs(form.made, form.shown)
            form.body.initializers.append(form.shown)
        # nodes that several forms share are unwired last
        gone = {id(node): node for cone in cones for node in cone.nodes}
        read = {id(tensor) for cone in cones for node in cone.nodes for tensor in node.inputs}
        for node in gone.values():
            detach(node)
        for body, nodes, constants in before.values():
            body.nodes = [node for node in nodes if id(node) not in gone]
            outputs = {id(tensor) for tensor in body.outputs}
            body.initializers = [
                constant
                for constant in body.initializers
                if id(constant) not in read or constant.outputs or id(constant) in outputs
            ]
            self._before[id(body)] = (body, nodes, list(body.nodes), constants, list(body.initializers))

    def close(self) -> list[str]:
        """Put the forms back; returns what a reader should know: weights that are dense now."""
        if not self._forms:
            return []
        self._model.normalize()
        self._show_again()
        homes = {id(constant): body for body in self._model.bodies() for constant in body.initializers}
        lost: list[_Form] = []
        back: list[_Form] = []
        for form in self._forms:
            home = homes.get(id(form.shown))
            if home is None:
                continue
            (back if home is form.body and form.intact else lost).append(form)
        self._put_back(back)
        self._recode()
        dense = {id(constant) for constant in self._model.constants()}
        return [f"{form.shown.name} is stored densely now" for form in lost if id(form.shown) in dense]

    def _show_again(self) -> None:
        """Show what the pass stored by itself, bit for bit what it was, and no smaller: it goes back as it came."""
        present = {id(constant) for constant in self._model.constants()}
        absent = {(id(form.body), form.made.name): form for form in self._forms if id(form.shown) not in present}
        if not absent:
            return
        found = ((absent.get((id(cone.body), cone.made.name)), cone) for cone in _cones(self._model, shared=False))
        pairs = [
            (form, cone) for form, cone in found if form is not None and form.readable and form.weight <= cone.weight
        ]
        values = _decoded([cone for _, cone in pairs], self._model, self._evaluate)
        pairs = [(form, cone) for form, cone in pairs if form.gives(values.get(id(cone.made)))]
        for form, cone in pairs:
            replace_inputs(cone.made, form.shown)
            form.shown.values = form.data
            form.body.initializers.append(form.shown)
        for body in {id(form.body): form.body for form, _ in pairs}.values():
            self._drop(body, [node for _, cone in pairs for node in cone.nodes if cone.body is body])

    def _drop(self, body: Graph, nodes: list[Node]) -> None:
        """Take those of `nodes`, sorted, out of a body that nothing reads, and constants that they alone read."""
        dead: set[int] = set()
        read: set[int] = set()
        outputs = {id(tensor) for tensor in body.outputs}
        for node in reversed(nodes):
            if id(node) not in dead and not any(made.outputs or id(made) in outputs for made in node.outputs):
                dead.add(id(node))
                read |= {id(tensor) for tensor in node.inputs}
                detach(node)
        body.nodes = [node for node in body.nodes if id(node) not in dead]
        places = {id(constant): at for at, constant in enumerate(self._before[id(body)][4])}
        held = [each for each in body.initializers if each.outputs or id(each) not in read or id(each) in outputs]
        body.initializers = sorted(held, key=lambda constant: places.get(id(constant), len(places)))

    def _put_back(self, back: list[_Form]) -> None:
        wired: set[int] = set()
        for form in back:
            for node, inputs, outputs in form.nodes:
                if id(node) not in wired:
                    wired.add(id(node))
                    node.inputs, node.outputs = list(inputs), list(outputs)
            replace_inputs(form.shown, form.made)
        shown = {id(form.shown) for form in back}
        touched = {id(form.body) for form in back}
        for body, nodes, left, constants, left_constants in self._before.values():
            if id(body) not in touched:
                continue
            if _same(body.nodes, left):
                body.nodes = [node for node in nodes if node.inputs or node.outputs]
            else:
                own = [node for node in nodes if id(node) in wired]
                body.nodes = own + body.nodes
            present = [constant for constant in body.initializers if id(constant) not in shown]
            if _same(body.initializers, left_constants):
                stayed = set(map(id, present))
                first = [constant for constant in constants if constant.outputs or id(constant) in stayed]
                present = first + [constant for constant in present if not any(constant is each for each in first)]
            body.initializers = present
        self._model.normalize()

    def _recode(self) -> None:
        """Store again, without loss, what the pass made of opened weights, but for codes that it stored itself."""
        masked = any(node.op == "CumSum" for form in self._forms for node, _, _ in form.nodes)
        shown = {id(form.shown) for form in self._forms}
        codes = {id(constant) for cone in _cones(self._model, shared=False) for constant in cone.constants}
        kept = codes | set(kept_dense(self._model))
        wanted: dict[Constant, Form] = {}
        for constant in self._model.constants():
            data = constant.data
            known = data.uid in self._uids and id(constant) not in shown
            if known or id(constant) in kept or data.nbytes < LEAST_BYTES or data.sparse is not None:
                continue
            found = smallest(data, palette=True, mask=masked, name=constant.name)
            if found is not None:
                wanted[constant] = found
        if wanted:
            store(self._model, wanted)


def smallest(data: TensorData, *, palette: bool, mask: bool, sparse: bool = False, name: str = "") -> Form | None:
    """The smallest form that gives back every bit of a tensor and is smaller than it, None where there is none.

    name: of the tensor, which nodes repeat.
    """
    if data.dtype.kind == "O" or data.nbytes < LEAST_BYTES:
        return None
    best: Form | None = None
    least = data.stored_nbytes
    for form in forms(data.array(), palette=palette, mask=mask, sparse=sparse):
        size = file_bytes(form, name)
        if size < least:
            best, least = form, size
    return best


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects in the same order."""
    return len(one) == len(other) and all(each is there for each, there in zip(one, other, strict=True))


@dataclass(frozen=True, eq=False)
class _Cone:
    """Nodes of one body, sorted, that compute `made` from constants alone."""

    body: Graph
    nodes: tuple[Node, ...]
    made: Variable

    @property
    def constants(self) -> list[Constant]:
        """What the nodes read."""
        read = (tensor for node in self.nodes for tensor in node.inputs if isinstance(tensor, Constant))
        return list({id(constant): constant for constant in read}.values())

    @property
    def borrows(self) -> bool:
        """Whether a constant of some size has a reader outside as well, so that it stays whatever becomes of this."""
        return any(constant.data.nbytes >= LEAST_BYTES and self._lent(constant) for constant in self.constants)

    @property
    def nbytes(self) -> int:
        """Bytes of the constants that these nodes alone read."""
        return sum(constant.data.nbytes for constant in self.constants if not self._lent(constant))

    @property
    def weight(self) -> int:
        """About the bytes that these nodes and the constants that they alone read take in a file, names as they are."""
        held = [constant.name for constant in self.constants if not self._lent(constant)]
        texts = [text for node in self.nodes for text in (node.op, node.name)]
        texts += [tensor.name for node in self.nodes for tensor in (*node.inputs, *node.outputs)]
        names = sum(len(text) + _FRAME for text in [*held, *texts])
        return self.nbytes + names + _ENTRY_BYTES * (len(held) + len(self.nodes))

    def _lent(self, constant: Constant) -> bool:
        own = set(map(id, self.nodes))
        return any(id(reader) not in own for reader in constant.outputs)


def _cones(model: Model, shared: bool) -> Iterator[_Cone]:
    """What may be a stored form: computed from constants, codes or shared ones, by moves and integers alone."""
    for body in model.bodies():
        if body.function is None and (shared or any(_has_codes(constant) for constant in _read_in(body))):
            yield from _cones_of(body, shared)


def _read_in(body: Graph) -> Iterator[Constant]:
    return (tensor for node in body.nodes for tensor in node.inputs if isinstance(tensor, Constant))


def _has_codes(constant: Constant) -> bool:
    data = constant.data
    return data.dtype in _CODES and bool(data.shape) and data.size > 0


def _cones_of(body: Graph, shared: bool) -> Iterator[_Cone]:
    dtypes: dict[int, np.dtype] = {}
    inside: dict[int, Node] = {}
    for node in sorted_nodes(body):
        dtype = _decodes(node, dtypes, inside)
        if dtype is not None:
            inside[id(node)] = node
            dtypes[id(node.outputs[0])] = dtype
    outputs = {id(tensor) for tensor in body.outputs}
    places = {key: at for at, key in enumerate(inside)}
    found: set[int] = set()
    for node in inside.values():
        made = node.outputs[0]
        readers = made.outputs
        if id(made) in outputs or not readers or all(id(reader) in inside for reader in readers):
            continue
        if not shared and _moves(node, found):
            continue
        cone = _Cone(body, tuple(_members(node, places)), made)
        if any(map(_has_codes, cone.constants)) or (shared and cone.borrows):
            found.add(id(node))
            yield cone


def _moves(node: Node, stored: set[int]) -> bool:
    """Whether a node moves around what one of the nodes `stored` makes: a weight in another layout, and no form."""
    pending = [node]
    while pending:
        each = pending.pop()
        if each.op not in _MOVES:
            continue
        makers = [
            tensor.inputs[0] for tensor in (each.inputs if each.op == "Concat" else each.inputs[:1]) if tensor.inputs
        ]
        if any(id(maker) in stored for maker in makers):
            return True
        pending += makers
    return False


def _decodes(node: Node, dtypes: dict[int, np.dtype], inside: dict[int, Node]) -> np.dtype | None:
    """The type of what a node makes when it may take part in decoding, else None."""
    if node.kind[0] != "" or len(node.outputs) != 1 or not node.inputs:
        return None
    given = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if not all(isinstance(tensor, Constant) or (tensor.inputs and id(tensor.inputs[0]) in inside) for tensor in given):
        return None
    first = given[0].dtype if isinstance(given[0], Constant) else dtypes[id(given[0])]
    if node.op == "Cast":
        whole = first.kind in "iu" or first.name in ("uint4", "int4", "uint2", "int2")
        return _CAST_TO.get(node.attrs.get("to")) if whole else None
    if node.op in _MOVES:
        return np.dtype(first)
    return np.dtype(first) if node.op in _INTEGER and np.dtype(first).kind in "iu" else None


def _members(node: Node, places: dict[int, int]) -> list[Node]:
    """`node` and all that it is computed by, in the order of their places."""
    found: dict[int, Node] = {}
    pending = [node]
    while pending:
        each = pending.pop()
        if id(each) not in found:
            found[id(each)] = each
            pending += [tensor.inputs[0] for tensor in each.inputs if isinstance(tensor, Variable) and tensor.inputs]
    return sorted(found.values(), key=lambda each: places[id(each)])


def _decoded(cones: list[_Cone], model: Model, evaluate: Evaluate) -> dict[int, NDArray[Any]]:
    """id(tensor) -> values of what the cones make, computed by the runtime."""
    values: dict[int, NDArray[Any]] = {}
    pending = [[cone for cone in cones if opset_of(cone.body) == opset] for opset in {opset_of(c.body) for c in cones}]
    while pending:
        members = pending.pop()
        nodes = {id(node): node for cone in members for node in cone.nodes}
        opset = opset_of(members[0].body)
        proto, inputs = extract(list(nodes.values()), [cone.made for cone in members], opset, model.ir_version)
        try:
            results = evaluate(proto, inputs)
        except Exception:  # noqa: BLE001  what the runtime can't compute is no stored form, whatever it raises
            pending += [[cone] for cone in members] if len(members) > 1 else []
            continue
        values |= {id(cone.made): value for cone, value in zip(members, results, strict=True)}
    return values


def _smaller(cone: _Cone, values: NDArray[Any] | None) -> bool:
    """Whether the constants of a cone take fewer bytes than what they stand for; None: it could not be computed."""
    return values is not None and _pays(cone, values.nbytes)


def _pays(cone: _Cone, nbytes: int) -> bool:
    """Whether a tensor of so many bytes may be what the cone stores."""
    return nbytes >= LEAST_BYTES and cone.nbytes < nbytes


def parameters(model: Model) -> int:
    """`Model.parameters` with stored forms counted as the weights that they stand for, as far as shapes are known."""
    total = model.parameters()
    counted: set[int] = set()
    cones = list(_cones(model, shared=False))
    facts = known(model) if cones else {}
    for cone in cones:
        fact = facts.get(id(cone.made), Fact())
        if fact.shape is None or fact.dtype is None or not all(isinstance(size, int) for size in fact.shape):
            continue
        elements = int(np.prod([int(size or 0) for size in fact.shape], dtype=np.int64))
        if not _pays(cone, elements * fact.dtype.itemsize):
            continue
        held = {constant.data.uid: constant.data for constant in cone.constants}
        stored = [data for uid, data in held.items() if uid not in counted and data.shape and data.dtype != np.int64]
        total += elements - sum(data.size for data in stored)
        counted |= set(held)
    return total
