from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnxopt
from onnxopt.errors import ModelError
from onnxopt.inspection.compare import compare_models
from onnxopt.inspection.difference import Difference
from onnxopt.model import load
from onnxopt.report import difference_view
from tests.helpers import proto, with_weights
from tests.inspection.models import everything, normal, wasteful


def diff(one: ModelProto, other: ModelProto) -> Difference:
    return compare_models(load(one), load(other))


def renamed(source: ModelProto, prefix: str = "new_") -> ModelProto:
    """Every inner tensor, weight and node under another name, in all bodies; inputs and outputs keep theirs."""
    result = ModelProto()
    result.CopyFrom(source)
    kept = {info.name for info in (*source.graph.input, *source.graph.output)} | {""}

    def name(old: str, scope: set[str]) -> str:
        return old if old in scope else prefix + old

    def visit(graph: onnx.GraphProto, scope: set[str]) -> None:
        for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
            tensor.name = name(tensor.name, scope)
        for info in (*graph.input, *graph.output, *graph.value_info):
            info.name = name(info.name, scope)
        for node in graph.node:
            node.name = f"{prefix}{node.name}"
            node.input[:] = [name(each, scope) for each in node.input]
            node.output[:] = [name(each, scope) for each in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g, scope)

    visit(result.graph, kept)
    return result


@pytest.mark.parametrize("make", [wasteful, everything])
def test_a_model_equals_itself_and_itself_renamed(make: Callable[[], ModelProto]) -> None:
    source = make()
    same = diff(source, source)
    assert same.equal
    assert (same.renamed, same.equal_nodes) == (0, same.totals[0].nodes)
    assert same.equal_weights == same.totals[0].weights
    other = diff(source, renamed(source))
    assert other.equal, other.to_text()
    assert other.equal_nodes == same.equal_nodes
    assert other.renamed >= other.equal_nodes
    assert "under other names" in other.to_text()


def test_the_order_of_nodes_is_no_difference() -> None:
    text = "agraph (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(x) y = Add(a, b) }"
    source = proto(text)
    other = copy.deepcopy(source)
    first, second = other.graph.node[0], other.graph.node[1]
    del other.graph.node[:2]
    other.graph.node.insert(0, second)
    other.graph.node.insert(1, first)
    assert diff(source, other).equal


CHAIN = """agraph (float[1,4] x) => (float[1,4] y) {
    [one] a = MatMul(x, w)
    [two] b = Relu(a)
    [three] c = MatMul(b, v)
    [four] y = Tanh(c)
}"""


def chain(text: str = CHAIN, seed: int = 0, opset: int = 17) -> ModelProto:
    return with_weights(proto(text, opset), w=normal(4, 4, seed=seed), v=normal(4, 4, seed=seed + 1))


def test_a_node_put_in_between() -> None:
    other = chain(CHAIN.replace("[two] b = Relu(a)", "[more] m = Neg(a) [two] b = Relu(m)"))
    for found in (diff(chain(), other), diff(chain(), renamed(other))):
        assert [(node.operator, node.inputs) for node in found.added] == [("Neg", found.added[0].inputs)]
        assert not found.removed
        [edit] = found.changed
        assert edit.operator == "Relu"
        assert edit.inputs[0].before == "a (from MatMul)"
        assert edit.inputs[0].after.endswith("m (from Neg)")
        assert found.equal_weights == 2
        assert found.by_operator == {"Neg": (1, 0, 0), "Relu": (0, 0, 1)}
    back = diff(other, chain())
    assert [node.name for node in back.removed] == ["more"]


def test_an_attribute_an_input_and_an_output_that_change() -> None:
    one = proto("agraph (float[4] x, float[4] z) => (float[2] y) { y, d = TopK<axis=0>(x, k) }")
    one.graph.initializer.append(numpy_helper.from_array(np.array([2]), "k"))
    other = copy.deepcopy(one)
    other.graph.node[0].attribute.append(helper.make_attribute("sorted", 0))
    other.graph.node[0].input[0] = "z"
    other.graph.node[0].output[1] = ""
    [edit] = diff(one, other).changed
    assert [(each.name, each.before, each.after) for each in edit.attributes] == [("sorted", "", "0")]
    assert [(each.name, each.before, each.after) for each in edit.inputs] == [("input 0", "x", "z")]
    assert [(each.name, each.before, each.after) for each in edit.outputs] == [("output 1", "d", "")]


