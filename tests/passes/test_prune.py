"""Lossless pruning: what goes, what stays and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.graph.axes import AxisMaps, known_operators, register
from onnxopt.graph.axes import maps as registry
from onnxopt.model import Model, Node, load
from onnxopt.passbase import Effect
from onnxopt.passes.prune import Prune
from tests.graph.test_channels import context, relative_error, removed_by
from tests.graph.topologies import IMAGE, TOPOLOGIES, Net
from tests.helpers import random_feeds, reference, run


def edited(proto: ModelProto, **edits: Any) -> ModelProto:
    """The proto with functions applied to initializers: name -> f(array) editing in place."""
    for tensor in proto.graph.initializer:
        if tensor.name in edits:
            array = numpy_helper.to_array(tensor).copy()
            edits[tensor.name](array)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def pruned(proto: ModelProto, **options: Any) -> tuple[Model, Any]:
    model = load(proto)
    result = Prune(**{"round_to": 1, **options}).run(model, context())
    feeds = random_feeds(proto)
    assert relative_error(run(proto, feeds), run(model, feeds)) < 1e-5
    assert relative_error(reference(proto, feeds), reference(model, feeds)) < 1e-5
    return model, result


def conv_widths(model: Model) -> list[int]:
    return [node.inputs[1].shape[0] for node in model.graph.nodes if node.op == "Conv"]


def set_rows(rows: slice, value: float) -> Any:
    def edit(array: np.ndarray) -> None:
        array[rows] = value

    return edit


def test_its_effect_is_rounding() -> None:
    assert Prune().effect is Effect.ROUNDING


def test_constant_channels_behind_padding_collapse_into_one() -> None:
    proto = edited(TOPOLOGIES["plain"](), c0=set_rows(slice(0, 10), 0), c1=set_rows(slice(0, 10), 2))
    model, result = pruned(proto)
    assert conv_widths(model) == [11, 6]
    assert "9 constant" in result.changes[0].detail


def test_constant_channels_without_padding_fold_into_the_bias() -> None:
    proto = edited(TOPOLOGIES["valid"](), c0=set_rows(slice(0, 10), 0), c1=set_rows(slice(0, 10), 2))
    model, _ = pruned(proto)
    assert conv_widths(model) == [10, 6]


def test_a_missing_bias_is_made_when_a_constant_folds() -> None:
    n = Net(3)
    x = n.call("Relu", n.call("Conv", "x", n.weights(8, 3, 1, 1), n.weights(8)))
    proto = n.model(n.call("Conv", x, n.weights(4, 8, 1, 1)), IMAGE, ("N", 4, 8, 8))
    model, _ = pruned(edited(proto, c0=set_rows(slice(2, 5), 0), c1=set_rows(slice(2, 5), 1.5)))
    assert conv_widths(model) == [5, 4]


def test_duplicate_and_proportional_channels_merge() -> None:
    def copies(array: np.ndarray) -> None:
        array[1], array[2], array[3] = array[0], 2.5 * array[0], 0.3 * array[0]

    proto = edited(TOPOLOGIES["plain"](), c0=copies, c1=copies)
    model, result = pruned(proto)
    assert conv_widths(model) == [17, 6]
    assert "3 proportional" in result.changes[0].detail


def test_a_negative_multiple_is_not_proportional_behind_relu() -> None:
    def opposite(array: np.ndarray) -> None:
        array[1] = -array[0]

    model, result = pruned(edited(TOPOLOGIES["plain"](), c0=opposite, c1=opposite))
    assert not result.changes
    assert conv_widths(model) == [20, 6]


def test_a_multiple_is_not_proportional_behind_sigmoid_but_a_copy_is() -> None:
    def copies(array: np.ndarray) -> None:
        array[1], array[2] = 2 * array[0], array[0]

    model, _ = pruned(edited(TOPOLOGIES["valid"](), c0=copies, c1=copies))
    assert conv_widths(model) == [19, 6]


def test_channels_nobody_reads_go() -> None:
    def unread(array: np.ndarray) -> None:
        array[:, 4:9] = 0

    model, result = pruned(edited(TOPOLOGIES["plain"](), c2=unread))
    assert conv_widths(model) == [15, 6]
    assert "5 unread" in result.changes[0].detail


def test_a_residual_channel_goes_only_when_dead_on_every_path() -> None:
    one_path = edited(TOPOLOGIES["residual"](), c4=set_rows(slice(0, 5), 0), c5=set_rows(slice(0, 5), 0))
    assert not pruned(one_path)[1].changes


def test_the_last_channel_of_an_axis_stays() -> None:
    proto = edited(TOPOLOGIES["plain"](), c0=set_rows(slice(None), 0), c1=set_rows(slice(None), 0))
    model, _ = pruned(proto)
    assert conv_widths(model) == [1, 6]


@pytest.mark.parametrize(("round_to", "expected"), [(1, 13), (4, 16), (8, 16), (16, 16), (32, 20)])
def test_round_to_keeps_a_multiple(round_to: int, expected: int) -> None:
    proto = edited(TOPOLOGIES["plain"](), c0=set_rows(slice(0, 7), 0), c1=set_rows(slice(0, 7), 0))
    assert conv_widths(pruned(proto, round_to=round_to)[0]) == [expected, 6]


def test_convolutions_keep_a_multiple_of_four_by_default_and_matrices_do_not() -> None:
    n = Net(4)
    x = n.call("GlobalAveragePool", n.call("Relu", n.conv("x", 3, 16)))
    x = n.call("Relu", n.call("Gemm", n.call("Flatten", x), n.weights(10, 16), n.weights(10), transB=1))
    proto = n.model(n.call("MatMul", x, n.weights(10, 4)), IMAGE, ("N", 4))
    edits = {name: set_rows(slice(0, 3), 0) for name in ("c0", "c1", "c2", "c3")}
    model = load(edited(proto, **edits))
    Prune().run(model, context())
    assert [node.inputs[1].shape for node in model.graph.nodes if node.op in ("Conv", "Gemm")] == [
        (16, 3, 3, 3),
        (7, 16),
    ]


def test_a_small_constant_shared_by_two_nodes_is_cut_for_one() -> None:
    n = Net(5)
    shared = n.value(np.zeros(12, np.float32))
    x = n.call("Relu", n.call("Conv", "x", n.weights(12, 3, 1, 1), shared))
    proto = n.model(n.call("Conv", x, n.weights(12, 12, 1, 1), shared), IMAGE, ("N", 12, 8, 8))
    model, _ = pruned(edited(proto, c1=set_rows(slice(0, 5), 0)))
    assert conv_widths(model) == [7, 12]
    assert sorted(node.inputs[2].shape[0] for node in model.graph.nodes if node.op == "Conv") == [7, 12]


def test_a_graph_output_keeps_its_channels() -> None:
    n = Net(6)
    proto = n.model(n.conv("x", 3, 8), IMAGE, ("N", 8, 8, 8))
    _, result = pruned(edited(proto, c0=set_rows(slice(0, 4), 0), c1=set_rows(slice(0, 4), 0)))
    assert not result.changes
    assert any("output of the model" in skip.reason for skip in result.skipped)


def test_an_operator_without_a_rule_freezes_its_channels_and_is_named() -> None:
    n = Net(7)
    x = n.call("ReverseSequence", n.call("Relu", n.conv("x", 3, 8)), n.ints(8, 8), time_axis=1, batch_axis=0)
    proto = n.model(n.conv(x, 8, 4), IMAGE, ("N", 4, 8, 8))
    model, result = pruned(edited(proto, c0=set_rows(slice(0, 4), 0), c1=set_rows(slice(0, 4), 0)))
    assert conv_widths(model) == [8, 4]
    assert [(skip.node, skip.reason) for skip in result.skipped if "rule" in skip.reason] == [
        ("n2_ReverseSequence", "no axis rule for ReverseSequence")
    ]


def test_a_rule_added_here_unlocks_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CenterCropPad to the size that is there does nothing: the rule passes the axis on."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    n = Net(8, opset=18)
    x = n.call("CenterCropPad", n.call("Relu", n.conv("x", 3, 8)), n.ints(8, 8), axes=[2, 3])
    proto = n.model(n.conv(x, 8, 4), IMAGE, ("N", 4, 8, 8))
    edited(proto, c0=set_rows(slice(0, 4), 0), c1=set_rows(slice(0, 4), 0))
    assert conv_widths(pruned(proto)[0]) == [8, 4]
    assert ("", "CenterCropPad") not in known_operators()

    @register("CenterCropPad")
    def crop(node: Node, maps: AxisMaps) -> None:
        maps.set(node.outputs[0], maps.of(node.inputs[0]))

    assert conv_widths(pruned(proto)[0]) == [4, 4]


def test_a_rule_that_forgets_an_axis_freezes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register("Relu")(lambda _node, _maps: None)
    proto = edited(TOPOLOGIES["plain"](), c0=set_rows(slice(0, 7), 0), c1=set_rows(slice(0, 7), 0))
    model, result = pruned(proto)
    assert conv_widths(model) == [20, 6]
    assert any("Relu is not followed" in skip.reason for skip in result.skipped)


def test_a_convolution_over_a_transposed_channel_axis_is_not_mistaken() -> None:
    """The channels of the first Conv are the second's width: nothing may go although its input looks unread."""
    n = Net(9)
    x = n.call("Transpose", n.conv("x", 3, 8), perm=[0, 2, 1, 3])
    proto = n.model(n.conv(x, 8, 4), IMAGE, ("N", 4, 8, 8))
    _, result = pruned(edited(proto, c0=set_rows(slice(0, 4), 0), c1=set_rows(slice(0, 4), 0)))
    assert not result.changes


