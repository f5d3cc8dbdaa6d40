"""Fisher information of channels: against differences of onnxruntime's own outputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from onnxopt.calibration import Requests, Statistics, collect
from onnxopt.calibration.channels import Source
from onnxopt.errors import UsageError
from onnxopt.feeds import Sample
from onnxopt.graph import infer
from onnxopt.model import Model, load
from onnxopt.pruning.gradients import fisher
from tests.graph.topologies import Net
from tests.helpers import session


def network() -> Model:
    """Conv, Relu, depthwise Conv, Clip, 1x1 Conv."""
    net = Net(3)
    x = net.call("Relu", net.conv("x", 3, 6))
    x = net.call("Clip", net.conv(x, 6, 6, group=6), net.value(np.float32(-1)), net.value(np.float32(1)))
    return load(net.model(net.conv(x, 6, 4, 1), (1, 3, 5, 5), (1, 4, 5, 5)))


def samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample({"x": rng.standard_normal((1, 3, 5, 5)).astype(np.float32)}, None, str(i)) for i in range(count)]


def test_derivatives_agree_with_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling one channel by 1 + h and 1 - h moves v . y by 2 h times its derivative."""
    pytest.importorskip("onnx_ad")
    monkeypatch.setattr("onnxopt.pruning.gradients.PROBES", 1)
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), (1, 4, 5, 5))
    model, feeds = network(), samples(12)
    infer(model)
    last = model.graph.nodes[-2]
    assert last.op == "Conv"
    source = Source(last.inputs[0], -3)

    def measure(other: Model, requests: Requests) -> Statistics:
        return collect(other, requests, feeds)

    found = fisher(model, [source], [last.outputs[0]], {"x": (1, 3, 5, 5)}, measure, 0)[source]
    weights = np.array(last.inputs[1].values)
    derivatives = np.zeros((6, len(feeds)))
    for channel in range(6):
        outputs = []
        for factor in (1.01, 0.99):
            changed = weights.copy()
            changed[:, channel] *= factor
            last.inputs[1].values = changed
            runner = session(model.to_proto())
            outputs.append([runner.run(None, feed.inputs)[0] for feed in feeds])
        last.inputs[1].values = weights
        derivatives[channel] = [np.sum(signs * (a - b)) / 0.02 for a, b in zip(*outputs, strict=True)]
    # the channels pass no further nonlinearity, so that differences are derivatives but for rounding
    assert np.allclose(found, (derivatives**2).mean(axis=1), rtol=1e-3)


def test_without_the_engine_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ad", None)
    model = network()
    with pytest.raises(UsageError, match="onnx-ad is not installed") as error:
        fisher(model, [], list(model.graph.outputs), {}, lambda _model, _requests: Statistics(), 0)
    assert "onnxopt[gradients]" in error.value.remedy
