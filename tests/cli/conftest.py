"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.builders import write_example


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.onnx and data.npz in it."""
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
