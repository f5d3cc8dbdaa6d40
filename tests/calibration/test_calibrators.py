import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration import calibrators
from onnxopt.calibration.calibrators import CALIBRATORS, Measured, choose
from onnxopt.numerics import affine
from onnxopt.numerics.histogram import BINS, HALF, HistogramSet

Values = npt.NDArray[np.float32]
SEARCHED = ["entropy", "mse"]
SIZE = 50_000


def measure(*tensors: npt.ArrayLike) -> Measured:
    """What a run would measure of `tensors`; the means of the extremes are those of the two halves."""
    arrays = [np.asarray(tensor, np.float32).reshape(-1) for tensor in tensors]
    found = HistogramSet(len(arrays))
    for index, array in enumerate(arrays):
        found.add(index, array)
    halves = [np.array_split(array, 2 if array.size > 1 else 1) for array in arrays]
    return Measured(
        np.array([array.min() for array in arrays], np.float64),
        np.array([array.max() for array in arrays], np.float64),
        found.counts,
        found.exponents,
        np.array([np.mean([half.min() for half in two], dtype=np.float64) for two in halves]),
        np.array([np.mean([half.max() for half in two], dtype=np.float64) for two in halves]),
    )


def bounds(name: str, values: npt.ArrayLike, **settings: Any) -> tuple[float, float]:
    low, high = CALIBRATORS[name](measure(values), **settings)
    return float(low[0]), float(high[0])


def squared_error(values: Values, low: float, high: float) -> float:
    params = affine.activation_qparams(low, high, np.uint8)
    restored = affine.dequantize(affine.quantize(values, params), params)
    return float(np.square(restored.astype(np.float64) - values).mean())


