"""Warnings about orders of passes that waste what one of them does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxopt
from onnxopt.passbase import Change
from onnxopt.passbase.lookup import names
from onnxopt.pipeline.order import WASTES, wasteful
from onnxopt.report import PassRecord, Status
from tests.helpers import proto, with_weights


def record(
    name: str, status: Status = Status.CHANGED, inserted_for: str | None = None, kind: str = "merged"
) -> PassRecord:
    return PassRecord(
        name=name,
        text=name,
        effect="exact",
        status=status,
        inserted_for=inserted_for,
        changes=(Change(kind, "w"),),
        skipped=(),
        notes=(),
        nodes_before=1,
        nodes_after=1,
        parameters_before=1,
        parameters_after=1,
        seconds=0.0,
        verify_seconds=0.0,
        comparison=None,
    )


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("dedup", "prune"),
        ("dedup", "prune_weights"),
        ("dedup", "lowrank"),
        ("share", "prune_weights"),
        ("int4", "fuse_bn"),
        ("int8", "prune"),
        ("int4", "prune"),
    ],
)
def test_a_wasteful_order_is_told_with_a_remedy(early: str, late: str) -> None:
    [told] = wasteful([record(early), record("fuse_pad", Status.UNCHANGED, "x"), record(late)])
    assert told.startswith(f"{early} before {late}: ")
    assert "; put " in told
    assert wasteful([record(late), record(early)]) == []


def test_only_passes_that_did_something_waste() -> None:
    for status in (Status.UNCHANGED, Status.FAILED, Status.UNDONE):
        assert wasteful([record("dedup", status), record("prune")]) == []
    assert wasteful([record("dedup"), record("prune", Status.FAILED)]) == []
    assert len(wasteful([record("dedup"), record("prune", Status.UNCHANGED)])) == 1


def test_inserted_passes_count_where_they_changed_something() -> None:
    assert wasteful([record("int4"), record("fuse_bn", Status.UNCHANGED, "prune")]) == []
    assert len(wasteful([record("int4"), record("fuse_bn", Status.CHANGED, "prune")])) == 1


def test_only_what_is_computed_from_another_weight_keeps_a_quantizing_pass_from_it() -> None:
    assert wasteful([record("dedup"), record("int8")]) == []
    [told] = wasteful([record("dedup", kind="transposed"), record("int8")])
    assert "or left alone; put dedup last" in told


def test_each_pair_is_told_once() -> None:
    assert len(wasteful([record("dedup"), record("dedup"), record("prune"), record("prune")])) == 1


def test_no_pass_stands_on_both_sides() -> None:
    for waste in WASTES:
        assert not set(waste.early) & set(waste.late)
    known = set(names()) | {"share", "sparsify", "lowrank"}
    assert {name for waste in WASTES for name in (*waste.early, *waste.late)} <= known


def test_the_report_warns(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    source = proto("g (float[2,16] x) => (float[2,16] y) { t = MatMul(x, a) r = Relu(t) y = MatMul(r, b) }")
    onnx.save(with_weights(source, a=weight, b=weight), tmp_path / "m.onnx")
    report = onnxopt.optimize(tmp_path / "m.onnx", "dedup,prune", latency_seconds=0).report
    assert any(told.startswith("dedup before prune: ") for told in report.warnings)
    report = onnxopt.optimize(tmp_path / "m.onnx", "prune,dedup", latency_seconds=0).report
    assert not any("dedup before prune" in told for told in report.warnings)
