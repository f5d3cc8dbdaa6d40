import numpy as np
import pytest

from onnxopt.numerics import affine
from onnxopt.numerics.saturation import (
    Layout,
    kernel_order,
    max_pair_sum,
    pair_bound_scales,
    pair_limit,
    pairs_at_risk,
    saturates,
    saturating_product,
    saturation_loss,
)


def exact(codes: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    return codes.astype(np.int64) @ ordered.astype(np.int64).T


def worst_inputs(ordered: np.ndarray, largest: int) -> np.ndarray:
    """Codes that turn on all positive, then all negative weights of each row: the worst any input can do to a pair."""
    return np.concatenate([(ordered > 0), (ordered < 0)]).astype(np.uint8) * np.uint8(largest)


@pytest.mark.parametrize(
    ("pair", "bad"), [((127, 1), False), ((127, 2), True), ((64, 64), False), ((65, 64), True), ((127, -127), False)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_known_limits_of_a_pair(pair: tuple[int, int], bad: bool, sign: int) -> None:
    codes = sign * np.array([pair], np.int8)
    assert saturates(codes, Layout.COLUMNS) is bad
    inputs = worst_inputs(codes, 255)
    differs = (saturating_product(inputs, codes) != exact(inputs, codes)).any()
    # -128 * 255 = -32640 still fits, as does 128 * 255: both signs share one limit
    assert bool(differs) is bad


def test_only_adjacent_weights_pair() -> None:
    apart = np.array([[127, 0, 127, 0]], np.int8)
    shifted = np.array([[0, 127, 127, 0]], np.int8)
    together = np.array([[127, 127, 0, 0]], np.int8)
    assert [saturates(w, Layout.COLUMNS) for w in (apart, shifted, together)] == [False, False, True]


def test_an_odd_last_weight_pairs_with_nothing() -> None:
    assert max_pair_sum(np.array([[1, 2, 100]], np.int8), Layout.COLUMNS).tolist() == [100]
    assert max_pair_sum(np.zeros((2, 0), np.int8), Layout.COLUMNS).tolist() == [0, 0]


def test_kernel_order_of_the_layouts() -> None:
    conv = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    # k runs over kernel positions first and channels innermost: w[0, :, 0, 0], w[0, :, 0, 1], ...
    assert kernel_order(conv, Layout.CONV)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    rows = np.arange(6).reshape(3, 2)
    assert kernel_order(rows, Layout.ROWS).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert kernel_order(rows, Layout.COLUMNS).tolist() == rows.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_model_agrees_with_brute_force(seed: int) -> None:
    """saturates() is exact: some input saturates if and only if it says so."""
    rng = np.random.default_rng(seed)
    spread = rng.integers(30, 127)
    codes = rng.integers(-spread, spread + 1, (6, int(rng.integers(1, 12)))).astype(np.int8)
    largest = int(rng.choice([255, 200, 128, 60]))
    inputs = worst_inputs(codes, largest)
    differs = (saturating_product(inputs, codes) != exact(inputs, codes)).any(axis=0)
    assert (max_pair_sum(codes, Layout.COLUMNS) > pair_limit(largest)).tolist() == differs.tolist()


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("family", ["gauss", "uniform", "laplace"])
@pytest.mark.parametrize("largest", [255, 131, 40])
def test_pair_bound_never_saturates_and_costs_less_than_seven_bits(layout: Layout, family: str, largest: int) -> None:
    rng = np.random.default_rng(3)
    shape = {Layout.CONV: (24, 9, 3, 3), Layout.ROWS: (81, 24), Layout.COLUMNS: (24, 81)}[layout]
    families = {
        "gauss": rng.normal(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "laplace": rng.laplace(size=shape),
    }
    weight = families[family].astype(np.float32)
    maximum = affine.channel_maximum(weight, layout.axis)
    plain = affine.weight_scales(maximum)
    bound = pair_bound_scales(weight, layout, maximum, largest)
    codes = affine.quantize_weight(weight, bound, layout.axis)
    assert not saturates(codes, layout, largest)
    ordered = np.asarray(kernel_order(codes, layout), np.int8)
    inputs = worst_inputs(ordered, largest)
    assert (saturating_product(inputs, ordered) == exact(inputs, ordered)).all()
    assert (bound >= plain).all()
    assert (bound <= 2.03 * plain).all()
    if largest == 255:
        assert saturates(affine.quantize_weight(weight, plain, layout.axis), layout)
        assert bound.mean() < 1.95 * plain.mean()


def test_pair_bound_leaves_harmless_weights_alone() -> None:
    weight = np.array([[1.0, -1.0, 1.0, -1.0], [0, 0, 0, 0]], np.float32)
    maximum = affine.channel_maximum(weight, 0)
    assert (pair_bound_scales(weight, Layout.COLUMNS, maximum) == affine.weight_scales(maximum)).all()


@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (4, 2, 8), (3, 5, 0), (0, 2, 4), (64, 16, 33)])
def test_the_loss_is_the_saturating_minus_the_exact_product(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    rng = np.random.default_rng(sum(shape))
    for _ in range(5):
        codes = rng.choice([0, 1, 130, 200, 254, 255], (rows, inputs)).astype(np.uint8)
        ordered = rng.choice([-128, -127, -90, 0, 64, 65, 127], (outputs, inputs)).astype(np.int8)
        expected = saturating_product(codes, ordered) - exact(codes, ordered)
        assert (saturation_loss(codes, ordered) == expected).all()


def test_pairs_at_risk_are_those_that_make_a_layer_saturate() -> None:
    ordered = np.array([[127, 1, 64, 64, 127], [127, 2, -65, -64, 127], [127, -127, 0, 0, -128]], np.int8)
    assert pairs_at_risk(ordered).tolist() == [[False, False], [True, True], [False, False]]
    assert not pairs_at_risk(ordered, 127).any()
    assert [saturates(row[None], Layout.COLUMNS) for row in ordered] == [False, True, False]
