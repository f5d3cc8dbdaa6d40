"""Small models through the passes fp16 and bf16, and what every result must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto

from onnxopt.calibration import collect
from onnxopt.model import Model
from onnxopt.passbase import Context, Pass, PassResult
from onnxopt.passes.bf16 import Bf16
from onnxopt.passes.fp16 import Fp16
from tests.helpers import run
from tests.passes.quantizing import samples, walk

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def halve(model: Model, feeds: Iterable[Feed] | None = None, **options: Any) -> PassResult:
    """The pass fp16 on `model`, in place, with statistics of `feeds`."""
    return apply(Fp16(**options), model, feeds)


def store_bfloat16(model: Model, **options: Any) -> PassResult:
    """The pass bf16 on `model`, in place."""
    return apply(Bf16(**options), model, None)


def apply(the_pass: Pass, model: Model, feeds: Iterable[Feed] | None) -> PassResult:
    """One pass in place; the result is held against what must always be true of it."""
    wanted = None if feeds is None else the_pass.needs(model)
    statistics = None if wanted is None or feeds is None else collect(model, wanted, samples(feeds))
    result = the_pass.run(model, Context(statistics=statistics))
    assert_sound(model)
    return result


def assert_sound(model: Model) -> None:
    """Checked, strictly inferred, loaded at every level, and no Cast behind another."""
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert not chained_casts(proto)


def chained_casts(proto: onnx.ModelProto) -> list[str]:
    """Casts to a float type that read a Cast to a float type."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    casts = [node for node in walk(proto.graph) if node.op_type == "Cast" and node.attribute[0].i in floats]
    made = {node.output[0] for node in casts}
    return [node.name for node in casts if node.input[0] in made]


def decibels(reference: Model, model: Model, feeds: Iterable[Feed]) -> float:
    """Signal to error of the worst output, over all feeds, at the highest level of optimization."""
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    for feed in feeds:
        found = run(model, feed, optimize=True)
        for name, exact in run(reference, feed).items():
            wanted = np.asarray(exact, np.float64)
            noise[name] = noise.get(name, 0.0) + float(np.square(wanted - found[name]).sum())
            signal[name] = signal.get(name, 0.0) + float(np.square(wanted).sum())
    return min(float(10 * np.log10(signal[name] / max(noise[name], 1e-30))) for name in noise)


def skips(result: PassResult) -> dict[str, str]:
    """Node or tensor -> why it was left."""
    return {skip.node: skip.reason for skip in result.skipped}


def kinds(result: PassResult, kind: str) -> list[str]:
    """Where changes of a kind were made."""
    return [change.where for change in result.changes if change.kind == kind]


def optimized_casts(model: Model, folder: Path) -> int:
    """Casts in the runtime's optimized graph, all bodies."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    return sum(node.op_type == "Cast" for node in walk(graph))
