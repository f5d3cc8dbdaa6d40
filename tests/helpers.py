"""What tests share: tiny textual models, two independent runtimes to judge by, and comparisons.

Nothing here goes through onnxopt.runtime: the judges must not share code with the judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, parser
from onnx.reference import ReferenceEvaluator

from onnxopt.model import Graph, Model, Node, load
from onnxopt.passbase import Context, Pass, PassResult

Feeds = Mapping[str, Any]


def proto(text: str, opset: int = 17, ir_version: int = 8, imports: str = "") -> ModelProto:
    """A ModelProto from onnx's textual syntax without the header: `g (float[2] x) => (float[2] y) { y = Relu(x) }`."""
    others = f", {imports}" if imports else ""
    model: ModelProto = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{others}]>\n{text}')
    return model


def model(text: str, opset: int = 17, ir_version: int = 8, imports: str = "") -> Model:
    """A Model from onnx's textual syntax."""
    return load(proto(text, opset, ir_version, imports))


def with_weights(source: ModelProto, **weights: NDArray[Any]) -> ModelProto:
    """The proto with more initializers in its main graph."""
    for name, array in weights.items():
        source.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return source


def session(source: ModelProto | Model, optimize: bool = False) -> onnxruntime.InferenceSession:
    """An onnxruntime session, by default without graph optimization, one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    raw = (source.to_proto() if isinstance(source, Model) else source).SerializeToString()
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def run(source: ModelProto | Model, feeds: Feeds, optimize: bool = False) -> dict[str, Any]:
    """Outputs by name from onnxruntime, by default unoptimized."""
    runner = session(source, optimize)
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(names, dict(feeds)), strict=True))


def reference(source: ModelProto | Model, feeds: Feeds) -> dict[str, Any]:
    """Outputs by name from onnx's reference implementation."""
    graph = source.to_proto() if isinstance(source, Model) else source
    names = [output.name for output in graph.graph.output]
    with np.errstate(all="ignore"):
        return dict(zip(names, ReferenceEvaluator(graph).run(None, dict(feeds)), strict=True))


def random_feeds(source: ModelProto | Model, seed: int = 0, free: int = 2) -> dict[str, NDArray[Any]]:
    """One random sample for every input without a default; open dims become `free`."""
    graph = (source.to_proto() if isinstance(source, Model) else source).graph
    rng = np.random.default_rng(seed)
    given = {tensor.name for tensor in graph.initializer}
    feeds: dict[str, NDArray[Any]] = {}
    for info in graph.input:
        if info.name in given:
            continue
        tensor = info.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        shape = [free if dim < 0 else dim for dim in dims]
        feeds[info.name] = _random(rng, shape, tensor.elem_type)
    return feeds


def _random(rng: np.random.Generator, shape: Sequence[int], kind: int) -> NDArray[Any]:
    if kind == TensorProto.BOOL:
        return rng.integers(0, 2, shape).astype(np.bool_)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    if dtype.kind in "iu":
        return np.asarray(rng.integers(0, 3, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def evaluate(source: ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """What a Context offers passes: a small model's outputs, unoptimized."""
    return list(run(source, inputs).values())


def apply(the_pass: Pass, target: Model) -> PassResult:
    """Run one pass in place with a plain context."""
    return the_pass.run(target, Context(evaluate=evaluate))


def operators(target: Model | Graph) -> list[str]:
    """Operator types of the main graph (or the given body), in order."""
    body = target.graph if isinstance(target, Model) else target
    return [node.op for node in body.nodes]


def node_of(target: Model, op: str) -> Node:
    """The only node of this operator type, in any body."""
    found = [node for body in target.bodies() for node in body.nodes if node.op == op]
    assert len(found) == 1, f"{len(found)} nodes of type {op}"
    node: Node = found[0]
    return node


def assert_valid(target: Model) -> None:
    """The checker accepts it and it is sorted."""
    onnx.checker.check_model(target.to_proto(), full_check=False)


def assert_equal(before: Feeds, after: Feeds) -> None:
    """The same names and bit-equal outputs: -0.0 is not 0.0, NaN payloads count."""
    assert list(before) == list(after)
    for name, expected in before.items():
        _assert_equal_value(name, expected, after[name])


def _assert_equal_value(name: str, expected: Any, found: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected), name
        for one, other in zip(expected, found, strict=True):
            _assert_equal_value(name, one, other)
        return
    if expected is None:
        assert found is None, name
        return
    one, other = np.asarray(expected), np.asarray(found)
    assert (one.dtype, one.shape) == (other.dtype, other.shape), name
    same = one.tolist() == other.tolist() if one.dtype.kind in "OUS" else one.tobytes() == other.tobytes()
    assert same, f"{name} differs"


def assert_close(before: Feeds, after: Feeds, relative: float = 1e-5) -> None:
    """The tolerance of rounding passes: max|difference| <= relative * max|expected| per output, and a like shape.

    What is not finite must be the same.
    """
    assert list(before) == list(after)
    for name, expected in before.items():
        one, other = np.asarray(expected), np.asarray(after[name])
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        if one.dtype.kind in "OUS":
            assert one.tolist() == other.tolist(), f"{name} differs"
            continue
        doubles, found = one.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(doubles)
        assert np.array_equal(doubles[~finite], found[~finite], equal_nan=True), f"{name}: other values are not finite"
        difference = np.max(np.abs(doubles[finite] - found[finite]), initial=0.0)
        scale = np.max(np.abs(doubles[finite]), initial=0.0)
        assert difference <= relative * scale, f"{name}: {difference} against {scale}"
