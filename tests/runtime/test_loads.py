from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxopt.errors import LimitError, PassError
from onnxopt.runtime import loads, worker
from onnxopt.runtime.loads import LoadMeter, Loads, Memory
from tests.runtime.builders import build

linux = pytest.mark.skipif(not loads._PAGES.exists(), reason="the system does not tell memory")


def written(folder: Path, size: int, *, beside: bool = False) -> Path:
    """A product with a weight of size x size floats."""
    proto = build(f"f (float[n, {size}] x) => (float[n, {size}] y) {{ y = MatMul(x, w) }}")
    values = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    path = folder / f"{size}{'_beside' if beside else ''}.onnx"
    onnx.save(proto, path, save_as_external_data=beside, location=f"{path.stem}.bin")
    return path


def measured(one: Path, two: Path, *, seconds: float = 0.0) -> Loads:
    with LoadMeter() as meter:
        return meter.measure(one, two, seconds=seconds)


def memory_of(found: Loads) -> Memory:
    assert found.memory is not None
    return found.memory


@linux
def test_memory_grows_with_the_weights(tmp_path: Path) -> None:
    memory = memory_of(measured(written(tmp_path, 8), written(tmp_path, 2048)))
    assert memory.reference < 1 << 20
    assert 4 * 2048**2 * 0.9 < memory.candidate < 3 * 4 * 2048**2
    assert memory.loads == 2


@linux
def test_equal_models_differ_by_no_more_than_the_noise(tmp_path: Path) -> None:
    path = written(tmp_path, 256)
    memory = memory_of(measured(path, path))
    assert abs(memory.candidate - memory.reference) <= memory.noise < 1 << 20


@linux
def test_values_in_a_file_beside_the_model_count(tmp_path: Path) -> None:
    memory = memory_of(measured(written(tmp_path, 1024), written(tmp_path, 1024, beside=True)))
    assert memory.candidate > 0.9 * 4 * 1024**2
    assert memory.candidate > 0.5 * memory.reference


def test_the_larger_model_takes_longer_and_the_interval_holds_the_ratio(tmp_path: Path) -> None:
    found = measured(written(tmp_path, 8), written(tmp_path, 2048), seconds=0.2).time
    assert found.ratio > 2
    assert found.candidate_ms > 2 * found.reference_ms > 0
    assert found.low <= found.ratio <= found.high
    assert found.pairs >= 2


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(PassError, match=r"broken\.onnx: onnxruntime can't load it"):
        measured(written(tmp_path, 8), broken)


def test_too_long_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, 8)
    with LoadMeter(timeout=0.01) as meter, pytest.raises(LimitError, match=r"did not load within 0\.01 s"):
        meter.measure(path, path)
    assert meter._child.poll() is not None


@linux
def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, 8)
    with LoadMeter() as meter:
        meter.wait_until_ready()
        os.kill(meter._child.pid, signal.SIGKILL)
        meter._child.wait()
        with pytest.raises(PassError, match="was ended by signal SIGKILL"):
            meter.measure(path, path)


@linux
def test_a_load_that_crashes_its_fork_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from onnxopt.runtime import loads\n"
        "loads._load = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "loads.main(Path(sys.argv[1]))\n"
    )
    start: Callable[..., subprocess.Popen[bytes]] = worker.start

    def crashing(command: list[str], folder: Path, **streams: int) -> subprocess.Popen[bytes]:
        return start([command[0], str(tmp_path / "crashing.py"), command[-1]], folder, **streams)

    monkeypatch.setattr(worker, "start", crashing)
    path = written(tmp_path, 8)
    with pytest.raises(PassError, match=r"8\.onnx: the process that loaded it was ended by signal SIGSEGV"):
        measured(path, path)


def test_without_a_request_the_process_goes_with_the_block() -> None:
    with LoadMeter() as meter:
        folder = meter._folder
        meter.wait_until_ready()
        assert (folder / "ready").exists()
        assert meter._child.poll() is None
    assert meter._child.poll() is not None
    assert not folder.exists()


@linux
def test_its_end_of_input_ends_it() -> None:
    with LoadMeter() as meter:
        meter.wait_until_ready()
        assert meter._child.stdin is not None
        meter._child.stdin.close()
        end = time.monotonic() + 20
        while meter._child.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert meter._child.poll() == 0
        meter._child.stdin = None


def test_times_alone_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "_PAGES", tmp_path / "absent")
    nothing = loads._model_of_one_node()
    taken, seconds = loads._load_apart(written(tmp_path, 8), 1, nothing)
    assert taken is None
    assert seconds > 0
    answer = {"loads": [[[None, 1.0], [None, 2.0], [None, 4.0], [None, 1.0]]], "nothing": None}
    found = loads._figures(answer)
    assert found.memory is None
    assert (found.time.ratio, found.time.pairs, found.time.reference_ms, found.time.candidate_ms) == (3, 1, 1e3, 3e3)


def test_figures_are_medians_and_the_noise_is_the_widest_range() -> None:
    blocks = [[[100, 1.0], [50, 1.0], [58, 1.0], [104, 1.0]], [[102, 1.0], [50, 1.0], [50, 1.0], [100, 1.0]]]
    memory = memory_of(loads._figures({"loads": blocks, "nothing": 3}))
    assert memory == Memory(101, 50, 8, 4)
    assert memory_of(loads._figures({"loads": blocks, "nothing": 9})).noise == 9


def test_blocks_go_on_for_the_time_given_and_at_least_twice_unless_they_are_long() -> None:
    assert not loads._goes_on(1, 0.0, 0)
    assert loads._goes_on(1, 0.5, 0.3)
    assert not loads._goes_on(1, 5.0, 0.3)
    assert not loads._goes_on(2, 0.5, 0.3)
    assert loads._goes_on(5, 0.1, 0.3)
    assert not loads._goes_on(loads.MAX_BLOCKS, 0.1, 9)
