"""dedup of weights that are nearly equal: the error that is kept to, the common value, and groups without drift."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto

from onnxopt.duplicates import near_groups
from onnxopt.model import Constant, TensorData, load
from onnxopt.passes.dedup import Dedup
from tests.helpers import apply, proto, random_feeds, run, with_weights

Array = NDArray[Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(*weights: Array) -> ModelProto:
    """x times each of the square weights."""
    side = weights[0].shape[0]
    body = " ".join(f"t{n + 1} = MatMul(t{n}, w{n})" for n in range(len(weights)))
    source = proto(f"g (float[2,1,{side}] t0) => (float[2,1,{side}] t{len(weights)}) {{ {body} }}")
    return with_weights(source, **{f"w{n}": array for n, array in enumerate(weights)})


def values(target: Any) -> dict[str, Array]:
    return {constant.name: constant.values for constant in target.constants()}


def error(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(one.astype(np.float64)))


def apart(first: Array, distance: float, seed: int = 5) -> Array:
    """A tensor at this relative distance."""
    noise = normal(*first.shape, seed=seed)
    return np.asarray(first + noise * np.float32(distance * np.linalg.norm(first) / np.linalg.norm(noise)), first.dtype)


def test_two_become_their_mean() -> None:
    first = normal(32, 32)
    other = apart(first, 0.001)
    source = chain(first, other)
    target = load(source)
    result = apply(Dedup(tolerance=0.001), target)
    assert [(change.kind, change.where) for change in result.changes] == [("averaged", "w0"), ("approximated", "w1")]
    assert "relative error 0.0005" in result.changes[1].detail
    [(name, merged)] = values(target).items()
    assert name == "w0"
    np.testing.assert_allclose(merged, (first + other) / 2, rtol=1e-6)
    feeds = random_feeds(source)
    expected, found = run(source, feeds)["t2"], run(target, feeds)["t2"]
    assert 0 < np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_without_a_tolerance_they_stay() -> None:
    first = normal(32, 32)
    assert not apply(Dedup(), load(chain(first, apart(first, 1e-6)))).changes


@pytest.mark.parametrize("distance", [0.0021, 0.1, 3.0])
def test_those_too_far_apart_stay(distance: float) -> None:
    first = normal(32, 32)
    source = chain(first, apart(first, distance))
    target = load(source)
    result = apply(Dedup(tolerance=0.001), target)
    assert (result.changes, result.skipped) == ([], [])
    assert values(target)["w0"].tobytes() == first.tobytes()


def test_a_chain_of_small_steps_leads_nowhere() -> None:
    steps = [normal(32, 32)]
    noise = apart(steps[0], 0.0015) - steps[0]
    steps += [steps[0] + noise * np.float32(number) for number in range(1, 6)]
    target = load(chain(*steps))
    result = apply(Dedup(tolerance=0.001), target)
    assert [change.where for change in result.changes] == ["w0", "w1", "w2", "w3", "w4", "w5"]
    left = values(target)
    assert list(left) == ["w0", "w2", "w4"]
    for number, each in enumerate(steps):
        assert error(each, left[f"w{number // 2 * 2}"]) <= 0.001


def test_whoever_lies_too_far_from_the_mean_leaves() -> None:
    first = normal(32, 32)
    noise = apart(first, 0.0019) - first
    target = load(chain(first, first + noise, first + noise * np.float32(0.95), first + noise * np.float32(0.9)))
    result = apply(Dedup(tolerance=0.001), target)
    for number, each in enumerate((first, first + noise)):
        assert min(error(each, stored) for stored in values(target).values()) <= 0.001, number
    assert result.changes


def test_readers_that_can_not_do_without_keep_theirs() -> None:
    first = normal(24, 32)
    source = with_weights(
        proto(
            """g (float[2,24] x, float[2,32] u) => (float[2,32] y, float[2,24] z) {
                y = MatMul(x, w0) z = com.microsoft.FusedMatMul(u, w1)
            }""",
            imports='"com.microsoft" : 1',
        ),
        w0=first,
        w1=np.ascontiguousarray(apart(first, 0.001).T),
    )
    target = load(source)
    before = target.digest()
    result = apply(Dedup(tolerance=0.001), target)
    assert not result.changes
    assert "domain 'com.microsoft'" in result.skipped[0].reason
    assert target.digest() == before


@pytest.mark.parametrize("scale", [1.0, -3.0, 0.01])
@pytest.mark.parametrize("turned", [False, True])
def test_transposed_and_scaled_ones_are_near_too(scale: float, turned: bool) -> None:
    first = normal(32, 32)
    other = apart(first, 0.001) * np.float32(scale)
    source = chain(first, np.ascontiguousarray(other.T) if turned else other)
    target = load(source)
    result = apply(Dedup(tolerance=0.001), target)
    assert [change.kind for change in result.changes] == ["averaged", "approximated"]
    feeds = random_feeds(source)
    expected, found = run(source, feeds)["t2"], run(target, feeds)["t2"]
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    off = load(source)
    changed = apply(Dedup(tolerance=0.001, transposed="off", scaled="off"), off).changes
    assert bool(changed) == (scale == 1 and not turned)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_zeros_and_what_is_not_finite_are_near_nothing(value: float) -> None:
    odd = normal(32, 32)
    odd[:] = value
    other = odd.copy()
    other[0, 0] = 1e-30
    target = load(chain(odd, other, normal(32, 32)))
    assert not apply(Dedup(tolerance=0.5), target).changes


def test_outputs_keep_their_values() -> None:
    first = normal(32, 32)
    source = chain(first, apart(first, 0.001))
    source.graph.output.append(onnx.helper.make_tensor_value_info("w0", onnx.TensorProto.FLOAT, [32, 32]))
    target = load(source)
    assert not apply(Dedup(tolerance=0.01), target).changes


def test_small_constants_are_no_weights() -> None:
    source = proto("g (float[8] x) => (float[8] y) { t = Mul(x, a) y = Add(t, b) }")
    source = with_weights(source, a=np.ones(8, np.float32), b=np.full(8, 1.0001, np.float32))
    assert not apply(Dedup(tolerance=0.01), load(source)).changes


@settings(max_examples=50, deadline=None)
@given(
    distances=st.lists(st.floats(0, 0.05), min_size=2, max_size=7),
    tolerance=st.floats(1e-4, 0.03),
    scaled=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_error_keeps_to_the_tolerance(distances: list[float], tolerance: float, scaled: bool, seed: int) -> None:
    base = normal(16, 24, seed=seed)
    scales = np.random.default_rng(seed).choice([1.0, -2.0, 7.0] if scaled else [1.0], len(distances))
    arrays = [apart(base, by, seed=10 + at) * np.float32(scales[at]) for at, by in enumerate(distances)]
    constants = [Constant(f"w{at}", TensorData.from_array(array)) for at, array in enumerate(arrays)]
    groups = list(near_groups(constants, tolerance, turned=True, scaled=scaled))
    again = list(near_groups(constants, tolerance, turned=True, scaled=scaled))
    assert [near.values.tobytes() for near in groups] == [near.values.tobytes() for near in again]
    seen: list[str] = []
    for near in groups:
        assert error(near.kept.values, near.values) == pytest.approx(near.error, rel=1e-6)
        seen.append(near.kept.name)
        for relation in near.relations:
            made = near.values.transpose(relation.perm) * (1 if relation.scale is None else relation.scale)
            assert error(relation.duplicate.values, made.astype(np.float64)) <= tolerance * 1.001
            assert relation.error <= tolerance
            assert relation.kept is near.kept
            seen.append(relation.duplicate.name)
    assert len(seen) == len(set(seen))
