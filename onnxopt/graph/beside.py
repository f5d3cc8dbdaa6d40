"""Two models in one graph over the same inputs, so that one run shows tensors of both for the same sample."""

from __future__ import annotations

from dataclasses import dataclass

from onnxopt.graph.names import Names
from onnxopt.model import Model, Variable


@dataclass(frozen=True)
class Beside:
    """`model` computes both. first, second: id of a variable of either model -> the variable it became."""

    model: Model
    first: dict[int, Variable]
    second: dict[int, Variable]


def beside(first: Model, second: Model) -> Beside:
    """Clones of two models, side by side in one main graph; the second reads the first's inputs of the same names.

    Both have the same inputs and local functions. The outputs are the first's; names of the second are new.
    """
    one, other = first.clone(), second.clone()
    joined, guest = one.model, other.model
    inputs = {tensor.name: tensor for tensor in joined.graph.inputs}
    mapped = {id(tensor): inputs[tensor.name] for tensor in guest.graph.inputs if tensor.name in inputs}
    names = Names(joined)
    for body in guest.bodies():
        if body.function is not None:
            continue
        owned = [*body.initializers, *(tensor for node in body.nodes for tensor in node.outputs)]
        owned += body.inputs if body is not guest.graph else []
        for tensor in owned:
            if tensor.name:
                tensor.name = names.tensor(f"{tensor.name}_beside")
        for node in body.nodes:
            node.name = names.node(f"{node.name}_beside") if node.name else node.name
            for at, tensor in enumerate(node.inputs):
                if id(tensor) in mapped:
                    node.inputs[at] = mapped[id(tensor)]
        for at, tensor in enumerate(body.outputs):
            if id(tensor) in mapped:
                body.outputs[at] = mapped[id(tensor)]
    joined.graph.nodes += guest.graph.nodes
    joined.graph.initializers += guest.graph.initializers
    joined.normalize()
    second_map = {key: mapped.get(id(tensor), tensor) for key, tensor in other.tensors.items()}
    return Beside(joined, one.tensors, second_map)