def test_a_default_that_is_spelled_out_is_no_difference() -> None:
    text = "agraph (float[2,3] x) => (float[2,3] y) {{ y = Softmax{}(x) }}"
    assert diff(proto(text.format("")), proto(text.format("<axis = -1>"))).equal
    assert not diff(proto(text.format("")), proto(text.format("<axis = 1>"))).equal
    # before opset 13 the default was 1
    assert diff(proto(text.format(""), opset=12), proto(text.format("<axis = 1>"), opset=12)).equal


def test_another_operator_is_never_the_same_node() -> None:
    found = diff(chain(), chain(CHAIN.replace("Tanh", "Sigmoid")))
    assert [node.operator for node in found.added] == ["Sigmoid"]
    assert [node.operator for node in found.removed] == ["Tanh"]
    assert [edit.what for edit in found.edits] == ["output"]


def test_weights_that_were_trained_on() -> None:
    other = chain(seed=7)
    for found in (diff(chain(), other), diff(chain(), renamed(other))):
        assert found.equal_nodes == 4
        assert not found.changed
        first = found.weights_changed[0]
        w, new = normal(4, 4, seed=0).astype(float), normal(4, 4, seed=7).astype(float)
        assert first.name == "w"
        assert first.differing == 1
        assert first.max_abs == pytest.approx(np.abs(new - w).max(), rel=1e-6)
        assert first.relative == pytest.approx(np.linalg.norm(new - w) / np.linalg.norm(w), rel=1e-6)


def test_figures_of_weights() -> None:
    text = "agraph (float[4] x) => (float[4] y) { y = Add(x, w) }"

    def figures(one: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None, float | None] | None:
        found = diff(with_weights(proto(text), w=one), with_weights(proto(text), w=other))
        assert found.equal == (not found.weights_changed)
        if found.equal:
            return None
        [edit] = found.weights_changed
        return edit.differing, edit.max_abs, edit.relative

    values = np.array([1, 0, np.nan, np.inf], np.float32)
    assert figures(values, values.copy()) is None
    assert figures(values, np.array([1, -0.0, np.nan, np.inf], np.float32)) == (0.25, 0.0, 0.0)
    assert figures(np.zeros(4, np.float32), np.full(4, 2, np.float32)) == (1.0, 2.0, np.inf)
    assert figures(np.array([2**62, 1]), np.array([2**62 + 1, 1])) == (0.5, 0.0, 0.0)
    assert figures(np.ones(4, np.float32), np.ones(3, np.float32)) == (None, None, None)
    assert figures(np.ones(4, np.float32), np.ones(4, np.float16)) == (0.0, 0.0, 0.0)
    nans = np.array([np.nan], np.float32)
    found = figures(nans, np.ones(1, np.float32))
    assert found is not None
    assert found[0] == 1.0


def test_weights_that_came_and_went_or_only_moved() -> None:
    one = with_weights(chain(), spare=normal(3), lost=normal(5, seed=4))
    other = with_weights(chain(), spare2=normal(3), found=normal(6, seed=5))
    found = diff(one, other)
    assert [weight.name for weight in found.weights_removed] == ["lost"]
    assert [weight.name for weight in found.weights_added] == ["found"]
    assert found.renamed == 1


def test_a_merged_duplicate_is_told_by_the_totals() -> None:
    source = wasteful()
    merged = onnxopt.optimize(source, "dedup", latency_seconds=0, verify=False).model
    found = compare_models(load(source), merged)
    assert found.totals[0].weights - found.totals[1].weights == 1
    assert (found.added, found.removed, found.changed) == ((), (), ())


