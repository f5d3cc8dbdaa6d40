"""Formats of fixed-point numbers: names, ranges, the choice between clipping and coarser steps, the bound on pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.numerics import affine, fixed_point
from onnxopt.numerics.fixed_point import activation_qparams, q_format, q_formats
from onnxopt.numerics.histogram import Histogram, HistogramSet
from onnxopt.numerics.powers import next_power_of_two
from onnxopt.numerics.saturation import Layout, saturates
from onnxopt.numerics.weights import fed_back, quantize_layer_weight
from tests.passes.quantizing import normal, weight

F32 = np.float32
POSITIVE = st.floats(2.0**-90, 2.0**90)


def histogram(values: np.ndarray) -> Histogram:
    found = HistogramSet(1)
    found.add(0, values.astype(F32))
    return found[0]


def is_power(scales: np.ndarray) -> bool:
    return bool((np.frexp(scales)[0] == 0.5).all())


@given(POSITIVE)
def test_the_next_power_is_the_smallest_that_is_large_enough(value: float) -> None:
    found = float(next_power_of_two(np.float64(value)))
    assert is_power(np.array(found))
    assert found / 2 < value <= found


def test_powers_of_two_stay() -> None:
    powers = (2.0 ** np.arange(-120, 120)).astype(F32)
    found = next_power_of_two(powers)
    assert found.dtype == F32
    np.testing.assert_array_equal(found, powers)
    np.testing.assert_array_equal(next_power_of_two(np.nextafter(powers, F32(np.inf))), 2 * powers)


@pytest.mark.parametrize(
    ("scale", "bits", "signed", "name"),
    [
        (2.0**-6, 8, True, "Q1.6"),
        (2.0**-7, 8, True, "Q0.7"),
        (2.0**-8, 8, False, "UQ0.8"),
        (2.0**-5, 8, False, "UQ3.5"),
        (2.0**-10, 8, True, "Q-3.10"),
        (4.0, 8, True, "Q9.-2"),
        (2.0**-2, 4, True, "Q1.2"),
        (1.0, 4, False, "UQ4.0"),
    ],
)
def test_a_format_is_called_by_its_bits_on_both_sides_of_the_point(
    scale: float, bits: int, signed: bool, name: str
) -> None:
    assert q_format(scale, bits, signed) == name


def test_the_formats_of_channels_are_told_by_their_ends() -> None:
    assert q_formats(np.array([2.0**-6] * 3, F32), 8) == "Q1.6"
    assert q_formats(np.array([2.0**-6, 2.0**-9, 2.0**-7], F32), 8) == "Q-2.9 to Q1.6"


@given(low=st.floats(-1e6, 0), high=st.floats(0, 1e6), signed_type=st.booleans(), bits=st.integers(2, 8))
def test_the_smallest_power_is_taken_with_which_a_range_fits(
    low: float, high: float, signed_type: bool, bits: int
) -> None:
    dtype = np.dtype(np.int8 if signed_type else np.uint8)
    params = activation_qparams(low, high, dtype, bits)
    assert params.dtype == dtype
    assert params.scale.shape == ()
    assert is_power(params.scale)
    start = 0 if dtype == np.uint8 else -128
    assert int(params.zero_point) == (start if low >= 0 else start + 128)
    lowest, highest = (0, 2**bits - 1) if low >= 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def fits(scale: float) -> bool:
        return lowest * scale <= low and high <= highest * scale

    scale = float(params.scale)
    if low == high == 0:
        assert scale == 1
    else:
        assert fits(scale)
        assert scale == affine.SMALLEST_SCALE or not fits(scale / 2)


def test_formats_of_one_range_hold_the_same_values_in_both_types() -> None:
    for low, high in ((-1.3, 2.0), (0.0, 5.9), (-4.0, 0.0)):
        unsigned, signed = (activation_qparams(low, high, dtype) for dtype in (np.uint8, np.int8))
        assert [unsigned.value(code) for code in range(256)] == [signed.value(code) for code in range(-128, 128)]


def test_symmetric_formats_have_zero_in_the_middle() -> None:
    params = activation_qparams(0.0, 1.0, np.int8, symmetric=True)
    assert (int(params.zero_point), float(params.scale)) == (0, 2.0**-6)


def test_a_finer_step_is_taken_where_clipping_costs_less() -> None:
    rng = np.random.default_rng(0)
    few = np.append(rng.uniform(0, 0.99, 20000), 1.001)  # one value just beyond 255/256
    many = rng.uniform(0, 1.9, 20000)
    fine = activation_qparams(0.0, 1.001, np.uint8, histogram=histogram(few))
    coarse = activation_qparams(0.0, 1.9, np.uint8, histogram=histogram(many))
    assert float(activation_qparams(0.0, 1.001, np.uint8).scale) == 2.0**-7
    assert float(fine.scale) == 2.0**-8
    assert float(coarse.scale) == 2.0**-7
    # with fewer bits than the code has, nothing would clip: the range is kept
    assert float(activation_qparams(0.0, 1.001, np.uint8, 4, histogram=histogram(few)).scale) == 2.0**-3


def test_counted_errors_are_those_of_the_values() -> None:
    values = np.random.default_rng(1).normal(0, 1, 100000).astype(F32)
    for scale, lowest, highest in ((2.0**-5, -128, 127), (2.0**-6, -128, 127), (2.0**-3, -8, 7)):
        exact = np.square(np.clip(np.rint(values / scale), lowest, highest) * scale - values).sum()
        assert fixed_point.squared_error(histogram(values), scale, lowest, highest) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("bounds", [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_what_is_no_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no range"):
        activation_qparams(*bounds, np.uint8)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_weights_get_powers_of_two_that_keep_the_bound(
    layout: Layout, bounded: bool, per_tensor: bool, bits: int
) -> None:
    values = weight(24, 16, 3, 3) if layout is Layout.CONV else weight(24, 40)
    values[3] = 0
    values[4] *= 1e-3
    found = quantize_layer_weight(values, layout, bounded, (), per_tensor, bits, power_of_two=True)
    assert is_power(found.scales)
    assert np.abs(found.codes).max() <= 2 ** (bits - 1) - 1 == found.limit
    assert not (bounded and saturates(found.codes, layout))
    if per_tensor:
        assert len(set(found.scales.tolist())) == 1
    # neighbours of the scales are no better where they are allowed, which nothing bounds here
    if not bounded and not per_tensor:
        errors = []
        for factor in (0.5, 1.0, 2.0):
            scales = (found.scales * F32(factor)).astype(F32)
            codes = affine.quantize_weight(values, scales, layout.axis, found.limit)
            errors.append(np.square(affine.dequantize_weight(codes, scales, layout.axis) - values).sum())
        assert errors[1] <= min(errors)


def test_a_scale_is_never_below_what_the_bias_needs() -> None:
    values, bias = weight(8, 16), np.full(8, 1e9, F32)
    found = quantize_layer_weight(values, Layout.COLUMNS, False, [(bias, np.array(2.0**-7, F32))], power_of_two=True)
    assert is_power(found.scales)
    assert (1e9 / (2.0**-7 * found.scales.astype(np.float64)) < 2**31).all()


def test_fed_back_codes_keep_to_their_bits() -> None:
    values, inputs = weight(8, 32), normal(400, 32)
    inputs[:, 1:] += inputs[:, :-1]
    nearest = quantize_layer_weight(values, Layout.COLUMNS, True, bits=4, power_of_two=True)
    second = (inputs.T @ inputs / len(inputs)).astype(np.float64)
    found = fed_back(values, Layout.COLUMNS, nearest, [second], bounded=True)
    assert np.abs(found.codes).max() <= 7

    def error(codes: np.ndarray) -> float:
        difference = affine.dequantize_weight(codes, found.scales, 0) - values
        return float(np.square(inputs @ difference.T).sum())

    assert error(found.codes) < error(nearest.codes)
