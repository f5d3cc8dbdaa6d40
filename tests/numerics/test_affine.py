import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numerics import affine

BOUNDS = st.floats(-1e4, 1e4, width=32)


@given(BOUNDS, BOUNDS, st.sampled_from([np.uint8, np.int8]))
@settings(max_examples=200, deadline=None)
def test_zero_is_exact_and_values_inside_the_range_err_by_half_a_step(a: float, b: float, dtype: type) -> None:
    low, high = min(a, b), max(a, b)
    params = affine.activation_qparams(low, high, dtype)
    assert affine.dequantize(affine.quantize(np.zeros(1), params), params)[0] == 0.0
    values = np.linspace(min(low, 0), max(high, 0), 33, dtype=np.float32)
    restored = affine.dequantize(affine.quantize(values, params), params)
    # the zero-point is rounded, so one end of a two-sided range may be cut by up to half a step more
    assert np.abs(restored - values).max() <= 1.001 * float(params.scale)


def test_scale_and_zero_point_are_scalars() -> None:
    params = affine.activation_qparams(-1, 3, np.uint8)
    assert params.scale.shape == ()
    assert params.zero_point.shape == ()
    assert params.scale.dtype == np.float32
    assert params.zero_point.dtype == np.uint8


@pytest.mark.parametrize("high", [6.0, 1.0, 0.1, 3.3333333, 5.9999995])
def test_upper_end_of_a_positive_range_is_not_exceeded(high: float) -> None:
    params = affine.activation_qparams(0, high, np.uint8)
    assert np.float32(255) * params.scale <= np.float32(high)
    assert params.code(high) == 255


@pytest.mark.parametrize(("low", "high", "code"), [(0, 5, 0), (-5, 0, 255), (-1, 1, 128), (2, 5, 0), (-5, -2, 255)])
def test_zero_points(low: float, high: float, code: int) -> None:
    assert abs(int(affine.activation_qparams(low, high, np.uint8).zero_point) - code) <= 1
    assert abs(int(affine.activation_qparams(low, high, np.int8).zero_point) - (code - 128)) <= 1


def test_one_sided_ranges_put_zero_exactly_at_the_end() -> None:
    assert int(affine.activation_qparams(0, 5, np.uint8).zero_point) == 0
    assert int(affine.activation_qparams(0, 5, np.int8).zero_point) == -128


def test_degenerate_ranges() -> None:
    assert float(affine.activation_qparams(0, 0, np.uint8).scale) == 1.0
    assert float(affine.activation_qparams(0, 1e-40, np.uint8).scale) >= 2.0**-100


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1), (0, np.inf), (-np.inf, 0), (2, 1)])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="range"):
        affine.activation_qparams(low, high, np.uint8)


