"""Networks of images: layouts, groups, blocks, several outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, TensorProto, helper

from tests.graph.net import IMAGE, Net


def transposed_groups() -> ModelProto:
    """ConvTranspose in groups, and with one channel a group."""
    n = Net(31)
    x = n.relu(n.conv("x", 3, 16))
    x = n.relu(n.call("ConvTranspose", x, n.weights(16, 6, 2, 2), n.weights(24), strides=[2, 2], group=4))
    x = n.call("ConvTranspose", x, n.weights(24, 1, 3, 3), n.weights(24), group=24, pads=[1] * 4)
    return n.model(n.conv(n.relu(x), 24, 3), IMAGE, ("N", 3, 16, 16))


def superresolution() -> ModelProto:
    """DepthToSpace in both modes, and back with SpaceToDepth."""
    n = Net(32)
    x = n.call("DepthToSpace", n.relu(n.conv("x", 3, 32)), blocksize=2)
    x = n.call("DepthToSpace", n.relu(n.conv(x, 8, 24)), blocksize=2, mode="CRD")
    x = n.call("SpaceToDepth", n.relu(n.conv(x, 6, 5)), blocksize=2)
    return n.model(n.conv(x, 20, 3), IMAGE, ("N", 3, 16, 16))


def channels_last() -> ModelProto:
    """A dense layer over the last axis of a transposed image, as converters from other layouts write it."""
    n = Net(33)
    x = n.call("Transpose", n.relu(n.conv("x", 3, 12)), perm=[0, 2, 3, 1])
    x = n.relu(n.linear(x, 12, 20))
    x = n.call("Transpose", x, perm=[0, 3, 1, 2])
    x = n.call("Flatten", n.call("Transpose", n.conv(x, 20, 6), perm=[0, 2, 3, 1]))
    return n.model(n.linear(x, 384, 4), IMAGE, ("N", 4))


def shuffle_unit() -> ModelProto:
    """A shuffle network's unit: Split, depthwise branch, Concat, shuffle with computed batch."""
    n = Net(34)
    x = n.relu(n.conv("x", 3, 16))
    for _ in range(2):
        left, right = n.calls("Split", 2, x, n.ints(8, 8), axis=1)
        right = n.relu(n.conv(right, 8, 8, 1))
        right = n.relu(n.conv(n.conv(right, 8, 8, group=8), 8, 8, 1))
        x = n.call("Concat", left, right, axis=1)
        x = n.call("Reshape", x, n.ints(-1, 2, 8, 8, 8))
        x = n.call("Reshape", n.call("Transpose", x, perm=[0, 2, 1, 3, 4]), n.ints(-1, 16, 8, 8))
    return n.model(n.conv(x, 16, 3), IMAGE, ("N", 3, 8, 8))


def mobile() -> ModelProto:
    """HardSwish written out, squeeze and excite with HardSigmoid, by ReduceMean."""
    n = Net(35)
    x = n.conv("x", 3, 12)
    six = n.call("Clip", n.call("Add", x, n.value(np.float32(3))), n.value(np.float32(0)), n.value(np.float32(6)))
    x = n.call("Div", n.call("Mul", x, six), n.value(np.float32(6)))
    wide = n.call("HardSwish", n.conv(n.conv(x, 12, 30, 1), 30, 30, group=30))
    gate = n.relu(n.conv(n.call("ReduceMean", wide, axes=[2, 3]), 30, 8, 1))
    wide = n.call("Mul", wide, n.call("HardSigmoid", n.conv(gate, 8, 30, 1)))
    return n.model(n.conv(n.call("Add", x, n.conv(wide, 30, 12, 1)), 12, 4), IMAGE, ("N", 4, 8, 8))


def detector() -> ModelProto:
    """Two scales, a head for each of boxes and classes, flattened, joined, with a second output."""
    n = Net(36)
    fine = n.relu(n.conv("x", 3, 12))
    coarse = n.relu(n.conv(fine, 12, 16, strides=[2, 2]))
    up = n.call("Resize", n.conv(coarse, 16, 12, 1), "", "", n.value(np.array([2, 12, 8, 8], np.int64)))
    fine = n.call("Add", fine, up)
    parts = []
    for x, c in ((fine, 12), (coarse, 16)):
        boxes = n.conv(n.relu(n.conv(x, c, 10)), 10, 4, 1)
        scores = n.call("Sigmoid", n.conv(n.relu(n.conv(x, c, 9)), 9, 3, 1))
        parts.append(n.call("Reshape", n.call("Concat", boxes, scores, axis=1), n.ints(2, 7, -1)))
    model = n.model(n.call("Concat", *parts, axis=2), (2, 3, 8, 8), (2, 7, 80))
    model.graph.output.append(helper.make_tensor_value_info(parts[1], TensorProto.FLOAT, (2, 7, 16)))
    return model


def unet() -> ModelProto:
    """Two levels down and up, transposed convolutions and copies."""
    n = Net(37)
    one = n.relu(n.conv("x", 3, 8))
    two = n.relu(n.conv(n.call("MaxPool", one, kernel_shape=[2, 2], strides=[2, 2]), 8, 12))
    deep = n.relu(n.conv(n.call("MaxPool", two, kernel_shape=[2, 2], strides=[2, 2]), 12, 16))
    up = n.call("ConvTranspose", deep, n.weights(16, 12, 2, 2), n.weights(12), strides=[2, 2])
    up = n.relu(n.conv(n.call("Concat", up, two, axis=1), 24, 12))
    up = n.call("ConvTranspose", up, n.weights(12, 8, 2, 2), n.weights(8), strides=[2, 2])
    return n.model(n.conv(n.relu(n.conv(n.call("Concat", up, one, axis=1), 16, 8)), 8, 2), IMAGE, ("N", 2, 8, 8))


