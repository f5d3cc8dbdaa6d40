from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxopt.errors import FeedError, UsageError
from onnxopt.runtime import Session
from onnxopt.verification import RecordedOutputs, default_names, evaluate, measure
from tests.runtime.builders import build_bytes
from tests.verification.builders import record

RNG = np.random.default_rng(0)
LABELS = [[int(label)] for label in RNG.integers(0, 8, 20)]
LOGITS = [(3 * np.eye(8)[label] + RNG.standard_normal((1, 8))).astype(np.float32) for label in LABELS]
REFERENCE = record(LOGITS, LABELS)


def values(name: str, reference: RecordedOutputs, candidate: RecordedOutputs) -> tuple[float, float]:
    change = evaluate([name], reference, candidate)[name]
    return change.reference, change.candidate


def softmax(logits: Any) -> Any:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return (exponents / exponents.sum(-1, keepdims=True)).astype(np.float32)


def test_top1_and_its_drop() -> None:
    candidate = record([-y for y in LOGITS], LABELS)
    change = evaluate(["top1"], REFERENCE, candidate)["top1"]
    expected = np.mean([y.argmax() == label[0] for y, label in zip(LOGITS, LABELS, strict=True)])
    assert change.reference == expected
    assert change.drop == pytest.approx(expected - change.candidate)
    assert change.drop > 0.5
    assert change.share


def test_drop_is_positive_when_worse_for_lower_is_better_too() -> None:
    change = evaluate(["nll"], REFERENCE, record([-y for y in LOGITS], LABELS))["nll"]
    assert (change.higher_is_better, change.drop > 1) == (False, True)
    assert change.drop == change.candidate - change.reference


def test_nll_reads_the_candidate_as_it_reads_the_reference() -> None:
    reference = record([softmax(y) for y in LOGITS], LABELS)
    # A quantised softmax misses a sum of 1 by far; it is still one.
    candidate = record([softmax(y) * np.float32(0.9) for y in LOGITS], LABELS)
    ours, theirs = values("nll", reference, candidate)
    assert theirs == pytest.approx(ours - math.log(0.9), rel=1e-5)
    assert ours == pytest.approx(values("nll", REFERENCE, REFERENCE)[0], rel=1e-5)


def test_batches_and_ragged_batches_are_joined() -> None:
    batches = [np.concatenate(LOGITS[:13]), np.concatenate(LOGITS[13:])]
    labels = [np.concatenate(LABELS[:13]), np.concatenate(LABELS[13:])]
    assert values("top1", record(batches, labels), record(batches, labels)) == values("top1", REFERENCE, REFERENCE)


def test_labels_of_sequences_fit_outputs_of_rank_three() -> None:
    outputs = [np.stack([y, y], 1) for y in LOGITS]
    labels = [[[label[0], label[0]]] for label in LABELS]
    assert values("top1", record(outputs, labels), record(outputs, labels)) == values("top1", REFERENCE, REFERENCE)


def test_labels_with_an_axis_of_one_fit() -> None:
    column = record(LOGITS, [[label] for label in LABELS])
    assert values("top1", column, column) == values("top1", REFERENCE, REFERENCE)


def test_mse_mae_and_auc() -> None:
    outputs = [np.array([[0.2]], np.float32), np.array([[0.9]], np.float32)]
    recorded = record(outputs, [[0.0], [1.0]])
    assert values("mse", recorded, recorded)[0] == pytest.approx((0.04 + 0.01) / 2)
    assert values("mae", recorded, recorded)[0] == pytest.approx(0.15)
    binary = record(outputs, [[0], [1]])
    assert values("auc", binary, record(outputs[::-1], [[0], [1]])) == (1, 0)
    pairs = [np.array([[0.7, 0.3]], np.float32), np.array([[0.2, 0.8]], np.float32)]
    assert values("auc", record(pairs, [[0], [1]]), record(pairs, [[0], [1]]))[0] == 1


def test_agreement_needs_no_labels() -> None:
    plain = record(LOGITS)
    turned = record([*LOGITS[:15], *[-y for y in LOGITS[15:]]])
    assert values("agreement", plain, turned) == (1.0, 0.75)
    numbers = record([np.array([1, 2, 3, 4])])
    assert values("agreement", numbers, record([np.array([1, 2, 3, 5])])) == (1.0, 0.75)


