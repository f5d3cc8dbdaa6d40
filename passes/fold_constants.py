"""Compute at rewriting time what does not depend on the model's inputs.

    Before                                      After
    s = Shape(x)          x: float[1,3,H,W]     y = Reshape(x, t)       t: int64[2] = {1, -1}
    n = Gather(s, zero)   once H, W are fixed
    t = Concat(n, minus_one)
    y = Reshape(x, t)

A node is computed when its operator is listed as foldable and all its inputs are constants or computed themselves;
Shape and Size of a tensor whose shape follows from the inputs' declared shapes are constants too. Values come from the
runtime, unoptimized, many nodes in one evaluation, so they are bit for bit what the model would have computed. What
follows is bit-equal too, except that the runtime packs constant weights of matrix products and then adds in another
order: `weights=false` leaves those alone.

Bounded: sizes are known before anything is computed. Results are stored only while the model grows by no more than
`max_growth` bytes over the constants they replace, and never if that would store at full width what the file holds in
a narrower type or sparsely (that undoes a compression). Quantization operators are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto

from onnxopt.graph import Names, detach, drop_unused, label, operators, replace_inputs
from onnxopt.graph.extract import extract
from onnxopt.graph.fold_plan import Plan, cone
from onnxopt.graph.operators import opset_of
from onnxopt.graph.shapes import Fact, known
from onnxopt.graph.sort import sorted_nodes
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.model.tensor_data import stored_nbytes
from onnxopt.passbase import Change, Context, Effect, Pass, PassResult, Skip, option

# No single intermediate value may be larger than this, unless it is no larger than what it is computed from.
_LARGEST_VALUE = 64 << 20
# From this many elements on, a constant in a narrow type counts as compressed.
_COMPRESSED_ELEMENTS = 256
# What may be stored on the way to a node that stays because its result is too large.
_SMALL = 1024
# Each round makes constants that let shape inference see further; chains of the field need two to four.
_MAX_ROUNDS = 32


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at rewriting time what does not depend on the inputs."""

    name: ClassVar[str] = "fold_constants"
    max_growth: int = option(65536, "bytes that all computed tensors together may add to the model", minimum=0)
    weights: bool = option(True, "also compute weights of matrix products; false: bit-equal outputs")

    @property
    def effect(self) -> Effect:
        """The runtime computes the same nodes, only earlier; but constant weights it packs, and adds otherwise."""
        return Effect.ROUNDING if self.weights else Effect.EXACT

    def run(self, model: Model, context: Context) -> PassResult:
        """Fold in all bodies until nothing more can be."""
        model.normalize()
        folder = _Folder(model, context, self)
        for _ in range(_MAX_ROUNDS):
            if not folder.fold():
                break
        alive = {id(node) for body in model.bodies() for node in body.nodes}
        skipped = [Skip(label(node), reason) for node, reason in folder.left.values() if id(node) in alive]
        return PassResult(folder.changes, skipped)