def test_same_as_is_bitwise() -> None:
    one = affine.activation_qparams(0, 1, np.uint8)
    assert one.same_as(affine.activation_qparams(0, 1, np.uint8))
    near = affine.QParams(np.array(np.nextafter(one.scale, np.float32(2))), one.zero_point)
    assert not one.same_as(near)
    assert not one.same_as(affine.QParams(one.scale, np.array(1, np.uint8)))
    assert not one.same_as(affine.QParams(one.scale, np.array(0, np.int8)))


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    params = affine.QParams(np.array(1, np.float32), np.array(10, np.uint8))
    codes = affine.quantize(np.array([0.5, 1.5, -0.5, 300.0, -300.0]), params)
    assert codes.tolist() == [10, 12, 10, 255, 0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weights_are_symmetric_per_channel(axis: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((5, 7, 3)) * 10.0 ** rng.integers(-3, 3, (5, 7, 1))).astype(np.float32)
    scales = affine.weight_scales(affine.channel_maximum(weight, axis))
    codes = affine.quantize_weight(weight, scales, axis)
    assert codes.dtype == np.int8
    assert scales.shape == (weight.shape[axis],)
    assert np.abs(codes.astype(int)).max() == 127
    error = np.abs(affine.dequantize_weight(codes, scales, axis) - weight)
    assert (error <= 0.5001 * affine.along(scales, axis, 3)).all()


def test_zero_channel_gets_scale_one() -> None:
    weight = np.array([[0, 0], [1, -2]], np.float32)
    scales = affine.weight_scales(affine.channel_maximum(weight, 0))
    assert scales[0] == 1.0
    assert affine.quantize_weight(weight, scales, 0).tolist() == [[0, 0], [64, -127]]


def test_empty_weight_has_finite_scales() -> None:
    scales = affine.weight_scales(affine.channel_maximum(np.zeros((3, 0), np.float32), 0))
    assert scales.tolist() == [1, 1, 1]


def test_bias_codes_carry_the_product_scale() -> None:
    scales = np.array([0.5, 0.25], np.float32)
    codes, product = affine.quantize_bias(np.array([1.0, -2.0]), np.array(0.5, np.float32), scales)
    assert codes.dtype == np.int32
    assert codes.tolist() == [4, -16]
    assert product.tolist() == [0.25, 0.125]


def test_scales_are_enlarged_only_where_the_bias_would_overflow() -> None:
    scales = np.array([1e-9, 1e-3], np.float32)
    bias = np.array([50.0, 50.0], np.float32)
    step = np.array(1e-3, np.float32)
    wide = affine.scales_for_bias(scales, bias, step)
    assert wide[0] > scales[0]
    assert wide[1] == scales[1]
    codes, product = affine.quantize_bias(bias, step, wide)
    assert np.allclose(codes * product.astype(np.float64), bias, rtol=1e-4)
    clipped, product = affine.quantize_bias(bias, step, scales)
    assert not np.allclose(clipped[0] * float(product[0]), 50.0, rtol=0.1)


def test_sqnr() -> None:
    signal = np.array([3.0, 4.0])
    assert affine.sqnr_db(signal, signal) == np.inf
    assert affine.sqnr_db(signal, signal + np.array([0.5, 0.0])) == pytest.approx(20.0)
    assert np.isnan(affine.sqnr_db(np.zeros(2), np.ones(2)))


@pytest.mark.parametrize(("extent", "lost"), [(0.0, False), (1e-45, True), (1e-29, True), (3e-28, False), (1.0, False)])
def test_a_range_underflows_below_255_smallest_scales(extent: float, lost: bool) -> None:
    assert affine.underflows(extent, 255) is lost
    if not lost and extent:
        assert float(affine.activation_qparams(0, extent, np.uint8).scale) == pytest.approx(extent / 255)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (0.0, 6.0), (-2.0, 0.0), (1e-3, 2e-3), (-1e30, 5.0)])
def test_symmetric_formats_have_no_zero_point_and_hold_both_ends(low: float, high: float) -> None:
    params = affine.activation_qparams(low, high, np.int8, symmetric=True)
    largest = max(-low, high)
    assert int(params.zero_point) == 0
    assert params.zero_point.shape == params.scale.shape == ()
    assert params.scale == pytest.approx(largest / 127, rel=1e-6)
    for value in (low, 0.0, high):
        assert params.value(params.code(value)) == pytest.approx(value, abs=float(params.scale) / 2 * 1.001)


def test_symmetric_formats_of_nothing_and_of_unsigned_types() -> None:
    nothing = affine.activation_qparams(0.0, 0.0, np.int8, symmetric=True)
    assert (float(nothing.scale), int(nothing.zero_point)) == (1.0, 0)
    assert affine.activation_qparams(0.0, 1e-40, np.int8, symmetric=True).scale == affine.SMALLEST_SCALE
    with pytest.raises(ValueError, match="needs a signed type, not uint8"):
        affine.activation_qparams(-1.0, 1.0, np.uint8, symmetric=True)


def test_unsigned_codes_are_the_same_values() -> None:
    codes = np.arange(-127, 128, dtype=np.int8)
    stored = affine.unsigned(codes)
    assert stored.dtype == np.uint8
    assert np.array_equal(stored.astype(int) - affine.UNSIGNED_ZERO, codes)
