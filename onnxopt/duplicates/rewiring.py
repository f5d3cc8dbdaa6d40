"""Graphs that read a duplicate from the constant that is kept: D = a * transpose(K, perm).

    off      it stays
    file     D is computed from K, by Transpose and Mul behind it: the same bits. Runtimes compute that once, when they
             load the model, and store the result again: the file shrinks, memory does not
    absorb   whoever reads D reads K instead and does the rest itself, so that memory shrinks too; else D stays
    all      absorb where that is possible, file where it is not

What readers do in its stead:

    Gemm(x, D)                D = a K^T     Gemm(x, K), transB flipped, alpha times a; transA and x alike
    MatMul(x, D), x: [m, k]   D = a K^T     Gemm(x, K, bias) with transB; an Add of a bias behind it goes
    MatMul(x, D)              D = a K       a * MatMul(x, K); Conv and ConvTranspose without bias alike
    Gather(D, i)              D = a K^T     a * Transpose(Gather(K, i)) along the other axis: the same bits

Gemm adds up in another order with transB than without it where one of its inputs is a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxopt.duplicates.related import SCALED_TYPES, Relation
from onnxopt.graph import Names, detach, drop_unused, label, replace_inputs, sort_nodes
from onnxopt.graph.operators import opset_of
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Constant, Graph, Model, Node, Variable

WAYS = ("off", "file", "absorb", "all")
# what nodes behind the kept constant take in a file, about: less is not worth it
NODE_BYTES = 512
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_TRANSPOSE = (1, 0)

Edit = Callable[[], None]


class Refused(Exception):
    """Why a duplicate stays."""


class Rewirer:
    """Rewrites the readers of duplicates in one model. Call `finish` once at the end.

    turned, scaled: one of WAYS each, for duplicates whose axes stand in another order, and for multiples.
    """

    def __init__(self, model: Model, *, turned: str, scaled: str) -> None:
        self._model = model
        self._turned, self._scaled = turned, scaled
        self._names = Names(model)
        self._home = {id(constant): body for body in model.bodies() for constant in body.initializers}
        self._body = {id(node): body for body in model.bodies() for node in body.nodes}
        self._outputs = {id(tensor) for body in model.bodies() for tensor in body.outputs}
        self._made: dict[tuple[Any, ...], Variable] = {}
        self._gone: list[Constant] = []
        self._touched: dict[int, Graph] = {}
        # ids stand for tensors, so all that there were must live as long as this does
        self._alive = [tensor for body in model.bodies() for node in body.nodes for tensor in node.outputs]
        self._facts = known(model) if {turned, scaled} & {"absorb", "all"} else {}

    def check(self, relation: Relation) -> None:
        """Raise Refused where `apply` would. Nothing is changed."""
        self._plan(relation)

    def apply(self, relation: Relation) -> str:
        """Let the readers of the duplicate read the kept one; returns how. Raises Refused before a change is made."""
        duplicate = relation.duplicate
        if not relation.turned and relation.scale is None:
            replace_inputs(duplicate, relation.kept)
            self._gone.append(duplicate)
            return "read instead"
        edits, rest = self._plan(relation)
        taken = [label(node) for node in _readers(duplicate) if not any(node is other for other in rest)]
        for edit in edits:
            edit()
        how = [f"taken in by {', '.join(taken)}"] if taken else []
        if rest:
            computed = self._computed(relation)
            replace_inputs(duplicate, computed)
            how.append(f"computed by {computed.inputs[0].op}")
        self._gone.append(duplicate)
        return " and ".join(how)

    def ease(self, constant: Constant) -> tuple[int, int]:
        """How well a constant could follow from another, turned and scaled.

        Each 0 where it could not, 1 where it would have to be computed, 2 where all its readers do the rest themselves.
        """
        axes = tuple(range(len(constant.shape)))
        kind = constant.dtype.type
        two = kind(2) if str(constant.dtype) in SCALED_TYPES else None
        turned = Relation(constant, constant, axes[::-1]) if len(axes) > 1 else None
        scaled = Relation(constant, constant, axes, two) if two is not None else None
        return self._ease(turned), self._ease(scaled)

    def _ease(self, relation: Relation | None) -> int:
        if relation is None:
            return 0
        try:
            _, rest = self._plan(relation)
        except Refused:
            return 0
        return 1 if rest else 2

    def finish(self) -> None:
        """Sort the touched bodies, and drop the duplicates that nothing reads any more."""
        self._model.normalize()
        for body in self._touched.values():
            sort_nodes(body)
        drop_unused(self._gone, self._model)

    # what is to be done

    def _plan(self, relation: Relation) -> tuple[list[Edit], list[Node]]:
        """(edits of the readers that do the rest themselves, the readers for which it has to be computed)."""
        ways = self._ways(relation)
        duplicate = relation.duplicate
        if not relation.turned and relation.scale is None:
            return [], []
        if self._home[id(duplicate)].function is not None:
            raise Refused("it stands in a local function, which gets no nodes")
        readers = _readers(duplicate)
        if not readers:
            raise Refused("no node reads it")
        edits: list[Edit] = []
        rest: list[Node] = []
        for node in readers:
            try:
                if "absorb" not in ways:
                    raise Refused("")
                edits.append(self._taker(node, relation))
            except Refused:
                if "file" not in ways:
                    raise
                rest.append(node)
        if rest:
            self._check_computed(relation, rest)
        return edits, rest

    def _ways(self, relation: Relation) -> frozenset[str]:
        wanted = [self._turned] if relation.turned else []
        wanted += [self._scaled] if relation.scale is not None else []
        ways = frozenset({"file", "absorb"})
        for way in wanted:
            ways &= {"off": frozenset(), "all": ways}.get(way, frozenset({way}))
        if not ways:
            raise Refused("what would be needed is off, or the two options leave no way")
        return ways

    def _check_computed(self, relation: Relation, readers: Sequence[Node]) -> None:
        """Raise Refused where a reader may need a constant, or the operators don't do."""
        duplicate = relation.duplicate
        if duplicate.data.stored_nbytes <= NODE_BYTES:
            raise Refused("the nodes that compute it would take as much as it does")
        if relation.scale is not None and opset_of(self._home[id(duplicate)]) < 7:
            raise Refused("before opset 7 Mul does not broadcast")
        for node in readers:
            if node.kind[0] != "":
                raise Refused(f"{label(node)} of domain {node.kind[0]!r} may need a constant")
            if node.op in _QUANTIZERS and node.inputs[0] is not duplicate:
                raise Refused(f"{label(node)} has it as its scale, which stays a constant")

    # nodes behind the kept constant

    def _computed(self, relation: Relation) -> Variable:
        """transpose(kept, perm) * scale in the innermost body around both; one node of a kind for a constant."""
        duplicate, kept = relation.duplicate, relation.kept
        body = _common(self._home[id(kept)], self._home[id(duplicate)])
        tensor: Any = kept
        if relation.turned:
            key: tuple[Any, ...] = (id(kept), id(body), relation.perm)
            tensor = self._once(key, body, "Transpose", [kept], relation, perm=list(relation.perm))
        if relation.scale is not None:
            key = (id(kept), id(body), relation.perm, relation.scale.tobytes())
            tensor = self._once(key, body, "Mul", [tensor, self._scalar(relation)], relation)
        found: Variable = tensor
        return found

    def _once(
        self, key: tuple[Any, ...], body: Graph, op: str, inputs: list[Any], relation: Relation, **attrs: object
    ) -> Variable:
        if key not in self._made:
            output = Variable(self._names.tensor(f"{relation.duplicate.name}_{op.lower()}"), relation.duplicate.dtype)
            output.shape = list(relation.duplicate.shape)
            node = Node(op, self._names.node(f"{output.name}_{op}"), attrs, inputs=inputs, outputs=[output])
            self._put(node, body, 0)
            self._made[key] = output
        return self._made[key]

    def _scalar(self, relation: Relation) -> Constant:
        values = np.asarray(relation.scale, relation.duplicate.dtype)
        return Constant(self._names.tensor(f"{relation.duplicate.name}_scale"), values)

    # readers that do the rest themselves

    def _taker(self, node: Node, relation: Relation) -> Edit:
        """What makes `node` read the kept constant. Raises Refused."""
        places = [at for at, tensor in enumerate(node.inputs) if tensor is relation.duplicate]
        takers = {
            ("", "Gemm"): self._gemm,
            ("", "MatMul"): self._matmul,
            ("", "Gather"): self._gather,
            ("", "Conv"): self._conv,
            ("", "ConvTranspose"): self._conv,
        }
        if node.kind not in takers or len(places) != 1 or id(node) not in self._body:
            raise Refused(f"{node.op} {label(node)} can't take in what makes it from {relation.kept.name}")
        return takers[node.kind](node, places[0], relation)

    def _gemm(self, node: Node, at: int, relation: Relation) -> Edit:
        if at > 1:
            raise Refused(f"it is the bias of Gemm {label(node)}")
        alpha = _alpha(float(node.attrs.get("alpha", 1.0)), relation)

        def edit() -> None:
            node.inputs[at] = relation.kept
            if relation.turned:
                flag = "transA" if at == 0 else "transB"
                node.attrs[flag] = 0 if node.attrs.get(flag, 0) else 1
            if relation.scale is not None:
                node.attrs["alpha"] = alpha

        return edit

    def _matmul(self, node: Node, at: int, relation: Relation) -> Edit:
        if not relation.turned:
            return lambda: self._scaled_output(node, at, relation)
        body, bias = self._body[id(node)], self._bias_behind(node)
        other = node.inputs[1 - at]
        rank = len(other.shape) if isinstance(other, Constant) else len(self._shape(other) or ())
        if len(relation.perm) != 2 or rank != 2 or str(relation.duplicate.dtype) not in SCALED_TYPES:
            raise Refused(f"MatMul {label(node)} is not known to multiply two matrices, as a Gemm does")
        least = 7 if bias is not None else 11
        if opset_of(body) < least:
            raise Refused(f"MatMul {label(node)} can become a Gemm from opset {least} on")
        alpha = _alpha(1.0, relation)

        def edit() -> None:
            node.inputs[at] = relation.kept
            node.op, node.attrs = "Gemm", {"transA" if at == 0 else "transB": 1}
            if relation.scale is not None:
                node.attrs["alpha"] = alpha
            if bias is not None:
                add, addend = bias
                output = add.outputs[0]
                detach(add)
                body.nodes = [each for each in body.nodes if each is not add]
                node.inputs.append(addend)
                node.outputs = [output]

        return edit

    def _bias_behind(self, node: Node) -> tuple[Node, Constant] | None:
        """The Add of a number a column that alone reads a MatMul of two matrices, and what it adds."""
        output = node.outputs[0]
        if len(output.outputs) != 1 or id(output) in self._outputs or output.outputs[0].kind != ("", "Add"):
            return None
        add: Node = output.outputs[0]
        if self._body.get(id(add)) is not self._body[id(node)]:
            return None
        addend = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
        columns = (self._shape(output) or [None])[-1]
        if not isinstance(addend, Constant) or addend.shape not in ((columns,), (1, columns)):
            return None
        return add, addend

    def _conv(self, node: Node, at: int, relation: Relation) -> Edit:
        biased = len(node.inputs) > 2 and not node.inputs[2].is_empty()
        if at != 1 or relation.turned or biased:
            raise Refused(f"{node.op} {label(node)} takes in a scale only, of its weight, and where it has no bias")
        return lambda: self._scaled_output(node, at, relation)

    def _gather(self, node: Node, at: int, relation: Relation) -> Edit:
        indices = node.inputs[1]
        shape = indices.shape if isinstance(indices, Constant) else self._shape(indices)
        axis = int(node.attrs.get("axis", 0)) % len(relation.perm)
        if at != 0 or (relation.turned and (relation.perm != _TRANSPOSE or shape is None)):
            raise Refused(
                f"Gather {label(node)} takes in the order of two axes, of its table, by indices of known rank"
            )

        def edit() -> None:
            rank = len(shape or ())
            if relation.scale is not None:
                self._scaled_output(node, at, relation)
            node.inputs[at] = relation.kept
            if relation.turned:
                node.attrs["axis"] = 1 - axis
                # what stood behind the indices' axes stands before them now, and the other way round
                perm = [*range(1, rank + 1), 0] if axis == 0 else [rank, *range(rank)]
                if rank:
                    self._behind(node, "Transpose", [], relation, perm=perm)

        return edit

    def _scaled_output(self, node: Node, at: int, relation: Relation) -> None:
        node.inputs[at] = relation.kept
        self._behind(node, "Mul", [self._scalar(relation)], relation)

    def _behind(self, node: Node, op: str, more: list[Constant], relation: Relation, **attrs: object) -> None:
        """Put a node behind the first output of `node`, whose name the new one's output takes."""
        body, output = self._body[id(node)], node.outputs[0]
        inner = Variable(self._names.tensor(f"{output.name}_{relation.kept.name}"), relation.duplicate.dtype)
        node.outputs = [inner]
        behind = Node(op, self._names.node(f"{output.name}_{op}"), attrs, inputs=[inner, *more], outputs=[output])
        place = next(at for at, each in enumerate(body.nodes) if each is node)
        self._put(behind, body, place + 1)

    def _put(self, node: Node, body: Graph, place: int) -> None:
        body.nodes.insert(place, node)
        self._body[id(node)] = body
        self._touched[id(body)] = body

    def _shape(self, tensor: Any) -> tuple[Any, ...] | None:
        return self._facts.get(id(tensor), Fact()).shape


def _readers(constant: Constant) -> list[Node]:
    """Each node once, in order."""
    return list({id(node): node for node in constant.outputs}.values())


def _alpha(present: float, relation: Relation) -> float:
    """The attribute of a Gemm that takes in the scale, a float32. Raises Refused where that loses of a float64."""
    exact = present * (1.0 if relation.scale is None else float(relation.scale))
    alpha = float(np.float32(exact))
    if alpha != exact and relation.duplicate.dtype == np.float64:
        raise Refused("alpha of a Gemm is a float32, which does not hold the scale")
    return alpha


def _common(one: Graph, other: Graph) -> Graph:
    """The innermost body that encloses both."""
    above = {id(body) for body in one.ancestors()}
    return next(body for body in other.ancestors() if id(body) in above)
