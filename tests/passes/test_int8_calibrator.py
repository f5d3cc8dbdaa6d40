"""Ranges of codes by other rules than minimum and maximum."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.calibration import CALIBRATORS, collect
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.passbase import Context, PassResult
from onnxopt.passes.int8 import Int8
from onnxopt.target import resolve
from tests.passes.quantizing import normal, parse, qparams, samples, weight

CONV = """g (float[n, 4, 32, 32] x) => (float[n, 4, 32, 32] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w)  r = Relu(a)  y = Conv<pads = [1, 1, 1, 1]>(r, v) }"""


def model() -> Model:
    return parse(CONV, {"w": weight(4, 4, 3, 3), "v": weight(4, 4, 3, 3, seed=2)})


def feeds() -> list[dict[str, np.ndarray]]:
    """Mostly small values, one element far out."""
    found = [{"x": normal(1, 4, 32, 32, seed=seed)} for seed in range(16)]
    found[3]["x"][0, 0, 0, 0] = 30.0
    return found


def quantize(the_pass: Int8, target: Model, compare: object = None) -> PassResult:
    statistics = collect(target, the_pass.needs(target), samples(feeds()))
    result = the_pass.run(target, Context(statistics=statistics, target=resolve("x86"), compare=compare))  # type: ignore[arg-type]
    target.normalize()
    return result


@pytest.mark.parametrize("name", [name for name in CALIBRATORS if name != "minmax"])
def test_other_calibrators_narrow_the_range_of_an_outlier(name: str) -> None:
    plain, narrow = model(), model()
    quantize(Int8(all_layers=True), plain)
    quantize(Int8(all_layers=True, calibrator=(name,)), narrow)
    assert qparams(plain)["x"][0] == pytest.approx((30 - normal_minimum()) / 255, rel=0.01)
    # the square of one far outlier still weighs more than a little noise on all others
    assert qparams(narrow)["x"][0] < (1.0 if name == "mse" else 0.7) * qparams(plain)["x"][0]


def normal_minimum() -> float:
    return min(float(feed["x"].min()) for feed in feeds())


def test_of_several_the_one_with_the_least_error_is_kept() -> None:
    scores = iter([3.0, 9.0, 5.0])
    seen: list[Model] = []

    def compare(candidate: Model) -> float:
        seen.append(candidate)
        return next(scores)

    target, alone = model(), model()
    result = quantize(Int8(all_layers=True, calibrator=("minmax", "mse", "percentile")), target, compare)
    quantize(Int8(all_layers=True, calibrator=("mse",)), alone)
    assert len(seen) == 3
    assert "ranges by mse: 9.0 dB at the outputs; minmax 3.0, percentile 5.0" in result.notes
    assert qparams(target) == qparams(alone)
    assert all(candidate is not target for candidate in seen)


def test_without_anything_to_compare_on_the_first_is_used_and_that_is_said() -> None:
    target, alone = model(), model()
    result = quantize(Int8(all_layers=True, calibrator=("mse", "minmax")), target)
    quantize(Int8(all_layers=True, calibrator=("mse",)), alone)
    assert any("nothing to compare calibrators on: mse" in note for note in result.notes)
    assert qparams(target) == qparams(alone)


def test_only_moving_averages_ask_for_extremes_of_each_run() -> None:
    target = model()
    assert Int8().needs(target).extremes == ()
    assert Int8(calibrator=("minmax", "moving_average")).needs(target).extremes == Int8().needs(target).ranges


def test_unknown_calibrators_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown calibrator 'percentil'") as caught:
        Int8(calibrator=("minmax", "percentil"))
    assert "percentile" in caught.value.remedy
    with pytest.raises(UsageError, match="no calibrator"):
        Int8(calibrator=())
    assert str(Int8(calibrator=("mse", "minmax"))) == "int8:calibrator=mse+minmax"
