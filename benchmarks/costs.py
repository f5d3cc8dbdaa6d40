"""The cost table of this processor: what layers, conversions and nodes take in onnxruntime, as data for a target.

    python -m benchmarks.costs [NAME ...] [--seconds 1] [--repeats 3] [--write] [--target x86-vnni]

Each row holds one network against another: float against signed weights (u8s8), unsigned ones (u8u8), or an input
quantized at run time (dynamic), integer networks taking and giving codes; five layers in float against one or three of
them on codes (island); operators; conversions; a kernel along one axis against one along the other (strip); a row times
a matrix against half of it (row); a layer against two thinner ones (split); one node against a chain of them.
Optimized, one thread; runs take turns, and the lower tenth of each counts, so that other programs disturb little. NAME
picks rows. --write needs all rows, and puts ratios, facts, processor and versions into
onnxopt/target/measured/TARGET.json, which the target reads from then on. Only ratios within one table mean anything;
run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxopt.feeds import Sample
from onnxopt.runtime import Session
from onnxopt.target import cpu
from onnxopt.target.costs import MEASURED

Array = npt.NDArray[Any]
FEWEST_RUNS = 20  # of each network and repeat
CHAIN = 64  # nodes of the networks that measure what one node costs


@dataclass(frozen=True)
class Layer:
    """A Conv (shapes NCHW and OIHW), MatMul or Gemm (weight [K, N]) on an input of `shape`."""

    op: str
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    group: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds of one run."""
        if self.op != "Conv":
            return math.prod(self.shape) * self.weight[1]
        return math.prod(self.weight) * math.prod(self.shape[2:])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result: Convs keep height and width."""
        if self.op != "Conv":
            return (*self.shape[:-1], self.weight[1])
        return (self.shape[0], self.weight[0], *self.shape[2:])


DENSE = {
    "conv 3x3 64@56": Layer("Conv", (1, 64, 56, 56), (64, 64, 3, 3)),
    "conv 3x3 256@14": Layer("Conv", (1, 256, 14, 14), (256, 256, 3, 3)),
    "conv 1x1 64-256@28": Layer("Conv", (1, 64, 28, 28), (256, 64, 1, 1)),
    "conv 1x1 256@14": Layer("Conv", (1, 256, 14, 14), (256, 256, 1, 1)),
    "matmul 128x768x768": Layer("MatMul", (128, 768), (768, 768)),
    "matmul 16x768x3072": Layer("MatMul", (16, 768), (768, 3072)),
    "gemm 16x512x1000": Layer("Gemm", (16, 512), (512, 1000)),
}
DEPTHWISE = {
    "depthwise 3x3 128@28": Layer("Conv", (1, 128, 28, 28), (128, 1, 3, 3), 128),
    "depthwise 3x3 64@56": Layer("Conv", (1, 64, 56, 56), (64, 1, 3, 3), 64),
}
# 3x1, beside 1x3
STRIPS = {
    "strip 64@56": Layer("Conv", (1, 64, 56, 56), (64, 64, 3, 1)),
    "strip 256@14": Layer("Conv", (1, 256, 14, 14), (256, 256, 3, 1)),
}
# one row, so that each weight is read for one multiply-add
ROW = Layer("MatMul", (1, 768), (768, 3072))
# beside two layers of a half and a quarter of its multiply-adds
WHOLE = Layer("MatMul", (16, 384), (384, 384))
ELEMENTS = (1, 64, 56, 56)
# 1x1 convolutions, so that what a border costs is not lost in them
ISLANDS = {
    "island 64@40": Layer("Conv", (1, 64, 40, 40), (64, 64, 1, 1)),
    "island 64@28": Layer("Conv", (1, 64, 28, 28), (64, 64, 1, 1)),
    "island 64@14": Layer("Conv", (1, 64, 14, 14), (64, 64, 1, 1)),
    "island 16@7": Layer("Conv", (1, 16, 7, 7), (16, 16, 1, 1)),
}


class Network:
    """Nodes, constants and ports of a model in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Array) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def scale(self, kind: str, tensor: str, output: str, zero: int = 128) -> str:
        """`tensor` through QuantizeLinear or DequantizeLinear with one scale and a uint8 zero-point."""
        names = [self.constant(f"{output}_scale", np.array(0.05, np.float32))]
        names.append(self.constant(f"{output}_zero", np.array(zero, np.uint8)))
        return self.node(kind, [tensor, *names], output)

    def pair(self, tensor: str, output: str) -> str:
        """`tensor` through QuantizeLinear and DequantizeLinear."""
        return self.scale("DequantizeLinear", self.scale("QuantizeLinear", tensor, f"{output}_codes", 0), output, 0)

    def serialized(self, inputs: dict[str, tuple[int, tuple[int, ...]]], output: tuple[str, int]) -> bytes:
        """The model. inputs: name -> (element type, shape). output: name and element type."""
        ports = [helper.make_tensor_value_info(name, *given) for name, given in inputs.items()]
        result = helper.make_tensor_value_info(output[0], output[1], None)
        graph = helper.make_graph(self.nodes, "costs", ports, [result], self.constants)
        opsets = [helper.make_opsetid("", 17)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def layer_network(layer: Layer, kind: str) -> bytes:
    """The layer as `float`, `u8s8`, `u8u8`, or `dynamic`."""
    net = Network()
    rng = np.random.default_rng(0)
    attributes: dict[str, Any] = {}
    if layer.op == "Conv":
        attributes = {"pads": [size // 2 for size in layer.weight[2:]] * 2, "group": layer.group}
    values = rng.standard_normal(layer.weight)
    channels = layer.weight[0] if layer.op == "Conv" else layer.weight[1]
    bias = rng.standard_normal(channels)
    biased = layer.op != "MatMul"
    if kind == "float":
        inputs = ["x", net.constant("w", values.astype(np.float32))]
        inputs += [net.constant("b", bias.astype(np.float32))] if biased else []
        net.node(layer.op, inputs, "y", **attributes)
        return net.serialized({"x": (TensorProto.FLOAT, layer.shape)}, ("y", TensorProto.FLOAT))
    codes = np.clip(np.rint(values * 16), -64, 64)  # no pair saturates
    scale = np.array(0.01, np.float32)
    if kind == "dynamic":
        net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["c", "s", "z"]))
        names = ["c", net.constant("w", codes.astype(np.int8)), "z", net.constant("wz", np.array(0, np.int8))]
        net.node("MatMulInteger", names, "i")
        net.node("Cast", ["i"], "f", to=TensorProto.FLOAT)
        net.node("Mul", ["s", net.constant("ws", scale)], "factor")
        net.node("Mul", ["f", "factor"], "y")
        return net.serialized({"x": (TensorProto.FLOAT, layer.shape)}, ("y", TensorProto.FLOAT))
    stored, zero = (codes.astype(np.int8), np.int8(0)) if kind == "u8s8" else ((codes + 128).astype(np.uint8), 128)
    scales = np.full(channels, scale)
    names = [net.constant("w", stored), net.constant("ws", scales)]
    names.append(net.constant("wz", np.full(channels, zero, stored.dtype)))
    net.node("DequantizeLinear", names, "wd", axis=0 if layer.op == "Conv" else 1)
    inputs = [net.scale("DequantizeLinear", "x", "xd"), "wd"]
    if biased:
        names = [net.constant("b", np.rint(bias * 100).astype(np.int32))]
        names.append(net.constant("bs", (np.float32(0.05) * scales).astype(np.float32)))
        inputs.append(net.node("DequantizeLinear", names, "bd", axis=0))
    net.node(layer.op, inputs, "r", **attributes)
    net.scale("QuantizeLinear", "r", "y")
    return net.serialized({"x": (TensorProto.UINT8, layer.shape)}, ("y", TensorProto.UINT8))


def island_network(layer: Layer, quantized: str) -> bytes:
    """Five of the layer, with Relu, in a row: those with a `q` in `quantized` run on codes, `f` on floats."""
    net = Network()
    rng = np.random.default_rng(0)
    tensor, coded = "x", False
    for index, kind in enumerate(quantized):
        values = rng.standard_normal(layer.weight).astype(np.float32) / 8
        name = net.constant(f"w{index}", values)
        if kind == "q":
            codes = net.constant(f"c{index}", np.clip(np.rint(values * 64), -64, 64).astype(np.int8))
            scales = net.constant(f"s{index}", np.full(layer.weight[0], 1 / 64, np.float32))
            zeros = net.constant(f"z{index}", np.zeros(layer.weight[0], np.int8))
            name = net.node("DequantizeLinear", [codes, scales, zeros], f"d{index}", axis=0)
            tensor = tensor if coded else net.pair(tensor, f"before{index}")
        tensor = net.node("Relu", [net.node("Conv", [tensor, name], f"y{index}")], f"r{index}")
        coded = kind == "q"
        tensor = net.pair(tensor, f"after{index}") if coded else tensor
    return net.serialized({"x": (TensorProto.FLOAT, layer.shape)}, (tensor, TensorProto.FLOAT))


def element_network(op: str, integer: bool) -> bytes:
    """One operator on tensors of `ELEMENTS`, on floats or on codes."""
    net = Network()
    count = 1 if op == "Sigmoid" else 2
    names = [f"x{index}" for index in range(count)]
    element = TensorProto.UINT8 if integer else TensorProto.FLOAT
    inputs = [net.scale("DequantizeLinear", name, f"{name}d", 100) for name in names] if integer else names
    net.node(op, inputs, "r" if integer else "y", **({"axis": 1} if op == "Concat" else {}))
    if integer:
        net.scale("QuantizeLinear", "r", "y", 90)
    return net.serialized(dict.fromkeys(names, (element, ELEMENTS)), ("y", element))


def convert_network(op: str) -> bytes:
    """QuantizeLinear or DequantizeLinear alone."""
    net = Network()
    net.scale(op, "x", "y")
    kinds = (TensorProto.FLOAT, TensorProto.UINT8) if op == "QuantizeLinear" else (TensorProto.UINT8, TensorProto.FLOAT)
    return net.serialized({"x": (kinds[0], ELEMENTS)}, ("y", kinds[1]))


def chain_network(length: int) -> bytes:
    """`length` nodes, one behind the other, that do next to nothing."""
    net = Network()
    tensor = "x"
    for index in range(length):
        tensor = net.node("Neg", [tensor], f"t{index}")
    return net.serialized({"x": (TensorProto.FLOAT, (8,))}, (tensor, TensorProto.FLOAT))


def split_network(rank: int) -> bytes:
    """The layer `WHOLE` as two MatMuls with `rank` values between."""
    net = Network()
    rng = np.random.default_rng(0)
    tensor = "x"
    for index, shape in enumerate([(WHOLE.weight[0], rank), (rank, WHOLE.weight[1])]):
        name = net.constant(f"w{index}", (rng.standard_normal(shape) / 16).astype(np.float32))
        tensor = net.node("MatMul", [tensor, name], f"t{index}")
    return net.serialized({"x": (TensorProto.FLOAT, WHOLE.shape)}, (tensor, TensorProto.FLOAT))


def feed(session: Session) -> Sample:
    """A feed of codes or of standard normal values."""
    rng = np.random.default_rng(1)
    inputs: dict[str, Array] = {}
    for item in session.inputs:
        shape = [size for size in item.shape or () if isinstance(size, int)]
        codes = item.dtype == np.uint8
        inputs[item.name] = rng.integers(0, 256, shape, np.uint8) if codes else rng.standard_normal(shape, np.float32)
    return Sample(inputs, None, "random")


def milliseconds(one: bytes, other: bytes, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a run of `one`, and the ratio of `other` to it.

    Runs take turns in the order A B B A; a network's time is the lower tenth of its runs, which other programs disturb
    least. Medians over the repeats.
    """
    runners = [runner(one), runner(other)]
    times, ratios = [], []
    for _ in range(args.repeats):
        taken: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + args.seconds
        while len(taken[0]) < FEWEST_RUNS or time.perf_counter() < end:
            for index in (0, 1, 1, 0):
                start = time.perf_counter()
                runners[index]()
                taken[index].append(time.perf_counter() - start)
        first, second = (float(np.quantile(each, 0.1)) for each in taken)
        times.append(first * 1e3)
        ratios.append(second / first)
    return statistics.median(times), statistics.median(ratios)


def runner(model: bytes) -> Callable[[], object]:
    """What runs a model once, on a feed of its own; warm."""
    session = Session(model)
    inputs = feed(session).inputs
    for _ in range(3):
        session.run(inputs)
    return lambda: session.run(inputs)


@dataclass(frozen=True)
class Row:
    """What `benchmarks.costs` prints: a network's milliseconds, and the ratios of its other kinds to it."""

    name: str
    reference_ms: float
    ratios: dict[str, float]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """All rows that the arguments ask for, as they are measured."""
    makers: dict[str, tuple[Callable[[], bytes], dict[str, Callable[[], bytes]]]] = {}
    for name, layer in (DENSE | DEPTHWISE).items():
        kinds = ["u8s8", "u8u8"] + (["dynamic"] if layer.op == "MatMul" else [])
        makers[name] = (
            lambda layer=layer: layer_network(layer, "float"),  # type: ignore[misc]
            {kind: lambda layer=layer, kind=kind: layer_network(layer, kind) for kind in kinds},  # type: ignore[misc]
        )
    for op in ("Add", "Mul", "Concat", "Sigmoid"):
        makers[op] = (
            lambda op=op: element_network(op, False),  # type: ignore[misc]
            {"integer": lambda op=op: element_network(op, True)},  # type: ignore[misc]
        )
    for name, layer in ISLANDS.items():
        makers[name] = (
            lambda layer=layer: island_network(layer, "fffff"),  # type: ignore[misc]
            {
                "one": lambda layer=layer: island_network(layer, "ffqff"),  # type: ignore[misc]
                "three": lambda layer=layer: island_network(layer, "fqqqf"),  # type: ignore[misc]
            },
        )
    for name, layer in STRIPS.items():
        turned = replace(layer, weight=(*layer.weight[:2], *layer.weight[:1:-1]))
        makers[name] = (
            lambda layer=layer: layer_network(layer, "float"),  # type: ignore[misc]
            {"wide": lambda turned=turned: layer_network(turned, "float")},  # type: ignore[misc]
        )
    half = replace(ROW, weight=(ROW.weight[0], ROW.weight[1] // 2))
    makers["row"] = (lambda: layer_network(ROW, "float"), {"half": lambda: layer_network(half, "float")})
    ranks = {"half": WHOLE.weight[0] // 4, "quarter": WHOLE.weight[0] // 8}
    splits: dict[str, Callable[[], bytes]] = {kind: partial(split_network, rank) for kind, rank in ranks.items()}
    makers["split"] = (lambda: layer_network(WHOLE, "float"), splits)
    makers["convert"] = (
        lambda: convert_network("QuantizeLinear"),
        {"dequantize": lambda: convert_network("DequantizeLinear")},
    )
    makers["node"] = (lambda: chain_network(1), {"chain": lambda: chain_network(1 + CHAIN)})
    for name, (make, others) in makers.items():
        if args.names and not any(part in name for part in args.names):
            continue
        found = {kind: milliseconds(make(), other(), args) for kind, other in others.items()}
        reference = statistics.median(ms for ms, _ in found.values())
        yield Row(name, reference, {kind: ratio for kind, (_, ratio) in found.items()})


def borders(table: dict[str, Row]) -> tuple[float, float]:
    """(ns an element, ns whatever the size) that it takes to get into an island of codes, or out of it.

    With g the gain of one layer on codes and b what both borders take, one such layer among five changes the time by
    b - g, three in a row by b - 3 g. That b is fitted by a line over the elements of a border: conversion, and the
    changes of layout that come with it.
    """
    sizes, times = [], []
    for name, layer in ISLANDS.items():
        row = table[name]
        one, three = ((row.ratios[kind] - 1) * row.reference_ms * 1e6 for kind in ("one", "three"))
        sizes.append(math.prod(layer.shape))
        times.append((3 * one - three) / 4)
    convert, node = np.polyfit(sizes, times, 1, w=1 / np.sqrt(sizes))
    return float(convert), float(node)


def facts(table: dict[str, Row]) -> dict[str, float]:
    """The figures of `CostFacts` from all rows, without the time that a call takes by itself."""
    call = table["node"].reference_ms
    each = call * (table["node"].ratios["chain"] - 1) / CHAIN

    def per_unit(names: dict[str, int], kind: str | None = None) -> float:
        figures = []
        for name, units in names.items():
            row = table[name]
            ms = row.reference_ms * (1.0 if kind is None else row.ratios[kind])
            figures.append(max(ms - call, 0.05 * ms) * 1e6 / units)
        return math.exp(statistics.fmean(map(math.log, figures)))

    convert, node = borders(table)
    dense = {name: layer.macs for name, layer in DENSE.items()}
    pointwise = {name: layer.macs for name, layer in DENSE.items() if layer.weight[2:] == (1, 1)}
    strips = {name: layer.macs for name, layer in STRIPS.items()}
    row, split = table["row"], table["split"]
    weight = row.reference_ms * (1 - row.ratios["half"]) * 2e6 / math.prod(ROW.weight)
    # what two layers take more than their share of the multiply-adds
    more = [
        split.reference_ms * split.ratios[kind] - call - share * (split.reference_ms - call)
        for kind, share in {"half": 0.5, "quarter": 0.25}.items()
    ]
    depthwise = {name: layer.macs for name, layer in DEPTHWISE.items()}
    dynamic = {name: layer.macs for name, layer in DENSE.items() if layer.op == "MatMul"}
    elements = math.prod(ELEMENTS)
    binary = {"Add": elements, "Mul": elements}
    found = {
        "float_mac": per_unit(dense),
        "integer_mac": per_unit(dense, "u8s8"),
        "unsigned_mac": per_unit(dense, "u8u8"),
        "float_depthwise_mac": per_unit(depthwise),
        "integer_depthwise_mac": per_unit(depthwise, "u8s8"),
        "dynamic_mac": per_unit(dynamic, "dynamic"),
        "float_element": per_unit(binary),
        "integer_element": per_unit(binary, "integer"),
        "convert": max(convert, (per_unit({"convert": elements}) + per_unit({"convert": elements}, "dequantize")) / 2),
        "node": max(node, each * 1e6),
        "float_pointwise_mac": per_unit(pointwise),
        "float_strip_mac": math.sqrt(per_unit(strips) * per_unit(strips, "wide")),
        "float_weight": weight,
        "layer": max(statistics.fmean(more), each) * 1e6,
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def processor() -> str:
    """The processor's name, as its system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance() -> dict[str, str]:
    """What made the table; nothing that differs from day to day."""
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp") if flag in cpu.flags().split()]
    return {
        "script": "python -m benchmarks.costs --write",
        "cpu": f"{processor()} ({', '.join(kinds) or cpu.machine()})",
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "threads": "1",
    }


def this_target() -> str:
    """The target whose table this processor can make."""
    if cpu.machine() in ("aarch64", "arm64"):
        return "arm64"
    return "x86-vnni" if cpu.has_dot_product(cpu.flags()) else "x86"


def main() -> int:
    """Print the table; with --write, put it where the target reads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of the names of rows")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each pair and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table as data")
    parser.add_argument("--target", default=this_target())
    args = parser.parse_args()
    if args.write and args.names:
        parser.error("--write needs all rows: name none")
    table: dict[str, Row] = {}
    for row in rows(args):
        table[row.name] = row
        ratios = "  ".join(f"{kind} {ratio:5.2f}x" for kind, ratio in row.ratios.items())
        print(f"{row.name:22} {row.reference_ms:9.4f} ms  {ratios}", flush=True)
    if args.names:
        return 0
    found = facts(table)
    print("  ".join(f"{name} {value:g}" for name, value in found.items()))
    if args.write:
        shown = {name: {kind: round(ratio, 3) for kind, ratio in row.ratios.items()} for name, row in table.items()}
        data = {"provenance": provenance(), "facts": found, "ratios": shown}
        path = MEASURED / f"{args.target}.json"
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        print(f"written {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
