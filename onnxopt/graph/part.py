"""A part of a model as a model of its own, cut out between tensors of its main graph.

Before                                      After  inputs h, outputs z
h = Conv(x, w)                              h is an input
z = Relu(h)                                 z = Relu(h)             z is an output
y = Gemm(z, v)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnxopt.errors import UsageError
from onnxopt.graph.dead import detach, remove_dead
from onnxopt.graph.names import Names
from onnxopt.graph.shapes import infer
from onnxopt.model import Constant, Model, Node, Variable


def part_of(model: Model, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Model:
    """A model that computes `outputs` from `inputs`, both names of tensors of the main graph. `model` is left alone.

    inputs: None for those inputs of the model that the outputs depend on. outputs: None for the model's own. Raises
    UsageError for a name that is no tensor there, a tensor that no input or output can be made of, an input that no
    output depends on, and where an output depends on an input of the model that is not among `inputs`.
    """
    cut = model.clone().model
    infer(cut)
    graph = cut.graph
    tensors = _tensors(cut)
    wanted = list(graph.outputs) if outputs is None else _named("output", outputs, tensors, cut)
    given = None if inputs is None else _named("input", inputs, tensors, cut)
    _check_outputs(wanted, given or [], cut)
    kept, read = _reached(cut, wanted, given or [])
    defaults = {id(tensor) for tensor, _, _ in graph.defaults}
    if given is None:
        given = [tensor for tensor in graph.inputs if id(tensor) in read and id(tensor) not in defaults]
    _check_inputs(given, read, cut, wanted)
    optional = [t for t in graph.inputs if id(t) in read and id(t) in defaults and t not in given]
    for node in graph.nodes:
        if id(node) not in kept:
            detach(node)
    graph.nodes = [node for node in graph.nodes if id(node) in kept]
    _disconnect(given, cut)
    graph.inputs, graph.outputs = [*given, *optional], wanted
    graph.defaults = [entry for entry in graph.defaults if entry[0] in optional]
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in wanted:
        if tensor.name not in graph.output_infos and tensor.info is not None:
            graph.output_infos[tensor.name] = [tensor.info]
    graph.value_infos = [entry for entry in graph.value_infos if id(entry[0]) not in ends]
    cut.carrier.ClearField("training_info")
    remove_dead(cut)
    _drop_functions(cut)
    cut.normalize()
    return cut


def _tensors(model: Model) -> dict[str, Any]:
    graph = model.graph
    made = (tensor for node in graph.nodes for tensor in node.outputs if not tensor.is_empty())
    return {tensor.name: tensor for tensor in (*graph.initializers, *graph.inputs, *made)}


def _named(role: str, names: Sequence[str], tensors: Mapping[str, Any], model: Model) -> list[Any]:
    if not names:
        raise UsageError(f"no {role} is named", f"name at least one tensor, or leave --{role}s out")
    repeated = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if repeated is not None:
        raise UsageError(f"{role} {repeated!r} is named twice", "name it once")
    for name in names:
        if name not in tensors:
            raise UsageError(f"{role} {name!r}: the main graph has no such tensor", _remedy(name, tensors, model))
        if isinstance(tensors[name], Constant):
            raise UsageError(f"{role} {name!r} is a constant of the model", "name a tensor that is computed")
    return [tensors[name] for name in names]


def _remedy(name: str, tensors: Mapping[str, Any], model: Model) -> str:
    for body in model.bodies():
        if body.parent is None:
            continue
        if any(tensor.name == name for node in body.nodes for tensor in node.outputs):
            owner = body.owner.op if body.owner is not None else "node"
            return f"it is made within the body of a {owner}, where no model can be cut; name a tensor outside"
    node = next((node for node in model.graph.nodes if node.name == name), None)
    if node is not None:
        made = ", ".join(tensor.name for tensor in node.outputs if tensor.name)
        return f"it is the name of a node, whose outputs are called: {made}"
    close = difflib.get_close_matches(name, tensors, n=1, cutoff=0.55)
    ends = ", ".join(tensor.name for tensor in (*model.graph.inputs, *model.graph.outputs))
    return f"did you mean {close[0]!r}?" if close else f"names are those of the file's tensors; its ends are {ends}"


def _check_outputs(wanted: Sequence[Any], given: Sequence[Any], model: Model) -> None:
    sources = {id(tensor) for tensor in (*given, *model.graph.inputs)}
    for tensor in wanted:
        if id(tensor) in sources:
            raise UsageError(f"output {tensor.name!r} is an input too: nothing computes it", "name what is computed")
        if isinstance(tensor, Variable) and tensor.dtype is None and tensor.info is None and not _stated(tensor, model):
            raise UsageError(
                f"output {tensor.name!r}: its element type is not known", "name another tensor, nearer to an input"
            )


def _stated(tensor: Variable, model: Model) -> bool:
    return tensor.name in model.graph.output_infos


def _check_inputs(given: Sequence[Any], read: set[int], model: Model, wanted: Sequence[Any]) -> None:
    idle = next((tensor for tensor in given if id(tensor) not in read), None)
    if idle is not None:
        raise UsageError(
            f"input {idle.name!r}: none of the outputs depends on it",
            f"leave it out, or name other outputs than {', '.join(tensor.name for tensor in wanted)}",
        )
    defaults = {id(tensor) for tensor, _, _ in model.graph.defaults}
    known = {id(tensor) for tensor in given} | defaults
    missing = [tensor.name for tensor in model.graph.inputs if id(tensor) in read and id(tensor) not in known]
    if missing:
        raise UsageError(
            f"the outputs depend on {', '.join(map(repr, missing))} too, not only on "
            f"{', '.join(tensor.name for tensor in given) or 'constants'}",
            f"add to --inputs: {', '.join(missing)}; or cut nearer to the outputs",
        )
    for tensor in given:
        if tensor.dtype is None and tensor.info is None:
            raise UsageError(
                f"input {tensor.name!r}: its element type is not known", "cut at another tensor, nearer to an input"
            )


def _reached(model: Model, wanted: Iterable[Any], given: Iterable[Any]) -> tuple[set[int], set[int]]:
    """Identities of the nodes that the outputs need, and of all tensors they read, down to `given`."""
    stops = {id(tensor) for tensor in given}
    producer = {id(tensor): node for node in model.graph.nodes for tensor in node.outputs if not tensor.is_empty()}
    kept: set[int] = set()
    read = {id(tensor) for tensor in wanted}
    pending = [producer[id(tensor)] for tensor in wanted if id(tensor) in producer]
    while pending:
        node = pending.pop()
        if id(node) in kept:
            continue
        kept.add(id(node))
        for tensor in _reads(node):
            read.add(id(tensor))
            if id(tensor) not in stops and id(tensor) in producer:
                pending.append(producer[id(tensor)])
    return kept, read


def _reads(node: Node) -> Iterator[Any]:
    """All tensors that the node or a body within it reads."""
    yield from node.inputs
    for inner in Node.graphs(node):
        yield from inner.outputs
        for each in inner.nodes:
            yield from _reads(each)


def _disconnect(given: Sequence[Variable], model: Model) -> None:
    """Take the tensors from the nodes that made them; one that is needed for another output makes an unread one."""
    names = Names(model)
    cut = {id(tensor) for tensor in given}
    for node in model.graph.nodes:
        for at, tensor in enumerate(node.outputs):
            if id(tensor) in cut:
                node.outputs[at] = Variable(names.tensor(f"{tensor.name}_before"), tensor.dtype, tensor.shape)


def _drop_functions(model: Model) -> None:
    """Remove local functions that nothing calls any more."""
    while True:
        called = {(node.domain or "", node.op) for body in model.bodies() for node in body.nodes}
        kept = [function for function in model.functions if (function.domain, function.name) in called]
        if len(kept) == len(model.functions):
            return
        model.functions = kept