def every_second() -> ModelProto:
    """Slices with a step over channels."""
    n = Net(38)
    x = n.relu(n.conv("x", 3, 20))
    even = n.call("Slice", x, n.ints(0), n.ints(2**60), n.ints(1), n.ints(2))
    odd = n.call("Slice", x, n.ints(-1), n.ints(-(2**60)), n.ints(1), n.ints(-2))
    return n.model(n.call("Add", n.conv(even, 10, 4), n.conv(odd, 10, 4)), IMAGE, ("N", 4, 8, 8))


def sized() -> ModelProto:
    """Resize to constant sizes of all axes, to sizes of two, and Pad of two axes."""
    n = Net(39, opset=18)
    x = n.call("Resize", n.relu(n.conv("x", 3, 10)), "", "", n.ints(2, 10, 12, 12), mode="linear")
    x = n.call("Resize", n.relu(n.conv(x, 10, 12)), "", "", n.ints(6, 6), mode="nearest", axes=[2, 3])
    x = n.call("Pad", n.relu(n.conv(x, 12, 9)), n.ints(1, 1, 1, 1), "", n.ints(2, 3))
    return n.model(n.conv(x, 9, 4, pads=[0] * 4), (2, 3, 8, 8), (2, 4, 6, 6))


def grouped_statistics() -> ModelProto:
    """Group normalization as an operator and as exporters wrote it before, sizes unknown."""
    n = Net(40, opset=21)
    x = n.conv("x", 3, 16)
    x = n.relu(n.call("GroupNormalization", x, n.weights(16), n.weights(16), num_groups=4))
    x = n.conv(x, 16, 24)
    parts = n.call("InstanceNormalization", n.call("Reshape", x, n.ints(0, 6, -1)), n.weights(6), n.weights(6))
    x = n.call("Mul", n.call("Reshape", parts, n.call("Shape", x)), n.weights(24, 1, 1))
    return n.model(n.conv(n.relu(n.call("Add", x, n.weights(24, 1, 1))), 24, 3), ("N", 3, "H", "W"), ("N", 3, "H", "W"))


def normalized_elsewhere() -> ModelProto:
    """Softmax, LayerNormalization, CumSum and ReduceMax over space: the channels pass."""
    n = Net(41)
    x = n.call("Softmax", n.conv("x", 3, 12), axis=3)
    x = n.call("LayerNormalization", n.conv(x, 12, 10), n.weights(8, 8), n.weights(8, 8), axis=2)
    x = n.call("CumSum", n.relu(n.conv(x, 10, 12)), n.value(np.int64(2)))
    x = n.call("ReduceMax", n.conv(x, 12, 9), axes=[2], keepdims=0)
    best, _ = n.calls("TopK", 2, n.conv1(x, 9, 14), n.ints(3), axis=2)
    return n.model(n.conv1(best, 14, 4), IMAGE, ("N", 4, 3))


def tiled() -> ModelProto:
    """Tile and Expand: channels repeated, space repeated."""
    n = Net(42)
    x = n.call("Tile", n.relu(n.conv("x", 3, 8)), n.ints(1, 2, 1, 1))
    pooled = n.call("GlobalAveragePool", n.relu(n.conv(x, 16, 10)))
    x = n.call("Expand", pooled, n.ints(1, 10, 4, 4))
    return n.model(n.conv(n.call("Mul", x, n.weights(10, 4, 4)), 10, 3), IMAGE, ("N", 3, 4, 4))


def mixed_space() -> ModelProto:
    """An MLP-mixer block: dense layers over tokens, by constants on the left, and over channels."""
    n = Net(43)
    x = n.call("Transpose", n.call("Reshape", n.conv("x", 3, 12), n.ints(0, 12, 64)), perm=[0, 2, 1])
    tokens = n.relu(n.call("MatMul", n.weights(20, 64), x))
    x = n.call("Add", x, n.call("MatMul", n.weights(64, 20), tokens))
    x = n.call("Add", x, n.linear(n.relu(n.linear(x, 12, 18)), 18, 12))
    return n.model(n.linear(n.call("ReduceMean", x, axes=[1], keepdims=0), 12, 5), IMAGE, ("N", 5))


def taken_back() -> ModelProto:
    """A flattened image that a Gemm with exchanged operands reads, and an image made of its output."""
    n = Net(44)
    x = n.call("Flatten", n.relu(n.conv("x", 3, 6)))
    x = n.call("Transpose", x, perm=[1, 0])
    x = n.relu(n.call("Gemm", x, n.weights(384, 40), n.weights(40), transA=1))
    x = n.call("Reshape", x, n.ints(-1, 10, 2, 2))
    return n.model(n.conv(x, 10, 3), IMAGE, ("N", 3, 2, 2))


def fused_convolutions() -> ModelProto:
    """The runtime's own convolution, matrix product and activation."""
    n = Net(45)
    fused = {"domain": "com.microsoft", "activation": "Relu"}
    x = n.call("FusedConv", "x", n.weights(12, 3, 3, 3), n.weights(12), pads=[1] * 4, **fused)
    x = n.call("FastGelu", n.call("Flatten", n.conv(x, 12, 5)), n.weights(320), domain="com.microsoft")
    x = n.call("FusedGemm", x, n.weights(320, 15), n.weights(15), **fused)
    return n.model(n.call("Gemm", x, n.weights(15, 4), n.weights(4)), IMAGE, ("N", 4))


IMAGES: dict[str, Callable[[], ModelProto]] = {
    build.__name__: build
    for build in (
        transposed_groups, superresolution, channels_last, shuffle_unit, mobile, detector, unet, every_second, sized,
        grouped_statistics, normalized_elsewhere, tiled, mixed_space, taken_back, fused_convolutions,
    )
}  # fmt: skip
