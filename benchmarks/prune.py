"""What lossless pruning finds in real models, and that it keeps what they compute.

    python -m benchmarks.prune --zoo DIR [--models DIR] [NAME ...] [--share 0.15]

Each model is pruned as it is; then whole random sets of channels are zeroed (`--share` of those that may go), pruned
away, and the outputs compared with the zeroed model's on calibration feeds, unoptimized. Columns: channels removed
from the model as it is; channels zeroed and removed; file bytes after over before; largest difference relative to the
largest output; seconds of pruning.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto

from benchmarks.tasks import add_arguments, found_models, load_tasks
from onnxopt.graph.channels import frozen_channels
from onnxopt.model import Model, load
from onnxopt.passbase import Context, lookup
from onnxopt.pipeline.passes import evaluate

PRUNE = lookup("prune")(round_to=1)  # type: ignore[call-arg]


def zero_sets(model: Model, context: Context, share: float, seed: int) -> int:
    """Zero the weights and biases of a random share of the removable channel sets; returns how many channels."""
    from onnxopt.pruning.maps import axis_maps

    maps = axis_maps(model, context)
    held = frozen_channels(maps)
    free = sorted({root for site in maps.sites for root in maps.channels.roots(site.channels).tolist()} - held)
    rng = np.random.default_rng(seed)
    chosen = [root for root in free if rng.random() < share]
    count = 0
    for site in maps.sites:
        mask = np.isin(maps.channels.roots(site.channels), chosen)
        count += int(mask.sum())
        gone = site.channels[mask]
        for parameter in maps.parameters:
            node, index = parameter.node, parameter.index
            rows = np.isin(parameter.channels, gone)
            if rows.any() and index < len(node.inputs) and not node.inputs[index].is_empty():
                values = np.array(node.inputs[index].values)
                if values.ndim and values.shape[parameter.axis] == len(rows):
                    np.moveaxis(values, parameter.axis, 0)[rows] = 0
                    node.inputs[index].values = values
    return count


def outputs(proto: ModelProto, feeds: list[dict[str, Any]]) -> list[Any]:
    """All outputs on all feeds, unoptimized, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [value for feed in feeds for value in session.run(None, feed)]


def difference(one: Any, other: Any) -> float:
    """Largest difference relative to the largest value; share of differing elements for integers."""
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind != "f":
        return float((one != other).mean())
    return float(np.abs(one - other).max(initial=0) / max(float(np.abs(one).max(initial=0)), 1e-30))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--feeds", type=int, default=2)
    arguments = parser.parse_args()
    tasks = load_tasks(arguments.zoo, arguments.models)
    context = Context(evaluate=evaluate)
    print(f"{'model':24} {'as it is':>8} {'zeroed':>7} {'removed':>7} {'bytes':>6} {'difference':>10} {'s':>5}")
    for name, path in found_models(tasks, arguments.names):
        model = load(path)
        for step in ("fold_constants", "fuse_bn"):
            lookup(step)().run(model, context)
        untouched = model.clone().model
        found = sum(change.count for change in PRUNE.run(untouched, context).changes)
        zeroed = zero_sets(model, context, arguments.share, 0)
        masked = model.to_proto()
        start = time.perf_counter()
        removed = sum(change.count for change in PRUNE.run(model, context).changes)
        seconds = time.perf_counter() - start
        pruned = model.to_proto()
        feeds = list(itertools.islice(tasks.load(name).calib_feeds(), arguments.feeds))
        pairs = zip(outputs(masked, feeds), outputs(pruned, feeds), strict=True)
        worst = max(difference(one, other) for one, other in pairs)
        ratio = pruned.ByteSize() / masked.ByteSize()
        print(f"{name:24} {found:8d} {zeroed:7d} {removed:7d} {ratio:6.3f} {worst:10.1e} {seconds:5.1f}", flush=True)


if __name__ == "__main__":
    main()
