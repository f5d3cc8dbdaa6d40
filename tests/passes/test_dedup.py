"""dedup: what is merged, what only looks alike, and what must not be touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.model import TensorData, load
from onnxopt.passes.dedup import Dedup
from tests.helpers import apply, assert_equal, model, node_of, operators, proto, random_feeds, run, with_weights

TWO = "g (float[2,3] x) => (float[2,3] y) { t = Mul(x, a) y = Add(t, b) }"


def two(a: NDArray[Any], b: NDArray[Any]) -> ModelProto:
    return with_weights(proto(TWO), a=a, b=b)


def stored(source: ModelProto) -> list[str]:
    return [tensor.name for tensor in source.graph.initializer]


def test_equal_weights_are_stored_once() -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    source = two(weights, weights.copy())
    target = load(source)
    result = apply(Dedup(), target)
    assert [(change.kind, change.where) for change in result.changes] == [("merged", "b")]
    assert "24 bytes" in result.changes[0].detail
    assert stored(target.to_proto()) == ["a"]
    feeds = random_feeds(source)
    assert_equal(run(source, feeds), run(target, feeds))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 3), np.float32), np.full((2, 3), -0.0, np.float32)),
        (np.ones((2, 3), np.float32), np.ones((1, 2, 3), np.float32)),
        (np.ones((2, 3), np.float32), np.nextafter(np.ones((2, 3), np.float32), np.float32(2))),
        (
            np.full((2, 3), 0x7FC00000, np.uint32).view(np.float32),
            np.full((2, 3), 0x7FC00001, np.uint32).view(np.float32),
        ),
    ],
    ids=["negative zero", "shape", "one bit", "NaN payload"],
)
def test_what_differs_in_a_bit_stays(a: NDArray[Any], b: NDArray[Any]) -> None:
    target = load(two(a, b))
    before = target.digest()
    assert not apply(Dedup(min_bytes=0), target).changes
    assert target.digest() == before


def test_equal_nans_are_merged() -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    assert len(apply(Dedup(), load(two(nan, nan.copy()))).changes) == 1


def test_equal_bytes_of_another_type_stay() -> None:
    source = proto("g (float[8] x, int32[8] i) => (float[8] y, int32[8] z) { y = Add(x, a) z = Add(i, b) }")
    target = load(with_weights(source, a=np.zeros(8, np.float32), b=np.zeros(8, np.int32)))
    assert not apply(Dedup(min_bytes=0), target).changes


def test_the_field_the_values_stand_in_does_not_matter() -> None:
    source = two(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    source.graph.initializer[1].ClearField("raw_data")
    source.graph.initializer[1].float_data.extend([1.0] * 6)
    assert len(apply(Dedup(), load(source)).changes) == 1


def test_small_constants_stay() -> None:
    source = "g (float[1] x) => (float[1] y) <float[1] a = {1}, float[1] b = {1}> { t = Mul(x, a) y = Add(t, b) }"
    assert not apply(Dedup(), model(source)).changes
    assert len(apply(Dedup(min_bytes=4), model(source)).changes) == 1


def test_constant_nodes_take_part() -> None:
    target = model(
        """g (float[4] x) => (float[4] y) <float[4] a = {1, 2, 3, 4}> {
            c = Constant<value = float[4] {1, 2, 3, 4}>()
            t = Mul(x, a)  y = Add(t, c)
        }"""
    )
    assert len(apply(Dedup(), target).changes) == 1
    assert [node.op_type for node in target.to_proto().graph.node] == ["Mul", "Add"]


def test_strings_are_merged() -> None:
    source = proto("g (string[2] x) => (bool[2] y, bool[2] z) { y = Equal(x, a) z = Equal(x, b) }", opset=19)
    words = np.array(["yes", "no"], object)
    target = load(with_weights(source, a=words, b=words.copy()))
    assert len(apply(Dedup(min_bytes=0), target).changes) == 1
    feeds = {"x": np.array(["no", "no"], object)}
    assert_equal(run(source, feeds), run(target, feeds))


def test_strings_with_shifted_borders_stay() -> None:
    source = proto("g (string[2] x) => (bool[2] y, bool[2] z) { y = Equal(x, a) z = Equal(x, b) }", opset=19)
    a, b = np.array(["ab", "c"], object), np.array(["a", "bc"], object)
    assert not apply(Dedup(min_bytes=0), load(with_weights(source, a=a, b=b))).changes


def test_graph_outputs_and_overridable_initializers_stay() -> None:
    source = proto(
        """g (float[4] x, float[4] a) => (float[4] y, float[4] b)
            <float[4] a = {1, 2, 3, 4}, float[4] b = {1, 2, 3, 4}, float[4] c = {1, 2, 3, 4}> {
            s = Mul(x, a)  t = Add(s, b)  y = Add(t, c)
        }"""
    )
    target = load(source)
    result = apply(Dedup(), target)
    assert not result.changes
    assert [(skip.node, skip.reason.split(";")[0]) for skip in result.skipped] == [
        ("b", "it is an output of graph 'g'"),
        ("a", "whoever runs the model may override it: it is an input"),
    ]
    assert stored(target.to_proto()) == ["a", "b", "c"]


def test_what_a_quantization_annotation_names_stays() -> None:
    source = two(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    annotation = source.graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    result = apply(Dedup(), load(source))
    assert not result.changes
    assert "annotation" in result.skipped[0].reason


def test_what_an_annotation_is_about_stays() -> None:
    source = two(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    source.graph.quantization_annotation.add(tensor_name="b")
    result = apply(Dedup(), load(source))
    assert not result.changes
    assert "annotation" in result.skipped[0].reason


def test_what_training_sets_stays() -> None:
    source = two(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))
    source.training_info.add().update_binding.add(key="b", value="b_new")
    result = apply(Dedup(), load(source))
    assert not result.changes
    assert [skip.reason.split(";")[0] for skip in result.skipped] == ["training information names it"]


IF = """g (bool c, float[4] x) => (float[4] y) {
    y = If(c) <
        then_branch = t () => (float[4] p) <float[4] w = {1, 2, 3, 4}> { p = Mul(x, w) },
        else_branch = e () => (float[4] q) <float[4] w = {1, 2, 3, 4}> { q = Add(x, w) }
    >
}"""


def test_siblings_share_in_the_body_around_them() -> None:
    source = proto(IF)
    target = load(source)
    assert len(apply(Dedup(), target).changes) == 1
    written = target.to_proto()
    assert stored(written) == ["w"]
    onnx.checker.check_model(written)
    for choice in (True, False):
        feeds = {"c": np.array(choice), "x": np.arange(4, dtype=np.float32)}
        assert_equal(run(source, feeds), run(written, feeds))


def test_a_shared_weight_is_not_captured_by_an_inner_name() -> None:
    source = proto(
        """g (bool c, float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> {
            s = Mul(x, w)
            y = If(c) <
                then_branch = t () => (float[4] p) <float[4] v = {1, 2, 3, 4}, float[4] w = {9, 9, 9, 9}>
                    { r = Add(s, v) p = Mul(r, w) },
                else_branch = e () => (float[4] q) { q = Neg(s) }
            >
        }"""
    )
    target = load(source)
    apply(Dedup(), target)
    feeds = {"c": np.array(True), "x": np.arange(4, dtype=np.float32)}
    assert_equal(run(source, feeds), run(target, feeds))


def test_functions_share_nothing_with_the_graph() -> None:
    text = """g (float[4] x) => (float[4] y) <float[4] a = {1, 2, 3, 4}> { t = Mul(x, a) y = local.f(t) }
        <domain: "local", opset_import: ["": 17]>
        f (x) => (y) {
            c = Constant<value = float[4] {1, 2, 3, 4}>()
            d = Constant<value = float[4] {1, 2, 3, 4}>()
            t = Add(x, c)  y = Mul(t, d)
        }"""
    source = proto(text, imports='"local" : 1')
    target = load(source)
    result = apply(Dedup(), target)
    assert [change.where for change in result.changes] == ["d"]
    feeds = {"x": np.arange(4, dtype=np.float32)}
    assert_equal(run(source, feeds), run(target, feeds))


def test_four_bit_values_are_merged() -> None:
    source = proto(
        "g (float[8] x) => (float[8] y) { c = Cast<to = 1>(a) d = Cast<to = 1>(b) t = Mul(x, c) y = Add(t, d) }", 21, 10
    )
    packed = [helper.make_tensor(name, TensorProto.INT4, [8], [1, -8, 7, 0, 1, 2, 3, 4]) for name in "ab"]
    source.graph.initializer.extend(packed)
    target = load(source)
    assert len(apply(Dedup(min_bytes=4), target).changes) == 1
    feeds = random_feeds(source)
    assert_equal(run(source, feeds), run(target, feeds))


def test_sparse_weights_are_compared_without_making_them_dense() -> None:
    source = proto("g (float[1000000] x) => (float[1000000] y) { t = Mul(x, a) y = Add(t, b) }")
    for name in "ab":
        sparse = source.graph.sparse_initializer.add(dims=[1_000_000])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), name))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.array([1, 5, 7], np.int64)))
    target = load(source)
    assert len(apply(Dedup(), target).changes) == 1
    constant = node_of(target, "Mul").inputs[1]
    assert constant.data.sparse is not None
    assert constant.data._array is None


LARGE = np.arange(20_000, dtype=np.float32)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The uids of contents that are read whole from here on."""
    calls: list[int] = []
    original = TensorData.chunks

    def counted(self: TensorData, size: int = 1 << 22) -> Iterator[Any]:
        calls.append(self.uid)
        return original(self, size)

    monkeypatch.setattr(TensorData, "chunks", counted)
    return calls


def added(*weights: NDArray[Any]) -> ModelProto:
    """x plus each of the weights."""
    body = " ".join(f"t{n + 1} = Add(t{n}, w{n})" for n in range(len(weights)))
    source = proto(f"g (float[20000] t0) => (float[20000] t{len(weights)}) {{ {body} }}")
    return with_weights(source, **{f"w{n}": array for n, array in enumerate(weights)})


def test_contents_that_are_the_same_object_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(added(LARGE, LARGE + 1))
    target.graph.nodes[1].inputs[1].values = target.graph.nodes[0].inputs[1].data
    calls = count_reads(monkeypatch)
    assert len(apply(Dedup(), target).changes) == 1
    assert not calls


def test_two_equal_contents_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(added(LARGE, LARGE))
    calls = count_reads(monkeypatch)
    assert len(apply(Dedup(), target).changes) == 1
    assert len(calls) == len(set(calls)) == 2


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The uids of contents that are hashed whole from here on."""
    hashed: list[int] = []
    original = TensorData.digest

    def counted(self: TensorData) -> bytes:
        if self._digest is None:
            hashed.append(self.uid)
        return original(self)

    monkeypatch.setattr(TensorData, "digest", counted)
    return hashed


def test_many_equal_contents_are_read_once_each_and_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(added(*[LARGE] * 4))
    calls, hashed = count_reads(monkeypatch), count_hashes(monkeypatch)
    assert len(apply(Dedup(), target).changes) == 3
    assert len(calls) == len(set(calls)) == 4
    assert not hashed


def test_nothing_is_hashed_twice_where_samples_do_not_tell_contents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    for kind in range(5):
        kinds.append(LARGE.copy())
        kinds[-1][700] += kind  # between the samples
    target = load(added(*kinds, *kinds, kinds[4]))
    weights = [node.inputs[1].data for node in target.graph.nodes]
    assert len({data.fingerprint() for data in weights}) == 1
    calls, hashed = count_reads(monkeypatch), count_hashes(monkeypatch)
    assert len(apply(Dedup(), target).changes) == 6
    assert len(hashed) == len(set(hashed)) == 11 - 4
    assert max(calls.count(data.uid) for data in weights) == 4  # two rounds, the hash, one comparison


def test_large_contents_that_differ_are_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(added(*(LARGE + n for n in range(5))))
    calls = count_reads(monkeypatch)
    assert not apply(Dedup(), target).changes
    assert not calls


@pytest.mark.parametrize("copies", [1, 2])
def test_a_difference_between_the_samples_is_seen(copies: int) -> None:
    other = LARGE.copy()
    other[700] += 1
    target = load(added(*[LARGE] * copies, other))
    weights = [node.inputs[1].data for node in target.graph.nodes]
    assert weights[0].fingerprint() == weights[-1].fingerprint()
    assert len(apply(Dedup(), target).changes) == copies - 1


def test_nothing_to_do_changes_nothing() -> None:
    target = model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    before = target.digest()
    result = apply(Dedup(), target)
    assert (result.changes, result.skipped) == ([], [])
    assert target.digest() == before
    assert operators(target) == ["Relu"]
