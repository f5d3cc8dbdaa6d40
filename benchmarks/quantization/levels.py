"""Part `levels`: does a result load and agree at every optimization level, and how much of it runs on integers?"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime

from benchmarks.bench import told_error
from benchmarks.quantization.bench import Bench
from benchmarks.quantization.steps import told_steps
from onnxopt.feeds import Feeds
from onnxopt.model import Model, Node, Variable, load
from onnxopt.runtime import Session
from onnxopt.verification import Comparison, RecordedOutputs, compare

MARGIN_DB = 10.0
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operators that are integer layers as they stand in a file, and those that the runtime makes of QDQ groups.
WRITTEN = frozenset(
    {"ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
    | {"MatMulNBits", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul"}
)


def levels(bench: Bench) -> Iterator[str]:
    """A few lines for each of ours."""
    yield f"{bench.name}:"
    for recipe in bench.args.ours:
        try:
            path = bench.make(recipe).path
            yield f"  {recipe:22} {told_levels(path)}"
            yield f"  {recipe:22} {told_agreement(bench.path, path, bench.evaluation)}"
            yield f"  {recipe:22} {told_steps(path, bench.evaluation)}"
            yield f"  {recipe:22} {told_kernels(path)}"
        except Exception as error:  # noqa: BLE001  one failing result must not end the part
            yield f"  {recipe:22} {told_error(error)}"


def told_levels(path: Path) -> str:
    """Which levels refuse the model."""
    refused = []
    for name in LEVELS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, name)
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen classes that share no base
            refused.append(f"{name} refuses it: {told_error(error)}")
    return "; ".join(refused) or f"loads at all {len(LEVELS)} levels: yes"


def told_agreement(original: Path, path: Path, feeds: Feeds) -> str:
    """SQNR of the optimized result against itself unoptimized, and against the float model."""
    optimized = RecordedOutputs(Session(path), feeds)
    itself = compare(RecordedOutputs(Session(path, optimize=False), feeds), optimized)
    float_ = compare(RecordedOutputs(Session(original), feeds), optimized)
    if itself.min_sqnr_db is None or float_.min_sqnr_db is None:
        same = itself.quality
        return f"answers equal: unoptimized {same:.4f}, float {float_.quality:.4f}"
    holds = float_.min_sqnr_db == math.inf or itself.min_sqnr_db >= float_.min_sqnr_db + MARGIN_DB
    told = f"SQNR to unoptimized {_db(itself)}, to float {_db(float_)}; {MARGIN_DB:.0f} dB above"
    return f"{told}: {'yes' if holds else 'NO'}"


def _db(found: Comparison) -> str:
    return f"{found.min_sqnr_db:.1f} dB"


def told_kernels(path: Path) -> str:
    """Layers that are quantized in the file, and the integer kernels that the runtime makes of them and of others."""
    layers = quantized_layers(load(path))
    kernels = Counter(op for op in optimized_operators(path) if op in WRITTEN or op.startswith("QLinear"))
    served = sum(count for op, count in kernels.items() if op in WRITTEN)
    return f"{sum(layers.values())} quantized layers ({_counts(layers)}), {served} integer ones ({_counts(kernels)})"


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{op} {count}" for op, count in found.most_common()) or "none"


def quantized_layers(model: Model) -> Counter[str]:
    """Operator -> how many layers of it read both operands from DequantizeLinear or compute on codes as they stand."""
    nodes = [node for body in model.bodies() for node in body.nodes]
    return Counter(node.op for node in nodes if node.op in WRITTEN or (node.op in LAYERS and _between_codes(node)))


def _between_codes(node: Node) -> bool:
    return all(
        isinstance(tensor, Variable) and bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"
        for tensor in node.inputs[:2]
    )


def optimized_operators(path: Path) -> list[str]:
    """Operators of all nodes of the model as onnxruntime runs it, those of inner bodies too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "optimized.onnx")
        Session(path, optimized_path=out)
        return list(_operators(onnx.load(out).graph))


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _operators(body)
