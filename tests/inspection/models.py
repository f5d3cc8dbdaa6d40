"""Models that hold what an inspection looks for."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from tests.helpers import proto, with_weights


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wasteful() -> ModelProto:
    """Equal weights, a weight of four values, one of rank 2, zeros, dead filters, an Identity, an unread weight."""
    text = """agraph (float[1,3,8,8] x) => (float[1,6] y) {
        h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, conv, bias)
        r = Relu(h)
        m = GlobalAveragePool(r)
        f = Flatten(m)
        i = Identity(f)
        g = MatMul(i, thin)
        t = Tanh(g)
        p = MatMul(t, table)
        s = Tanh(p)
        q = MatMul(s, twin)
        o = Tanh(q)
        k = Neg(two)
        w = Mul(last, k)
        y = MatMul(o, w)
    }"""
    conv = normal(16, 3, 3, 3)
    conv[:8] = 0
    bias = np.zeros(16, np.float32)
    thin = normal(16, 2, seed=1) @ normal(2, 64, seed=2)
    table = np.random.default_rng(3).choice(np.array([-1, 0.5, 1, 2], np.float32), (64, 64))
    source = with_weights(proto(text), conv=conv, bias=bias, thin=thin, table=table, twin=table.copy())
    return with_weights(source, last=normal(64, 6), two=np.array(2, np.float32), unread=normal(10))


def everything() -> ModelProto:
    """If, Loop, a function, a sparse weight, strings, a default, a sequence, another domain."""
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    agraph (bool c, float[N,4] x, int64 n, float[4] d) => (float[N,4] y, string[2] names, seq(float[N,4]) s) {
        a = If(c) <then_branch = one () => (float[N,4] t) { t = Relu(x) },
                   else_branch = two () => (float[N,4] e) { u = Abs(x) e = Neg(u) }>
        b = Loop(n, c, a) <body = step (int64 i, bool go, float[N,4] v) => (bool on, float[N,4] w) {
            on = Identity(go) w = MatMul(v, sparse)
        }>
        z = my.twice(b)
        y = Add(z, d)
        names = Identity(words)
        s = SequenceConstruct(y, z)
    }
    <domain: "my", opset_import: ["" : 17]> twice (a) => (r) { r = Add(a, a) }"""
    source = with_weights(onnx.parser.parse_model(text), d=np.ones(4, np.float32), words=np.array(["a", "b"], object))
    values = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.array([0, 5], np.int64), "at")
    source.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    source.metadata_props.add(key="author", value="me")
    source.producer_name, source.producer_version = "tests", "1.0"
    return source
