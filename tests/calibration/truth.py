"""What `collect` should find, computed from exposed tensors by numpy in float64. Shares no code with what it judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.helper

from onnxopt.calibration import Requests, Statistics
from onnxopt.calibration.sampling import ELEMENTS, batch_of, grid
from onnxopt.calibration.tallies import HistogramTally, Tally
from onnxopt.feeds import Sample
from onnxopt.model import Model, Node, Variable
from onnxopt.numerics.compensated import CompensatedSum
from tests.helpers import session

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


def tensor(model: Model, name: str) -> Variable:
    """The tensor of this name, in the first body that has one."""
    for body in model.bodies():
        for candidate in [*body.inputs, *(t for node in body.nodes for t in node.outputs)]:
            if candidate.name == name:
                found: Variable = candidate
                return found
    raise KeyError(name)


def tensors(model: Model, names: str) -> tuple[Variable, ...]:
    """Several of them: "a b c"."""
    return tuple(tensor(model, name) for name in names.split())


def everything(
    wanted: Iterable[Variable], axes: Sequence[int] = (), threshold: float = 0.25, grams: Iterable[Node] = ()
) -> Requests:
    """All kinds of statistics of these tensors, but for the Gram matrices of their channels: axes may be long."""
    all_of_them = tuple(wanted)
    channels = tuple((variable, axis) for variable in all_of_them for axis in axes)
    return Requests(
        ranges=all_of_them,
        extremes=all_of_them,
        moments=all_of_them,
        histograms=all_of_them,
        channel_ranges=channels,
        channel_means=channels,
        channel_moments=channels,
        firings=tuple((variable, axis, threshold) for variable, axis in channels),
        grams=tuple(grams),
    )


class Exposed:
    """Values of tensors of the main graph in every sample, as one session shows them."""

    def __init__(
        self, model: Model, wanted: Iterable[Variable], samples: Iterable[Sample], optimize: bool = True
    ) -> None:
        names = list(dict.fromkeys(variable.name for variable in wanted))
        proto = model.to_proto()
        shown = {output.name for output in proto.graph.output}
        inputs = {info.name for info in proto.graph.input}
        proto.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in shown | inputs
        )
        runner = session(proto, optimize)
        self.samples = list(samples)
        self.values: dict[str, list[Array]] = {name: [] for name in names}
        for sample in self.samples:
            fetched = [name for name in names if name not in inputs]
            found = dict(zip(fetched, runner.run(fetched, sample.inputs) if fetched else [], strict=True))
            for name in names:
                value = found[name] if name in found else sample.inputs[name]
                self.values[name].append(np.asarray(value).astype(np.float32))

    def of(self, variable: Variable) -> list[Array]:
        """Its values in all samples where it has any."""
        return [value for value in self.values[variable.name] if value.size]

    def flat(self, variable: Variable) -> FloatArray:
        """All its values."""
        return np.concatenate([value.reshape(-1) for value in self.of(variable)]).astype(np.float64)

    def channels(self, variable: Variable, axis: int) -> FloatArray:
        """[C, n]: all its values by channel."""
        parts = [np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1) for value in self.of(variable)]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def picked(self, variable: Variable, channels_first: bool, elements: int | None) -> FloatArray:
        """Its values on the grid, sorted."""
        found = [
            grid(value.shape, channels_first, batch_of(sample.inputs), elements).pick(value).reshape(-1)
            for value, sample in zip(self.values[variable.name], self.samples, strict=True)
            if value.size
        ]
        return np.sort(np.concatenate(found)).astype(np.float64)


def bins(values: FloatArray, exponent: int) -> npt.NDArray[np.int64]:
    """Counts of 8192 bins over [-2**exponent, 2**exponent), by numpy."""
    edges = (np.arange(8193) - 4096) * 2.0 ** (exponent - 12)
    return np.histogram(values, edges)[0].astype(np.int64)


def close(found: Any, expected: Any, relative: float, scale: Any = 0.0) -> None:
    """Each element within `relative` of itself, or of `scale` where that is larger."""
    one, other = np.asarray(found), np.asarray(expected)
    assert one.shape == other.shape
    assert (np.abs(one - other) <= relative * np.maximum(np.abs(other), scale)).all(), (one, other)


def check(
    found: Statistics,
    requests: Requests,
    truth: Exposed,
    *,
    elements: int | None = ELEMENTS,
    channels_first: Callable[[Variable], bool] = lambda variable: False,
    relative: float = 2e-6,
    exact: bool = True,
) -> None:
    """Hold everything asked of the main graph's tensors against the truth. exact: extremes and bins to the last bit."""
    for variable in requests.ranges:
        _check_range(found, variable, truth, 0.0 if exact else relative)
    for variable in requests.extremes:
        lows, highs = zip(*((float(v.min()), float(v.max())) for v in truth.of(variable)), strict=True)
        measured = found.mean_extremes(variable)
        assert measured is not None
        close(measured, (np.mean(lows), np.mean(highs)), relative if not exact else 1e-12, 1e-30)
    for variable in requests.moments:
        moments, values = found.moments(variable), truth.flat(variable)
        assert moments is not None
        assert moments.count == values.size
        close(moments.mean, values.mean(), relative, np.abs(values).mean())
        close(moments.mean_square, np.square(values).mean(), 2 * relative)
    for variable in requests.histograms:
        histogram, values = found.histogram(variable), truth.picked(variable, channels_first(variable), elements)
        assert histogram is not None
        assert histogram.count == values.size
        if exact:
            assert np.array_equal(histogram.counts, bins(values, histogram.exponent))
            assert np.abs(values).max() < 2.0**histogram.exponent
            assert histogram.exponent == -100 or np.abs(values).max() >= 2.0 ** (histogram.exponent - 1)
    _check_channels(found, requests, truth, relative, exact)


