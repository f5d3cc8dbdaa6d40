"""Inner tensors of a model, run by run, no more of them at once than memory is meant for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxopt.graph.names import Names
from onnxopt.graph.shapes import Fact, known
from onnxopt.model import Model, Node, Variable
from onnxopt.runtime import Session

_NAME = "the model under proof"
# bytes of an element whose type is not looked up
_WIDEST = 4


def sizes(model: Model, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, int]:
    """Name -> bytes that each of these tensors of the main graph takes in a run on these inputs.

    What shape inference does not tell, one run does, which hands over shapes alone. Raises PassError where it fails.
    """
    given = {name: value.shape for name, value in inputs.items() if isinstance(value, np.ndarray)}
    facts, here = known(model, given), _tensors(model)
    found, unknown = {}, []
    for name in names:
        fact = facts.get(id(here[name]), Fact())
        shape = [size for size in fact.shape or () if isinstance(size, int)]
        if fact.shape is None or len(shape) != len(fact.shape):
            unknown.append(name)
        else:
            found[name] = math.prod(shape) * (4 if fact.dtype is None else np.dtype(fact.dtype).itemsize)
    return found | (_measured(model, unknown, inputs) if unknown else {})


def _measured(model: Model, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, int]:
    clone = model.clone().model
    here, fresh = _tensors(clone), Names(clone)
    outputs = {}
    for name in names:
        outputs[name] = Variable(fresh.tensor(f"{name}_shape"), dtype=np.dtype(np.int64))
        node = Node(op="Shape", name=fresh.node(f"{name}_Shape"))
        node.inputs, node.outputs = [here[name]], [outputs[name]]
        clone.graph.nodes.append(node)
    clone.graph.outputs[:] = list(outputs.values())
    shapes = Session(clone, optimize=False, one_block=False, name=_NAME).run(inputs)
    return {name: _WIDEST * math.prod(shapes[output.name].tolist()) for name, output in outputs.items()}


def grouped(names: Sequence[str], held: Mapping[str, int], memory: int) -> list[list[str]]:
    """The names in order, in groups of at most `memory` bytes, or of one."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = held[name]
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


def exposing(model: Model, names: Sequence[str], threads: int) -> Session:
    """A session that gives out these tensors of the main graph and nothing else, unoptimized: each exists as it is.

    Raises ModelError where onnxruntime refuses the model.
    """
    clone = model.clone().model
    here = _tensors(clone)
    wanted = [here[name] for name in names]
    facts = known(clone) if any(tensor.dtype is None for tensor in wanted) else {}
    for tensor in wanted:
        if tensor.dtype is None and id(tensor) in facts:
            tensor.dtype = facts[id(tensor)].dtype
    clone.graph.outputs[:] = wanted
    return Session(clone, optimize=False, threads=threads, one_block=False, name=_NAME)


def main_tensors(model: Model) -> set[str]:
    """Names of the tensors that nodes of the main graph make, and of its inputs."""
    return set(_tensors(model))


def _tensors(model: Model) -> dict[str, Variable]:
    made = [*model.graph.inputs, *(tensor for node in model.graph.nodes for tensor in node.outputs)]
    return {tensor.name: tensor for tensor in made if not tensor.is_empty()}
