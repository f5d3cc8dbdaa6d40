"""Part `rounding`: the output error of 4-bit weights beside plain rounding to nearest, layer by layer.

With G = E[x x^T] of what a layer's weight W multiplies, an error D of the weight costs E|D x|^2 = tr(D G D^T) at the
output, whose power without bias is tr(W G W^T). Their ratio is the relative squared error; its root compares with
amplitudes. (Nagel et al. 2020, arXiv 2004.10568, equation 11; Frantar et al. 2022, arXiv 2210.17323.)

The effective weights of a result are read back out of its file: what its constants give, computed by onnxruntime.
"""

from __future__ import annotations

import re
import statistics as numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from benchmarks.bench import told_error
from benchmarks.ours import feeds_in, run_steps
from benchmarks.quantization.bench import Bench
from onnxopt.calibration import Requests, collect
from onnxopt.feeds import Feeds
from onnxopt.graph.extract import extract
from onnxopt.model import Constant, Model, Node, Variable, load
from onnxopt.passbase import names
from onnxopt.pipeline.grammar import parse
from onnxopt.pipeline.passes import evaluate
from onnxopt.pipeline.prepare import with_prepared

Rows = npt.NDArray[np.float64]  # [groups, outputs of a group, inputs of one output]
BOUND = 0.6
_GRAM_BYTES = 1 << 30  # of matrices gathered in one run


@dataclass(frozen=True)
class Effective:
    """The weight that a layer of a result multiplies by: its rows, and how many weights share a scale."""

    rows: Rows
    block: int


@dataclass(frozen=True)
class LayerError:
    """Roots of the relative squared errors of one layer."""

    name: str
    block: int
    ours: float
    symmetric: float
    asymmetric: float


def rounding(bench: Bench) -> Iterator[str]:
    """One line a model, or one a layer with --each; without a pass that rounds to 4 bits, the plain errors."""
    text = bench.args.rounding
    installed = ".py:" in text or re.split("[:{]", text)[0] in names()
    steps = [step for step in with_prepared(parse(text if installed else "int8")) if step.inserted_for is not None]
    feeds = feeds_in(bench.calibration, bench.path)
    try:
        model, _ = run_steps(bench.path, steps, feeds, bench.args.target)
        made = effective_weights(load(bench.make(text).path)) if installed else None
        errors, left = layer_errors(model, made, feeds, bench.args.block, bench.args.largest_gram)
    except Exception as error:  # noqa: BLE001  one failing model must not end the part
        yield f"{bench.name}: {told_error(error)}"
        return
    if not installed:
        yield f"{bench.name}: {text} is not installed; rounding to nearest, block {bench.args.block}:"
    if bench.args.each:
        for found in errors:
            told = f"{found.ours:.4f} of " if installed else ""
            yield f"  {found.name:40} {told}{found.symmetric:.4f}, {found.asymmetric:.4f} block {found.block}"
    yield summary(bench.name, errors, left, installed)
    for found in errors:
        bench.log({"part": "rounding", **vars(found)})


def summary(name: str, errors: Sequence[LayerError], left: Mapping[str, int], installed: bool) -> str:
    """Medians over layers, what was left out, and the bound."""
    out = "; ".join(f"{count} {reason}" for reason, count in left.items())
    told = f"{name}: {len(errors)} layers" + (f" ({out})" if out else "")
    if not errors:
        return told
    symmetric, asymmetric = ([getattr(e, kind) for e in errors] for kind in ("symmetric", "asymmetric"))
    told += f"; root of relative squared error, median: nearest {numbers.median(symmetric):.4f} symmetric,"
    told += f" {numbers.median(asymmetric):.4f} asymmetric"
    if not installed:
        return told
    told += f", ours {numbers.median(e.ours for e in errors):.4f}"
    for kind, plain in (("symmetric", symmetric), ("asymmetric", asymmetric)):
        ratios = [e.ours / p for e, p in zip(errors, plain, strict=True) if p > 0]
        if ratios:
            middle = numbers.median(ratios)
            told += f"; over {kind} {middle:.2f} [{min(ratios):.2f}, {max(ratios):.2f}], squared {middle**2:.2f},"
            told += f" bound {BOUND}: {'yes' if middle <= BOUND else 'NO'}"
    return told


