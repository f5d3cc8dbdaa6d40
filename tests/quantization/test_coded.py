from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import int4

from onnxopt.numerics.saturation import Layout
from onnxopt.quantization.coded import CodedLayer, Form, coded_layers
from tests.passes.quantizing import parse

QDQ = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
GIVEN: dict[str, Any] = {
    "s": np.array(0.1, np.float32),
    "z": np.array(128, np.uint8),
    "c": np.arange(-8, 8).astype(np.int8).reshape(4, 4),
    "v": np.ones((4, 4), np.float32),
}


def only(text: str, **more: Any) -> CodedLayer:
    (layer,) = coded_layers(parse(f"g (float[n, 4] x) => (float[n, 4] y) {{ {text} }}", {**GIVEN, **more}, opset=21))
    return layer


def test_the_three_forms() -> None:
    static = only(f"{QDQ} w = DequantizeLinear(c, s) y = MatMul(d, w)")
    assert (static.form, static.name, static.layout) == (Form.STATIC, "y", Layout.ROWS)
    assert static.activation is not None
    assert (static.activation.tensor.name, static.activation.dtype, static.activation.constant) == ("q", "uint8", False)
    stored = only("w = DequantizeLinear(c, s) y = MatMul(x, w)")
    assert (stored.form, stored.activation) == (Form.WEIGHTS, None)
    kernel = only("q, t, z0 = DynamicQuantizeLinear(x) i = MatMulInteger(q, c, z0) y = Cast <to = 1> (i)")
    assert (kernel.form, kernel.name) == (Form.KERNEL, "i")
    assert kernel.activation is not None
    assert kernel.activation.tensor.name == "q"
    for layer in (static, stored, kernel):
        codes = layer.weight_codes()
        assert codes is not None
        assert (codes == GIVEN["c"]).all()


@pytest.mark.parametrize(
    "text",
    [
        "y = MatMul(x, v)",
        f"{QDQ} y = MatMul(d, v)",
        f"{QDQ} y = Relu(d)",
        "w = Cast <to = 1> (c) m = Mul(w, s) y = MatMul(x, m)",
        "w = DequantizeLinear(c, s) y = Add(x, w)",
    ],
)
def test_what_is_no_quantized_layer(text: str) -> None:
    assert list(coded_layers(parse(f"g (float[n, 4] x) => (float[n, 4] y) {{ {text} }}", GIVEN))) == []


def test_two_activations_and_a_weight_from_the_left() -> None:
    both = only(f"{QDQ} t = Transpose(d) m = MatMul(t, d) y = Identity(m)")
    assert (both.form, both.weight) == (Form.STATIC, None)
    left = only(f"{QDQ} w = DequantizeLinear(c, s) t = Transpose(d) m = MatMul(w, t) y = Transpose(m)")
    assert left.activation is not None
    assert left.activation.tensor.name == "q"
    assert left.weight is not None
    assert left.weight.constant


def test_codes_are_found_behind_what_unpacks_them() -> None:
    packed = only(f"{QDQ} k = Cast <to = 3> (p) w = DequantizeLinear(k, s) y = MatMul(d, w)", p=GIVEN["c"].astype(int4))
    assert packed.weight is not None
    assert packed.weight.names == {"k", "p"}
    codes = packed.weight_codes()
    assert codes is not None
    assert codes.dtype == np.int8
    assert (codes == GIVEN["c"]).all()
    book = only(f"{QDQ} k = Gather(c, i) w = DequantizeLinear(k, s) y = MatMul(d, w)", i=np.arange(4))
    assert book.weight is not None
    assert book.weight.constant
    assert book.weight_codes() is None


def test_signed_and_missing_zero_points_tell_the_type_of_codes() -> None:
    signed = only(f"{QDQ} w = DequantizeLinear(c, s) y = MatMul(d, w)", z=np.array(0, np.int8))
    assert signed.activation is not None
    assert signed.activation.dtype == "int8"
    text = "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) w = DequantizeLinear(c, s) y = MatMul(d, w)"
    bare = only(text)
    assert bare.activation is not None
    assert bare.activation.dtype == "uint8"