def test_bodies_are_compared_within() -> None:
    other = everything()
    branch = other.graph.node[0].attribute[1].g
    branch.node[0].op_type = "Ceil"
    body = other.graph.node[1].attribute[0].g
    body.node[1].attribute.append(helper.make_attribute("note", 3))
    found = diff(everything(), other)
    assert [(node.operator, node.body) for node in found.added] == [("Ceil", "else_branch of a")]
    assert [(node.operator, node.body) for node in found.removed] == [("Abs", "else_branch of a")]
    assert ("MatMul", "body of b") in [(edit.operator, edit.body) for edit in found.changed]
    assert "If" not in found.by_operator


def test_functions_sparse_weights_strings_and_defaults() -> None:
    other = everything()
    other.functions[0].node[0].op_type = "Mul"
    other.graph.initializer[1].string_data[0] = b"z"
    other.graph.sparse_initializer[0].values.raw_data = np.array([1, 3], np.float32).tobytes()
    other.graph.initializer[0].raw_data = np.zeros(4, np.float32).tobytes()
    other.functions.add(name="extra", domain="my", output=["o"]).node.add(op_type="Relu", input=["i"], output=["o"])
    found = diff(everything(), other)
    assert ("Mul", "function my.twice") in [(node.operator, node.body) for node in found.added]
    assert ("Relu", "function my.extra") in [(node.operator, node.body) for node in found.added]
    assert [edit.name for edit in found.weights_changed] == ["sparse", "words"]
    assert found.weights_changed[1].max_abs is None
    assert found.weights_changed[0].dtype == "float32, sparse"
    assert [(edit.kind, edit.what, edit.name) for edit in found.edits if edit.what != "output"] == [
        ("changed", "default value of input", "d"),
        ("changed", "output of function my.twice", "r"),
        ("added", "function", "my.extra"),
    ]


def test_signature_operator_sets_and_metadata() -> None:
    other = chain(opset=18)
    other.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    other.graph.output[0].name = "z"
    other.graph.node[-1].output[0] = "z"
    other.metadata_props.add(key="author", value="me")
    other.opset_import.add(domain="my", version=2)
    other.producer_name = "else"
    found = diff(chain(), other)
    assert {(edit.kind, edit.what, edit.name, edit.before, edit.after) for edit in found.edits} == {
        ("changed", "input", "x", "float32[1,4]", "float32[N,4]"),
        ("removed", "output", "y", "float32[1,4]", ""),
        ("added", "output", "z", "", "float32[1,4]"),
        ("changed", "operator set", "ai.onnx", "17", "18"),
        ("added", "operator set", "my", "", "2"),
        ("added", "metadata", "author", "", "me"),
        ("changed", "model", "producer", "", "else"),
    }
    assert found.equal_nodes == 4


def test_inputs_in_another_order_and_a_renamed_input() -> None:
    one = proto("agraph (float[2] a, float[2] b) => (float[2] y) { y = Sub(a, b) }")
    other = proto("agraph (float[2] b, float[2] a) => (float[2] y) { y = Sub(a, b) }")
    [edit] = diff(one, other).edits
    assert (edit.what, edit.before, edit.after) == ("order of inputs", "a, b", "b, a")
    swapped = proto("agraph (float[2] a, float[2] b) => (float[2] y) { y = Sub(b, a) }")
    assert len(diff(one, swapped).changed[0].inputs) == 2
    called = proto("agraph (float[2] left, float[2] b) => (float[2] y) { y = Sub(left, b) }")
    found = diff(one, called)
    assert found.equal_nodes == 1
    assert {(edit.kind, edit.name) for edit in found.edits} == {("removed", "a"), ("added", "left")}


def test_ir_3_weights_among_inputs() -> None:
    old = chain(opset=8)
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    new = chain(opset=8)
    assert {edit.name for edit in diff(old, new).edits} == {"IR version"}


