"""The pruning benchmark as a command, on a task made up for tests, and the rival's script without the rival."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from benchmarks.pruning import foreign
from tests.helpers import proto, run
from tests.passes.quantizing import normal

ROOT = Path(__file__).parents[2]
MINI = """
import numpy as np
from onnx import parser

TEXT = '''<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y)
    <float[2, 2] w = {1, 0, 0, 1}> { y = MatMul (x, w) }'''
GRAPHS = {"small": lambda: parser.parse_model(TEXT)}
EXTRA = {"constant_channels": GRAPHS["small"]}


def feed(model, seed):
    return {"x": np.random.default_rng(seed).standard_normal((2, 2)).astype(np.float32)}
"""


def lines_of(*words: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.pruning", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


def test_every_part_tells_of_each_recipe(zoo: Path) -> None:
    words = ["--zoo", str(zoo), "--part", "ladder", "speed", "order", "--levels", "0.5", "--ours", "fuse_bn"]
    lines = lines_of(*words, "--seconds", "0.1", "--samples", "8", "--feeds", "8", "--log", str(zoo / "log"))

    def line(start: str) -> str:
        return next(found for found in lines if found.startswith(start))

    assert "agree up" in line("digits: ")
    assert " M MACs, " in line("digits: ")
    assert line("50% fewer MACs:")
    assert "error 0.0000 | 1.000 MACs, " in line("ours, least squares")
    assert "agree 1.0000" in line("ours, least squares")
    assert "no option 'refit'" in line("ours, mean fold")
    assert "no option 'refit'" in line("ours, raw")
    assert line("onnxsim, raw").endswith("left out: --onnxsim names no interpreter")
    assert line("onnxsim, recovered").endswith("left out: --onnxsim names no interpreter")
    assert "digits: 1.000 MACs, latency " in "\n".join(lines)
    assert "no option 'refit'" in line("digits at 50%")
    records = [json.loads(record) for record in (zoo / "log").read_text().splitlines()]
    assert {record["part"] for record in records} == {"ladder", "speed"}
    assert records[0]["error_total"] < 1e-5


def test_minigraphs_need_no_model(zoo: Path) -> None:
    script = zoo / "mini.py"
    script.write_text(MINI)
    words = ["--zoo", str(zoo), "--part", "minigraphs", "--minigraphs", str(script), "--onnxsim", sys.executable]
    lines = lines_of(*words)
    starts = [line.split()[0] for line in lines]
    assert starts == ["small", "constant_channels", *["perceptron"] * 5]
    assert lines[1].endswith("difference 0.0e+00 of the scale; below 1e-04: yes")
    assert "onnxsim, raw: " in lines[-2]


def test_weights_of_all_bodies_become_initializers() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        w = Constant <value = float[2] {1, 2}> ()
        h = Mul (x, w)
        y = If (c) <then_branch = t () => (float[2] a) {
                        v = Constant <value = float[2] {3, 4}> ()
                        a = Mul (h, v)
                    }, else_branch = e () => (float[2] b) { b = Constant <value = float[2] {5, 6}> () }>
    }"""
    model = proto(text)
    made = foreign.hoisted(model)
    assert [tensor.name for tensor in made.graph.initializer] == ["w"]
    branches = [attribute.g for node in made.graph.node for attribute in node.attribute]
    assert [[node.op_type for node in branch.node] for branch in branches] == [["Mul"], ["Constant"]]
    onnx.checker.check_model(made, full_check=True)
    for taken in (True, False):
        feed = {"x": normal(2), "c": np.array(taken)}
        np.testing.assert_array_equal(run(made, feed)["y"], run(model, feed)["y"])


def test_hoisting_leaves_attributes_alone() -> None:
    made = foreign.hoisted(proto("g (int64[2] x) => (float[2] y) { y = Cast <to = 1> (x) }"))
    # reading a body that is not there must not make one: onnxruntime refuses an attribute with two kinds of value
    assert onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])


def test_failures_of_the_rival_are_answers(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", x=normal(2))
    assert list(foreign.feeds_of(tmp_path)[0]) == ["x"]
    path = tmp_path / "model.onnx"
    model = proto("g (float[2] x) => (float[2] y) { y = Mul (x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(normal(2), "w"))
    onnx.save(model, path)
    answer = foreign.answered({"prune": "l2", "from": str(path / "missing"), "sparsity": 0.5, "out": ""}, [])
    assert answer["error"].startswith("NotADirectoryError: ")
