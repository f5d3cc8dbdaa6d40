"""Low-rank factors: optimal where a closed form is known, better than plain where not, and errors as predicted."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.numerics.lowrank import (
    Second,
    Wide,
    refitted,
    spectrum,
    spectrum_of_outputs,
    squared_error,
    strips,
    tucker,
)


def inputs(rows: int, width: int, seed: int = 0, decay: float = 1.0, mean: float = 0.5) -> Wide:
    """Inputs that move together, each direction less than the one before, around a mean."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(77).standard_normal((width, width)))[0]
    scales = np.arange(1, width + 1.0) ** -decay
    middle = mean * np.random.default_rng(78).standard_normal(width)
    return np.asarray((rng.standard_normal((rows, width)) * scales) @ turn.T + middle)


def covariance(rows: Wide) -> Wide:
    centred = rows - rows.mean(axis=0)
    return np.asarray(centred.T @ centred / len(rows))


def exact(seen: Wide) -> Second:
    """Trusted as they are."""
    return Second(seen, seen)


def relative(x: Wide, matrix: Wide, other: Wide, mean: bool) -> float:
    """Squared error of the outputs over their variance; mean: the bias takes the mean."""
    lost, outputs = x @ (matrix - other).T, x @ matrix.T
    lost = lost - lost.mean(axis=0) if mean else lost
    return float(np.square(lost).sum() / np.square(outputs - outputs.mean(axis=0)).sum())


def truncated(matrix: Wide, rank: int) -> Wide:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def test_each_step_of_the_method_leaves_less_and_the_last_what_it_predicts() -> None:
    # the construction of a published comparison of plain SVD, mean bias, diagonal (ASVD) and whitened factors
    x = np.maximum(inputs(20_000, 96, decay=0.5, mean=0.3), 0.0)
    weight = np.random.default_rng(1).standard_normal((96, 96)) / 96**0.5
    scale = np.sqrt(np.square(x).mean(axis=0))
    found = spectrum(weight, exact(covariance(x)))
    last, first = found.split(weight, 32)
    plain = relative(x, weight, truncated(weight, 32), mean=False)
    biased = relative(x, weight, truncated(weight, 32), mean=True)
    diagonal = relative(x, weight, truncated(weight * scale, 32) / scale, mean=True)
    whitened = relative(x, weight, last @ first, mean=True)
    assert plain > biased > diagonal > whitened
    assert whitened < 0.3 * plain
    np.testing.assert_allclose(whitened, found.error(32) / found.total, rtol=1e-9)
    np.testing.assert_allclose([plain, biased, diagonal, whitened], SEEN, rtol=2e-3)


# as seen with this seed
SEEN = [0.8775, 0.2527, 0.1976, 0.1086]


@pytest.mark.parametrize(("rows", "width"), [(24, 40), (40, 40), (64, 24)])
def test_factors_are_those_of_an_svd_whitened_by_the_root_of_the_covariance(rows: int, width: int) -> None:
    seen = covariance(inputs(500, width))
    weight = np.random.default_rng(2).standard_normal((rows, width))
    values, axes = np.linalg.eigh(seen)
    root = axes * np.sqrt(values)
    found = spectrum(weight, exact(seen))
    for rank in (1, 8, 16):
        last, first = found.split(weight, rank)
        left, sizes, right = np.linalg.svd(weight @ root, full_matrices=False)
        other = (left[:, :rank] * sizes[:rank]) @ right[:rank] @ np.linalg.inv(root)
        np.testing.assert_allclose(last @ first, other, atol=1e-8)
        np.testing.assert_allclose(found.error(rank), np.square(sizes[rank:]).sum(), rtol=1e-8)
        np.testing.assert_allclose(squared_error(weight, last @ first, seen), found.error(rank), rtol=1e-8)
        np.testing.assert_allclose(last.T @ last, np.eye(rank), atol=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(24, 40), (64, 24)])
def test_predicted_error_is_that_of_the_seen_moments_where_they_are_trusted_less(rows: int, width: int) -> None:
    seen = covariance(inputs(60, width))
    weight = np.random.default_rng(3).standard_normal((rows, width))
    found = spectrum(weight, Second.of(seen, 60))
    for rank in (1, 5, 20):
        last, first = found.split(weight, rank)
        np.testing.assert_allclose(squared_error(weight, last @ first, seen), found.error(rank), rtol=1e-6)


def test_shrunk_moments_are_better_on_inputs_not_seen_where_few_were() -> None:
    weight = np.random.default_rng(4).standard_normal((64, 96))
    few, many = inputs(40, 96, seed=5, decay=0.4), inputs(5000, 96, seed=6, decay=0.4)

    def held_out(second: Second) -> float:
        last, first = spectrum(weight, second).split(weight, 24)
        return squared_error(weight, last @ first, covariance(many))

    assert held_out(Second.of(covariance(few), 40)) < 0.97 * held_out(exact(covariance(few)))


def test_nothing_known_makes_plain_singular_vectors() -> None:
    weight = np.random.default_rng(7).standard_normal((30, 50))
    last, first = spectrum(weight, Second()).split(weight, 10)
    np.testing.assert_allclose(last @ first, truncated(weight, 10), atol=1e-9)