class _Folder:
    """The state of one run over a model."""

    def __init__(self, model: Model, context: Context, options: FoldConstants) -> None:
        self.model, self.context = model, context
        self.max_growth = self.budget = options.max_growth
        self.weights = options.weights
        self.changes: list[Change] = []
        self.left: dict[int, tuple[Node, str]] = {}
        self.failed: dict[int, tuple[Node, str]] = {}
        self.names = Names(model)
        self.folded: dict[int, Node] = {}
        self.facts: dict[int, Fact] = {}
        self.outputs: set[int] = set()

    def fold(self) -> bool:
        """One round; whether it changed anything."""
        before = len(self.changes)
        self.left = dict(self.failed)
        self.facts = known(self.model)
        self.outputs = {id(tensor) for body in self.model.bodies() for tensor in body.outputs}
        self._take_static_shapes()
        self._pass_identities()
        failures = len(self.failed)
        plan = self._plan()
        self._choose(plan)
        values = self._compute(plan, plan.stored)
        computed = [node for node in plan.stored if id(node) in values]
        shared: dict[Any, Constant] = {}
        for node in computed:
            self._store(node, plan, values[id(node)], shared)
        if computed:
            self._sweep([node for node, _ in plan.nodes.values() if plan.goes(node)])
        return len(self.changes) > before or len(self.failed) > failures

    # without the runtime

    def _take_static_shapes(self) -> None:
        done: list[Node] = []
        for node, body in list(_nodes(self.model)):
            value = self._static_shape(node)
            if value is not None and not self._only_output(node):
                self._note(node, f"the shape is {value.tolist()}")
                self._replace(node, body, {0: Constant(node.outputs[0].name, value)})
                done.append(node)
        self._sweep(done)

    def _static_shape(self, node: Node) -> NDArray[Any] | None:
        if node.kind not in (("", "Shape"), ("", "Size")) or isinstance(node.inputs[0], Constant):
            return None
        shape = self.facts.get(id(node.inputs[0]), Fact()).shape
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            return None
        bounds = node.attrs.get("start", 0), node.attrs.get("end", None)
        if not isinstance(bounds[0], int) or not isinstance(bounds[1], (int, type(None))):
            return None  # a function's reference to an attribute of its call
        dims = np.array(shape, np.int64)
        return np.array(np.prod(dims), np.int64) if node.op == "Size" else dims[slice(*bounds)]

    def _only_output(self, node: Node) -> bool:
        """Whether replacing the node by an Identity of a constant gains nothing: nobody but the caller reads it."""
        return all(id(tensor) in self.outputs and not tensor.outputs for tensor in node.outputs)

    def _pass_identities(self) -> None:
        done: list[Node] = []
        for node, _ in list(_nodes(self.model)):
            if node.kind != ("", "Identity") or not isinstance(node.inputs[0], Constant):
                continue
            if id(node.outputs[0]) not in self.outputs:
                replace_inputs(node.outputs[0], node.inputs[0])
                done.append(node)
        self._sweep(done)

    # planning

    def _plan(self) -> Plan:
        plan = Plan()
        computed: set[int] = set()
        for body in self.model.bodies():
            for node in sorted_nodes(body):
                if id(node) in self.failed or not _may_fold(node, computed):
                    continue
                reason = self._too_large(node)
                if reason:
                    self.left[id(node)] = (node, reason)
                    continue
                plan.add(node, body, self._rounds_half(node))
                computed.update(map(id, node.outputs))
        return plan

    def _too_large(self, node: Node) -> str | None:
        """Why the node must not be computed, even as a step on the way."""
        if any(isinstance(tensor, Constant) and tensor.data.sparse is not None for tensor in node.inputs):
            return "it would store a sparse tensor densely"
        read = [self._nbytes(tensor) for tensor in node.inputs if not tensor.is_empty()]
        row = operators.info(node)
        if row is not None and row.shrinks:
            return None
        made = [self._nbytes(tensor) for tensor in node.outputs if not tensor.is_empty()]
        if None in made:
            return "the size of its result is not known before it is computed"
        if self._may_divide_by_zero(node):
            return "it may divide an integer by zero"
        limit = max(_LARGEST_VALUE, sum(size or 0 for size in read))
        largest = max((size for size in made if size is not None), default=0)
        return f"its result would take {largest} bytes" if largest > limit else None

    def _nbytes(self, tensor: Any) -> int | None:
        if isinstance(tensor, Constant):
            return tensor.data.nbytes
        fact = self.facts.get(id(tensor), Fact())
        if fact.dtype is None or fact.shape is None or not all(isinstance(dim, int) for dim in fact.shape):
            return None
        return stored_nbytes(fact.dtype, int(np.prod([int(dim or 0) for dim in fact.shape], dtype=np.float64)))

    def _may_divide_by_zero(self, node: Node) -> bool:
        """Integer division can end the process, and a branch that is never taken may well contain one that does.

        By zero it does, and so does the smallest integer divided by -1, whose result there is no integer for.
        """
        if node.op not in ("Div", "Mod"):
            return False
        divisor = node.inputs[1]
        if isinstance(divisor, Constant):
            fatal = (divisor.values == 0) | ((divisor.values == -1) if divisor.dtype.kind == "i" else False)
            return divisor.dtype.kind in "iu" and bool(np.any(fatal))
        dtype = self.facts.get(id(divisor), Fact()).dtype
        return dtype is None or dtype.kind in "iu"  # the next round knows its values

    def _choose(self, plan: Plan) -> None:
        """Decide, from the last node to the first, which results are stored and which nodes stay as they are.

        A constant pays for results only if all its readers go; where one of them turns out to stay, decide again.
        """
        budget, left = self.budget, dict(self.left)
        lasting: set[int] = set()
        while True:
            self.budget, self.left = budget, dict(left)
            plan.begin(lasting)
            for node, body in reversed(list(plan.nodes.values())):
                self._decide(node, body, plan)
            lost = {key for key, constant in plan.paying.items() if not all(map(plan.goes, constant.outputs))}
            if lost <= lasting:
                return
            lasting |= lost

    def _decide(self, node: Node, body: Graph, plan: Plan) -> None:
        wanted = [tensor for tensor in node.outputs if self._is_wanted(tensor, plan)]
        if not wanted:
            return
        reason = self._reason_to_stay(node, body, wanted, plan)
        if reason is None:
            plan.stored.append(node)
            return
        plan.staying.add(id(node))
        if reason:
            self.left[id(node)] = (node, reason)

    def _is_wanted(self, tensor: Variable, plan: Plan) -> bool:
        return id(tensor) in self.outputs or any(not plan.goes(consumer) for consumer in tensor.outputs)

    def _reason_to_stay(self, node: Node, body: Graph, wanted: list[Any], plan: Plan) -> str | None:
        """Why the results must not be stored; "" where there is simply nothing to gain, None where they may."""
        if node.op == "Identity":
            return ""
        packing = [user for tensor in wanted for user in tensor.outputs if _packs(user) and not plan.goes(user)]
        if packing and not self.weights:
            return f"{packing[0].op} {label(packing[0])} would multiply constant weights otherwise (weights=false)"
        sources = plan.sources_of(node)
        if id(node) in plan.rounding:
            return "the runtime computes 16-bit floats in float32 and would not round this result to 16 bits"
        new = {plan.key(tensor, body): tensor for tensor in wanted if plan.key(tensor, body) not in plan.keys}
        size = sum(self._nbytes(tensor) or 0 for tensor in new.values())
        held = sum(constant.data.nbytes for constant in sources)
        widths = [_bits(dtype) for tensor in wanted if (dtype := self.facts.get(id(tensor), Fact()).dtype) is not None]
        narrow = [c for c in sources if c.data.size >= _COMPRESSED_ELEMENTS and _bits(c.dtype) < max(widths, default=0)]
        if narrow and size > held:
            return f"it would store the compressed values of {narrow[0].name} at full width"
        growth = size - self._paid(size, sources, plan)
        halfway = any(id(user) in plan.dear for tensor in wanted for user in tensor.outputs)
        if growth > (min(_SMALL, self.budget) if halfway else self.budget):
            plan.dear.add(id(node))
            return f"its result would add {growth} bytes to the model (max_growth={self.max_growth} in all)"
        self.budget -= growth
        plan.keys.update(new)
        return None

    def _rounds_half(self, node: Node) -> bool:
        """Whether the node computes a 16-bit float; onnxruntime's insert_cast_transformer.cc keeps it wide."""
        row = operators.info(node)
        return (row is None or not row.moves) and any(self._is_half(tensor) for tensor in node.outputs)

    def _is_half(self, tensor: Any) -> bool:
        dtype = self.facts.get(id(tensor), Fact()).dtype
        return dtype is not None and dtype.name in ("float16", "bfloat16")

    def _paid(self, size: int, sources: list[Constant], plan: Plan) -> int:
        """How many of `size` bytes are won back by constants that nothing will read any more."""
        freed = [c for c in sources if id(c) not in self.outputs and id(c) not in plan.lasting]
        freed = [c for c in freed if all(map(plan.goes, c.outputs))]
        for constant in freed:
            plan.credit.setdefault(id(constant), constant.data.nbytes)
        owed = size
        for constant in freed:
            paid = min(owed, plan.credit[id(constant)])
            plan.credit[id(constant)] -= paid
            plan.paying[id(constant)] = constant
            owed -= paid
        return size - owed

    # computing

    def _compute(self, plan: Plan, nodes: list[Node]) -> dict[int, dict[int, NDArray[Any]]]:
        """id(node) -> output position -> value; a node the runtime can't compute is noted and left out."""
        groups: dict[int, list[Node]] = {}
        for node in nodes:
            groups.setdefault(opset_of(plan.nodes[id(node)][1]), []).append(node)
        values: dict[int, dict[int, NDArray[Any]]] = {}
        for opset, members in groups.items():
            pending = [members]
            while pending:
                batch = pending.pop()
                try:
                    values.update(self._evaluate(batch, plan, opset))
                except Exception as error:  # noqa: BLE001  whatever the runtime raises means: it can't compute this
                    if len(batch) > 1:
                        pending += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                    else:
                        reason = str(error).strip().split("\n")[0]
                        self.failed[id(batch[0])] = (batch[0], f"the runtime can't compute it: {reason}")
        return values

    def _evaluate(self, batch: list[Node], plan: Plan, opset: int) -> dict[int, dict[int, NDArray[Any]]]:
        wanted = [
            (node, at, tensor)
            for node in batch
            for at, tensor in enumerate(node.outputs)
            if not tensor.is_empty() and self._is_wanted(tensor, plan)
        ]
        needed = {id(node) for node in cone(batch, plan)}
        ordered = [node for key, (node, _) in plan.nodes.items() if key in needed]
        proto, inputs = extract(ordered, [tensor for _, _, tensor in wanted], opset, self.model.ir_version)
        results = self.context.evaluate(proto, inputs)
        values: dict[int, dict[int, NDArray[Any]]] = {}
        for (node, at, tensor), result in zip(wanted, results, strict=True):
            fact = self.facts.get(id(tensor), Fact())
            if fact.dtype is not None and np.asarray(result).dtype != fact.dtype:
                raise ValueError(f"it gives {np.asarray(result).dtype} where {fact.dtype} was inferred")
            values.setdefault(id(node), {})[at] = result
        return values

    # rewriting

    def _note(self, node: Node, detail: str) -> None:
        self.folded[id(node)] = node
        self.changes.append(Change("folded", label(node), detail))

    def _store(self, node: Node, plan: Plan, values: dict[int, NDArray[Any]], shared: dict[Any, Constant]) -> None:
        body = plan.nodes[id(node)][1]
        self._note(node, f"{node.op}: {sum(value.nbytes for value in values.values())} bytes")
        constants: dict[int, Constant] = {}
        for at, value in values.items():
            tensor = node.outputs[at]
            constants[at] = shared.setdefault(plan.key(tensor, body), Constant(tensor.name, value))
        self._replace(node, body, constants)

    def _replace(self, node: Node, body: Graph, constants: dict[int, Constant]) -> None:
        """Make constants of outputs. What is an output of a body keeps a producer, an Identity of the constant."""
        for at, constant in constants.items():
            tensor = node.outputs[at]
            if id(tensor) not in self.outputs:
                replace_inputs(tensor, constant)
                continue
            if constant.name == tensor.name:
                constant.name = self.names.tensor(f"{tensor.name}_value")
            node.outputs[at] = Variable.empty()
            place = next(index for index, other in enumerate(body.nodes) if other is node)
            name = self.names.node(f"{label(node)}_value")
            body.nodes.insert(place, Node("Identity", name, inputs=[constant], outputs=[tensor]))

    def _sweep(self, nodes: list[Node]) -> None:
        """Remove those of `nodes` that nobody reads any more, and the pure nodes and constants only they read."""
        homes = {id(node): body for node, body in _nodes(self.model)}
        removed: dict[int, set[int]] = {}
        unused: dict[int, Constant] = {}
        pending = list(nodes)  # the last one first: consumers go before their producers
        while pending:
            node = pending.pop()
            if id(node) not in homes or not self._is_dead(node):
                continue
            body = homes.pop(id(node))
            removed.setdefault(id(body), set()).add(id(node))
            if id(node) not in self.folded:
                self.changes.append(Change("removed", label(node), "nothing reads it any more"))
            sources = list(node.inputs)
            detach(node)
            pending += [producer for tensor in sources for producer in tensor.inputs]
            unused.update({id(tensor): tensor for tensor in sources if isinstance(tensor, Constant)})
        for body in self.model.bodies():
            gone = removed.get(id(body), set())
            if gone:
                body.nodes = [node for node in body.nodes if id(node) not in gone]
        drop_unused(unused.values(), self.model)

    def _is_dead(self, node: Node) -> bool:
        used = any(tensor.outputs or id(tensor) in self.outputs for tensor in node.outputs if not tensor.is_empty())
        return not used and operators.is_pure(node)


def _nodes(model: Model) -> Iterator[tuple[Node, Graph]]:
    for body in model.bodies():
        yield from ((node, body) for node in body.nodes)


def _may_fold(node: Node, computed: set[int]) -> bool:
    """Whether the operator is foldable, no attribute is a function's parameter, and every input is known."""
    if not operators.is_foldable(node) or not node.inputs:
        return False
    if any(isinstance(value, AttributeProto) for value in node.attrs.values()):
        return False
    return all(isinstance(t, Constant) or t.is_empty() or id(t) in computed for t in node.inputs)


def _packs(node: Node) -> bool:
    """Whether the runtime rearranges this node's weights when they are constant (PrePack in its kernels)."""
    domain, op = node.kind
    return domain != "" or op in ("Attention", "Einsum", "GRU", "Gemm", "LSTM", "RNN") or "Conv" in op or "MatMul" in op


def _bits(dtype: Any) -> int:
    return stored_nbytes(np.dtype(dtype), 8)
