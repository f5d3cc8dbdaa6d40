"""Passes as data: options, their text, effects, plain functions, look-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxopt.errors import PassError, UsageError
from onnxopt.model import Graph, Node, Variable
from onnxopt.passbase import Context, Effect, Pass, lookup, names, option, rewrite
from tests.helpers import apply, model, operators


@dataclass(frozen=True)
class Example(Pass):
    """Do nothing, with options.

    More text.
    """

    name: ClassVar[str] = "example"
    ratio: float = option(0.5, "a share", minimum=0.0, maximum=1.0)
    count: int = option(3, "a number", minimum=1)
    fast: bool = option(False, "a switch")
    mode: str = option("a", "a choice", choices=("a", "b"))
    layers: tuple[str, ...] = option((), "a list")


def test_an_option_is_parsed_and_printed_back() -> None:
    texts = {"ratio": "0.25", "count": "7", "fast": "true", "mode": "b", "layers": "x+y"}
    found = Example.parse(texts)
    assert found == Example(ratio=0.25, count=7, fast=True, mode="b", layers=("x", "y"))
    assert str(found) == "example:ratio=0.25:count=7:fast=true:mode=b:layers=x+y"
    assert str(Example()) == "example"
    assert Example.help() == "Do nothing, with options."


@pytest.mark.parametrize(
    "texts", [{"ratio": "2"}, {"ratio": "much"}, {"count": "0"}, {"count": "1.5"}, {"fast": "maybe"}, {"mode": "c"}]
)
def test_a_wrong_value_is_refused_by_name(texts: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        Example.parse(texts)
    assert "example" in caught.value.cause
    assert next(iter(texts)) in caught.value.cause
    assert caught.value.remedy


def test_an_unknown_option_gets_the_closest_one() -> None:
    with pytest.raises(UsageError) as caught:
        Example.parse({"ration": "1"})
    assert "'ratio'" in caught.value.remedy


def test_a_plain_function_is_a_pass_of_all_graph_bodies() -> None:
    @rewrite(name="swap", effect="lossy")
    def swap(graph: Graph) -> None:
        """Turn Neg into Abs."""
        for node in list(graph.nodes):
            if node.op == "Neg":
                node.op = "Abs"

    made: Any = swap
    assert made.help() == "Turn Neg into Abs."
    assert made().effect is Effect.LOSSY
    target = model(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <
                then_branch = t () => (float[2] p) { p = Neg(x) },
                else_branch = e () => (float[2] q) { q = Neg(x) }
            >
        }"""
    )
    apply(made(), target)
    assert [operators(body) for body in target.bodies()] == [["If"], ["Abs"], ["Abs"]]


def bypass(graph: Graph) -> None:
    node = graph.nodes.pop(0)
    graph.nodes[0].inputs[0] = node.inputs[0]
    node.inputs.clear()
    node.outputs.clear()


def put_between(graph: Graph) -> None:
    between = Variable("i_between")
    graph.nodes.insert(1, Node("Identity", "", inputs=[graph.nodes[0].outputs[0]], outputs=[between]))
    graph.nodes[2].inputs[0] = between


def swap_inputs(graph: Graph) -> None:
    node = graph.nodes[2]
    first, second = node.inputs
    node.inputs[0], node.inputs[1] = second, first


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda g: setattr(g.nodes[0], "op", "Abs"), [("changed", "Neg n", "now Abs n")]),
        (lambda g: g.nodes[1].attrs.update(alpha=0.5), [("changed", "LeakyRelu l", "")]),
        (lambda g: g.nodes[1].inputs.__setitem__(0, g.inputs[0]), [("changed", "LeakyRelu l", "")]),
        (lambda g: g.nodes[1].attrs.update(alpha=0.25), []),
        (lambda g: setattr(g.initializers[0], "values", np.ones(2, np.float32)), [("replaced values", "w", "")]),
        (lambda g: g.outputs.__setitem__(0, g.nodes[0].outputs[0]), [("changed", "inputs or outputs of graph g", "")]),
        (bypass, [("removed", "Neg n", "")]),
        (put_between, [("added", "Identity", "")]),
        (swap_inputs, [("changed", "Sub s", "")]),
    ],
)
def test_a_plain_function_reports_what_it_changed(edit: Any, expected: list[tuple[str, str, str]]) -> None:
    @rewrite(name="edit", effect="lossy")
    def made(graph: Graph) -> None:
        """Edit."""
        edit(graph)

    target = model(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {"
        "[n] a = Neg(x) [l] b = LeakyRelu <alpha = 0.25> (a) [s] y = Sub(b, w) }"
    )
    the_pass: Any = made
    found = apply(the_pass(), target).changes
    assert [(change.kind, change.where.rsplit(" i_")[0], change.detail) for change in found] == expected


def test_passes_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    assert {"dedup", "fold_constants", "fuse_bn", "fuse_pad", "convert_opset"} <= set(names())
    assert lookup("dedup").name == "dedup"
    with pytest.raises(UsageError) as caught:
        lookup("dedupe")
    assert "'dedup'" in caught.value.remedy
    file = tmp_path / "mine.py"
    file.write_text(
        "from onnxopt.passbase import Pass\nclass Mine(Pass):\n    'Mine.'\n    name = 'mine'\nnothing = 3\n"
    )
    assert lookup(f"{file}:Mine").name == "mine"
    for wrong in (f"{file}:Other", f"{file}:nothing", f"{tmp_path}/gone.py:Mine"):
        with pytest.raises(UsageError):
            lookup(wrong)
    file.write_text("raise KeyError('x')")
    with pytest.raises(UsageError, match="KeyError"):
        lookup(f"{file}:Mine")


def test_a_context_without_a_runtime_says_so() -> None:
    with pytest.raises(PassError, match="runtime"):
        Context().evaluate(model("g (float[2] x) => (float[2] y) { y = Neg(x) }").to_proto(), {})