def layer_errors(
    model: Model, made: Mapping[str, Effective] | None, feeds: Feeds, block: int, largest: int
) -> tuple[list[LayerError], dict[str, int]]:
    """The error of every layer of the float `model` that `made` rounded, and why others are left out: reason -> count.

    made: `effective_weights` of the result; None rounds all to nearest. block: of plain rounding where made is None.
    largest: inputs of one output above which no Gram matrix is gathered.
    """
    left: dict[str, int] = {}
    weights: dict[Node, Rows] = {}
    for node in model.graph.nodes:
        if node.kind[0] or node.op not in ("Conv", "Gemm", "MatMul") or not isinstance(node.inputs[1], Constant):
            continue
        rows = rows_of(node, node.inputs[1].values)
        reason = _left_out(node, rows, made, largest)
        if reason is not None:
            left[reason] = left.get(reason, 0) + 1
        elif rows is not None:
            weights[node] = rows
    errors: list[LayerError] = []
    for part in _parts(weights):
        found = collect(model, Requests(grams=tuple(part)), feeds)
        for node in part:
            gram = found.gram(node)
            if gram is None:
                left["without Gram matrix"] = left.get("without Gram matrix", 0) + 1
                continue
            rows = weights[node]
            size = block if made is None else made[_key(node)].block
            plain = [_root(rows, nearest(rows, size, symmetric), gram.second) for symmetric in (True, False)]
            ours = float("nan") if made is None else _root(rows, made[_key(node)].rows, gram.second)
            errors.append(LayerError(str(node.name or _key(node)), size, ours, *plain))
    return errors, left


def _left_out(node: Node, rows: Rows | None, made: Mapping[str, Effective] | None, largest: int) -> str | None:
    if rows is None:
        return "with a weight of more than 2 axes"
    if rows.shape[2] > largest:
        return f"of more than {largest} inputs"
    if made is None:
        return None
    if _key(node) not in made:
        return "not found in the result"
    ours = made[_key(node)].rows
    if ours.shape != rows.shape:
        return "of another shape in the result"
    return "left as they were" if np.array_equal(ours, rows) else None


def _parts(weights: Mapping[Node, Rows]) -> Iterator[list[Node]]:
    """Layers whose matrices are gathered in one run."""
    part: list[Node] = []
    held = 0
    for node, rows in weights.items():
        size = 16 * rows.shape[0] * rows.shape[2] ** 2  # compensated sums are two arrays
        if part and held + size > _GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(node)
        held += size
    if part:
        yield part


def _root(rows: Rows, other: Rows, gram: Rows) -> float:
    return float(np.sqrt(relative_error(rows, other, gram)))


def relative_error(rows: Rows, other: Rows, gram: Rows) -> float:
    """tr(D G D^T) / tr(W G W^T) with D = other - rows, summed over groups; 0 where neither has any, inf over nothing.

    rows, other: [groups, outputs, inputs]. gram: E[x x^T], [groups, inputs, inputs].
    """
    wrong = rows - other
    error = float(np.einsum("gni,gij,gnj->", wrong, gram, wrong, optimize=True))
    power = float(np.einsum("gni,gij,gnj->", rows, gram, rows, optimize=True))
    if power <= 0:
        return 0.0 if error <= 0 else float("inf")
    return max(error, 0.0) / power


def nearest(rows: Rows, block: int, symmetric: bool) -> Rows:
    """Each block of a row rounded to 16 levels: the baseline.

    symmetric: scale = -w / 8 of the weight w of largest magnitude, codes -8..7, as onnxruntime's MatMulNBits quantizer
    does; else 15 steps from the least to the largest weight, zero among them.
    """
    groups, outputs, inputs = rows.shape
    size = min(block, inputs)
    padded = np.pad(rows, [(0, 0), (0, 0), (0, -inputs % size)]).reshape(groups, outputs, -1, size)
    if symmetric:
        at = np.abs(padded).argmax(axis=-1)[..., None]
        scale = np.take_along_axis(padded, at, axis=-1) / -8.0
        zero, codes = np.zeros_like(scale), (-8, 7)
    else:
        low = np.minimum(padded.min(axis=-1, keepdims=True), 0.0)
        scale = (np.maximum(padded.max(axis=-1, keepdims=True), 0.0) - low) / 15.0
        zero, codes = np.rint(-low / np.where(scale == 0, 1.0, scale)), (0, 15)
    scale = np.where(scale == 0, 1.0, scale)
    rounded = (np.clip(np.rint(padded / scale) + zero, *codes) - zero) * scale
    return np.asarray(rounded.reshape(groups, outputs, -1)[..., :inputs])


