"""What 16-bit formats can hold, and which schemas allow float16."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.graph.shapes import known
from onnxopt.quantization.half import BF16, FP16, HalfFormat, trouble
from onnxopt.quantization.half_operators import Ports, Types, ports
from tests.passes.quantizing import parse


@pytest.mark.parametrize(
    ("values", "form", "exact", "wanted"),
    [
        ([], FP16, False, None),
        ([np.nan, np.inf, -np.inf], FP16, True, None),
        ([0.0, 0.0], FP16, True, None),
        ([65504.0], FP16, True, None),
        ([-65519.0], FP16, True, None),  # rounds down to the largest
        ([65520.0], FP16, False, "reaches 6.55e+04, and float16 ends at 6.55e+04"),
        ([3.38e38], BF16, True, None),
        ([-3.4e38], BF16, False, "reaches 3.4e+38, and bfloat16 ends at 3.39e+38"),
        ([1.0, 1e-6, 1e-6], FP16, False, "has 67% of its values below 6e-05, where float16 loses digits"),
        ([1.0] * 9 + [1e-6], FP16, False, None),
        ([1.0, 1.0, 1e-9], FP16, True, "holds 1e-09, which float16 rounds away"),
        ([1e-5], FP16, True, None),
        ([1e-30], BF16, True, None),
    ],
)
def test_what_a_format_can_hold(values: list[float], form: HalfFormat, exact: bool, wanted: str | None) -> None:
    assert trouble(np.array(values, np.float32), form, exact) == wanted


@pytest.mark.parametrize(
    ("body", "opset", "wanted"),
    [
        ("y = Add(x, x)", 17, Ports((0, 1), (0,))),
        ("y = Pow(x, x)", 17, Ports((0, 1), (0,))),
        ("y = Dropout(x, r)", 17, Ports((0,), (0,))),
        ("y = GridSample(q, g)", 17, Ports((0,), (0,))),
        ("y = Identity(i)", 17, "it has no float32 output"),
        ("y = Equal(x, x)", 17, Ports((0, 1), ())),
        ("y = Cast<to = 1>(i)", 17, "an attribute decides the type of its output"),
        ("y = RandomNormal<shape = [2]>()", 17, "an attribute decides the type of its output"),
        ("y = Range(r, r, r)", 17, "Range of opset 17 has an output that is never float16"),
        ("u = Own(x)  y = Mul(x, u)", 17, "the element type of u is not known"),
        ("y = LSTM<hidden_size = 4>(q3, w3, w3)", 17, Ports((0, 1, 2), (0,))),
        ("y, m = LayerNormalization(x, v)", 17, "LayerNormalization of opset 17 has an output that is never float16"),
        ("y = LayerNormalization(x, v)", 17, Ports((0, 1), (0,))),
        ("y = BatchNormalization(q, v, v, v, v)", 17, Ports((0, 1, 2, 3, 4), (0,))),
        ("y = Clip(x, r)", 17, Ports((0, 1), (0,))),
        ("y = Clip<max = 6.0>(x)", 9, Ports((0,), (0,))),
        (
            'y = ScatterElements<reduction = "add">(x, i, x)',
            17,
            "the runtime has no float16 kernel for a Scatter that reduces, and finds out when it runs",
        ),
        ("y = ScatterElements(x, i, x)", 17, Ports((0, 2), (0,))),
        ("y = CumSum(x, one)", 17, "it adds up a whole axis, one rounding after the other"),
    ],
)
def test_what_of_a_node_may_become_float16(body: str, opset: int, wanted: Ports | str) -> None:
    text = f"""g (float[2, 4] x, float[1, 4, 4, 4] q, float[1, 4, 4, 2] g, float r, int64[2, 4] i, float[4] v,
      float[2, 1, 4] q3, float[1, 16, 4] w3, int64 one) => (y) {{ {body} }}"""
    model = parse(text, opset=opset)
    node = model.graph.nodes[-1]
    assert ports(node, opset, Types(known(model))) == wanted
