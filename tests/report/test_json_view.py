from __future__ import annotations

import dataclasses
import json
import math

import pytest

from onnxopt.errors import UsageError
from onnxopt.report import Report
from tests.report.examples import check_report, full_report


@pytest.mark.parametrize("report", [full_report(), check_report()], ids=["optimize", "check"])
def test_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_it_is_strict_json_even_with_infinities() -> None:
    report = full_report()
    assert report.comparison is not None
    assert report.comparison.outputs[1].sqnr_db == math.inf

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(report.to_json(), parse_constant=refuse)
    assert data["schema_version"] == "1"
    assert data["verdict"] == "passed"
    assert data["comparison"]["outputs"][1]["sqnr_db"] == "inf"
    assert data["passes"][1]["changes"][0]["kind"] == "removed"


def test_a_later_field_is_skipped() -> None:
    data = json.loads(full_report().to_json())
    data["moon_phase"] = "full"
    data["passes"][0]["colour"] = "blue"
    assert Report.from_json(json.dumps(data)) == full_report()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("not json", "no onnxopt report"),
        ("[]", "no onnxopt report"),
        ('{"schema_version": "99"}', "schema version '99'"),
        ('{"schema_version": "1"}', "damaged"),
    ],
)
def test_what_is_refused(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        Report.from_json(text)


def test_a_wrongly_typed_field_is_refused() -> None:
    data = json.loads(full_report().to_json())
    data["seed"] = "seven"
    with pytest.raises(UsageError, match="damaged"):
        Report.from_json(json.dumps(data))


def test_every_field_of_the_report_is_written() -> None:
    data = json.loads(full_report().to_json())
    assert set(data) == {item.name for item in dataclasses.fields(Report)}