@pytest.mark.parametrize(("rows", "width"), [(32, 48), (48, 32)])
def test_rank_is_found_and_more_than_all_of_it_loses_nothing(rows: int, width: int) -> None:
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((rows, 7)) @ rng.standard_normal((7, width))
    found = spectrum(weight, Second())
    assert found.rank(1e-13) == 7
    assert found.rank(1.0) == 0
    last, first = found.split(weight, 200)
    np.testing.assert_allclose(last @ first, weight, atol=1e-8)
    assert found.error(200) <= 1e-12 * found.total


def test_inputs_that_never_vary_cost_nothing_and_break_nothing() -> None:
    weight = np.random.default_rng(9).standard_normal((20, 30))
    nothing = spectrum(weight, Second.of(np.zeros((30, 30)), 100.0))
    assert nothing.total == 0
    assert nothing.error(3) == 0
    assert np.isfinite(nothing.split(weight, 3)[0]).all()
    some = covariance(inputs(500, 30))
    some[10:], some[:, 10:] = 0, 0
    for matrix in (weight, np.random.default_rng(10).standard_normal((40, 30))):
        found = spectrum(matrix, Second.of(some, 500))
        last, first = found.split(matrix, 10)
        np.testing.assert_allclose(squared_error(matrix, last @ first, some), found.error(10), atol=1e-6 * found.total)
        assert found.error(10) < 1e-4 * found.total


def test_signs_do_not_depend_on_the_solver() -> None:
    weight = np.random.default_rng(11).standard_normal((12, 16))
    vectors = spectrum(weight, Second()).vectors
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    assert (largest > 0).all()


def test_spectrum_of_rows_of_a_table() -> None:
    table = np.random.default_rng(12).standard_normal((500, 24)) * np.arange(24, 0, -1.0)
    used = table[:50]
    seen = used.T @ used / 50
    found = spectrum_of_outputs(seen, seen)
    last, first = found.split(table.T, 12)
    left = np.square(used.T - last @ first[:, :50]).sum() / 50
    np.testing.assert_allclose(left, found.error(12), rtol=1e-9)


def patches(rank: int = 8, channels: int = 16, seed: int = 0) -> Wide:
    """Patches [rows, C * 9] of smooth images whose channels move together."""
    rng = np.random.default_rng(seed)
    mixed = np.einsum("nkhw,ck->nchw", rng.standard_normal((12, rank, 14, 14)), np.ones((channels, rank)) / 3)
    images = mixed + np.einsum(
        "nkhw,ck->nchw", rng.standard_normal((12, rank, 14, 14)), rng.standard_normal((channels, rank))
    )
    images = images + np.roll(images, 1, 2) + np.roll(images, 1, 3) + 0.3 * rng.standard_normal(images.shape)
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))
    return np.asarray(windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, channels * 9))


def test_kernel_forms_are_whitened_too_and_alternation_helps() -> None:
    weight = np.random.default_rng(13).standard_normal((24, 16, 3, 3))
    flat = weight.reshape(24, -1)
    seen = covariance(patches())

    def errors(second: Second, turns: int = 2) -> list[float]:
        one = strips(weight, second, 12, turns).dense().reshape(24, -1)
        other = tucker(weight.reshape(24, 16, 9), second, (10, 16), turns).dense().reshape(24, -1)
        return [squared_error(flat, each, seen) for each in (one, other)]

    plain, started, whitened = errors(Second()), errors(exact(seen), 0), errors(exact(seen))
    for without, start, with_ in zip(plain, started, whitened, strict=True):
        assert with_ < start
        assert with_ < 0.8 * without


def test_kernels_of_a_form_are_found_exactly() -> None:
    rng = np.random.default_rng(14)
    seen = Second.of(covariance(patches()), 1e9)
    striped = np.einsum("nrx,rcy->ncyx", rng.standard_normal((24, 5, 3)), rng.standard_normal((5, 16, 3)))
    found = strips(striped, seen, 5)
    assert found.last.shape == (24, 5, 3)
    assert found.first.shape == (5, 16, 3)
    np.testing.assert_allclose(found.dense(), striped, atol=1e-5 * np.abs(striped).max())
    core = rng.standard_normal((6, 4, 9))
    folded = np.einsum("ns,srp,rc->ncp", rng.standard_normal((24, 6)), core, rng.standard_normal((4, 16)))
    both = tucker(folded, seen, (4, 6))
    assert [both.last.shape, both.core.shape, both.first.shape] == [(24, 6), (6, 4, 9), (4, 16)]
    np.testing.assert_allclose(both.dense(), folded, atol=1e-5 * np.abs(folded).max())


def test_refitting_is_least_squares_and_stays_near_the_start_where_rows_are_few() -> None:
    x = inputs(400, 20)
    weight = np.random.default_rng(15).standard_normal((6, 20))
    features = np.random.default_rng(16).standard_normal((5, 20))
    wanted = np.linalg.lstsq(x @ features.T, x @ weight.T, rcond=None)[0].T
    z, y = x @ features.T, x @ weight.T
    start = np.zeros((6, 5))
    near, far = (refitted(y.T @ z / 400, z.T @ z / 400, start, rows, ridge=0.0) for rows in (1, 1e9))
    np.testing.assert_allclose(far, wanted, atol=1e-5)
    np.testing.assert_allclose(near, wanted / 6, atol=1e-5)
