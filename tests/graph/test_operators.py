"""The operator table: an allow-list of what onnx knows, and the modes in which pure operators are not pure."""

from __future__ import annotations

import pytest
from onnx import defs

from onnxopt.graph import operators
from onnxopt.graph.extract import extract
from onnxopt.graph.values import ValueNumbers
from onnxopt.model import Variable
from tests.helpers import evaluate, model

KNOWN = {schema.name: schema for schema in defs.get_all_schemas() if schema.domain == ""}
FORMER = {"Scatter", "Upsample"}


def test_every_row_is_an_operator_and_none_is_known_to_be_random() -> None:
    for (domain, op), row in operators._TABLE.items():
        assert domain == ""
        assert op in KNOWN or op in FORMER, op
        assert row.pure
        if op in KNOWN and op != "Dropout":  # which is random in training only, see below
            assert "NonDeterministic" not in str(KNOWN[op].node_determinism), op


@pytest.mark.parametrize(
    "op", ["RandomNormal", "RandomUniformLike", "Bernoulli", "Multinomial", "If", "Loop", "Scan", "SequenceMap", "Mine"]
)
def test_what_is_random_unknown_or_holds_bodies_is_not_pure(op: str) -> None:
    node = model(f"g (float[2] x) => (float[2] y) {{ y = {op}(x) }}").graph.nodes[0]
    assert operators.info(node) is None
    assert not operators.is_pure(node)
    assert not operators.is_foldable(node)


def test_another_domains_operator_of_the_same_name_is_unknown() -> None:
    node = model("g (float[2] x) => (float[2] y) { y = custom.Relu(x) }", imports='"custom" : 1').graph.nodes[0]
    assert not operators.is_pure(node)
    node.domain = "ai.onnx"
    assert operators.is_pure(node)


def test_quantization_is_pure_but_not_folded() -> None:
    node = model("g (float[2] x, float s) => (int8[2] y) { y = QuantizeLinear(x, s) }").graph.nodes[0]
    assert operators.is_pure(node)
    assert not operators.is_foldable(node)


@pytest.mark.parametrize(
    ("line", "training"),
    [
        ("y = Dropout(x)", False),
        ("y = Dropout(x, h, no)", False),
        ("y = Dropout(x, h, yes)", True),
        ("y = Dropout(x, h, c)", True),
        ("y = Dropout<is_test = 0>(x)", True),
        ("y = BatchNormalization(x, x, x, x, x)", False),
        ("y = BatchNormalization<training_mode = 0>(x, x, x, x, x)", False),
        ("y, a, b = BatchNormalization<training_mode = 1>(x, x, x, x, x)", True),
        ("y, a, b = BatchNormalization(x, x, x, x, x)", True),
    ],
)
def test_training(line: str, training: bool) -> None:
    text = f"g (float[2] x, bool c) => (float[2] y) <float h = {{0.5}}, bool yes = {{1}}, bool no = {{0}}> {{ {line} }}"
    node = model(text).graph.nodes[0]
    assert operators.is_training(node) is training
    assert operators.is_pure(node) is not training


def test_equal_computations_get_equal_numbers() -> None:
    target = model(
        """g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 3}> {
            p = Softmax<axis = 0>(a)  q = Softmax<axis = 0>(b)  r = Softmax<axis = -1>(a)  s = Softmax<axis = 0>(c)
            y = Add(p, q) }"""
    )
    numbers = ValueNumbers()
    for node in target.graph.nodes[:4]:
        numbers.add(node, 17)
    p, q, r, s = (numbers.number(node.outputs[0]) for node in target.graph.nodes[:4])
    assert p == q
    assert len({p, r, s}) == 3
    assert numbers.number(Variable.empty()) == -1


def test_a_part_is_a_model_of_its_own() -> None:
    target = model("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { p = Neg(a) q = Add(p, a) y = Mul(x, q) }")
    part, inputs = extract(target.graph.nodes[:2], [target.graph.nodes[1].outputs[0]], 17, 8)
    assert inputs == {}
    assert evaluate(part, inputs)[0].tolist() == [0, 0]
    assert target.graph.nodes[0].inputs[0].name == "a"
