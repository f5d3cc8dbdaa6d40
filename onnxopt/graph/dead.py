"""Dead code: nodes nobody reads, values nobody uses."""

from __future__ import annotations

from onnxopt.model import Graph, Model, Node, Variable

# Loop and Scan bodies have positional outputs; a node's outputs are positional too: both are blanked, never removed.


def remove_dead(model: Model) -> int:
    """Remove nodes whose outputs nobody reads and constants nobody uses, in all bodies; returns how many went.

    Output positions stay as they are; bodies keep their outputs and inputs. A removed random node does not change what
    the runtime draws for others: ONNX gives every node its own seed.
    """
    model.normalize()
    removed = 0
    used = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    for body in list(model.bodies()):
        removed += _remove_nodes(body, used)
    used = {id(tensor) for body in model.bodies() for tensor in body.outputs}
    for body in model.bodies():
        for node in body.nodes:
            used.update(map(id, node.inputs))
    for body in model.bodies():
        kept = [constant for constant in body.initializers if id(constant) in used]
        removed += len(body.initializers) - len(kept)
        body.initializers = kept
    return removed


def _remove_nodes(body: Graph, used: set[int]) -> int:
    """Remove dead nodes of one body; a consumer list that becomes empty makes the producer a candidate."""
    dead: set[int] = set()
    pending = list(reversed(body.nodes))
    members = {id(node) for node in body.nodes}
    while pending:
        node = pending.pop()
        if id(node) in dead or id(node) not in members or any(t.outputs or id(t) in used for t in node.outputs):
            continue
        dead.add(id(node))
        sources = [producer for tensor in _all_inputs(node) for producer in tensor.inputs]
        detach(node)
        pending += sources
    if dead:
        body.nodes = [node for node in body.nodes if id(node) not in dead]
    return len(dead)


def _all_inputs(node: Node) -> list[Variable]:
    """The node's inputs and those of every node in its bodies."""
    found = list(node.inputs)
    for inner in Node.graphs(node):
        for each in inner.nodes:
            found += _all_inputs(each)
    return found


def detach(node: Node) -> None:
    """Unwire a node, and every node within its bodies, from all tensors."""
    node.inputs.clear()
    node.outputs.clear()
    for inner in Node.graphs(node):
        for each in inner.nodes:
            detach(each)