def test_the_output_is_chosen_by_fit_or_by_name() -> None:
    model = build_bytes(
        "f (float[N,C] x) => (float[N] a, float[N,C] b, float[N,C] c) "
        "{ k = Constant<value_ints=[1]>()\n a = ReduceSum<keepdims=0>(x, k)\n b = Identity(x)\n c = Neg(x) }"
    )
    outputs = RecordedOutputs(Session(model), REFERENCE.feeds)
    assert values("top1", outputs, outputs) == values("top1", REFERENCE, REFERENCE)
    assert values("top1@c", outputs, outputs)[0] < 0.2
    with pytest.raises(FeedError, match="fit no output"):
        evaluate(["top1@a"], outputs, outputs)
    with pytest.raises(UsageError, match="no output 'd'"):
        evaluate(["top1@d"], outputs, outputs)


def test_a_candidate_that_can_not_be_measured_gets_nan() -> None:
    assert math.isnan(values("top1", REFERENCE, record([y[:, :4] for y in LOGITS], LABELS))[1])
    nan = record([np.full_like(y, np.nan) for y in LOGITS], LABELS)
    assert values("top1", REFERENCE, nan)[1] == 0
    assert math.isnan(values("nll", REFERENCE, nan)[1])


def test_top1_is_the_default_with_class_labels_only() -> None:
    assert default_names(REFERENCE) == ["top1"]
    assert default_names(record(LOGITS)) == []
    assert default_names(record(LOGITS, [[0.5]] * 20)) == []
    assert default_names(record([y[0, :1] for y in LOGITS], LABELS)) == []


@pytest.mark.parametrize(
    ("name", "recorded", "cause"),
    [
        ("top1", record(LOGITS), r"feed\[0\]: no labels"),
        ("top1", record(LOGITS, [[0.5]] * 20), "not class numbers"),
        ("top1", record(LOGITS, [[8]] * 20), r"labels lie in 8\.\.8.*classes 0\.\.7"),
        ("top1", record(LOGITS, [[-1]] * 20), r"labels lie in -1"),
        ("top1", record(LOGITS, [[1, 2]] * 20), "fit no output"),
        ("top5", record([y[:, :5] for y in LOGITS], [[0]] * 20), "top5 says nothing about the 5 classes"),
        ("auc", record([y[:, :1] for y in LOGITS], [[1]] * 20), "both classes"),
        ("mse", record(LOGITS, LABELS), "fit no output"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: str, recorded: RecordedOutputs, cause: str) -> None:
    with pytest.raises(FeedError, match=cause):
        evaluate([name], recorded, recorded)


def test_unknown_names_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown metric 'top2'") as caught:
        evaluate(["top2"], REFERENCE, REFERENCE)
    assert "top1" in caught.value.remedy or "top5" in caught.value.remedy
    with pytest.raises(UsageError, match="does not exist"):
        evaluate([f"{tmp_path}/absent.py:f"], REFERENCE, REFERENCE)


SCRIPT = """
def right(outputs, labels):
    return sum(int(o["y"].argmax() == l[0]) for o, l in zip(outputs, labels))

def errors(outputs, labels):
    return {"wrong": len(labels) - right(outputs, labels), "right": right(outputs, labels) / len(labels)}
errors.higher_is_better = {"wrong": False}

def text(outputs, labels):
    return "good"

def failing(outputs, labels):
    return 1 / 0
"""


def test_functions_of_the_user(tmp_path: Path) -> None:
    script = tmp_path / "metric.py"
    script.write_text(SCRIPT)
    candidate = record([-y for y in LOGITS], LABELS)
    right = evaluate([f"{script}:right"], REFERENCE, candidate)["right"]
    assert (right.reference, right.higher_is_better, right.share) == (
        20 * values("top1", REFERENCE, REFERENCE)[0],
        True,
        False,
    )
    both = evaluate([f"{script}:errors"], REFERENCE, candidate)
    assert both["wrong"].drop == right.drop > 0
    assert not both["wrong"].higher_is_better
    assert both["right"].share
    for name, cause in (
        ("text", "returned 'good'"),
        ("failing", "it failed: ZeroDivisionError"),
        ("absent", "no function"),
    ):
        with pytest.raises(UsageError, match=cause):
            evaluate([f"{script}:{name}"], REFERENCE, candidate)


def test_one_model_alone_is_measured() -> None:
    metric = measure(["nll"], REFERENCE)["nll"]
    assert (metric.name, metric.higher_is_better) == ("nll", False)
    assert metric.value == values("nll", REFERENCE, REFERENCE)[0]
