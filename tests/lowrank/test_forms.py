"""What pieces cost, which of them pay, and at which ranks they are looked at."""

from __future__ import annotations

import pytest

from onnxopt.calibration.elements import Seen, run_shapes
from onnxopt.graph import infer
from onnxopt.graph.selection import Selection
from onnxopt.lowrank.forms import FACTORS, STRIPS, TUCKER, Form, Positions, Pricing, Splitter, Work, find_forms
from onnxopt.lowrank.inputs import Inputs
from onnxopt.lowrank.layers import Layer, find_layers
from onnxopt.model import Model
from onnxopt.target import resolve
from tests.passes.quantizing import parse, weight

AVX2 = resolve("x86")


def one(model: Model, tables: bool = False) -> tuple[Layer, Positions]:
    infer(model)
    [layer], _ = find_layers(model, Selection(), tables)
    return layer, Positions(layer, run_shapes(model, {}, Seen()), Seen())


def conv(channels: int, size: int, outputs: int, kernel: int, stride: int = 1) -> tuple[Layer, Positions]:
    pad = kernel // 2
    text = (
        f"g (float[1, {channels}, {size}, {size}] x) => (float[a, b, c, d] y) {{ "
        f"y = Conv<pads = [{pad}, {pad}, {pad}, {pad}], strides = [{stride}, {stride}]>(x, w) }}"
    )
    return one(parse(text, {"w": weight(outputs, channels, kernel, kernel)}))


def matmul(rows: int, inputs: int, outputs: int) -> tuple[Layer, Positions]:
    text = f"g (float[{rows}, {inputs}] x) => (float[{rows}, {outputs}] y) {{ y = MatMul(x, w) }}"
    return one(parse(text, {"w": weight(inputs, outputs)}))


def test_multiply_adds_and_parameters_of_pieces() -> None:
    layer, at = conv(64, 28, 128, 3, stride=2)
    pricing = Pricing(AVX2)
    assert pricing.whole(layer, at).macs == 128 * 576 * 14 * 14
    assert pricing.split(layer, FACTORS, (32,), at).macs == (32 * 576 + 128 * 32) * 14 * 14
    # the first strip has stride 2 along one axis only
    assert pricing.split(layer, STRIPS, (32,), at).macs == 32 * 192 * 14 * 28 + 128 * 96 * 14 * 14
    assert pricing.split(layer, TUCKER, (16, 32), at).macs == 16 * 64 * 28 * 28 + (32 * 144 + 128 * 32) * 14 * 14
    assert pricing.split(layer, TUCKER, (16, 32), at).parameters == 16 * 64 + 32 * 144 + 128 * 32


# (layer, form, rank of measured break-even): as measured on the processor of the AVX2 table
MEASURED = [
    (matmul(128, 768, 3072), FACTORS, (580, 604)),
    (matmul(128, 768, 768), FACTORS, (354, 370)),
    (conv(64, 56, 64, 3), FACTORS, (54, 60)),
    (conv(256, 14, 256, 3), FACTORS, (215, 239)),
    (conv(256, 14, 256, 3), STRIPS, (310, 342)),
]


@pytest.mark.parametrize(("found", "form", "measured"), MEASURED, ids=lambda value: str(value)[:24])
def test_split_ranks_of_the_avx2_table_lie_below_those_measured_to_break_even(
    found: tuple[Layer, Positions], form: str, measured: tuple[int, int]
) -> None:
    layer, at = found
    pricing = Pricing(AVX2)
    whole = pricing.whole(layer, at).latency
    even = max(rank for rank in range(1, 700) if pricing.split(layer, form, (rank,), at).latency <= whole)
    assert 0.9 * measured[0] <= even <= 1.1 * measured[1]
    splitter = Splitter(layer, Inputs().seconds(layer))
    forms, _ = find_forms(layer, splitter, at, pricing, (form,), "macs")
    assert max(each.ranks[0] for each in forms) < measured[0]


def test_ranks_are_multiples_of_what_kernels_work_in() -> None:
    for found, step in ((conv(64, 56, 64, 3), 16), (matmul(128, 256, 256), 8)):
        layer, at = found
        forms, _ = find_forms(
            layer, Splitter(layer, Inputs().seconds(layer)), at, Pricing(AVX2), (FACTORS, STRIPS, TUCKER), "latency"
        )
        assert forms
        assert all(rank % step == 0 for form in forms for rank in form.ranks)
        assert {form.name for form in forms} == ({FACTORS, STRIPS, TUCKER} if step == 16 else {FACTORS})


def test_tiny_layers_do_not_pay_and_the_reason_tells_by_how_much() -> None:
    layer, at = matmul(1, 64, 64)
    splitter = Splitter(layer, Inputs().seconds(layer))
    forms, why = find_forms(layer, splitter, at, Pricing(AVX2), (FACTORS,), "macs")
    assert not forms
    assert why.startswith("no split pays: factors of rank 8, the best, takes")
    forms, _ = find_forms(layer, splitter, at, Pricing(AVX2), (FACTORS,), "parameters")
    assert forms


def test_work_adds_up_and_forms_read_well() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
    assert Work(1, 2, 3).of("latency") == 3
    assert str(Form(TUCKER, (16, 24), 0.1, Work())) == "tucker, rank 16 and 24"
