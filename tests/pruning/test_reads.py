"""Where layers can take a constant, and what they read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxopt.model import Model
from onnxopt.passbase import Context
from onnxopt.pruning.maps import channel_maps
from onnxopt.pruning.reads import Read, reads_of, slot_of
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import evaluate, random_feeds, run
from tests.passes.quantizing import parse, weight
from tests.pruning.nets import mapped


def read_of(model: Model, name: str, index: int = 1) -> Read:
    maps = channel_maps(model, Context(evaluate=evaluate))
    return next(read for read in reads_of(maps) if read.node.outputs[0].name == name and read.reader.index == index)


def adds(model: Model, name: str, count: int) -> np.ndarray:
    """What the output y gains when 1, 2, ... are added at a slot, which must be there: [channels]."""
    read = read_of(model, name)
    slot = slot_of(read.reader, model)
    assert slot is not None
    feeds = random_feeds(model)
    before = run(model, feeds)["y"]
    slot.add(np.arange(1.0, count + 1))
    return np.asarray(run(model, feeds)["y"] - before)


HIDDEN = "h = MatMul(x, w1)  r = Relu(h)"
DENSE: dict[str, Any] = {"w1": weight(5, 7), "w2": weight(7, 3, seed=2)}


def dense(tail: str, **more: Any) -> Model:
    return parse(f"g (float[2, 5] x) => (float[2, 3] y) {{ {HIDDEN}  {tail} }}", {**DENSE, **more})


@pytest.mark.parametrize(
    ("tail", "shape"),
    [
        ("m = MatMul(r, w2)  y = Add(m, b)", (3,)),
        ("m = MatMul(r, w2)  y = Add(b, m)", (3,)),
        ("m = MatMul(r, w2)  y = Add(m, b)", (1, 3)),
        ("m = Gemm(r, w2, b)  y = Identity(m)", (3,)),
        ("m = Gemm(r, w2, b)  y = Identity(m)", (1, 3)),
        ("m = Gemm(r, w2, b)  y = Identity(m)", (1,)),
    ],
)
def test_dense_layers_take_constants(tail: str, shape: tuple[int, ...]) -> None:
    gained = adds(dense(tail, b=weight(*shape, seed=3)), "m", 3)
    assert np.abs(gained - [1, 2, 3]).max() < 1e-6


def test_a_gemm_scales_what_it_takes_as_it_scales_its_weights() -> None:
    model = dense("m = Gemm <alpha = 0.5, beta = 2.0> (r, w2, b)  y = Identity(m)", b=weight(3))
    assert np.abs(adds(model, "m", 3) - [0.5, 1, 1.5]).max() < 1e-6


def test_a_gemm_without_bias_gets_one() -> None:
    assert np.abs(adds(dense("m = Gemm(r, w2)  y = Identity(m)"), "m", 3) - [1, 2, 3]).max() < 1e-6


@pytest.mark.parametrize(
    "tail",
    [
        "m = MatMul(r, w2)  y = Relu(m)",
        "y = MatMul(r, w2)",
        "m = MatMul(r, w2)  a = Add(m, b)  c = Relu(m)  y = Mul(a, c)",
        "m = MatMul(r, w2)  y = Add(m, m)",
        "m = MatMul(r, w2)  y = Sub(m, b)",
        "m = MatMul(r, w2)  y = Add(m, s)",
        "m = MatMul(r, w2)  y = Add(m, x2)",
    ],
)
def test_a_product_without_an_add_of_its_own_takes_none(tail: str) -> None:
    model = dense(tail, b=weight(3), s=np.float32(2), x2=weight(2, 3))
    assert slot_of(read_of(model, "y" if "y = MatMul" in tail else "m").reader, model) is None


def test_a_product_that_is_an_output_takes_none() -> None:
    text = f"g (float[2, 5] x) => (float[2, 3] y, float[2, 3] m) {{ {HIDDEN}  m = MatMul(r, w2)  y = Add(m, b) }}"
    model = parse(text, {**DENSE, "b": weight(3)})
    assert slot_of(read_of(model, "m").reader, model) is None


def test_a_computed_operand_takes_none() -> None:
    text = f"g (float[2, 5] x, float[3] b) => (float[2, 3] y) {{ {HIDDEN}  m = MatMul(r, w2)  y = Add(m, b) }}"
    model = parse(text, DENSE)
    assert slot_of(read_of(model, "m").reader, model) is None


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_convolutions_take_constants(op: str, bias: str) -> None:
    shape = (6, 8, 1, 1) if op == "Conv" else (8, 6, 1, 1)
    values = {"w1": weight(8, 3, 1, 1), "w2": weight(*shape, seed=2), "b": weight(6, seed=3)}
    text = f"""g (float[1, 3, 4, 4] x) => (float[1, 6, 4, 4] y) {{
        h = Conv(x, w1)  m = {op}(h, w2{bias})  y = Identity(m) }}"""
    gained = adds(parse(text, values), "m", 6)
    assert np.abs(gained - np.arange(1, 7)[:, None, None]).max() < 1e-5


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "speech", "stacked"])
def test_recurrent_cells_take_constants_with_input_and_state(name: str) -> None:
    """A constant beside the input's weights is one more input that is always 1."""
    model, maps = mapped(TOPOLOGIES[name]())
    reads = [read for read in reads_of(maps) if read.node.op in ("LSTM", "GRU", "RNN")]
    assert reads
    for read in reads:
        slot = slot_of(read.reader, model)
        assert slot is not None
        weights = read.node.inputs[1]
        directions, rows = weights.shape[:2]
        old = [0.0] * 2 * rows if len(read.node.inputs) < 4 else np.array(read.node.inputs[3].values)
        slot.add(np.ones(directions * rows))
        gained = read.node.inputs[3].values - old
        half = slice(rows, 2 * rows) if read.reader.data is None else slice(0, rows)
        assert gained[:, half] == pytest.approx(1, abs=1e-5)
        assert np.abs(gained).sum() == pytest.approx(directions * rows, rel=1e-5)
    onnx_feeds = random_feeds(model)
    assert np.isfinite(run(model, onnx_feeds)["y"]).all()


def test_energy_is_that_of_the_weights() -> None:
    model, maps = mapped(TOPOLOGIES["grouped"]())
    node = next(n for n in model.graph.nodes if n.attrs.get("group", 1) == 4)
    reads = [read for read in reads_of(maps) if read.node is node]
    weights = np.asarray(node.inputs[1].values, np.float64).reshape(4, 6, 4, 9)
    assert [read.group for read in reads] == [0, 1, 2, 3]
    for at, read in enumerate(reads):
        assert read.energy == pytest.approx(np.einsum("rit,rjt->ij", weights[at], weights[at]))
        assert read.positions == slice(4 * at, 4 * at + 4)


def test_a_state_is_read_without_the_weights_that_go_with_it() -> None:
    _, maps = mapped(TOPOLOGIES["gru"]())
    read = next(read for read in reads_of(maps) if read.reader.data is None)
    values = np.asarray(read.node.inputs[2].values, np.float64)[0].reshape(3, 14, 14).copy()
    values[:, np.arange(14), np.arange(14)] = 0
    assert read.energy == pytest.approx(np.einsum("gri,grj->ij", values, values))


def test_directions_are_seen_apart() -> None:
    _, maps = mapped(TOPOLOGIES["stacked"]())
    states = [read for read in reads_of(maps) if read.reader.data is None]
    assert [read.source.direction for read in states if read.source is not None] == [0, 1, 0, 1]
