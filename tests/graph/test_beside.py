"""Two models in one graph: each tensor of both holds what it held alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from onnxopt.graph.beside import beside
from onnxopt.model import Constant, Model, Variable, load
from tests.graph.topologies import TOPOLOGIES
from tests.helpers import random_feeds, run
from tests.passes.quantizing import parse, weight


def changed(proto: ModelProto) -> Model:
    """The same network with other values in every weight of a node."""
    model = load(proto)
    seen: set[int] = set()
    for body in model.bodies():
        for node in body.nodes:
            for tensor in node.inputs if node.op != "Resize" else ():
                if isinstance(tensor, Constant) and tensor.dtype.kind == "f" and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensor.values = np.asarray(tensor.values * np.float32(0.7))
    return model


def both(first: Model, second: Model, feeds: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the joined model gives for the outputs of either."""
    joined = beside(first, second)
    ones = [joined.first[id(tensor)] for tensor in first.graph.outputs]
    others = [joined.second[id(tensor)] for tensor in second.graph.outputs]
    joined.model.graph.outputs[:] = [*ones, *(tensor for tensor in others if tensor not in ones)]
    proto = joined.model.to_proto()
    onnx.checker.check_model(proto)
    found = run(proto, feeds)
    return {t.name: found[t.name] for t in ones}, {t.name: found[t.name] for t in others}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_each_gives_what_it_gave_alone(name: str) -> None:
    proto = TOPOLOGIES[name]()
    first, second = load(proto), changed(proto)
    feeds = random_feeds(proto)
    one, other = both(first, second, feeds)
    assert np.array_equal(one["y"], run(first, feeds)["y"])
    assert np.array_equal(next(iter(other.values())), run(second, feeds)["y"])
    assert not np.array_equal(one["y"], next(iter(other.values())))


def test_models_are_left_alone() -> None:
    proto = TOPOLOGIES["chosen"]()
    first, second = load(proto), changed(proto)
    before = [model.digest() for model in (first, second)]
    beside(first, second)
    assert [model.digest() for model in (first, second)] == before


def test_a_model_beside_itself() -> None:
    model = load(TOPOLOGIES["looped"]())
    feeds = random_feeds(model)
    one, other = both(model, model, feeds)
    assert np.array_equal(one["y"], next(iter(other.values())))


def test_the_outputs_are_the_firsts() -> None:
    proto = TOPOLOGIES["plain"]()
    joined = beside(load(proto), changed(proto)).model
    assert [tensor.name for tensor in joined.graph.outputs] == ["y"]
    assert [tensor.name for tensor in joined.graph.inputs] == ["x"]


def test_names_that_look_taken_do_not_meet() -> None:
    """The first model holds names that the second's would get."""
    text = """g (float[2, 4] x) => (float[2, 4] y) { h_beside = MatMul(x, w)  h = Relu(h_beside)  y = MatMul(h, w) }"""
    first, second = (parse(text, {"w": weight(4, 4, seed=seed)}) for seed in (1, 2))
    feeds = {"x": np.ones((2, 4), np.float32)}
    one, other = both(first, second, feeds)
    assert np.array_equal(one["y"], run(first, feeds)["y"])
    assert np.array_equal(next(iter(other.values())), run(second, feeds)["y"])


def test_an_input_that_is_an_output() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] x, float[2, 4] y) { y = Relu(x) }"
    first, second = parse(text), parse(text)
    joined = beside(first, second)
    assert joined.second[id(second.graph.inputs[0])] is joined.first[id(first.graph.inputs[0])]
    assert isinstance(joined.first[id(first.graph.inputs[0])], Variable)


def test_a_branch_that_gives_out_an_input() -> None:
    text = """g (float[2, 4] x, bool c) => (float[2, 4] y) {
        y = If (c) <
            then_branch = t () => (float[2, 4] a) { a = Relu(x) },
            else_branch = e () => (float[2, 4] b) { b = Identity(x) }
        >
    }"""
    first, second = parse(text), parse(text)
    for flag in (True, False):
        feeds = {"x": np.array([[-1, 2, -3, 4]] * 2, np.float32), "c": np.array(flag)}
        one, other = both(first, second, feeds)
        assert np.array_equal(one["y"], run(first, feeds)["y"])
        assert np.array_equal(next(iter(other.values())), one["y"])
