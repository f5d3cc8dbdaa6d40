from __future__ import annotations

from pathlib import Path

import pytest

from onnxopt.errors import UsageError
from onnxopt.report import Report, check_paths, write
from tests.report.examples import full_report


def test_the_suffix_tells_the_format(tmp_path: Path) -> None:
    report = full_report()
    write(report, tmp_path / "run.json")
    write(report, tmp_path / "run.txt")
    assert Report.from_json((tmp_path / "run.json").read_text()) == report
    assert (tmp_path / "run.txt").read_text() == report.to_text()


@pytest.mark.parametrize("name", ["run.pdf", "run", "run.json.bak"])
def test_an_unknown_suffix_names_those_that_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_paths([tmp_path / name])
    assert caught.value.remedy == "end its name in one of: .json, .txt"


def test_a_missing_folder_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        check_paths([tmp_path / "gone" / "run.json"])


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match="folder"):
        check_paths([tmp_path / "folder.txt"])
    with pytest.raises(UsageError, match="can't write"):
        write(full_report(), tmp_path / "folder.txt")
