"""fuse_pad: pads that a Conv takes over, and those it can't."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from onnxopt.model import load
from onnxopt.passes.fuse_pad import FusePad
from tests.helpers import apply, assert_close, model, operators, proto, random_feeds, reference, run, with_weights

ONE_AROUND = "<int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}>"
SHAPES = "g (float[1,4,6,7] x) => (float[1,8,H,W] y)"


def build(text: str, group: int = 1, opset: int = 17) -> ModelProto:
    weights = np.random.default_rng(0).standard_normal((8, 4 // group, 3, 3)).astype(np.float32)
    return with_weights(proto(text, opset), w=weights)


@pytest.mark.parametrize("pads", [(0, 0, 1, 1, 0, 0, 1, 1), (0, 0, 0, 2, 0, 0, 1, 0), (0, 0, 0, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("attributes", ["", "pads = [1, 0, 2, 1]", 'auto_pad = "VALID"', "strides = [2, 1], group = 4"])
def test_zeros_around_become_the_convs_pads(pads: tuple[int, ...], attributes: str) -> None:
    settings = f"<{attributes}>" if attributes else ""
    amounts = ", ".join(map(str, pads))
    source = build(
        f"{SHAPES} <int64[8] p = {{{amounts}}}> {{ t = Pad(x, p) y = Conv{settings}(t, w) }}",
        4 if "group" in attributes else 1,
    )
    target = load(source)
    assert apply(FusePad(), target).changes
    assert operators(target) == ["Conv"]
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))
    assert_close(reference(source, feeds), reference(target, feeds))


@pytest.mark.parametrize("pads", [(0, 0, 1, 1, 0, 0, 1, 1), (0, 0, 0, 2, 0, 0, 1, 0)])
@pytest.mark.parametrize(
    ("op", "attributes", "fill"),
    [
        ("AveragePool", "kernel_shape = [3, 3]", 0.0),
        ("AveragePool", "kernel_shape = [3, 3], strides = [2, 2], count_include_pad = 1", 0.0),
        ("AveragePool", "kernel_shape = [4, 4], pads = [1, 0, 0, 1], count_include_pad = 1", 0.0),
        ("MaxPool", "kernel_shape = [3, 3], strides = [2, 1]", -np.inf),
        ("MaxPool", "kernel_shape = [4, 4], pads = [0, 1, 1, 0], dilations = [1, 1]", -np.inf),
    ],
)
def test_pools_take_pads_over(pads: tuple[int, ...], op: str, attributes: str, fill: float) -> None:
    amounts = ", ".join(map(str, pads))
    graph = f"<int64[8] p = {{{amounts}}}> {{ t = Pad(x, p, f) y = {op}<{attributes}>(t) }}"
    source = with_weights(proto(f"g (float[1,4,6,7] x) => (float[1,4,H,W] y) {graph}"), f=np.array(fill, np.float32))
    target = load(source)
    assert apply(FusePad(), target).changes
    assert operators(target) == [op]
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))
    assert_close(reference(source, feeds), run(target, feeds))


def test_attributes_before_opset_11() -> None:
    source = build(f"{SHAPES} {{ t = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1]>(x) y = Conv(t, w) }}", opset=10)
    target = load(source)
    assert apply(FusePad(), target).changes
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('t = Pad<mode = "reflect">(x, p) y = Conv(t, w)', "reflect"),
        ("t = Pad(x, p, one) y = Conv(t, w)", "constant zero"),
        ("t = Pad(x, channels) u = Slice(t, zero, four, oneaxis) y = Conv(u, w)", "channel"),
        ("t = Pad(x, crop) y = Conv(t, w)", "crops"),
        ("n = Neg(p) q = Neg(n) t = Pad(x, q) y = Conv(t, w)", "not constant"),
        ("t = Pad(x, p) r = Relu(t) y = Conv(r, w)", "Relu"),
        ('t = Pad(x, p) y = Conv<auto_pad = "SAME_UPPER">(t, w)', "SAME_UPPER"),
        ("t = Pad(x, p) a = Conv(t, w) b = MaxPool<kernel_shape = [3, 3]>(t) y = Identity(a)", "MaxPool"),
        ("t = Pad(x, p, low) y = AveragePool<kernel_shape = [3, 3]>(t)", "constant zero"),
        ("t = Pad(x, p) y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(t)", "own pads"),
        ("t = Pad(x, p) y = AveragePool<kernel_shape = [3, 3], ceil_mode = 1, strides = [2, 2]>(t)", "rounds"),
        ("t = Pad(x, p) y = AveragePool<kernel_shape = [1, 3]>(t)", "as long as its kernel"),
        ("t = Pad(x, p, low) y, i = MaxPool<kernel_shape = [3, 3]>(t)", "maxima"),
    ],
)
def test_what_stays(body: str, reason: str) -> None:
    text = f"""{SHAPES} <int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}, int64[8] channels = {{0, 1, 0, 0, 0, 0, 0, 0}},
        int64[8] crop = {{0, 0, -1, 0, 0, 0, 0, 0}}, float one = {{1}}, float low = {{-inf}},
        int64[1] zero = {{0}}, int64[1] four = {{4}},
        int64[1] oneaxis = {{1}}> {{ {body} }}"""
    target = load(build(text))
    before = target.digest()
    result = apply(FusePad(), target)
    assert not result.changes
    assert reason in result.skipped[0].reason
    assert target.digest() == before


def test_one_pad_of_two_convs_goes_when_both_take_it() -> None:
    text = f"{SHAPES[:-1]}, float[1,8,H,W] z) {ONE_AROUND} {{ t = Pad(x, p) y = Conv(t, w) z = Conv(t, w) }}"
    source = build(text)
    target = load(source)
    assert apply(FusePad(), target).changes
    assert operators(target) == ["Conv", "Conv"]
    feeds = random_feeds(source)
    assert_close(run(source, feeds), run(target, feeds))


def test_a_pad_that_is_an_output_stays() -> None:
    text = f"{SHAPES[:-1]}, float[1,4,H,W] t) {ONE_AROUND} {{ t = Pad(x, p) y = Conv(t, w) }}"
    assert "output" in apply(FusePad(), load(build(text))).skipped[0].reason


def test_a_conv_that_reads_the_padded_tensor_as_weights_too_keeps_its_pad() -> None:
    target = model(
        "g (float[1,1,2,2] x) => (float[a,b,c,d] y) <int64[8] p = {0,0,1,1,0,0,1,1}> { t = Pad(x, p) y = Conv(t, t) }"
    )
    result = apply(FusePad(), target)
    assert not result.changes
    assert "weights too" in result.skipped[0].reason
