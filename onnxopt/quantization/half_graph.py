"""A mixed graph: float16 wherever nothing speaks against it, float32 elsewhere, and one Cast where the two meet.

    x: float ── Conv ── Relu ── CumSum ── MatMul ── y: float

    x ── Cast ── Conv ── Relu ── Cast ── CumSum ── MatMul ── y

Inputs and outputs of the model, and of the bodies within it, keep their types. A node stays float32 when its operator
has no float16 form, a value of it is too large or too small, or its values are needed more exactly
(`onnxopt.quantization.half_operators`). A part of the graph that would need more Casts around it than it has nodes that
compute stays float32 too, as the MatMul above. Each tensor is cast once for all that read it in the other type. A Cast
that stands at the border already makes the type that is wanted, so that no Cast ever follows another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxopt.calibration import Requests, Statistics
from onnxopt.graph import operators
from onnxopt.graph.edit import label
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Graph, Model, Node, Variable
from onnxopt.passbase import Change, Skip
from onnxopt.quantization.half import FLOAT, FLOAT32, HalfFormat, Halves
from onnxopt.quantization.half_operators import (
    ANY_READER,
    LARGE_ANGLE,
    Ports,
    Types,
    delicate,
    moved_batches,
    ports,
    unfit_constants,
    unfit_ranges,
)

Reader = tuple[Node, int]


@dataclass
class Mixed:
    """The plan: what of each node becomes float16, and why the others that hold floats do not."""

    types: Types
    nodes: dict[Node, Ports] = field(default_factory=dict)
    kept: dict[Node, str] = field(default_factory=dict)


def requests(model: Model) -> Requests:
    """Ranges of every float32 tensor that a node which may become float16 reads or makes."""
    types = Types(known(model))
    tensors: dict[Variable, None] = {}
    for body in _bodies(model):
        for node in body.nodes:
            found = ports(node, model.opset, types)
            if isinstance(found, Ports):
                tensors |= dict.fromkeys(node.outputs[at] for at in found.outputs)
                reads = [node.inputs[at] for at in found.inputs]
                tensors |= dict.fromkeys(each for each in reads if not isinstance(each, Constant))
    return Requests(ranges=tuple(tensors))


def plan(
    model: Model, form: HalfFormat, statistics: Statistics | None, left_out: dict[Node, str], keep_ops: tuple[str, ...]
) -> Mixed:
    """Which nodes compute in float16. left_out: nodes that stay float32 whatever they are, with the reason.

    keep_ops: operator types that do. Without statistics only constants are held against the format.
    """
    types = Types(known(model))
    mixed = Mixed(types)
    exact = delicate(model, types, lambda node: _large_angle(node, statistics)) | moved_batches(model, types)
    for body in _bodies(model):
        for node in body.nodes:
            found: Ports | str = ports(node, model.opset, types)
            if node in left_out:
                found = left_out[node]
            elif node.op in keep_ops:
                found = f"{node.op} is kept float32"
            elif isinstance(found, Ports):
                found = exact.get(node) or _unfit(node, found, form, statistics) or found
            if isinstance(found, Ports):
                mixed.nodes[node] = found
            elif types.floats(node.outputs) or types.floats(node.inputs):
                mixed.kept[node] = found
    _drop_small_parts(model, mixed)
    return mixed


def _bodies(model: Model) -> list[Graph]:
    return [body for body in model.bodies() if body.function is None]


def _unfit(node: Node, found: Ports, form: HalfFormat, statistics: Statistics | None) -> str | None:
    reason = unfit_constants(node, found, form)
    if reason is None and statistics is not None:
        reason = unfit_ranges(node, found, form, statistics)
    return reason


def _large_angle(node: Node, statistics: Statistics | None) -> bool:
    found = None if statistics is None else statistics.range(node.inputs[0])
    return found is None or max(-found.minimum, found.maximum) > LARGE_ANGLE


def _drop_small_parts(model: Model, mixed: Mixed) -> None:
    """Keep float32 the connected parts that need more Casts than they have nodes which compute."""
    leader = {node: node for node in mixed.nodes}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    makers = _makers(mixed)
    for node, found in mixed.nodes.items():
        for at in found.inputs:
            if node.inputs[at] in makers:
                leader[find(node)] = find(makers[node.inputs[at]])
    balance = dict.fromkeys(mixed.nodes, 0)
    for node in mixed.nodes:
        row = operators.info(node)
        balance[find(node)] += 0 if row is not None and row.moves else 1
    for node, crossing in _crossings(model, mixed, makers):
        balance[find(node)] -= crossing
    small = [node for node in mixed.nodes if balance[find(node)] < 0]
    for node in small:
        del mixed.nodes[node]
        mixed.kept[node] = "the Casts around it would outnumber what it computes"


def _makers(mixed: Mixed) -> dict[Variable, Node]:
    """float16 tensor -> the node that makes it."""
    return {node.outputs[at]: node for node, found in mixed.nodes.items() for at in found.outputs}


def _crossings(model: Model, mixed: Mixed, makers: dict[Variable, Node]) -> list[tuple[Node, int]]:
    """(a node of the part, Casts) for every tensor at a border; those that an existing Cast spares are not counted."""
    shown = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    found: list[tuple[Node, int]] = []
    entered: set[Variable] = set()
    for node, taken in mixed.nodes.items():
        for at in taken.inputs:
            tensor = node.inputs[at]
            if isinstance(tensor, Constant) or tensor in makers or tensor in entered:
                continue
            entered.add(tensor)
            found.append((node, 0 if _made_by_cast(tensor, mixed.types) else 1))
    for tensor, node in makers.items():
        if id(tensor) in shown or any(not _takes(reader, at, mixed) for reader, at in readers(tensor)):
            found.append((node, 1))
    return found


def readers(tensor: Variable | Constant) -> list[Reader]:
    """Every (node, input) that reads a tensor."""
    return [
        (node, at) for node in dict.fromkeys(tensor.outputs) for at, each in enumerate(node.inputs) if each is tensor
    ]


def _takes(node: Node, at: int, mixed: Mixed) -> bool:
    """Whether an input may be float16 as it comes."""
    if node in mixed.nodes:
        return at in mixed.nodes[node].inputs
    return node.kind[0] == "" and node.op in ANY_READER


def _made_by_cast(tensor: Variable, types: Types) -> bool:
    """Whether a Cast of another type than float32 makes a tensor, and can make float16 instead."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].kind != ("", "Cast"):
        return False
    source = types.of(tensor.inputs[0].inputs[0])
    return source is not None and source != FLOAT32


