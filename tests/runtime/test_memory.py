from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxopt.runtime import memory
from onnxopt.runtime.memory import loaded_bytes
from tests.runtime.builders import build

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the platform does not tell memory")


def written(folder: Path, size: int) -> Path:
    proto = build(f"f (float[n, {size}] x) => (float[n, {size}] y) {{ y = MatMul(x, w) }}")
    values = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    path = folder / f"{size}.onnx"
    onnx.save(proto, path)
    return path


@linux
def test_it_grows_with_the_weights(tmp_path: Path) -> None:
    small, large = (loaded_bytes(written(tmp_path, size)) for size in (8, 2048))
    assert small is not None
    assert large is not None
    assert small < 4 << 20
    assert 4 * 2048**2 * 0.9 < large < 3 * 4 * 2048**2


def test_no_figure_for_what_cannot_be_loaded_or_takes_too_long(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert loaded_bytes(broken) is None
    assert loaded_bytes(written(tmp_path, 8), timeout=0.001) is None


def test_no_figure_where_the_platform_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    assert loaded_bytes(written(tmp_path, 8)) is None
