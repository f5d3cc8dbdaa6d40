"""Which second moments are gathered, and how those of layers that share a weight are joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnxopt.calibration import Requests, Statistics, collect, moments
from onnxopt.calibration.moments import affordable, second_moments
from onnxopt.model import Model, Node
from tests.passes.quantizing import Array, nodes, normal, parse, samples, weight

SHARED = """g (float[n, 6] x, float[m, 6] z) => (float[n, 4] y, float[m, 4] t) {
    y = MatMul(x, w)
    t = MatMul(z, w)
}"""
FEED = {"x": normal(5, 6), "z": normal(3, 6, seed=1) + 2}


def shared() -> Model:
    return parse(SHARED, {"w": weight(6, 4)})


def told(second: Array, rows: int) -> Array:
    """With what few rows tell shrunk towards the diagonal."""
    off = ~np.eye(len(second), dtype=bool)
    return np.where(off, second * rows / (rows + len(second)), second)


def gathered(statistics: Statistics, readers: Sequence[Node], centred: Sequence[Node] = ()) -> Array:
    """[groups, K, K] of what is known."""
    found = second_moments(statistics, readers, centred)
    assert found is not None
    return np.array(found)


def test_moments_of_sharers_are_those_of_all_their_rows() -> None:
    model = shared()
    layers = nodes(model, "MatMul")
    found = gathered(collect(model, Requests(grams=tuple(layers)), samples([FEED])), layers)
    rows = np.concatenate([FEED["x"], FEED["z"]]).astype(np.float64)
    np.testing.assert_allclose(found, [told(rows.T @ rows / 8, 8)], rtol=1e-6)


def test_each_sharer_is_centred_around_its_own_mean_and_only_where_asked() -> None:
    model = shared()
    layers = nodes(model, "MatMul")
    statistics = collect(model, Requests(grams=tuple(layers)), samples([FEED]))
    x, z = (FEED[name].astype(np.float64) for name in ("x", "z"))
    apart, plain = z - z.mean(axis=0), x.T @ x
    both = apart.T @ apart + 5 * np.cov(x.T, bias=True)
    np.testing.assert_allclose(gathered(statistics, layers, layers), [told(both / 8, 8)], atol=1e-6)
    one = gathered(statistics, layers, layers[1:])
    np.testing.assert_allclose(one, [told((plain + apart.T @ apart) / 8, 8)], atol=1e-6)


def test_inputs_that_do_not_vary_have_no_covariance_at_all() -> None:
    model = shared()
    layers = nodes(model, "MatMul")
    still = {"x": FEED["x"].copy(), "z": FEED["z"].copy()}
    for values in still.values():
        values[:, ::2] = np.float32(1234.567)
    found = gathered(collect(model, Requests(grams=tuple(layers)), samples([still])), layers, layers)[0]
    assert not found[::2].any()
    assert not found[:, ::2].any()
    assert (np.diagonal(found)[1::2] > 0.05).all()


def test_nothing_is_known_where_nothing_was_measured() -> None:
    model = shared()
    layers = nodes(model, "MatMul")
    statistics = collect(model, Requests(grams=(layers[0],)), samples([FEED]))
    assert second_moments(statistics, layers[1:]) is None
    rows = FEED["x"].astype(np.float64)
    np.testing.assert_allclose(gathered(statistics, layers), [told(rows.T @ rows / 5, 5)], rtol=1e-6)


@pytest.mark.parametrize(("limit", "names"), [(16 * 52, ["b", "a"]), (16 * 36, ["b"]), (16 * 15, [])])
def test_small_layers_come_first_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, limit: int, names: list[str]
) -> None:
    weights: dict[str, Array] = {"w": weight(6, 4), "v": weight(4, 4)}
    model = parse("g (float[n, 6] x) => (float[n, 4] y) { a = MatMul(x, w) y = MatMul(a, v) }", weights)
    first, second = nodes(model, "MatMul")
    called = {"a": first, "b": second}
    monkeypatch.setattr(moments, "MOST_BYTES", limit)
    assert set(affordable([first, second, first])) == {called[name] for name in names}
