from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from onnxopt.errors import LimitError, ModelError, PassError
from onnxopt.model import load
from onnxopt.model.limits import DEFAULT, OFF, STRICT
from onnxopt.runtime import Probe, probe
from tests.runtime.builders import build

ROOT = Path(probe.__file__).parents[2]
NEG = "f (float[N] x) => (float[N] y) { y = Neg(x) }"
ENDLESS = """f (bool[1] go, float[1] x) => (float[1] y) {
    y = Loop (, go, x) <body = b (int64 i, bool[1] c, float[1] v) => (bool[1] d, float[1] w) {
        d = Identity(c)
        w = Identity(v)
    }>
}"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory")


def with_values(text: str, **values: Any) -> ModelProto:
    made = build(text, 17)
    made.ir_version = 8
    for name, value in values.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def probed(made: ModelProto, inputs: Mapping[str, Any] | None = None, **limits: Any) -> None:
    with Probe(load(made), None, replace(DEFAULT, **limits)) as opened:
        if inputs is not None:
            opened.prove(inputs)


def fake(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a script run in place of the child's own."""
    monkeypatch.setattr(Probe, "_command", staticmethod(lambda _folder: [sys.executable, "-c", code]))


def test_a_harmless_model_is_met_in_well_below_a_second(tmp_path: Path) -> None:
    path = tmp_path / "neg.onnx"
    onnx.save(build(NEG), path)
    model = load(path)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with Probe(model, path, DEFAULT) as opened:
            opened.run({"x": np.ones(3, np.float32)})
            opened.run({"x": np.ones(2, np.float32)})
            opened.prove({"x": np.ones(1, np.float32)})
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


def test_off_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "raise SystemExit(1)")
    with Probe(load(build(NEG)), None, OFF) as opened:
        assert opened.skipped
        opened.run({})
        opened.prove({})
    with pytest.raises(ModelError), Probe(load(build(NEG)), None, STRICT):
        pass