def test_padding_makes_a_constant_no_constant() -> None:
    n = Net(10)
    x = n.call("Pad", n.call("Relu", n.conv("x", 3, 8)), n.ints(0, 0, 1, 1, 0, 0, 1, 1))
    proto = n.model(n.conv(x, 8, 4, pads=[0] * 4), IMAGE, ("N", 4, 8, 8))
    model, _ = pruned(edited(proto, c0=set_rows(slice(0, 4), 0), c1=set_rows(slice(0, 4), 3)))
    assert conv_widths(model) == [5, 4]


def test_value_info_follows_the_cut() -> None:
    proto = onnx.shape_inference.infer_shapes(TOPOLOGIES["inverted"]())
    edited(proto, c2=set_rows(slice(0, 8), 0), c3=set_rows(slice(0, 8), 0))
    model, _ = pruned(proto)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    widths = {info.name: info.type.tensor_type.shape.dim[1].dim_value for info in model.to_proto().graph.value_info}
    assert 16 in widths.values()


def test_weights_in_constant_nodes_stay_constant_nodes() -> None:
    proto = edited(TOPOLOGIES["plain"](), c0=set_rows(slice(0, 7), 0), c1=set_rows(slice(0, 7), 0))
    nodes = [
        onnx.helper.make_node("Constant", [], [t.name], value=numpy_helper.from_array(numpy_helper.to_array(t)))
        for t in proto.graph.initializer
    ]
    del proto.graph.initializer[:]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
    model, _ = pruned(proto)
    assert conv_widths(model) == [13, 6]
    assert len(model.to_proto().graph.initializer) == 0


def test_running_twice_changes_nothing_more() -> None:
    proto = edited(TOPOLOGIES["gated"](), c0=set_rows(slice(0, 7), 0), c1=set_rows(slice(0, 7), 0))
    model, _ = pruned(proto)
    digest = model.digest()
    assert removed_by(Prune(round_to=1).run(model, context())) == 0
    assert model.digest() == digest


def test_a_width_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UsageError, match="round_to"):
        Prune(round_to=-1)
