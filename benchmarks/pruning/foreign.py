"""onnxsim's structured pruning and its recovery, under an interpreter that has it; imports nothing of this project.

    PYTHON foreign.py SOURCE FEEDS FOLDER HEADS WIDTH

prepares the float model in FOLDER in each way that onnxsim may find more to prune in, tells of them as JSON, and then
answers one JSON request a line until its input ends. FEEDS is a folder with one .npz (input name -> array) a sample.
HEADS, WIDTH: of a transformer's attention, which onnxruntime's optimizer wants to be told; 0 where it may look itself.

Requests: {"prune": METHOD, "from": FILE, "sparsity": s, "out": FILE} and {"recover": STEPS, "original": FILE, "from":
FILE, "out": FILE}. Answers: {"seconds": s} or {"error": line}.

Methods are all of its structured entry points for float models: weight norms l1 and l2, weight norms times activation
norms (wanda-), one ranking for the whole model (-global), whole transformer blocks (blocks), and with "+heads" whole
attention heads to the same share. Recovery: "ridge" is apply_pruning_finetune, "ridge-weak" the same with a hundredth
of its regularization, "+bias" behind one of them its correct_bias.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# What runs the whole model with many tensors as outputs is given this many samples: its own default is 8.
RANKING_SAMPLES = 16
_GEMM = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched", "fuse_transpose_into_gemm"]


def feeds_of(folder: Path) -> list[dict[str, Any]]:
    """All feeds of a folder, by name of their files."""
    feeds = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            feeds.append({name: arrays[name] for name in arrays.files})
    return feeds


def hoisted(model: Any) -> Any:
    """Constant nodes as initializers, in all bodies: onnxsim looks for weights only there."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _hoist(made.graph)
    return made


def _hoist(graph: Any) -> None:
    outputs = {port.name for port in graph.output}
    kept = []
    for node in graph.node:
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for body in bodies:
                _hoist(body)
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if node.op_type == "Constant" and values and node.output[0] not in outputs:
            tensor = graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept)


def simplified(source: Path) -> Any:
    """Constants folded, BatchNormalization in Conv, GELU in one node; MatMul stays MatMul, whose chains are longer."""
    import onnxsim

    fused = ["fuse_gelu", "fuse_layer_norm"]
    settings = {"skipped_optimizers": _GEMM, "extra_optimizers": fused}
    try:
        model, _ = onnxsim.simplify(onnx.load(source), **settings, target_opset_version=20)
    except Exception:  # noqa: BLE001  some models can't be raised
        model, _ = onnxsim.simplify(onnx.load(source), **settings)
    return hoisted(model)


def fused(source: Path, heads: int, width: int) -> Any:
    """What onnxruntime's optimizer for transformers makes, where that has attention nodes: heads are found in those."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = options.enable_bias_gelu = False
    settings = {"num_heads": heads, "hidden_size": width, "optimization_options": options, "opt_level": 0}
    made = optimizer.optimize_model(str(source), model_type="bert", **settings).model
    if all(node.op_type != "Attention" for node in made.graph.node):
        raise ValueError("no attention found")
    return hoisted(made)


def prune(method: str, model: Any, sparsity: float, feeds: list[dict[str, Any]]) -> Any:
    """One method at one share."""
    import onnxsim

    base, _, heads = method.partition("+")
    calibration = {"calibration_data": feeds[:RANKING_SAMPLES]}
    if base == "blocks":
        return onnxsim.apply_transformer_block_pruning(model, sparsity=sparsity, **calibration)
    settings = {"importance_norm": "l1" if "l1" in base else "l2", "sparsity": sparsity}
    everywhere = {**settings, "global_sparsity": "global" in base}
    if base.startswith("wanda"):
        made = onnxsim.apply_structured_wanda_pruning(model, **calibration, **everywhere)
        return onnxsim.apply_attention_head_wanda_pruning(made, **calibration, **settings) if heads else made
    made = onnxsim.apply_structured_pruning(model, **everywhere)
    return onnxsim.apply_attention_head_pruning(made, **settings) if heads else made


def recover(steps: str, original: Any, pruned: Any, feeds: list[dict[str, Any]]) -> Any:
    """Its recovery without gradients, the fit on all samples."""
    import onnxsim

    fit, _, bias = steps.partition("+")
    strength = {"reg_param": 1e-4} if fit == "ridge-weak" else {}
    made = onnxsim.apply_pruning_finetune(original, pruned, calibration_data=feeds, **strength)
    return onnxsim.correct_bias(original, made, calibration_data=feeds[:RANKING_SAMPLES]) if bias else made


def prepared(source: Path, folder: Path, heads: int, width: int) -> dict[str, str]:
    """Preparation -> the path of its model, or why there is none."""
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: hoisted(onnx.load(source)),
        "simplified": lambda: simplified(source),
        "fused": lambda: fused(source, heads, width),
    }
    found = {}
    for name, make in ways.items():
        out = folder / f"{name}.onnx"
        try:
            onnx.save(make(), out)
        except Exception as error:  # noqa: BLE001  each preparation may fail on its own
            found[name] = f"failed: {_line(error)}"
            continue
        found[name] = str(out)
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def answered(request: dict[str, Any], feeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What one request came to."""
    started = time.perf_counter()
    try:
        model = onnx.load(request["from"])
        if "prune" in request:
            made = prune(request["prune"], model, request["sparsity"], feeds)
        else:
            made = recover(request["recover"], onnx.load(request["original"]), model, feeds)
        seconds = time.perf_counter() - started
        onnx.save(made, request["out"])
    except Exception as error:  # noqa: BLE001  its message is the answer
        return {"error": _line(error)}
    return {"seconds": seconds}


@contextlib.contextmanager
def answers() -> Iterator[Any]:
    """The real output; what libraries print goes to the errors, their native code too."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        yield out


def main() -> int:
    """Answer until the input ends."""
    source, folder, out_folder = map(Path, sys.argv[1:4])
    heads, width = map(int, sys.argv[4:])
    with answers() as out:
        import onnxsim

        feeds = feeds_of(folder)
        told = {"version": onnxsim.__version__, "prepared": prepared(source, out_folder, heads, width)}
        print(json.dumps(told), file=out)
        for line in sys.stdin:
            print(json.dumps(answered(json.loads(line), feeds)), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
