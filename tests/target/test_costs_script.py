"""`benchmarks.costs` times the kernels that it says it does, and makes the table of them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import costs
from onnxopt.runtime import Session
from onnxopt.target.costs import MEASURED, CostFacts

KERNELS = {"Conv": "QLinearConv", "MatMul": "QLinearMatMul", "Gemm": "QGemm"}
LAYERS = costs.DENSE | costs.DEPTHWISE | costs.STRIPS
SPLITS = {"half": 0.5, "quarter": 0.25}


def operators(model: bytes, folder: Path) -> list[str]:
    """Operators of the runtime's optimised graph."""
    path = folder / "optimized.onnx"
    Session(model, optimized_path=path)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("kind", ["u8s8", "u8u8"])
def test_layers_on_codes_are_one_integer_kernel(name: str, kind: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    found = operators(costs.layer_network(layer, kind), tmp_path)
    assert KERNELS[layer.op] in found
    assert not {"DequantizeLinear", "QuantizeLinear", layer.op} & set(found)


def test_matmul_with_an_input_quantized_at_run_time_is_one_kernel(tmp_path: Path) -> None:
    layer = costs.DENSE["matmul 16x768x3072"]
    assert operators(costs.layer_network(layer, "dynamic"), tmp_path) == ["DynamicQuantizeMatMul"]


@pytest.mark.parametrize("op", ["Add", "Mul", "Concat", "Sigmoid"])
def test_operators_on_codes_are_one_integer_kernel(op: str, tmp_path: Path) -> None:
    assert operators(costs.element_network(op, True), tmp_path) == [f"QLinear{op}"]
    assert operators(costs.element_network(op, False), tmp_path) == [op]


def test_no_node_of_the_chain_is_left_out(tmp_path: Path) -> None:
    assert operators(costs.chain_network(9), tmp_path) == ["Neg"] * 9


@pytest.mark.parametrize("name", list(costs.ISLANDS))
def test_islands_have_as_many_integer_layers_as_they_say(name: str, tmp_path: Path) -> None:
    for quantized in ("fffff", "ffqff", "fqqqf"):
        found = operators(costs.island_network(costs.ISLANDS[name], quantized), tmp_path)
        assert found.count("QLinearConv") == quantized.count("q")
        assert found.count("QuantizeLinear") == found.count("DequantizeLinear") == ("q" in quantized)


def test_a_network_that_does_ten_times_as_much_takes_longer() -> None:
    args = argparse.Namespace(seconds=0.01, repeats=1)
    ms, ratio = costs.milliseconds(costs.chain_network(1), costs.chain_network(200), args)
    assert ms > 0
    assert ratio > 2


@pytest.mark.parametrize("name", list(LAYERS))
def test_multiply_adds_and_shapes(name: str) -> None:
    layer = LAYERS[name]
    session = Session(costs.layer_network(layer, "float"))
    [result] = session.run(costs.feed(session).inputs).values()
    assert result.shape == layer.out_shape
    inner = math.prod(layer.weight[1:]) if layer.op == "Conv" else layer.weight[0]
    assert layer.macs == result.size * inner


def table(overhead: float) -> dict[str, costs.Row]:
    """Rows of a processor of known figures, in ns: a call costs `overhead` ms whatever it does."""

    def row(name: str, units: int, each: float, **others: float) -> costs.Row:
        ms = units * each / 1e6 + overhead
        return costs.Row(name, ms, {kind: (units * ns / 1e6 + overhead) / ms for kind, ns in others.items()})

    rows = [row(name, layer.macs, 0.02, u8s8=0.01, u8u8=0.015, dynamic=0.012) for name, layer in costs.DENSE.items()]
    rows += [row(name, layer.macs, 0.1, u8s8=0.2, u8u8=0.3) for name, layer in costs.DEPTHWISE.items()]
    elements = math.prod(costs.ELEMENTS)
    rows += [row(op, elements, 0.3, integer=0.6) for op in ("Add", "Mul", "Concat", "Sigmoid")]
    rows.append(row("convert", elements, 0.1, dequantize=0.2))
    rows += [row(name, layer.macs, 0.03, wide=0.03) for name, layer in costs.STRIPS.items()]
    rows.append(row("row", math.prod(costs.ROW.weight), 0.1, half=0.05))
    whole = costs.WHOLE.macs * 0.02 / 1e6
    ratios = {kind: (share * whole + 0.003 + overhead) / (whole + overhead) for kind, share in SPLITS.items()}
    rows.append(costs.Row("split", whole + overhead, ratios))
    for name, layer in costs.ISLANDS.items():
        ms, gain = 5 * layer.macs * 0.02 / 1e6 + overhead, layer.macs * 0.01 / 1e6
        both = 2 * (math.prod(layer.shape) * 0.4 + 1000) / 1e6
        ratios = {"one": (ms + both - gain) / ms, "three": (ms + both - 3 * gain) / ms}
        rows.append(costs.Row(name, ms, ratios))
    rows.append(costs.Row("node", overhead, {"chain": (overhead + costs.CHAIN * 0.0004) / overhead}))
    return {each.name: each for each in rows}


def test_facts_are_those_of_the_processor_whatever_a_call_costs() -> None:
    expected = CostFacts(0.02, 0.01, 0.1, 0.2, 0.4, 1000.0, 0.015, 0.012, 0.3, 0.6, 0.02, 0.03, 0.1, 3000.0)
    for overhead in (0.001, 0.01):
        assert CostFacts(**costs.facts(table(overhead))) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_hold_all_rows_and_where_they_come_from(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"provenance", "facts", "ratios"}
    assert set(data["ratios"]) == set(table(0.01))
    assert set(data["provenance"]) == set(costs.provenance())
    assert set(data["facts"]) == set(costs.facts(table(0.01)))
    assert np.isfinite(list(data["facts"].values())).all()
