"""How long a layer takes at each width: why `prune` keeps multiples.

    python -m benchmarks.widths [--seconds 1]

Two networks whose middle width m is varied: 3x3 Conv 64 -> m -> 64 at 56x56, and an inverted residual 32 -> m ->
depthwise -> 32 at 28x28. Prints the latency over that of the widest: median of interleaved runs, optimized, one
thread.
"""

from __future__ import annotations

import argparse

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxopt.feeds import Sample
from onnxopt.runtime import Session
from onnxopt.runtime.latency import measure

WIDTHS = {"3x3": (64, 63, 62, 60, 57, 56, 52, 49, 48, 44, 40, 33, 32), "inverted": (192, 191, 190, 188, 184, 176, 160)}


def network(kind: str, width: int) -> bytes:
    """The serialized model of one kind and middle width, random weights."""
    rng = np.random.default_rng(0)
    outer, size = (64, 56) if kind == "3x3" else (32, 28)
    layers = (
        [(outer, width, 3, 1), (width, outer, 3, 1)]
        if kind == "3x3"
        else [(outer, width, 1, 1), (width, width, 3, width), (width, outer, 1, 1)]
    )
    nodes, weights = [], []
    x = "x"
    for index, (inner, out, kernel, group) in enumerate(layers):
        shape = (out, inner // group, kernel, kernel)
        weights.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.05, f"w{index}"))
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [x, f"w{index}"], [f"c{index}"], pads=pads, group=group))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        x = f"r{index}"
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, outer, size, size]) for name in ("x", x)]
    graph = helper.make_graph(nodes, kind, info[:1], info[1:], weights)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each width")
    seconds = parser.parse_args().seconds
    for kind, widths in WIDTHS.items():
        widest = Session(network(kind, widths[0]))
        shape = (1, 64, 56, 56) if kind == "3x3" else (1, 32, 28, 28)
        feeds = [Sample({"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}, None, "random")]
        print(f"{kind}: width, latency over width {widths[0]} [95 %]")
        for width in widths[1:]:
            found = measure(widest, Session(network(kind, width)), feeds, seconds=seconds)
            print(f"  {width:4d} {found.ratio:5.2f} [{found.low:.2f}, {found.high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
