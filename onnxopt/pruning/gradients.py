"""How much the outputs lean on each channel, by gradients: the Fisher information of a factor on the channel.

With a factor m_j = 1 on channel j and a vector v of random signs, E (d(v . y) / d m_j)^2 over feeds and v is the sum
over the outputs of the squared derivative: the diagonal of the Gauss-Newton matrix (Molchanov et al., "Importance
Estimation for Neural Network Pruning", 2019, with outputs in place of a loss). onnx-ad writes the derivatives as an
ONNX graph; it is an extra: pip install 'onnxopt[gradients]'.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper, shape_inference

from onnxopt.calibration import Requests
from onnxopt.calibration.channels import Measure, Source
from onnxopt.errors import PassError, UsageError
from onnxopt.graph import remove_dead
from onnxopt.graph.axes.axis import Floats
from onnxopt.graph.names import Names
from onnxopt.graph.shapes import known
from onnxopt.model import Constant, Model, Node, TensorData, Variable, load

# vectors of signs that are tried
PROBES = 2
_EXTRA = "pip install 'onnxopt[gradients]'"


def fisher(
    model: Model,
    sources: Sequence[Source],
    outputs: Sequence[Variable],
    shapes: Mapping[str, Sequence[int]],
    measure: Measure,
    seed: int,
) -> dict[Source, Floats]:
    """[K] for each source in the main graph: E (d(v . y) / d m)^2 of its channels, over feeds and vectors.

    outputs: the tensors y. shapes: those of all inputs, the same for all feeds. Raises UsageError without onnx-ad, and
    PassError where it can't differentiate an operator.
    """
    found: dict[Source, Floats] = {}
    for probe in range(PROBES):
        differentiated, names = _differentiated(model, sources, outputs, shapes, np.random.default_rng(seed + probe))
        tensors = {tensor.name: tensor for tensor in differentiated.graph.outputs}
        asked = {source: tensors[name] for source, name in names.items() if name in tensors}
        requests = Requests(channel_moments=tuple((tensor, 0) for tensor in asked.values()))
        statistics = measure(differentiated, requests)
        for source, tensor in asked.items():
            moments = statistics.channel_moments(tensor, 0)
            if moments is not None:
                found[source] = found.get(source, np.zeros(len(moments.mean_square))) + moments.mean_square / PROBES
    return found


def _differentiated(
    model: Model,
    sources: Sequence[Source],
    outputs: Sequence[Variable],
    shapes: Mapping[str, Sequence[int]],
    rng: np.random.Generator,
) -> tuple[Model, dict[Source, str]]:
    """A model whose outputs are the derivatives, [K, 1], and their names."""
    engine = _engine()
    clone = model.clone()
    work = clone.model
    for tensor in work.graph.inputs:
        if tensor.name in shapes:
            tensor.shape = list(shapes[tensor.name])
    names = Names(work)
    factors = {source: _factor(work, clone.tensors, source, names) for source in sources}
    wanted = {source: factor.name for source, factor in factors.items() if factor is not None}
    loss = _project(work, [clone.tensors[id(tensor)] for tensor in outputs], names, shapes, rng)
    work.graph.outputs[:] = [loss]
    remove_dead(work)
    proto = shape_inference.infer_shapes(work.to_proto(), data_prop=True)
    try:
        reverse = engine.reverse(
            proto, inputs=list(wanted.values()), outputs=[loss.name], prefix="fisher_", layout="onnx"
        )
    except Exception as error:  # the engine raises errors of many kinds, its own among them
        text = " ".join(str(error).split())[:200]
        raise PassError(
            f"criterion fisher: onnx-ad can't differentiate this model: {text}",
            "use criterion=obs, which needs no gradients",
        ) from error
    return _closed(reverse, loss.name, wanted)


def _engine() -> Any:
    try:
        return importlib.import_module("onnx_ad")
    except ImportError as error:
        raise UsageError("criterion fisher needs gradients, and onnx-ad is not installed", _EXTRA) from error


def _factor(work: Model, tensors: Mapping[int, Variable], source: Source, names: Names) -> Variable | None:
    """A new input that multiplies the channels of a source; None for a source that is not in the main graph."""
    tensor = tensors.get(id(source.tensor))
    here = {made for node in work.graph.nodes for made in node.outputs}
    if tensor is None or tensor not in here or source.direction is not None:
        return None
    width = source.tensor.shape[source.axis]
    shape = [width] + [1] * (-source.axis - 1)
    factor = Variable(names.tensor(f"{tensor.name}_factor"), np.dtype(np.float32), shape)
    scaled = Variable(names.tensor(f"{tensor.name}_scaled"), tensor.dtype, tensor.shape)
    readers = list({id(node): node for node in tensor.outputs}.values())
    node = Node("Mul", names.node(f"{tensor.name}_factor"))
    for reader in readers:
        for at, each in enumerate(reader.inputs):
            if each is tensor:
                reader.inputs[at] = scaled
    node.inputs, node.outputs = [tensor, factor], [scaled]
    place = next(at for at, other in enumerate(work.graph.nodes) if other is tensor.inputs[0])
    work.graph.nodes.insert(place + 1, node)
    work.graph.inputs.append(factor)
    return factor


def _project(
    work: Model,
    outputs: Sequence[Variable],
    names: Names,
    shapes: Mapping[str, Sequence[int]],
    rng: np.random.Generator,
) -> Variable:
    """The sum over all outputs of their product with random signs."""
    facts = known(work, {**{t.name: t.shape for t in work.graph.inputs}, **shapes})
    terms: list[Variable] = []
    for output in outputs:
        shape = facts[id(output)].shape if id(output) in facts else None
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            raise PassError(
                f"criterion fisher: the shape of {output.name!r} does not follow from those of the inputs",
                "use criterion=obs, which needs no gradients",
            )
        signs = rng.choice(np.array([-1.0, 1.0], np.float32), [int(dim) for dim in shape if isinstance(dim, int)])
        constant = Constant(names.tensor("fisher_signs"), TensorData.from_array(signs.astype(np.float32)))
        product = _add(work, names, "Mul", [output, constant])
        terms.append(_add(work, names, "ReduceSum", [product], keepdims=0))
    return terms[0] if len(terms) == 1 else _add(work, names, "Sum", terms)


def _add(work: Model, names: Names, op: str, inputs: Sequence[Variable | Constant], **attrs: Any) -> Variable:
    out = Variable(names.tensor(f"fisher_{op.lower()}"), np.dtype(np.float32), None)
    node = Node(op, names.node(f"fisher_{op.lower()}"), attrs=attrs)
    node.inputs, node.outputs = list(inputs), [out]
    work.graph.nodes.append(node)
    return out


def _closed(reverse: ModelProto, loss: str, wanted: Mapping[Source, str]) -> tuple[Model, dict[Source, str]]:
    """The derivatives as a model of the original inputs: factors are one, and so is the seed."""
    dims = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in reverse.graph.input}
    ones = {name: np.ones(dims[name], np.float32) for name in wanted.values()}
    ones[f"fisher_{loss}"] = np.ones([*dims[f"fisher_{loss}"][:-1], 1], np.float32)
    kept = [info for info in reverse.graph.input if info.name not in ones]
    del reverse.graph.input[:]
    reverse.graph.input.extend(kept)
    reverse.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in ones.items())
    made = {f"fisher_{name}" for name in wanted.values()}
    outputs = [info for info in reverse.graph.output if info.name in made]
    del reverse.graph.output[:]
    reverse.graph.output.extend(outputs)
    return load(reverse), {source: f"fisher_{name}" for source, name in wanted.items()}