def sample(name: str) -> Values:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(SIZE)
    made: dict[str, npt.NDArray[np.float64]] = {
        "gaussian": normal,
        "laplace": rng.laplace(size=SIZE),
        "relu": np.maximum(normal, 0),
        "negative": -np.abs(normal) - 0.5,
        "outlier": np.append(normal, [40.0, 55.0]),
        "bimodal": np.append(rng.normal(-1, 0.05, SIZE), rng.normal(3, 0.1, SIZE // 2)),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "student": rng.standard_t(3, size=SIZE),
        "uniform": rng.uniform(-1, 2, SIZE),
    }
    return made[name].astype(np.float32)


SAMPLES = ["gaussian", "laplace", "relu", "negative", "outlier", "bimodal", "silu", "student", "uniform"]


def brute_force(values: Values, symmetric: bool) -> float:
    """The smallest squared error of 8-bit formats inside the extremes, every one tried on the values themselves."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if symmetric:
        return min(squared_error(values, -m, m) for m in np.geomspace(1, 1 / 16, 48) * max(-low, high))
    return min(
        squared_error(values, float(start), float(start + extent))
        for extent in np.geomspace(1, 1 / 16, 32) * (high - low)
        for start in np.unique(np.clip(np.linspace(low, high - extent, 7), -extent, 0))
    )


def inside(measured: Measured, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], symmetric: bool) -> bool:
    lowest, highest = np.minimum(measured.minimum, 0), np.maximum(measured.maximum, 0)
    if symmetric:
        highest = np.maximum(-lowest, highest)
        lowest = -highest
        assert np.array_equal(low, -high)
    assert low.dtype == high.dtype == np.float64
    assert low.shape == high.shape == measured.minimum.shape
    return bool(
        np.isfinite(low).all()
        and np.isfinite(high).all()
        and (lowest <= low).all()
        and (low <= 0).all()
        and (high >= 0).all()
        and (high <= highest).all()
        and ((low < high) | (lowest == highest)).all()
    )


DEGENERATE: list[npt.ArrayLike] = [
    [0.0, -0.0],
    [3.0, 3.0],
    [-3.0],
    [0.0, 5.0],
    [-5.0, 0.0],
    [2.0, 7.0],
    [1e-45, 0.0],
    [-1e-40, 1e-40],
    [3.4e38, -3.4e38],
    [-3.4e38] * 50 + [0.0, 1.0, -1.0],
    [0.0] * 99_999 + [5.0],
    [0.0] * 99_999 + [-1e-20],
    [1e-20] * 1000 + [1e20],
]


@pytest.mark.parametrize("levels", [256, 255, 16, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_degenerate_tensors_get_usable_ranges(name: str, symmetric: bool, levels: int) -> None:
    measured = measure(*DEGENERATE)
    low, high = CALIBRATORS[name](measured, symmetric=symmetric, levels=levels)
    assert inside(measured, low, high, symmetric)
    for index in range(len(measured)):
        assert affine.activation_qparams(low[index], high[index], np.uint8).scale > 0


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranges_of_any_values_are_inside_the_extremes(values: list[float], symmetric: bool) -> None:
    measured = measure(values)
    for name, calibrator in CALIBRATORS.items():
        low, high = calibrator(measured, symmetric=symmetric)
        assert inside(measured, low, high, symmetric), name


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("counted", [[], [0.0, 0.0]], ids=["nothing", "zeros only"])
def test_extremes_stand_where_the_histogram_saw_nothing(name: str, counted: list[float]) -> None:
    found = HistogramSet(1)
    found.add(0, np.array(counted, np.float32))
    measured = Measured(np.array([-1.0]), np.array([5.0]), found.counts, found.exponents)
    low, high = CALIBRATORS[name](measured)
    assert (low[0], high[0]) == (-1, 5)
    low, high = CALIBRATORS[name](measured, symmetric=True)
    assert (low[0], high[0]) == (-5, 5)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_tensors_do_not_influence_each_other(name: str) -> None:
    tensors = [sample(shape) for shape in SAMPLES]
    low, high = CALIBRATORS[name](measure(*tensors))
    for index, tensor in enumerate(tensors):
        assert (low[index], high[index]) == bounds(name, tensor)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_one_sided_tensors_keep_zero_as_their_end(name: str) -> None:
    assert bounds(name, sample("relu"))[0] == 0
    assert bounds(name, sample("negative"))[1] == 0


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("power", [-60, 3, 90])
def test_ranges_scale_with_the_values(name: str, power: int) -> None:
    values = sample("student")
    low, high = bounds(name, values)
    scaled = bounds(name, np.ldexp(values, power))
    assert scaled == (np.ldexp(low, power), np.ldexp(high, power))


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1), (0, np.inf), (2, 1)])
def test_impossible_extremes_are_refused(low: float, high: float) -> None:
    found = HistogramSet(1)
    with pytest.raises(ValueError, match="extremes"):
        Measured(np.array([low]), np.array([high]), found.counts, found.exponents)


def test_minmax() -> None:
    assert bounds("minmax", [-1, 4, 2]) == (-1, 4)
    assert bounds("minmax", [-1, 4, 2], symmetric=True) == (-4, 4)
    assert bounds("minmax", [3, 4]) == (0, 4)


def test_moving_average_is_the_mean_of_the_extremes() -> None:
    assert bounds("moving_average", [-1, 4, -3, 2]) == (-2, 3)
    assert bounds("moving_average", [-1, 4, -3, 2], symmetric=True) == (-3, 3)


def test_moving_average_needs_the_means() -> None:
    found = HistogramSet(1)
    with pytest.raises(ValueError, match="means"):
        CALIBRATORS["moving_average"](Measured(np.zeros(1), np.ones(1), found.counts, found.exponents))


@pytest.mark.parametrize("percent", [99.99, 99.0, 50.0])
@pytest.mark.parametrize("shape", ["gaussian", "laplace", "silu", "student"])
def test_percentiles_are_those_of_the_values(shape: str, percent: float) -> None:
    values = sample(shape).astype(np.float64)
    measured = measure(values)
    width = measured.histogram(0).width

    def near(found: float, of: npt.NDArray[np.float64], wanted: float) -> bool:
        below, above = (float(np.percentile(of, wanted, method=side)) for side in ("lower", "higher"))
        return min(below, 0 if wanted < 50 else below) - width <= found <= max(above, 0) + width

    low, high = calibrators.percentile(measured, percent=percent)
    assert near(low[0], values, (100 - percent) / 2)
    assert near(high[0], values, (100 + percent) / 2)
    low, high = calibrators.percentile(measured, symmetric=True, percent=percent)
    assert near(high[0], np.abs(values), percent)


def test_percentile_is_99_99_unless_told() -> None:
    measured = measure(sample("student"))
    assert calibrators.percentile(measured) == calibrators.percentile(measured, percent=99.99)
    low, high = calibrators.percentile(measured, percent=100)
    assert low[0] <= measured.minimum[0] + measured.histogram(0).width
    assert high[0] >= measured.maximum[0] - measured.histogram(0).width


@pytest.mark.parametrize("percent", [0, -1, 100.1, np.nan])
def test_impossible_percentiles_are_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        calibrators.percentile(measure([1.0, 2.0]), percent=percent)


def test_rare_values_beside_zeros_are_not_all_cut_away() -> None:
    assert bounds("percentile", [0.0] * 99_999 + [5.0]) == (0, 5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SAMPLES)
def test_mse_is_as_good_as_trying_every_format_on_the_values(shape: str, symmetric: bool) -> None:
    values = sample(shape)
    found = squared_error(values, *bounds("mse", values, symmetric=symmetric))
    assert found <= 1.02 * brute_force(values, symmetric)
    assert found <= 1.0001 * squared_error(values, *bounds("minmax", values, symmetric=symmetric))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_symmetric_ranges_are_searched_with_the_zero_point_they_will_get(dtype: type) -> None:
    params = affine.activation_qparams(-0.3, 0.3, dtype)
    space = calibrators._Space(-0.3, 0.3, 255, symmetric=True)
    assert space._zero_points(np.ones(1), 1).tolist() == [[int(params.zero_point) - params.codes[0]]]


@pytest.mark.parametrize("name", SEARCHED)
def test_what_was_searched_is_what_the_range_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formats: list[tuple[float, int]] = []
    plain = calibrators._Space._bounds

    def kept(space: calibrators._Space, step: float, zero_point: int) -> tuple[float, float]:
        formats.append((step, zero_point))
        return plain(space, step, zero_point)

    monkeypatch.setattr(calibrators._Space, "_bounds", kept)
    measured = measure(*(sample(shape) for shape in SAMPLES))
    low, high = CALIBRATORS[name](measured)
    for index, (step, zero_point) in enumerate(formats):
        params = affine.activation_qparams(low[index], high[index], np.uint8)
        assert int(params.zero_point) == zero_point
        assert float(params.scale) == pytest.approx(step * measured.histogram(index).width, rel=1e-6)


def test_mse_clips_gaussians_and_not_uniforms() -> None:
    values = sample("gaussian")
    assert squared_error(values, *bounds("mse", values)) < 0.95 * squared_error(values, *bounds("minmax", values))
    assert bounds("mse", sample("uniform")) == pytest.approx((-1, 2), rel=0.005)


def test_fewer_codes_clip_more() -> None:
    ranges = [bounds("mse", sample("laplace"), levels=levels) for levels in (256, 64, 16, 4)]
    widths = [high - low for low, high in ranges]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.6 * widths[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_zeros_do_not_matter(name: str, symmetric: bool) -> None:
    values = sample("relu")
    values = values[values > 0]
    more = np.append(values, np.zeros(10 * SIZE, np.float32))
    plain, padded = (np.array(bounds(name, v, symmetric=symmetric)) for v in (values, more))
    assert padded == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "share"), [("student", 0.8), ("outlier", 0.3)])
def test_entropy_clips_heavy_tails(shape: str, share: float, symmetric: bool) -> None:
    values = sample(shape)
    low, high = bounds("entropy", values, symmetric=symmetric)
    assert high < share * values.max()
    assert high > np.quantile(values, 0.99)
    assert low < np.quantile(values, 0.01)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_does_not_clip_uniform_values(symmetric: bool) -> None:
    values = sample("uniform")
    found = bounds("entropy", values, symmetric=symmetric)
    assert found == pytest.approx(bounds("minmax", values, symmetric=symmetric), rel=0.01)


def test_entropy_does_not_cut_off_whole_modes() -> None:
    low, high = bounds("entropy", sample("bimodal"))
    assert low < -1.1
    assert high > 3.2


# The costs against the plain definitions, on 40 bins about zero.


def some_counts() -> npt.NDArray[np.float64]:
    counts = np.zeros(BINS)
    counts[HALF - 15 : HALF + 25] = np.random.default_rng(3).integers(0, 60, 40) * (np.arange(40) % 7 != 3)
    return counts


def formats() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], int]:
    zero_points = np.array([[0, 3, 8, 15], [2, 5, 7, 11], [15, 14, 1, 6], [0, 6, 9, 12]])
    return np.array([2.7, 1.3, 1.0, 1.9]), zero_points, 15


def plain_squared_error(counts: npt.NDArray[np.float64], step: float, zero_point: int, codes: int) -> float:
    parts = 1000
    filled = np.flatnonzero(counts)
    values = (filled[:, None] - HALF) + (np.arange(parts) + 0.5) / parts
    restored = (np.clip(np.rint(values / step) + zero_point, 0, codes) - zero_point) * step
    return float((np.square(restored - values).mean(axis=1) * counts[filled]).sum())


def plain_divergence(counts: npt.NDArray[np.float64], step: float, zero_point: int, codes: int) -> float:
    filled = np.flatnonzero(counts)
    edges = [math.floor((k - 0.5) * step + 0.5) + HALF for k in range(-zero_point, codes - zero_point + 2)]
    edges = [min(max(edge, int(filled[0])), int(filled[-1]) + 1) for edge in edges]
    reference = counts.copy()
    reference[: edges[0]] = reference[edges[-1] :] = 0
    if edges[0] < BINS:
        reference[min(edges[0], int(filled[-1]))] += counts[: edges[0]].sum()
    reference[max(edges[-1] - 1, int(filled[0]))] += counts[edges[-1] :].sum()
    total = 0.0
    for low, high in pairwise(edges):
        held = reference[low:high] > 0
        if held.any():
            spread = max(counts[low:high].sum(), 1.0) / held.sum()
            p = reference[low:high][held]
            total += float((p * np.log(p / spread)).sum())
    return total


def test_squared_error_is_that_of_quantising() -> None:
    counts = some_counts()
    steps, zero_points, codes = formats()
    found = calibrators._SquaredError(counts)(steps, zero_points, codes)
    plain = np.array(
        [
            [plain_squared_error(counts, step, int(z), codes) for z in row]
            for step, row in zip(steps, zero_points, strict=True)
        ]
    )
    constant = plain - found
    assert constant == pytest.approx(constant[0, 0], rel=1e-5)
    moved = calibrators._SquaredError(np.roll(counts, 1))(steps, zero_points, codes)
    assert plain - moved != pytest.approx((plain - moved)[0, 0], rel=1e-2)


def test_divergence_is_that_of_its_definition() -> None:
    counts = some_counts()
    steps, zero_points, codes = formats()
    found = calibrators._Divergence(counts)(steps, zero_points, codes)
    plain = [
        [plain_divergence(counts, step, int(z), codes) for z in row]
        for step, row in zip(steps, zero_points, strict=True)
    ]
    assert found == pytest.approx(np.array(plain), rel=1e-9, abs=1e-9)
    moved = calibrators._Divergence(np.roll(counts, 1))(steps, zero_points, codes)
    assert moved != pytest.approx(np.array(plain), rel=1e-2)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({"a": 1.0, "b": 2.0}, "b"),
        ({"a": 2.0, "b": 2.0}, "a"),
        ({"a": np.nan, "b": -np.inf}, "b"),
        ({"a": np.nan, "b": np.nan}, "a"),
        ({"a": 5.0, "b": np.nan, "c": np.inf}, "c"),
    ],
)
def test_the_best_score_is_chosen(scores: dict[str, float], best: str) -> None:
    assert choose(scores) == best


def test_nothing_cannot_be_chosen_from() -> None:
    with pytest.raises(ValueError, match="choose"):
        choose({})
