"""The pass bf16: weights stored as bfloat16, which hold float32's range and less of its digits."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxopt import optimize
from onnxopt.errors import UsageError
from onnxopt.passbase import Context, Effect, lookup
from onnxopt.passes.bf16 import Bf16
from onnxopt.passes.fp16 import Fp16
from tests.passes.halving import decibels, kinds, optimized_casts, skips, store_bfloat16
from tests.passes.quantizing import nodes, normal, parse, weight

TEXT = "g (float[4, 64] x) => (float[4, 32] y) { z = MatMul(x, w)  r = Relu(z)  y = Gemm(r, v) }"
FEEDS = [{"x": normal(4, 64, seed=seed)} for seed in range(3)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_weights_take_half_the_bytes(opset: int, tmp_path: Path) -> None:
    values = {"w": weight(64, 64), "v": weight(64, 32, seed=2)}
    model, before = (parse(TEXT, values, opset) for _ in range(2))
    result = store_bfloat16(model)
    assert kinds(result, "stored") == ["w", "v"]
    assert Bf16().effect is Effect.LOSSY
    assert model.nbytes() == before.nbytes() / 2
    found = next(constant for constant in model.constants() if constant.name == "w_bfloat16")
    assert found.dtype == BFLOAT16
    assert np.array_equal(found.values, values["w"].astype(BFLOAT16))
    assert optimized_casts(model, tmp_path) == 0
    assert 45 < decibels(before, model, FEEDS) < 60


def test_rows_of_a_table_are_gathered_first() -> None:
    text = "g (int64[2, 3] i) => (float[2, 3, 32] y) { y = Gather(table, i) }"
    model, before = (parse(text, {"table": normal(300, 32)}) for _ in range(2))
    store_bfloat16(model)
    assert nodes(model, "Gather")[0].inputs[0].dtype == BFLOAT16
    assert decibels(before, model, [{"i": np.array([[0, 5, 299], [7, 7, 1]])}]) > 45


def test_an_older_opset_is_refused_by_the_pass_and_raised_by_the_pipeline() -> None:
    values = {"w": weight(64, 64), "v": weight(64, 32, seed=2)}
    model = parse(TEXT, values, opset=11)
    digest = model.digest()
    assert skips(store_bfloat16(model)) == {"opset": "11 has no Cast of bfloat16; 13 has"}
    assert model.digest() == digest
    result = optimize(model, passes="bf16", feeds=FEEDS)
    assert result.model.opset == 13
    assert any(constant.dtype == BFLOAT16 for constant in result.model.constants())


def test_its_range_is_that_of_float32() -> None:
    text = "g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }"
    large = {"w": weight(64, 64) * np.float32(1e30)}
    assert store_bfloat16(parse(text, large)).changes
    assert "times" not in store_bfloat16(parse(text, large)).changes[0].detail
    assert "times" in Fp16().run(parse(text, large), Context()).changes[0].detail
    beyond = np.zeros((64, 64), np.float32)
    beyond[0, 0] = np.finfo(np.float32).max
    assert store_bfloat16(parse(text, {"w": beyond})).changes[0].detail == "bfloat16 behind a Cast, times 2**-2"


def test_computing_in_bfloat16_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match="no kernels for bfloat16") as caught:
        lookup("bf16").parse({"compute": "half"})
    assert "fp16:compute=half" in caught.value.remedy
    assert str(Bf16(compute="float")) == "bf16:compute=float"


def test_excluded_nodes_keep_their_weights() -> None:
    values = {"w": weight(64, 64), "v": weight(64, 32, seed=2)}
    model = parse(TEXT, values)
    result = store_bfloat16(model, exclude=("y",))
    assert kinds(result, "stored") == ["w"]
    assert skips(result) == {"weight v": "is read by y, which is excluded"}
