"""`inspect` and `diff` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxopt.cli.run import run


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(words) == code
    return capsys.readouterr().out


def test_inspect_tells_one_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "inspect", "net.onnx")
    assert text.startswith("net.onnx\n")
    assert "what passes could win, estimated, not proven" in text
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "net.onnx"]
    data = json.loads(said(capsys, "inspect", "net.onnx", "--format", "json"))
    assert data["models"][0]["operators"] == {"MatMul": 2, "Identity": 1, "Relu": 1}
    assert data["models"][0]["path"] == "net.onnx"


def test_inspect_puts_several_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "net.onnx", "--outputs", "r", "-o", "part.onnx", "--latency-seconds", "0")
    text = said(capsys, "inspect", "net.onnx", "part.onnx")
    assert text.splitlines()[0].split() == ["net.onnx", "part.onnx"]
    assert ["nodes", "4", "3"] in [line.split() for line in text.splitlines()]
    assert len(json.loads(said(capsys, "inspect", "net.onnx", "part.onnx", "--format", "json"))["models"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (["inspect"], 2, "no model is given"),
        (["inspect", "nett.onnx"], 2, "no such file: nett.onnx"),
        (["inspect", "data.npz"], 3, "data.npz"),
        (["inspect", "net.onnx", "--format", "xml"], 2, "'xml' is not one of"),
        (["inspect", "net.onnx", "--force"], 2, "no such option: --force"),
    ],
)
def test_errors_are_two_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, cause: str
) -> None:
    assert run(words) == code
    told = capsys.readouterr().err
    assert cause in told
    assert [line.partition(":")[0] for line in told.splitlines()] == ["error", "hint"]


def test_diff_exits_0_unless_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "net.onnx", "--outputs", "r", "-o", "part.onnx", "--latency-seconds", "0")
    text = said(capsys, "diff", "net.onnx", "part.onnx")
    assert text.startswith("net.onnx -> part.onnx\n")
    assert "- MatMul second" in text
    assert said(capsys, "diff", "net.onnx", "part.onnx", "--exit-code", code=1) == text
    assert "equal: 4 nodes and 2 weights" in said(capsys, "diff", "net.onnx", "net.onnx", "--exit-code")
    data = json.loads(said(capsys, "diff", "net.onnx", "part.onnx", "--format", "json"))
    assert [node["name"] for node in data["removed"]] == ["second"]


def test_diff_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "diff", "net.onnx", "net.onnx", "--html", "same.html")
    page = (folder / "same.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    for words, cause in (
        (["--html", "same.html"], "same.html exists already"),
        (["--html", "same.txt"], "can't be written as .txt"),
        (["--html", "no/same.html"], "the folder no does not exist"),
    ):
        assert run(["diff", "net.onnx", "net.onnx", *words]) == 2
        assert cause in capsys.readouterr().err
    said(capsys, "diff", "net.onnx", "net.onnx", "--html", "same.html", "--force")
    (folder / "net.html").write_bytes((folder / "net.onnx").read_bytes())
    assert run(["diff", "net.onnx", "net.html", "--html", "net.html", "--force"]) == 2
    assert "the run uses that file" in capsys.readouterr().err
    assert run(["diff", "net.onnx", "data.npz"]) == 3
    assert run(["diff", "net.onnx"]) == 2
    assert "no model b is given" in capsys.readouterr().err
