"""What other optimizers got wrong without a word, each case once: none of it may happen here.

Every model goes through the whole list `simplify`; where a case is about one pass, through that pass as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.model import Model, load
from onnxopt.passbase import pass_list
from onnxopt.pipeline.grammar import parse
from tests.helpers import (
    apply,
    assert_close,
    assert_equal,
    assert_valid,
    operators,
    proto,
    random_feeds,
    run,
    with_weights,
)


def simplified(source: ModelProto) -> Model:
    target = load(source)
    for step in parse("simplify"):
        apply(step.pass_, target)
    return target


def test_two_random_tensors_are_not_merged() -> None:
    for op in ("RandomNormalLike", "RandomUniformLike"):
        source = proto(f"g (float[64] x) => (float[64] y) {{ a = {op}(x) b = {op}(x) y = Sub(a, b) }}")
        target = simplified(source)
        assert operators(target) == [op, op, "Sub"]
        assert np.any(run(target, random_feeds(source))["y"] != 0)


def test_two_bernoullis_are_not_merged() -> None:
    source = proto("g (float[64] p) => (float[64] y) { a = Bernoulli(p) b = Bernoulli(p) y = Sub(a, b) }")
    assert operators(simplified(source)) == ["Bernoulli", "Bernoulli", "Sub"]


def test_two_multinomials_and_two_dropouts_in_training_are_not_merged() -> None:
    source = proto(
        """g (float[1,8] x) => (int32[1,4] y, float[1,8] z) <float h = {0.5}, bool t = {1}> {
        a = Multinomial<sample_size = 4>(x) b = Multinomial<sample_size = 4>(x) y = Sub(a, b)
        c = Dropout(x, h, t) d = Dropout(x, h, t) z = Sub(c, d) }"""
    )
    assert operators(simplified(source)).count("Multinomial") == 2
    assert operators(simplified(source)).count("Dropout") == 2


def test_a_random_tensor_is_not_frozen() -> None:
    source = proto("g (float[4] x) => (float[4] y) { r = RandomNormal<shape = [4]>() y = Add(x, r) }")
    target = simplified(source)
    assert operators(target) == ["RandomNormal", "Add"]


def test_a_pass_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UsageError, match="not_a_pass"):
        parse("simplify:skip=not_a_pass")
    with pytest.raises(UsageError, match="not_a_pass"):
        parse("simplify,not_a_pass")


def test_batch_normalization_in_training_is_not_fused() -> None:
    source = proto(
        """g (float[2,1,4,4] x) => (float[2,2,a,b] y) <float[2] s = {1, 2}, float[2] o = {0, 1}> {
        t = Conv(x, W) y, m, v = BatchNormalization<training_mode = 1>(t, s, o, o, s) }"""
    )
    source = with_weights(source, W=np.random.default_rng(0).standard_normal((2, 1, 3, 3)).astype(np.float32))
    target = simplified(source)
    assert operators(target) == ["Conv", "BatchNormalization"]
    assert_equal(run(source, random_feeds(source)), run(target, random_feeds(source)))


def test_a_name_that_is_taken_does_not_lose_a_weight() -> None:
    for taken in ("W_bias", "t_bias", "W_fused", "Conv_bias", "y_bias"):
        source = proto(
            f"""g (float[1,1,4,4] x) => (float[1,2,a,b] y)
            <float[2] s = {{1, 2}}, float[2] o = {{0, 1}}, float {taken} = {{7}}> {{
            t = Conv(x, W) u = BatchNormalization(t, s, o, o, s) y = Mul(u, {taken}) }}"""
        )
        source = with_weights(source, W=np.random.default_rng(0).standard_normal((2, 1, 3, 3)).astype(np.float32))
        target = simplified(source)
        assert operators(target) == ["Conv"]
        assert_valid(target)
        assert_close(run(source, random_feeds(source)), run(target, random_feeds(source)))


def test_a_few_bytes_do_not_become_megabytes() -> None:
    source = proto(
        """g (float[1] x) => (float[4096,4096] y) <float one = {1}, int64[2] shape = {4096, 4096}> {
        e = Expand(one, shape) y = Add(x, e) }"""
    )
    target = simplified(source)
    assert len(target.to_proto().SerializeToString()) <= len(source.SerializeToString()) + 64


def test_outputs_of_a_recurrent_layer_keep_their_places() -> None:
    source = proto("g (float[n,b,4] x) => (float[1,b,3] y) { a, h, y = LSTM<hidden_size = 3>(x, W, R) d = Exp(a) }")
    rng = np.random.default_rng(0)
    source = with_weights(
        source,
        W=rng.standard_normal((1, 12, 4)).astype(np.float32),
        R=rng.standard_normal((1, 12, 3)).astype(np.float32),
    )
    target = load(source)
    before = target.digest()
    result = apply(parse("eliminate_dead_code")[0].pass_, target)
    assert result.changes
    assert target.digest() != before
    assert [tensor.name for tensor in target.graph.nodes[0].outputs] == ["a", "h", "y"]
    assert_equal(run(source, random_feeds(source)), run(simplified(source), random_feeds(source)))


def test_a_sparse_initializer_stays_one() -> None:
    source = proto("g (float[4] x) => (float[4] y) { a = Identity(x) y = Mul(a, w) }")
    values = numpy_helper.from_array(np.array([2, 3], np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 2], np.int64), "w_indices")
    source.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    target = simplified(source)
    written = target.to_proto()
    assert operators(target) == ["Mul"]
    assert [sparse.values.data_type for sparse in written.graph.sparse_initializer] == [TensorProto.FLOAT]
    assert_equal(run(source, random_feeds(source)), run(written, random_feeds(source)))


def test_a_way_through_integers_is_no_identity() -> None:
    source = proto("g (float[4] x) => (float[4] y) { a = Cast<to = 7>(x) y = Cast<to = 1>(a) }")
    target = simplified(source)
    assert operators(target) == ["Cast", "Cast"]
    given = {"x": np.array([0.5, -1.75, 3, 2.25], np.float32)}
    assert_equal(run(source, given), run(target, given))


def test_beta_of_a_gemm_counts_when_a_normalization_is_fused() -> None:
    source = proto(
        """g (float[3,4] x) => (float[3,2] y) <float[2] s = {1, 2}, float[2] o = {0, 1}, float[2] c = {5, 6}> {
        t = Gemm<alpha = 0.5, beta = 3.0>(x, W, c) y = BatchNormalization(t, s, o, o, s) }"""
    )
    source = with_weights(source, W=np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32))
    target = simplified(source)
    assert operators(target) == ["Gemm"]
    assert_close(run(source, random_feeds(source)), run(target, random_feeds(source)))


def test_local_functions_are_not_dropped() -> None:
    source = proto(
        """g (float[4] x) => (float[4] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 17, "far" : 1]> F (a) => (b) { c = Neg(a) b = far.Thing(c) }""",
        imports='"own" : 1, "far" : 1',
    )
    target = simplified(source)
    assert operators(target) == ["Neg", "Thing"]
    assert target.opset_imports == {"": 17, "far": 1}


def test_open_dims_of_outputs_stay_open() -> None:
    source = proto(
        "g (float[N,4] x) => (float[N,2,2] y) <int64[3] t = {-1, 2, 2}> { a = Identity(x) y = Reshape(a, t) }"
    )
    before = source.graph.output[0]
    assert simplified(source).to_proto().graph.output[0] == before


def test_inputs_stay_whether_used_or_not_and_overridable_ones_too() -> None:
    source = proto("g (float[4] x, float[4] idle, float[4] w) => (float[4] y) { a = Identity(x) y = Add(a, w) }")
    source.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "w"))
    written = simplified(source).to_proto()
    assert [info.name for info in written.graph.input] == ["x", "idle", "w"]
    assert [tensor.name for tensor in written.graph.initializer] == ["w"]
    given = {"x": np.ones(4, np.float32), "idle": np.ones(4, np.float32), "w": np.full(4, 5, np.float32)}
    assert_equal(run(source, given), run(written, given))


def full_of_metadata() -> ModelProto:
    source = proto(
        """g (float[N,4] x) => (float[a,b] y) <float one = {1}, float two = {2}> {
        a = Mul(x, one) b = Relu(a) y = Mul(b, two) }"""
    )
    source.producer_name, source.domain, source.model_version, source.doc_string = "p", "d", 7, "model"
    source.metadata_props.add(key="model", value="1")
    source.graph.doc_string = "graph"
    source.graph.metadata_props.add(key="graph", value="2")
    source.graph.input[0].doc_string = "input"
    for node in source.graph.node:
        node.name = f"node {node.output[0]}"
        node.doc_string = f"why {node.output[0]}"
        node.metadata_props.add(key="node", value=node.output[0])
    source.graph.initializer[1].metadata_props.add(key="initializer", value="3")
    source.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", 4]))
    source.graph.value_info[0].doc_string = "b"
    return source


def test_no_metadata_is_lost() -> None:
    source = full_of_metadata()
    written = simplified(source).to_proto()
    for field in ("producer_name", "domain", "model_version", "doc_string", "metadata_props", "opset_import"):
        assert getattr(written, field) == getattr(source, field)
    graph, before = written.graph, source.graph
    assert (graph.doc_string, graph.metadata_props) == (before.doc_string, before.metadata_props)
    assert list(graph.input) == list(before.input)
    assert list(graph.output) == list(before.output)
    assert list(graph.value_info) == list(before.value_info)
    assert list(graph.initializer) == [before.initializer[1]]
    after = {node.name: node for node in graph.node}
    assert list(after) == ["node b", "node y"]
    assert [(node.doc_string, node.metadata_props) for node in after.values()] == [
        (node.doc_string, node.metadata_props) for node in before.node[1:]
    ]


def test_the_model_of_the_caller_is_not_changed() -> None:
    source = full_of_metadata()
    before = source.SerializeToString(deterministic=True)
    simplified(source)
    assert source.SerializeToString(deterministic=True) == before


CHAIN = """g (float[N,4] x) => (float[a,b] y) <int64[1] v0 = {0}, int64[1] m1 = {-1}, float one = {1}> {
  s = Shape(x) n = Gather(s, v0) t = Concat<axis = 0>(n, m1) a = Reshape(x, t) b = Mul(a, one) c = Relu(b) d = Relu(c)
  e = Transpose(d) f = Transpose(e) g0 = Exp(f) h = Exp(f) y = Add(g0, h) }"""


def test_a_second_run_changes_nothing_and_bytes_are_the_same() -> None:
    source = proto(CHAIN)
    once, again = simplified(source), simplified(source)
    first = once.to_proto().SerializeToString(deterministic=True)
    assert first == again.to_proto().SerializeToString(deterministic=True)
    assert operators(once) == ["Relu", "Exp", "Add"]
    for step in parse("simplify"):
        result: Any = apply(step.pass_, once)
        assert not result.changes, f"{step} changes something in a second run"
    assert once.to_proto().SerializeToString(deterministic=True) == first


def test_it_loads_at_every_level_of_optimization() -> None:
    import onnxruntime

    raw = simplified(proto(CHAIN)).to_proto().SerializeToString()
    for level in onnxruntime.GraphOptimizationLevel.__members__.values():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    onnx.checker.check_model(onnx.load_model_from_string(raw), full_check=True)


def test_the_list_is_spelled_out_and_may_be_shortened() -> None:
    names = [step.source for step in parse("simplify")]
    assert names == list(pass_list("simplify") or ())
    assert "recompose" not in [step.source for step in parse("simplify:skip=recompose+dedup")]
    with pytest.raises(UsageError, match="has no option 'level'"):
        parse("simplify:level=3")
