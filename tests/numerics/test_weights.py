from dataclasses import replace

import numpy as np
import pytest

from onnxopt.numerics import affine
from onnxopt.numerics.saturation import Layout
from onnxopt.numerics.weights import (
    lost_decibels,
    mean_output_error,
    quantize_kept,
    quantize_layer_weight,
    trouble,
)

SHAPES = {Layout.CONV: (6, 4, 3, 3), Layout.ROWS: (36, 6), Layout.COLUMNS: (6, 36)}


def uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("layout", list(Layout))
def test_bounded_weights_report_what_the_bound_cost(layout: Layout) -> None:
    weight = uniform(*SHAPES[layout])
    free, bounded = (quantize_layer_weight(weight, layout, bounded) for bounded in (False, True))
    assert free.growth == 1.0
    assert free.largest_pair > 128
    assert 1.0 < bounded.growth < 2.0
    assert bounded.largest_pair <= 128
    assert np.abs(free.codes.astype(int)).max() == 127


def test_every_bias_must_fit() -> None:
    weight = uniform(4, 8) * np.float32(1e-10)
    step = np.array(1e-4, np.float32)
    bias = np.full(4, 10.0, np.float32)
    free = quantize_layer_weight(weight, Layout.COLUMNS, False)
    fitted = quantize_layer_weight(weight, Layout.COLUMNS, False, [(bias, step), (np.full(4, 0.1, np.float32), step)])
    assert (fitted.scales > free.scales).all()
    codes, product = affine.quantize_bias(bias, step, fitted.scales)
    assert np.allclose(codes * product.astype(np.float64), bias, rtol=1e-4)


@pytest.mark.parametrize(
    ("layout", "group"), [(Layout.CONV, 1), (Layout.CONV, 2), (Layout.ROWS, 1), (Layout.COLUMNS, 1)]
)
def test_mean_error_is_what_a_constant_input_would_see(layout: Layout, group: int) -> None:
    weight = uniform(*SHAPES[layout])
    quantized = quantize_layer_weight(weight, layout, True)
    channels = SHAPES[layout][1] * group if layout is not Layout.ROWS else 36
    mean = np.random.default_rng(1).standard_normal(channels)
    difference = affine.dequantize_weight(quantized.codes, quantized.scales, layout.axis).astype(np.float64) - weight
    if layout is Layout.CONV:
        expected = [sum(mean[(o // (6 // group)) * 4 + c] * difference[o, c].sum() for c in range(4)) for o in range(6)]
    else:
        expected = list(mean @ difference if layout is Layout.ROWS else difference @ mean)
    assert np.allclose(mean_output_error(weight, quantized.values(layout.axis), layout, group, mean), expected)


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 1), (2,)])
def test_scales_run_along_the_kept_axes(kept: tuple[int, ...]) -> None:
    values = np.random.default_rng(2).standard_normal((3, 4, 5)).astype(np.float32)
    codes, scales = quantize_kept(values, kept)
    assert scales.shape == tuple(n if axis in kept else 1 for axis, n in enumerate(values.shape))
    assert (np.abs(codes * scales - values) <= 0.501 * scales).all()


@pytest.mark.parametrize(("outlier", "low", "high"), [(3.0, 30, 45), (1e5, -60, -10)])
def test_typical_sqnr_falls_with_outliers(outlier: float, low: float, high: float) -> None:
    values = np.random.default_rng(3).standard_normal(10000).clip(-3, 3)
    values[0] = outlier
    found = affine.typical_sqnr_db(float(values.min()), float(values.max()), float(np.abs(values).mean()))
    assert low < found < high


def test_typical_sqnr_of_nothing() -> None:
    assert affine.typical_sqnr_db(0.0, 0.0, 0.0) == np.inf


def test_trouble_is_what_no_scale_can_hold() -> None:
    fine = uniform(4, 4)
    assert trouble(fine) is None
    assert trouble(np.zeros((4, 4), np.float32)) is None
    assert trouble(np.zeros((0, 4), np.float32)) is None
    for bad in (np.nan, np.inf, -np.inf):
        broken = fine.copy()
        broken[1, 2] = bad
        assert trouble(broken) == "holds NaN or infinity"
    assert trouble(-np.abs(fine) * np.float32(1e-30)) == "is too small for 8 bits, 1e-30 at most"
    dead = fine.copy()
    dead[1] *= np.float32(1e-35)
    assert trouble(dead) is None


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("bounded", [False, True])
def test_one_scale_for_the_whole_weight(layout: Layout, bounded: bool) -> None:
    weight = uniform(*SHAPES[layout])
    bias = (np.full(6, 1e9, np.float32), np.array(1e-6, np.float32))
    for biases in ([], [bias]):
        found = quantize_layer_weight(weight, layout, bounded, biases, per_tensor=True)
        assert len(set(found.scales.tolist())) == 1
        assert found.stored_scales.shape == found.stored_zero.shape == ()
        assert found.stored_codes is found.codes
        values = affine.dequantize_weight(found.codes, found.scales, layout.axis)
        assert (np.abs(values - weight) <= 0.501 * found.stored_scales).all()
        assert not bounded or found.largest_pair <= 128


def test_unsigned_weights_are_stored_around_128() -> None:
    found = replace(quantize_layer_weight(uniform(4, 8), Layout.COLUMNS, False), unsigned=True)
    assert found.stored_codes.dtype == found.stored_zero.dtype == np.uint8
    assert (found.stored_zero == 128).all()
    assert found.stored_zero.shape == found.stored_scales.shape == (4,)
    assert np.array_equal(found.stored_codes.astype(int) - 128, found.codes)


def test_decibels_that_the_bound_costs() -> None:
    weight = uniform(64, 64)
    free, bounded = (quantize_layer_weight(weight, Layout.ROWS, each) for each in (False, True))
    assert 4.0 < lost_decibels(weight, bounded, free, Layout.ROWS) < 7.0
    assert lost_decibels(weight, free, free, Layout.ROWS) == 0.0
    exact = np.zeros((4, 4), np.float32)
    same = quantize_layer_weight(exact, Layout.ROWS, True)
    assert lost_decibels(exact, same, same, Layout.ROWS) == 0.0
    ends = np.array([[127, 127], [127, -127]], np.float32)
    free, bounded = (quantize_layer_weight(ends, Layout.ROWS, each) for each in (False, True))
    assert lost_decibels(ends, bounded, free, Layout.ROWS) in (0.0, float("inf"))


def test_channels_that_cannot_saturate_keep_their_scale() -> None:
    weight = np.array([[1.0, 1 / 127], [1.0, 1.0], [1.0, -1.0]], np.float32)  # pairs of 128, 254 and 127 codes
    free, bounded = (quantize_layer_weight(weight, Layout.COLUMNS, each) for each in (False, True))
    assert np.array_equal(bounded.scales == free.scales, [True, False, True])
    assert bounded.largest_pair == 128
