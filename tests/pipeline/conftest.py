from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.builders import write_example


@pytest.fixture
def example(tmp_path: Path) -> tuple[Path, Path]:
    """Paths of a small model and of its feeds, in a folder of their own."""
    return write_example(tmp_path)
