"""Small networks, one per topology that channel pruning must follow; random weights, no two alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from tests.graph.net import IMAGE, Net
from tests.graph.topologies_bodies import BODIES
from tests.graph.topologies_images import IMAGES
from tests.graph.topologies_sequences import SEQUENCES


def plain() -> ModelProto:
    """Conv, Relu, Conv."""
    n = Net(1)
    return n.model(n.conv(n.call("Relu", n.conv("x", 3, 20)), 20, 6), IMAGE, ("N", 6, 8, 8))


def valid() -> ModelProto:
    """Convolutions without padding: constants fold into the bias."""
    n = Net(2)
    x = n.call("Sigmoid", n.conv("x", 3, 20, pads=[0] * 4))
    return n.model(n.conv(x, 20, 6, pads=[0] * 4), IMAGE, ("N", 6, 4, 4))


def normalized() -> ModelProto:
    """BatchNormalization after the activation, which can't go into the Conv before."""
    n = Net(3)
    x = n.call("Relu", n.conv("x", 3, 20))
    positive = np.abs(n.rng.standard_normal(20)).astype(np.float32) + 0.5
    x = n.call("BatchNormalization", x, n.weights(20), n.weights(20), n.weights(20), n.value(positive))
    return n.model(n.conv(x, 20, 6), IMAGE, ("N", 6, 8, 8))


def residual() -> ModelProto:
    """Two blocks with skip connections and a classifier."""
    n = Net(4)
    x = n.call("Relu", n.conv("x", 3, 16))
    for _ in range(2):
        x = n.call("Relu", n.call("Add", x, n.conv(n.call("LeakyRelu", n.conv(x, 16, 12)), 12, 16)))
    pooled = n.call("Flatten", n.call("GlobalAveragePool", x))
    return n.model(n.call("Gemm", pooled, n.weights(16, 5), n.weights(5)), IMAGE, ("N", 5))


def flattened() -> ModelProto:
    """Pooling and Flatten: every channel becomes 16 columns."""
    n = Net(5)
    x = n.call("MaxPool", n.call("Relu", n.conv("x", 3, 10)), kernel_shape=[2, 2], strides=[2, 2])
    x = n.call("Gemm", n.call("Flatten", x), n.weights(7, 160), n.weights(7), transB=1, alpha=0.5, beta=2.0)
    return n.model(n.call("MatMul", n.call("Tanh", x), n.weights(7, 4)), IMAGE, ("N", 4))


def reshaped() -> ModelProto:
    """Reshape with a zero and a rest, and back to an image."""
    n = Net(6)
    x = n.call("Reshape", n.call("Relu", n.conv("x", 3, 10)), n.ints(0, 640))
    x = n.call("Reshape", x, n.ints(-1, 10, 8, 8))
    return n.model(n.conv(x, 10, 4), IMAGE, ("N", 4, 8, 8))


def measured() -> ModelProto:
    """Reshape to a shape computed from the input's, with the width written into it."""
    n = Net(7)
    x = n.call("Relu", n.conv("x", 3, 10))
    batch = n.call("Unsqueeze", n.call("Gather", n.call("Shape", x), n.value(np.int64(0))), n.ints(0))
    target = n.call("Concat", batch, n.ints(640), axis=0)
    x = n.call("Reshape", x, target)
    return n.model(n.call("MatMul", x, n.weights(640, 4)), IMAGE, ("N", 4))


def joined() -> ModelProto:
    """Concat of two branches."""
    n = Net(8)
    x = n.call("Concat", n.call("Relu", n.conv("x", 3, 9)), n.call("Sigmoid", n.conv("x", 3, 11)), axis=1)
    return n.model(n.conv(n.call("Relu", n.conv(x, 20, 8)), 8, 3), IMAGE, ("N", 3, 8, 8))


def divided() -> ModelProto:
    """Split in two unequal parts."""
    n = Net(9)
    left, right = n.calls("Split", 2, n.call("Relu", n.conv("x", 3, 20)), n.ints(8, 12), axis=1)
    return n.model(n.call("Add", n.conv(left, 8, 5), n.conv(right, 12, 5)), IMAGE, ("N", 5, 8, 8))


def ranges() -> ModelProto:
    """Slices of the channels, one from the end."""
    n = Net(10)
    x = n.call("Relu", n.conv("x", 3, 20))
    front = n.call("Slice", x, n.ints(0), n.ints(9), n.ints(1))
    back = n.call("Slice", x, n.ints(-11), n.ints(2**60), n.ints(1))
    return n.model(n.call("Add", n.conv(front, 9, 5), n.conv(back, 11, 5)), IMAGE, ("N", 5, 8, 8))


def shuffled() -> ModelProto:
    """Channel shuffle: Reshape, Transpose, Reshape."""
    n = Net(11)
    x = n.call("Reshape", n.call("Relu", n.conv("x", 3, 20)), n.ints(-1, 2, 10, 8, 8))
    x = n.call("Reshape", n.call("Transpose", x, perm=[0, 2, 1, 3, 4]), n.ints(-1, 20, 8, 8))
    return n.model(n.conv(x, 20, 6), IMAGE, ("N", 6, 8, 8))


def upsampled() -> ModelProto:
    """ConvTranspose behind ConvTranspose."""
    n = Net(12)
    x = n.call("Relu", n.conv("x", 3, 14))
    x = n.call("Relu", n.call("ConvTranspose", x, n.weights(14, 9, 2, 2), n.weights(9), strides=[2, 2]))
    return n.model(n.call("ConvTranspose", x, n.weights(9, 4, 3, 3)), IMAGE, ("N", 4, 18, 18))


