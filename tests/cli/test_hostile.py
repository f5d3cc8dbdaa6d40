"""Models made to do harm: every one of them ends in a plain error, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from tests.helpers import proto
from tests.model.test_limits import chain, changed, deep_bytes, nested, weight
from tests.runtime.test_probe import COMPUTED, ENDLESS, with_values

ROOT = Path(__file__).parents[2]
SECONDS = 60
BYTES = 2 << 30

pytestmark = pytest.mark.skipif(os.name != "posix", reason="wait4 tells the memory of a child")


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code, seconds, bytes of the largest process in it, and what it said."""

    code: int
    seconds: float
    nbytes: int
    said: str


def onnxopt(*words: str | Path) -> Ended:
    """Run the command line; bounds on time and memory are held for every run."""
    command = [sys.executable, "-P", "-m", "onnxopt", *map(str, words)]
    started = time.monotonic()
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    ended = Ended(child.returncode, time.monotonic() - started, usage.ru_maxrss * unit, said)
    assert ended.seconds < SECONDS, said
    assert ended.nbytes < BYTES, said
    assert "Traceback" not in said
    return ended


def optimize(folder: Path, content: ModelProto | bytes, *words: str) -> Ended:
    path = folder / "hostile.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return onnxopt(path, "-p", "fold_constants", "-o", folder / "out.onnx", "--latency-seconds", "0", *words)


def refused(folder: Path, content: ModelProto | bytes, code: int, *words: str) -> str:
    """Assert that it is refused with two lines, cause and remedy, and leaves nothing behind."""
    ended = optimize(folder, content, *words)
    assert ended.code == code, ended.said
    lines = ended.said.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert "hostile.onnx" in lines[0]
    assert [path.name for path in folder.iterdir()] == ["hostile.onnx"]
    return lines[0]


def absurd_opset(version: int) -> ModelProto:
    made = proto("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    made.opset_import[0].version = version
    return made


def unknown_input_type() -> ModelProto:
    made = proto("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    made.graph.input[0].type.tensor_type.elem_type = 77
    return made


def truncated() -> bytes:
    raw: bytes = weight(changed()).SerializeToString()
    return raw[: len(raw) - 3]


def circle() -> ModelProto:
    made = chain(2)
    made.functions[-1].node[0].op_type, made.functions[-1].node[0].domain = "f0", "d"
    return made


LIMIT: dict[str, Callable[[], ModelProto]] = {
    **{name: lambda made=made: made for name, made in COMPUTED.items()},  # type: ignore[misc]
    "input of 2^31 x 2^31": lambda: proto(f"g (float[{1 << 31},{1 << 31}] x) => (float[A,B] y) {{ y = Relu(x) }}"),
    "functions": lambda: chain(25),
    "sizes from inputs": lambda: with_values(
        """f (int64[2] x) => (float[M,N] y) {
            k = Constant<value = int64 {300000}>()
            o = Div(x, x)
            s = Mul(o, k)
            y = ConstantOfShape(s)
        }"""
    ),
}
NONSENSE: dict[str, Callable[[], ModelProto | bytes]] = {
    "circle of functions": circle,
    "90 nested bodies": lambda: deep_bytes(90),
    "200 nested bodies": lambda: deep_bytes(200),
    "negative dims": lambda: weight(changed(dims=[-2])),
    "raw data too short": lambda: weight(changed(raw_data=b"1234")),
    "raw data too long": lambda: weight(changed(raw_data=b"123456789")),
    "huge dims without data": lambda: weight(changed(dims=[1 << 31, 1 << 31], raw_data=b"")),
    "wrong typed field": lambda: weight(changed(raw_data=b"", int32_data=[1, 2])),
    "unknown type of a tensor": lambda: weight(changed(data_type=99)),
    "unknown type of an input": unknown_input_type,
    "negative opset": lambda: absurd_opset(-17),
    "opset of 2^60": lambda: absurd_opset(1 << 60),
    "opset of 100,000": lambda: absurd_opset(100_000),
    "cut off": truncated,
}


@pytest.mark.parametrize("make", LIMIT.values(), ids=LIMIT)
def test_asks_for_too_much(tmp_path: Path, make: Callable[[], ModelProto]) -> None:
    refused(tmp_path, make(), 6)


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE)
def test_makes_no_sense(tmp_path: Path, make: Callable[[], ModelProto | bytes]) -> None:
    refused(tmp_path, make(), 3)


@pytest.mark.slow
def test_an_endless_loop(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{ENDLESS}')
    del made.graph.input[0]
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True]), "go"))
    assert "within the 15 s" in refused(tmp_path, made, 6, "--limits", "strict")


def test_thirty_nested_bodies_work(tmp_path: Path) -> None:
    ended = optimize(tmp_path, nested(30))
    assert ended.code == 0, ended.said
    assert "30 deep" not in ended.said
    strict = optimize(tmp_path, nested(30), "--limits", "strict", "--force")
    assert strict.code == 6
    assert "more than 8 deep" in strict.said


def test_limits_off_leaves_them_out(tmp_path: Path) -> None:
    made = with_values("f (float[1] x) => (float[M] y) { y = Tile(x, r) }", r=[40 << 20])
    assert "the limit for this model is 134,217,728" in refused(tmp_path, made, 6, "--limits", "strict")
    (tmp_path / "hostile.onnx").unlink()
    assert optimize(tmp_path, made, "--limits", "off", "--dry-run", "--samples", "1").code == 0


def test_check_holds_candidate_and_reference_to_the_limits(tmp_path: Path) -> None:
    good, bad, data = tmp_path / "good.onnx", tmp_path / "bad.onnx", tmp_path / "data.npz"
    onnx.save(proto("g (float[N,1] x) => (float[N,1] y) { y = Relu(x) }"), good)
    onnx.save(with_values("f (float[N,1] x) => (float[M] y) { y = ConstantOfShape(s) }", s=[1 << 32]), bad)
    np.savez(data, x=np.ones((4, 1), np.float32))
    for words in ((good, "--reference", bad), (bad, "--reference", good)):
        ended = onnxopt("check", *words, "--data", data, "--latency-seconds", "0")
        assert ended.code == 6, ended.said
        assert "bad.onnx: tensor 'y' would take 17,179,869,184 bytes" in ended.said
    assert onnxopt("check", good, "--reference", good, "--data", data, "--latency-seconds", "0").code == 0


@pytest.mark.slow
def test_a_million_nodes_are_no_crime() -> None:
    from onnxopt.model.limits import DEFAULT, check_limits

    made = proto("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    made.graph.node.extend([helper.make_node("Relu", ["x"], ["z"])] * 1_000_000)
    started = time.monotonic()
    check_limits(made, DEFAULT)
    assert time.monotonic() - started < 20


def test_the_models_are_small() -> None:
    for make in (*LIMIT.values(), *NONSENSE.values()):
        made = make()
        assert len(made if isinstance(made, bytes) else made.SerializeToString()) < 20_000