def test_what_the_runtime_says_keeps_its_class(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    onnx.save(build("f (float[N] x) => (float[N] y) { y = Unheard(x) }"), path)
    with pytest.raises(ModelError, match=r"own\.onnx") as caught, Probe(load(path), path, DEFAULT):
        pass
    assert "Unheard" in caught.value.cause
    with Probe(load(build(NEG)), None, DEFAULT) as opened:
        with pytest.raises(PassError, match="expected float32, got float64"):
            opened.run({"x": np.zeros(2)})
        opened.run({"x": np.zeros(2, np.float32)})


COMPUTED = {
    "Tile": with_values("f (float[1] x) => (float[M] y) { y = Tile(x, r) }", r=[1 << 28]),
    "ConstantOfShape": with_values("f (float[1] x) => (float[M] y) { y = ConstantOfShape(s) }", s=[1 << 16, 1 << 16]),
    "overflow": with_values("f (float[1] x) => (float[M] y) { y = ConstantOfShape(s) }", s=[1 << 31, 1 << 31]),
    "Expand": with_values("f (float[1] x) => (float[A,B] y) { y = Expand(x, s) }", s=[1 << 17, 1 << 17]),
    "Range": with_values(
        "f (float[1] x) => (float[M] y) { y = Range(a, b, c) }",
        a=np.float32(0), b=np.float32(2e9), c=np.float32(1),
    ),
    "Pad": with_values("f (float[1] x) => (float[M] y) { y = Pad(x, p) }", p=[0, 1 << 32]),
    "Resize": with_values(
        "f (float[1,1,1,1] x) => (float[A,B,C,D] y) { y = Resize(x, , s) }", s=np.array([1, 1, 4e4, 4e4], np.float32)
    ),
    "in a body": with_values(
        """f (bool c) => (float[M] y) { y = If(c)
            <then_branch = t () => (float[M] a) {
                 s = Constant<value = int64[1] {1073741824}>()
                 a = ConstantOfShape(s)
             },
             else_branch = e () => (float[M] b) { b = Identity(s2) }> }""",
        s2=np.ones(1, np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("made", COMPUTED.values(), ids=COMPUTED)
def test_sizes_that_shapes_tell_are_judged_before_anything_runs(made: ModelProto) -> None:
    started = time.perf_counter()
    with pytest.raises(LimitError, match=r"would take [\d,]+ bytes"):
        probed(made)
    assert time.perf_counter() - started < 10


def test_a_size_below_the_limit_is_computed() -> None:
    made = with_values("f (float[1] x) => (float[M] y) { y = Tile(x, r) }", r=[1 << 20])
    probed(made, {"x": np.ones(1, np.float32)}, computed_bytes=4 << 20)
    with pytest.raises(LimitError, match="4,194,304 bytes"):
        probed(made, computed_bytes=(4 << 20) - 1)


def test_inputs_count_as_given() -> None:
    """A large input may lead to large tensors; the input itself is bounded by the weights alone."""
    text = "f (float[1024] x) => (float[M] y) { y = Tile(x, r) }"
    probed(with_values(text, r=[64]), computed_bytes=4096)
    with pytest.raises(LimitError, match="tensor 'y'"):
        probed(with_values(text, r=[65]), computed_bytes=4096)
    with pytest.raises(LimitError, match="input 'x'"):
        probed(with_values(text, r=[64]), computed_bytes=1024)


@LINUX
@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_that_values_tell_end_at_the_memory_limit(threads: int) -> None:
    made = with_values("f (int64[1] n) => (float[M] y) { y = ConstantOfShape(n) }")
    started = time.perf_counter()
    with Probe(load(made), None, DEFAULT, threads=threads) as opened:
        opened.run({"n": np.array([1 << 20])})
        with pytest.raises(LimitError, match="more memory"):
            opened.run({"n": np.array([1 << 34])})
        opened.run({"n": np.array([1 << 20])})
    assert time.perf_counter() - started < 10


def test_an_endless_loop_ends_at_the_time_limit() -> None:
    started = time.perf_counter()
    with pytest.raises(LimitError, match="within the 3 s"):
        probed(build(ENDLESS, 17), {"go": np.array([True]), "x": np.ones(1, np.float32)}, seconds=3.0)
    assert time.perf_counter() - started < 10


def test_inference_that_never_ends_is_stopped_too() -> None:
    """onnx expands functions for inference; limits that let these through leave it to the clock."""
    made = with_values("f (float[1] x) => (float[1] y) { y = Neg(x) }")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    made.opset_import.append(imports[1])
    made.graph.node[0].op_type, made.graph.node[0].domain = "f0", "d"
    for at in range(28):
        op, domain = (f"f{at + 1}", "d") if at < 27 else ("Neg", "")
        nodes = [helper.make_node(op, [f"t{step}"], [f"t{step + 1}"], domain=domain) for step in range(2)]
        made.functions.append(helper.make_function("d", f"f{at}", ["t0"], ["t2"], nodes, imports))
    started = time.perf_counter()
    with (
        pytest.raises(LimitError, match="within the 3 s"),
        Probe(load(made, "off"), None, replace(DEFAULT, seconds=3.0)),
    ):
        pass
    assert time.perf_counter() - started < 10


def test_a_crash_is_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match="SIGSEGV"):
        probed(build(NEG))
    fake(monkeypatch, "import sys; sys.exit('all went wrong')")
    with pytest.raises(ModelError, match="status 1: all went wrong"):
        probed(build(NEG))
    fake(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LimitError, match="memory"):
        probed(build(NEG))


def test_large_weights_are_given_more() -> None:
    """128 MiB of weights in a process that may hold 300 MiB without them."""
    made = with_values(
        "f (float[1,4096] x) => (float[1,8192] y) { y = MatMul(x, w) }", w=np.ones((4096, 8192), np.float32)
    )
    probed(made, {"x": np.ones((1, 4096), np.float32)}, memory_bytes=300 << 20)


def test_a_file_that_reads_as_another_format_too_is_read_as_the_one_that_was_checked(tmp_path: Path) -> None:
    """Bytes 4 to 7 of an onnxruntime flatbuffer are ORTM; a producer of that name puts them there as well."""
    made = build(NEG)
    made.producer_name = "ORTM"
    path = tmp_path / "both.ort"
    path.write_bytes(made.SerializeToString())
    assert path.read_bytes()[4:8] == b"ORTM"
    with Probe(load(path), path, DEFAULT) as opened:
        opened.prove({"x": np.ones(1, np.float32)})


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_child_goes_when_the_parent_is_interrupted_or_killed(tmp_path: Path, number: signal.Signals) -> None:
    onnx.save(build(ENDLESS, 17), tmp_path / "endless.onnx")
    script = (
        "import numpy, sys\n"
        "from onnxopt.model import load, Limits\n"
        "from onnxopt.runtime import Probe\n"
        f"with Probe(load({str(tmp_path / 'endless.onnx')!r}), None, Limits.of('default')) as probe:\n"
        "    print(probe._child.pid, flush=True)\n"
        "    probe.run({'go': numpy.array([True]), 'x': numpy.ones(1, numpy.float32)})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(1)
        assert alive(pid)
        parent.send_signal(number)
        parent.wait(20)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