def test_many_alike_nodes_and_a_cycle() -> None:
    relus = " ".join(f"r{at} = Relu(x)" for at in range(50))
    summed = f"y = Sum({', '.join(f'r{at}' for at in range(50))})"
    source = proto(f"agraph (float[2] x) => (float[2] y) {{ {relus} {summed} }}")
    assert diff(source, renamed(source)).equal
    cyclic = proto("agraph (float[2] x) => (float[2] y) { a = Add(x, y) y = Relu(a) }")
    with pytest.raises(ModelError, match="cycle"):
        diff(source, cyclic)


def test_it_is_linear() -> None:
    def long(count: int, prefix: str, without: int) -> ModelProto:
        nodes, last = [], "x"
        for at in range(count):
            if at != without:
                nodes.append(helper.make_node(("Relu", "Neg", "Tanh")[at % 3], [last], [f"{prefix}{at}"]))
                last = nodes[-1].output[0]
        nodes += [helper.make_node("Abs", ["x"], [f"{prefix}side{at}"]) for at in range(count)]
        nodes.append(helper.make_node("Identity", [last], ["y"]))
        ends = [helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def seconds(count: int) -> float:
        models = load(long(count, "a", -1)), load(long(count, "b", count // 2))
        started = time.process_time()
        found = compare_models(*models)
        assert (len(found.removed), len(found.changed), len(found.added)) == (1, 1, 0)
        return time.process_time() - started

    small, large = seconds(1000), seconds(8000)
    assert large < 40 * max(small, 0.02)


def test_json_text_and_page() -> None:
    found = diff(
        chain(), renamed(chain(CHAIN.replace("[two] b = Relu(a)", "[more] m = Neg(a) [two] b = Relu(m)"), seed=3))
    )
    data = json.loads(found.to_json())
    assert data["schema_version"] == "1"
    assert data["equal"] is False
    assert data["by_operator"]["Neg"] == {"added": 1, "removed": 0, "changed": 0}
    assert len(data["weights_changed"]) == 2
    long = renamed(chain(CHAIN.replace("Relu(a)", "Neg(a)")), prefix="a/rather/long/path/of/" * 3)
    for each in (found, diff(chain(), long), diff(long, chain(seed=3)), diff(everything(), wasteful())):
        for detail in (0, 1):
            assert max(map(len, difference_view.plain(each, detail).splitlines())) <= 80
    infinite = diff(
        with_weights(proto("agraph (float[1] x) => (float[1] y) { y = Add(x, w) }"), w=np.zeros(1, np.float32)),
        with_weights(proto("agraph (float[1] x) => (float[1] y) { y = Add(x, w) }"), w=np.ones(1, np.float32)),
    )
    assert json.loads(infinite.to_json())["weights_changed"][0]["relative"] == "inf"
    check_page(found.to_html())
    check_page(diff(chain(), chain()).to_html())
    check_page(diff(everything(), wasteful()).to_html())


VOID = {"meta", "br"}


def check_page(text: str) -> None:
    """Every element is closed in order; nothing is fetched and nothing runs."""
    stack: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "link", "iframe")
            assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
            if tag not in VOID:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Parser().feed(text)
    assert not stack
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped_in_the_page() -> None:
    bad = "<script>alert(1)</script>&\"'"
    one = proto("agraph (float[2] x) => (float[2] y) { y = Relu(x) }")
    other = copy.deepcopy(one)
    other.graph.node[0].name = bad
    other.graph.node[0].op_type = bad
    other.metadata_props.add(key=bad, value=bad)
    page = diff(one, other).to_html()
    check_page(page)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_long_lists_are_cut_in_the_page_only() -> None:
    nodes = " ".join(f"r{at} = Relu(x)" for at in range(2100))
    found = diff(
        proto("agraph (float[2] x) => (float[2] y) { y = Neg(x) }"),
        proto(f"agraph (float[2] x) => (float[2] y) {{ {nodes} y = Neg(x) }}"),
    )
    assert "and 100 more; --format json lists all" in found.to_html()
    assert len(json.loads(found.to_json())["added"]) == 2100
