"""Which nodes `only` and `exclude` leave to a pass."""

from __future__ import annotations

import pytest

from onnxopt.errors import UsageError
from onnxopt.graph.selection import Selection
from onnxopt.model import Model, Node
from tests.passes.quantizing import nodes, parse


@pytest.fixture
def model() -> Model:
    """Two Relus; the second is called `tail[0]`, the first only by the tensor it makes."""
    found = parse("g (float[2] x) => (float[2] y) { a = Relu(x) y = Relu(a) }")
    nodes(found, "Relu")[1].name = "tail[0]"
    return found


def left(model: Model, selection: Selection) -> list[str | None]:
    return [selection.refuses(node) for node in nodes(model, "Relu")]


def test_without_names_every_node_is_taken(model: Model) -> None:
    assert left(model, Selection()) == [None, None]


@pytest.mark.parametrize("pattern", ["tail[0]", "tail*", "t?il*", "*[[]0]"])
def test_a_node_is_called_by_name_or_pattern(model: Model, pattern: str) -> None:
    assert left(model, Selection(only=(pattern,))) == [f"not among only={pattern}", None]
    assert left(model, Selection(exclude=(pattern,))) == [None, f"excluded by {pattern!r}"]


def test_a_node_without_a_name_is_called_by_what_it_makes(model: Model) -> None:
    first: Node = nodes(model, "Relu")[0]
    first.name = ""
    assert left(model, Selection(only=("a",))) == [None, "not among only=a"]


def test_exclude_wins(model: Model) -> None:
    selection = Selection(only=("*",), exclude=("tail*",))
    assert left(model, selection) == [None, "excluded by 'tail*'"]
    assert [selection.excludes(node) for node in nodes(model, "Relu")] == [False, True]


def test_a_name_that_no_node_has_is_an_error_with_advice(model: Model) -> None:
    Selection(only=("tail*",)).check(model, "prune")
    with pytest.raises(UsageError, match="pass 'prune': no node is called 'tial") as caught:
        Selection(exclude=("tial[0]",)).check(model, "prune")
    assert "tail[0]" in caught.value.remedy
