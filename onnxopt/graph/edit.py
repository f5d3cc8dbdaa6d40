"""Edits that passes share: redirecting uses, inserting and removing nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnxopt.graph.dead import detach
from onnxopt.model import Constant, Graph, Model, Node


def replace_uses(old: Any, new: Any, model: Model) -> int:
    """Make every reader of `old`, in all bodies, read `new`; returns how many inputs changed.

    Body outputs are redirected too, except the main graph's and functions', whose names are the model's signature:
    there the caller keeps a producer.
    """
    return replace_inputs(old, new) + replace_outputs(old, new, inner_bodies(model))


def inner_bodies(model: Model) -> list[Graph]:
    """All bodies but the main graph and functions: those whose outputs may be redirected."""
    return [body for body in model.bodies() if body.parent is not None]


def replace_outputs(old: Any, new: Any, bodies: Iterable[Graph]) -> int:
    """Make these bodies give out `new` where they gave `old`; returns how many outputs changed."""
    count = 0
    for body in bodies:
        for at, tensor in enumerate(body.outputs):
            if tensor is old:
                body.outputs[at] = new
                count += 1
    return count


def replace_inputs(old: Any, new: Any) -> int:
    """Make every node that reads `old`, in all bodies, read `new`; returns how many inputs changed. O(readers)."""
    count = 0
    for consumer in {id(node): node for node in old.outputs}.values():
        for at, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[at] = new
                count += 1
    return count


def is_output(tensor: Any, model: Model) -> bool:
    """Whether the tensor is an output of any body."""
    return any(tensor is output for body in model.bodies() for output in body.outputs)


def named_elsewhere(model: Model) -> dict[int, str]:
    """id(tensor) -> what refers to it besides nodes, so that it must stay: outputs, annotations, training."""
    kept: dict[int, str] = {}
    for body in model.bodies():
        kept |= {id(tensor): f"it is an output of graph {body.name!r}" for tensor in body.outputs}
        annotations = getattr(body.proto, "quantization_annotation", ())
        named = {entry.value for item in annotations for entry in item.quant_parameter_tensor_names}
        named |= {item.tensor_name for item in annotations}
        about = (constant for constant in body.initializers if constant.name in named)
        kept |= {id(constant): "a quantization annotation names it" for constant in about}
    training = model.carrier.training_info
    trained = {entry.key for info in training for entry in (*info.initialization_binding, *info.update_binding)}
    about = (constant for constant in model.graph.initializers if constant.name in trained)
    return kept | {id(constant): "training information names it" for constant in about}


def drop_unused(constants: Iterable[Constant], model: Model) -> int:
    """Remove those of the given constants that nothing reads and no body gives out; returns how many."""
    lost = [constant for constant in constants if not constant.outputs]
    if not lost:
        return 0
    bodies = list(model.bodies())
    outputs = {id(tensor) for body in bodies for tensor in body.outputs}
    gone = {id(constant) for constant in lost if id(constant) not in outputs}
    for body in bodies:
        if any(id(constant) in gone for constant in body.initializers):
            body.initializers = [constant for constant in body.initializers if id(constant) not in gone]
    return len(gone)


def remove_node(node: Node, body: Graph) -> None:
    """Unwire a node and take it out of its body."""
    detach(node)
    body.nodes = [other for other in body.nodes if other is not node]


def insert_before(node: Node, new: list[Node], body: Graph) -> None:
    """Put nodes into the body just before `node`."""
    at = next(index for index, other in enumerate(body.nodes) if other is node)
    body.nodes[at:at] = new


class NodeEdits:
    """Nodes of one body to be put in and taken out; its list is written once, by `write`."""

    def __init__(self, body: Graph) -> None:
        self._body = body
        self._members = {id(node) for node in body.nodes}
        self._gone: dict[int, Node] = {}
        self._before: dict[int, list[Node]] = {}

    def __contains__(self, node: Node) -> bool:
        """Whether the node stands in the body, edits counted."""
        return id(node) in self._members

    def insert_before(self, node: Node, new: Iterable[Node]) -> None:
        """Put nodes just before `node`, one that stood in the body when it was written last."""
        fresh = list(new)
        self._before.setdefault(id(node), []).extend(fresh)
        self._members.update(map(id, fresh))

    def remove(self, node: Node) -> None:
        """Unwire a node and take it out."""
        detach(node)
        self._gone[id(node)] = node
        self._members.discard(id(node))

    def write(self) -> None:
        """Write the list of nodes. Until then nodes that are gone stand there, without inputs and outputs."""
        if self._gone or self._before:
            placed = (each for node in self._body.nodes for each in (*self._before.get(id(node), ()), node))
            self._body.nodes = [node for node in placed if id(node) not in self._gone]
        self._gone.clear()
        self._before.clear()


def label(node: Node) -> str:
    """How reports name a node: its name, or the tensor it makes."""
    return str(node.name or next((tensor.name for tensor in node.outputs if tensor.name), node.op))
