"""The bash script is sourced and its function called as bash would."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onnxopt.cli.commands import root
from onnxopt.cli.completion import script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, and an `onnxopt` to be found on the path."""
    command = tmp_path / "bin" / "onnxopt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m onnxopt "$@"\n')
    command.chmod(0o755)
    (tmp_path / "net.onnx").touch()
    (tmp_path / "check.txt").touch()
    (tmp_path / "onnxopt.bash").write_text(script("bash", root))
    return tmp_path


def offered(folder: Path, *words: str) -> tuple[list[str], bool]:
    """What is offered for the last word, and whether bash is told to complete file names."""
    typed = " ".join(map(shlex.quote, words))
    line = f"""
        source ./onnxopt.bash
        compopt() {{ echo "FILES"; }}
        COMP_WORDS=(onnxopt {typed}); COMP_CWORD={len(words)}
        _onnxopt_completion onnxopt
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    found = done.stdout.split()
    return [word for word in found if word != "FILES"], "FILES" in found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["che"], "check"),
        ([""], "net.onnx"),
        (["--pas"], "--passes"),
        (["net.onnx", "--max-s"], "--max-size"),
        (["net.onnx", "--passes", "pru"], "prune"),
        (["net.onnx", "--passes", "prune,int"], "prune,int8"),
        (["--passes", "pru"], "prune"),
        (["passes", "int"], "int8"),
        (["net.onnx", "--target", "ar"], "arm64"),
        (["net.onnx", "--metric", "top"], "top5"),
        (["net.onnx", "--limits", "st"], "strict"),
        (["check", "net.onnx", "--ref"], "--reference"),
        (["completion", "b"], "bash"),
    ],
)
def test_words(words: list[str], expected: str, folder: Path) -> None:
    found, _ = offered(folder, *words)
    assert expected in found
    assert all(word.startswith(words[-1]) for word in found)


@pytest.mark.parametrize(
    "words",
    [
        ["ne"],
        ["--passes", "prune", "ne"],
        ["check", "ne"],
        ["check", "net.onnx", "--reference", "ne"],
        ["net.onnx", "--data", "da"],
        ["net.onnx", "--passes", "./my"],
        ["net.onnx", "-o", ""],
        ["net.onnx", "--report", ""],
        ["net.onnx", "--labels", ""],
    ],
)
def test_file_names_are_left_to_bash(words: list[str], folder: Path) -> None:
    assert offered(folder, *words) == ([], True)


def test_bash_completes_file_names_where_nothing_fits() -> None:
    assert "-o default -F _onnxopt_completion onnxopt" in script("bash", root)