def _check_range(found: Statistics, variable: Variable, truth: Exposed, relative: float) -> None:
    measured, values = found.range(variable), truth.flat(variable)
    assert measured is not None
    assert measured.count == values.size
    scale = np.abs(values).max()
    close((measured.minimum, measured.maximum), (values.min(), values.max()), relative, scale)


def _check_channels(found: Statistics, requests: Requests, truth: Exposed, relative: float, exact: bool) -> None:
    for variable, axis in requests.channel_ranges:
        measured, values = found.channel_range(variable, axis), truth.channels(variable, axis)
        assert measured is not None
        scale = np.abs(values).max()
        close(measured[0], values.min(axis=1), 0.0 if exact else relative, scale)
        close(measured[1], values.max(axis=1), 0.0 if exact else relative, scale)
    for variable, axis in requests.channel_means:
        mean, values = found.channel_mean(variable, axis), truth.channels(variable, axis)
        close(mean, values.mean(axis=1), relative, np.abs(values).mean(axis=1))
    for variable, axis in requests.channel_moments:
        moments, values = found.channel_moments(variable, axis), truth.channels(variable, axis)
        assert moments is not None
        assert moments.count == values.shape[1]
        close(moments.mean, values.mean(axis=1), relative, np.abs(values).mean(axis=1))
        close(moments.mean_square, np.square(values).mean(axis=1), 2 * relative)
    for variable, axis in requests.channel_grams:
        _check_channel_gram(found, variable, axis, truth, relative)
    for variable, axis, threshold in requests.firings:
        share, values = found.firing(variable, axis, threshold), truth.channels(variable, axis)
        fired = (values > np.float32(threshold)).mean(axis=1)
        close(share, fired, 1e-12 if exact else 1e-3, 1.0)


def _check_channel_gram(found: Statistics, variable: Variable, axis: int, truth: Exposed, relative: float) -> None:
    gram, values = found.channel_gram(variable, axis), truth.channels(variable, axis)
    assert gram is not None
    assert gram.rows <= values.shape[1]
    if gram.rows < values.shape[1]:  # a subset of the positions was looked at
        return
    size = np.sqrt(np.square(values).mean(axis=1))
    close(gram.second[0], values @ values.T / gram.rows, 4 * relative, np.outer(size, size))
    close(gram.mean[0], values.mean(axis=1), relative, np.abs(values).mean(axis=1))


def same(one: Statistics, other: Statistics, sums: float = 1e-12) -> None:
    """The same figures: extremes, counts and bins to the last bit, every element of a sum to `sums` of itself."""
    assert one.samples == other.samples
    assert dict(_reasons(one)) == dict(_reasons(other))
    mine, theirs = ({(kind, subject): tally for kind, subject, tally in found.tallies()} for found in (one, other))
    assert mine.keys() == theirs.keys()
    for at, tally in mine.items():
        assert _alike(tally, theirs[at], sums), (at, tally, theirs[at])


def _reasons(statistics: Statistics) -> Iterable[tuple[tuple[str, Any], str]]:
    return (((kind, subject), reason) for kind, subject, reason in statistics.reasons())


def _alike(one: Tally, other: Tally, sums: float) -> bool:
    if isinstance(one, HistogramTally) and isinstance(other, HistogramTally):
        return int(one.exponent) == int(other.exponent) and np.array_equal(one.counts, other.counts)
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, CompensatedSum):
            difference = np.abs(value.value - theirs.value)
            if not (difference <= sums * np.minimum(np.abs(value.value), np.abs(theirs.value))).all():
                return False
        elif not np.array_equal(value, theirs):
            return False
    return True
