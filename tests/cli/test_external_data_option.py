"""--external-data from the command line to the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxopt import api, load
from onnxopt.cli.run import run
from onnxopt.errors import UsageError
from onnxopt.report import Report
from tests.pipeline.builders import BREAKING, write_example

GOOD = f"{BREAKING}:DropIdentity"
WORDS = [
    "net.onnx",
    "--passes",
    GOOD,
    "--data",
    "data.npz",
    "-o",
    "out.onnx",
    "--force",
    "--latency-seconds",
    "0",
    "-q",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("out.*on*"))


def test_where_values_go(folder: Path) -> None:
    assert run([*WORDS, "--external-data", "always", "--report", "report.json"]) == 0
    files = outputs(folder)
    assert [file.suffix for file in files] == [".onnxdata", ".onnx"]
    report = Report.from_json((folder / "report.json").read_text())
    assert report.candidate is not None
    assert report.candidate.file_bytes == sum(file.stat().st_size for file in files)
    beside = load(folder / "out.onnx").to_proto()
    for words in (["--external-data", "never"], []):
        assert run([*WORDS, *words]) == 0
        assert outputs(folder) == [folder / "out.onnx"]
        assert load(folder / "out.onnx").to_proto() == beside


def test_too_large_for_one_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxopt.model.files.INLINE_LIMIT", 100)
    assert run([*WORDS, "--external-data", "never"]) == 6
    told = capsys.readouterr().err
    assert "GB of values" in told
    assert "--external-data auto" in told
    assert outputs(folder) == []
    assert run([*WORDS, "--external-data", "auto"]) == 0
    assert len(outputs(folder)) == 2


def test_what_is_no_choice(folder: Path) -> None:
    assert run([*WORDS, "--external-data", "sometimes"]) == 2
    with pytest.raises(UsageError, match="sometimes"):
        api.optimize("net.onnx", GOOD, external_data="sometimes")