def rows_of(node: Node, weight: npt.NDArray[np.generic]) -> Rows | None:
    """The weight of a Conv, Gemm or MatMul as the rows that its Gram matrix belongs to; None for batched products."""
    values = np.asarray(weight, np.float64)
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        return values.reshape(groups, values.shape[0] // groups, -1)
    if values.ndim != 2:
        return None
    return (values if node.op == "Gemm" and node.attrs.get("transB", 0) else values.T)[None]


def effective_weights(model: Model) -> dict[str, Effective]:
    """Name of a layer's output -> the weight it multiplies by, of the main graph's layers whose weight is constant."""
    found = {}
    for node in model.graph.nodes:
        effective = None
        if node.kind == ("com.microsoft", "MatMulNBits"):
            effective = _of_blocks(node)
        elif not node.kind[0] and node.op in ("Conv", "Gemm", "MatMul"):
            effective = _of_constants(model, node)
        if effective is not None:
            found[_key(node)] = effective
    return found


def _key(node: Node) -> str:
    return str(node.outputs[0].name)


def _of_constants(model: Model, node: Node) -> Effective | None:
    """Evaluate what leads to the weight, where all of it is constant."""
    weight = node.inputs[1]
    if isinstance(weight, Constant):
        rows = rows_of(node, weight.values)
        return None if rows is None else Effective(rows, rows.shape[2])
    nodes = constant_nodes(weight)
    if nodes is None:
        return None
    proto, inputs = extract(nodes, [weight], model.opset, model.ir_version)
    rows = rows_of(node, evaluate(proto, inputs)[0])
    return None if rows is None else Effective(rows, _block(nodes, rows))


def constant_nodes(tensor: Variable) -> list[Node] | None:
    """The nodes that compute `tensor` from constants, sorted; None where an input of the model has a part in it."""
    done: dict[int, Node] = {}

    def add(found: Variable) -> bool:
        if not found.inputs:
            return False
        node: Node = found.inputs[0]
        if id(node) not in done:
            reached = [add(source) for source in node.inputs if isinstance(source, Variable) and not source.is_empty()]
            if not all(reached):
                return False
            done[id(node)] = node
        return True

    return list(done.values()) if add(tensor) else None


def _block(nodes: Sequence[Node], rows: Rows) -> int:
    """Weights to a scale: the scales are the largest float constant on the way."""
    read = [tensor for node in nodes for tensor in node.inputs if isinstance(tensor, Constant)]
    scales = max((tensor.data.size for tensor in read if tensor.dtype.kind == "f"), default=1)
    return max(1, min(int(rows.shape[2]), round(rows.size / scales)))


def _of_blocks(node: Node) -> Effective | None:
    """What MatMulNBits makes of the identity."""
    if not all(isinstance(tensor, Constant) or tensor.is_empty() for tensor in node.inputs[1:]):
        return None
    inputs, outputs = int(node.attrs["K"]), int(node.attrs["N"])
    kept = {key: node.attrs[key] for key in ("K", "N", "bits", "block_size") if key in node.attrs}
    given = ["" if tensor.is_empty() else f"w{at}" for at, tensor in enumerate(node.inputs[1:5])]  # no bias
    layer = helper.make_node("MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", **kept)
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [inputs, inputs]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [inputs, outputs]),
    ]
    values = [t.data.to_proto(n) for t, n in zip(node.inputs[1:5], given, strict=True) if n]
    graph = helper.make_graph([layer], "weight", ports[:1], ports[1:], values)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    found = evaluate(proto, {"x": np.eye(inputs, dtype=np.float32)})[0]
    return Effective(np.asarray(found, np.float64).T[None], int(node.attrs["block_size"]))
