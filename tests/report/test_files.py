from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from onnxopt.errors import UsageError
from onnxopt.report import Report, check_paths, obstacle, write
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


def test_an_existing_file_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        check_paths([path])
    check_paths([path], force=True)
    check_paths([tmp_path / "new.json"])


def test_files_of_the_run_are_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "net.txt"
    model.touch()
    (tmp_path / "link.txt").symlink_to(model)
    os.link(model, tmp_path / "hard.txt")
    for name in ("net.txt", "link.txt", "hard.txt", "../" + tmp_path.name + "/net.txt"):
        with pytest.raises(UsageError, match="the run uses that file"):
            check_paths([tmp_path / name], force=True, taken=[model])
    with pytest.raises(UsageError, match="the run uses that file"):
        check_paths([tmp_path / "out.json"], taken=[tmp_path / "out.json"])
    with pytest.raises(UsageError, match="the run uses that file"):
        check_paths([tmp_path / "a.json", tmp_path / "a.json"])
    check_paths([tmp_path / "other.txt"], taken=[model])


def test_nothing_but_files_may_be_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loose.json").symlink_to(tmp_path / "gone")
    (tmp_path / "round.json").symlink_to(tmp_path / "round.json")
    (tmp_path / "file.json").touch()
    (tmp_path / "good.json").symlink_to(tmp_path / "file.json")
    found = {"pipe": "a named pipe", "loose": "a link that leads nowhere"}
    for name, what in found.items():
        assert obstacle(tmp_path / f"{name}.json") == what
        with pytest.raises(UsageError, match=what):
            check_paths([tmp_path / f"{name}.json"], force=True)
    assert "no place for a file" in (obstacle(tmp_path / "round.json") or "")
    for name in ("file.json", "good.json", "new.json"):
        assert obstacle(tmp_path / name) is None


def test_a_file_name_that_is_no_utf8_can_be_reported(tmp_path: Path) -> None:
    name = os.fsdecode(b"n\xffet.onnx")
    report = dataclasses.replace(full_report(), reason=name)
    write(report, tmp_path / "run.json")
    write(report, tmp_path / "run.txt")
    assert Report.from_json((tmp_path / "run.json").read_text("utf-8")).reason == name
    assert "n\\udcffet.onnx" in (tmp_path / "run.txt").read_text("utf-8")


def test_an_old_report_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.txt"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write(full_report(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.txt"]