def inverted() -> ModelProto:
    """Expand, depthwise, project, with a skip connection."""
    n = Net(13)
    x = n.call("Relu", n.conv("x", 3, 8))
    wide = n.call("Clip", n.conv(x, 8, 24, 1), n.value(np.float32(0)), n.value(np.float32(6)))
    wide = n.call("HardSwish", n.conv(wide, 24, 24, group=24))
    x = n.call("Add", x, n.conv(wide, 24, 8, 1))
    return n.model(n.conv(x, 8, 3), IMAGE, ("N", 3, 8, 8))


def multiplied() -> ModelProto:
    """Depthwise Conv with two filters a channel."""
    n = Net(14)
    x = n.conv(n.call("Relu", n.conv("x", 3, 10)), 10, 20, group=10)
    return n.model(n.conv(n.call("Relu", x), 20, 5), IMAGE, ("N", 5, 8, 8))


def grouped() -> ModelProto:
    """Grouped Conv between dense ones."""
    n = Net(15)
    x = n.call("Relu", n.conv(n.call("Relu", n.conv("x", 3, 16)), 16, 24, group=4))
    return n.model(n.conv(x, 24, 5), IMAGE, ("N", 5, 8, 8))


def gated() -> ModelProto:
    """Squeeze and excite."""
    n = Net(16)
    x = n.call("Relu", n.conv("x", 3, 16))
    gate = n.conv(n.call("Relu", n.conv(n.call("GlobalAveragePool", x), 16, 6, 1)), 6, 16, 1)
    return n.model(n.conv(n.call("Mul", x, n.call("Sigmoid", gate)), 16, 5), IMAGE, ("N", 5, 8, 8))


def ladder() -> ModelProto:
    """Down, up, Concat with what was before; nearest Resize."""
    n = Net(17)
    skip = n.call("Relu", n.conv("x", 3, 10))
    deep = n.call("Relu", n.conv(n.call("AveragePool", skip, kernel_shape=[2, 2], strides=[2, 2]), 10, 14))
    up = n.call("Resize", deep, "", n.value(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    return n.model(n.conv(n.call("Concat", up, skip, axis=1), 24, 4), IMAGE, ("N", 4, 8, 8))


def perceptron() -> ModelProto:
    """MatMul, Add, activation, over three axes."""
    n = Net(18)
    x = n.call("Relu", n.call("Add", n.call("MatMul", "x", n.weights(6, 20)), n.weights(20)))
    x = n.call("PRelu", n.call("MatMul", x, n.weights(20, 12)), n.weights(12))
    return n.model(n.call("MatMul", x, n.weights(12, 4)), ("N", 5, 6), ("N", 5, 4))


def recurrent() -> ModelProto:
    """A projection read by an LSTM."""
    n = Net(19)
    x = n.call("Relu", n.call("MatMul", "x", n.weights(6, 12)))
    y, _, _ = n.calls("LSTM", 3, x, n.weights(1, 20, 12), n.weights(1, 20, 5), n.weights(1, 40), hidden_size=5)
    return n.model(n.call("Squeeze", y, n.ints(1)), (7, 2, 6), (7, 2, 5))


def looked_up() -> ModelProto:
    """Embedding rows through a dense layer."""
    n = Net(20)
    x = n.call("Gather", n.weights(30, 16), "x")
    x = n.call("Relu", n.call("MatMul", x, n.weights(16, 10)))
    return n.model(n.call("MatMul", x, n.weights(10, 3)), ("N", 4), ("N", 4, 3), TensorProto.INT64)


def attention() -> ModelProto:
    """Two heads of scaled products."""
    n = Net(21)

    def heads(order: list[int]) -> str:
        split = n.call("Reshape", n.call("MatMul", "x", n.weights(12, 16)), n.ints(0, 0, 2, 8))
        return n.call("Transpose", split, perm=order)

    scores = n.call("MatMul", heads([0, 2, 1, 3]), heads([0, 2, 3, 1]))
    weights = n.call("Softmax", n.call("Mul", scores, n.value(np.float32(0.35))), axis=-1)
    mixed = n.call("Transpose", n.call("MatMul", weights, heads([0, 2, 1, 3])), perm=[0, 2, 1, 3])
    mixed = n.call("Reshape", mixed, n.ints(0, 0, 16))
    return n.model(n.call("MatMul", mixed, n.weights(16, 12)), ("N", 5, 12), ("N", 5, 12))


def branching() -> ModelProto:
    """An If whose branches read the same outer tensor, one through weights of its own."""
    n = Net(22)
    x = n.call("Relu", n.call("MatMul", "x", n.weights(6, 20)))
    weights = [numpy_helper.from_array(n.rng.standard_normal((20, 9)).astype(np.float32), "w") for _ in range(2)]

    def body(index: int) -> GraphProto:
        out = helper.make_tensor_value_info(f"b{index}", TensorProto.FLOAT, None)
        return helper.make_graph(
            [helper.make_node("MatMul", [x, "w"], [f"b{index}"], name=f"body{index}")],
            f"body{index}",
            [],
            [out],
            [weights[index]],
        )

    condition = n.call("Greater", n.call("ReduceSum", "x", keepdims=0), n.value(np.float32(0)))
    y = n.call("If", condition, then_branch=body(0), else_branch=body(1))
    return n.model(n.call("MatMul", n.call("Relu", y), n.weights(9, 3)), ("N", 6), ("N", 3))


TOPOLOGIES: dict[str, Callable[[], ModelProto]] = {
    build.__name__: build
    for build in (
        plain, valid, normalized, residual, flattened, reshaped, measured, joined, divided, ranges, shuffled, upsampled,
        inverted, multiplied, grouped, gated, ladder, perceptron, recurrent, looked_up, attention, branching,
    )
} | IMAGES | SEQUENCES | BODIES  # fmt: skip

__all__ = ["IMAGE", "TOPOLOGIES", "Net"]