class Writer:
    """Writes a plan into its model."""

    def __init__(self, model: Model, mixed: Mixed, halves: Halves) -> None:
        self.mixed, self.halves, self.writer, self.form = mixed, halves, halves.writer, halves.form
        self.shown = {id(tensor) for body in model.bodies() for tensor in body.outputs}
        self.bodies = {node: body for body in model.bodies() for node in body.nodes}
        self.homes: dict[Variable, Graph] = {}
        for body in model.bodies():
            self.homes |= dict.fromkeys(body.inputs, body)
            self.homes |= {tensor: body for node in body.nodes for tensor in node.outputs}

    def write(self) -> list[Change]:
        """Constants, then the tensors that become float16, then the Casts into them."""
        changes = [Change("half", label(node), f"{node.op} in {self.form.name}") for node in self.mixed.nodes]
        makers = _makers(self.mixed)
        entering: dict[Variable, None] = {}
        for node, found in self.mixed.nodes.items():
            for at in found.inputs:
                tensor = node.inputs[at]
                if isinstance(tensor, Constant):
                    self.writer.set_input(node, at, self.halves.of(tensor), self.bodies[node])
                elif tensor not in makers:
                    entering[tensor] = None
        for tensor, node in makers.items():
            self._leave(tensor, node)
        for tensor in entering:
            self._enter(tensor)
        return changes

    def _leave(self, tensor: Variable, maker: Node) -> None:
        """Make a tensor float16, and cast it once for all that need it in float32."""
        body = self.bodies[maker]
        wanting = readers(tensor)
        if id(tensor) in self.shown:
            half = self.writer.variable(f"{tensor.name}_{self.form.name}", tensor, self.form.dtype)
            maker.outputs[[each is tensor for each in maker.outputs].index(True)] = half
            self._redirect([(node, at) for node, at in wanting if _takes(node, at, self.mixed)], half)
            self.writer.make(body, "Cast", [half], tensor, to=FLOAT)
            return
        tensor.dtype = self.form.dtype
        floats = [(node, at) for node, at in wanting if not _takes(node, at, self.mixed)]
        if floats:
            restored = self.writer.node(body, "Cast", [tensor], f"{tensor.name}_float", to=FLOAT)
            restored.dtype, restored.shape = FLOAT32, tensor.shape
            self._redirect(floats, restored)

    def _enter(self, tensor: Variable) -> None:
        """Give the float16 nodes that read a float32 tensor one Cast of it, or of what it was cast from."""
        wanting = readers(tensor)
        halves = [(node, at) for node, at in wanting if node in self.mixed.nodes and _takes(node, at, self.mixed)]
        others = [(node, at) for node, at in wanting if not _takes(node, at, self.mixed)]
        source, to = tensor, self.form.element
        if _made_by_cast(tensor, self.mixed.types):
            if not others and id(tensor) not in self.shown:
                tensor.inputs[0].attrs["to"] = to
                tensor.dtype = self.form.dtype
                return
            source = tensor.inputs[0].inputs[0]
        half = self.writer.node(self.homes[tensor], "Cast", [source], f"{tensor.name}_{self.form.name}", to=to)
        half.dtype, half.shape = self.form.dtype, tensor.shape
        self._redirect(halves, half)

    def _redirect(self, wanting: list[Reader], tensor: Variable) -> None:
        for node, at in wanting:
            self.writer.set_input(node, at, tensor, self.bodies[node])


def drop_casts_to_itself(model: Model) -> None:
    """Write a Cast from float32 to float32 as what it is."""
    types = Types(known(model))
    for body in _bodies(model):
        for node in body.nodes:
            if node.kind == ("", "Cast") and types.floats(node.inputs) and types.floats(node.outputs):
                node.op, node.attrs = "Identity", {}


def skips(mixed: Mixed) -> list[Skip]:
    """Every node that holds floats and stays float32, with the reason."""
    return [Skip(label(node), reason) for node, reason in mixed.kept.items() if not _reads_only(node)]


def _reads_only(node: Node) -> bool:
    return node.kind[0] == "" and node.op in ANY_READER
