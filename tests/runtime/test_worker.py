from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt.errors import LimitError, ModelError, PassError, UsageError
from onnxopt.runtime import worker
from tests.runtime.builders import build, build_bytes

ROOT = Path(worker.__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "neg.onnx"
    path.write_bytes(build_bytes("f (float[N] x) => (float[N] y) { y = Neg(x) }"))
    return path


def fake(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a script run in place of the child's own."""
    monkeypatch.setattr(worker, "_command", lambda folder: [sys.executable, "-c", code, str(folder)])


def test_outputs_come_back_in_order(model: Path) -> None:
    samples = [{"x": np.full(index, index, np.float32)} for index in range(3)]
    outputs = worker.run_saved(model, samples)
    assert [output["y"].tolist() for output in outputs] == [[], [-1], [-2, -2]]


def test_relative_paths_and_no_samples(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert worker.run_saved(model.name, []) == []


def test_refusal_run_error_and_missing_file_keep_their_class(model: Path) -> None:
    with pytest.raises(PassError, match="expected float32, got float64"):
        worker.run_saved(model, [{"x": np.zeros(2)}])
    with pytest.raises(UsageError, match="no such file"):
        worker.run_saved(model.parent / "absent.onnx", [])
    model.write_bytes(b"no model")
    with pytest.raises(ModelError, match="can't load it"):
        worker.run_saved(model, [])


def test_a_crash_is_named_by_its_signal(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(PassError, match="ended by signal SIGSEGV"):
        worker.run_saved(model, [])


def test_a_hang_ends_at_the_time_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(LimitError, match=r"within 0\.5 s"):
        worker.run_saved(model, [], 0.5)
    assert time.monotonic() - start < 10


def test_an_exit_without_response_is_an_error_and_quotes_the_last_line(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, "import sys; print('first'); print('all went wrong', file=sys.stderr); sys.exit(3)")
    with pytest.raises(PassError, match="status 3: all went wrong"):
        worker.run_saved(model, [])


def test_silence_is_not_success(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "pass")
    with pytest.raises(PassError, match="status 0"):
        worker.run_saved(model, [])


def test_a_killed_child_ran_out_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LimitError, match="memory"):
        worker.run_saved(model, [])


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_memory_limit_of_a_real_run(tmp_path: Path) -> None:
    model = build("f (int64[1] n) => (float[M] y) { y = ConstantOfShape(n) }")
    onnx.save(model, tmp_path / "huge.onnx")
    with pytest.raises(LimitError, match="memory ran out"):
        worker.run_saved(tmp_path / "huge.onnx", [{"n": np.array([1 << 32])}], memory=4 << 30)


def test_ctrl_c_kills_the_child(model: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "import sys\n"
        "from onnxopt.runtime import worker\n"
        f"worker._command = lambda folder: [sys.executable, '-c', {code!r}]\n"
        f"worker.run_saved({str(model)!r}, [])\n"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (pid_file.is_file() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=20)
    assert parent.returncode != 0
    assert b"KeyboardInterrupt" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
