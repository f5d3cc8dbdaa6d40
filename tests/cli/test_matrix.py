"""What goes wrong, what is said, what is left behind: every error of the command line in one table."""

from __future__ import annotations

import hashlib
import os
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from onnxopt.cli.run import run
from tests.pipeline.builders import BREAKING, classifier, feeds, write_example

PASSES = f"--passes {BREAKING}:DropIdentity"
BAD = f"net.onnx --passes {BREAKING}"
GOOD = f"net.onnx {PASSES}"


@dataclass(frozen=True)
class Case:
    """words: the command line. code, cause, hint: what it must answer. prepare: what is done to the folder before."""

    name: str
    words: str
    code: int
    cause: str
    hint: str
    prepare: Callable[[Path], object] = lambda _folder: None


def save(name: str, array: np.ndarray, member: str = "x") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive, archive.open(f"{member}.npy", "w") as file:
            np.lib.format.write_array(file, array)

    return write


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: os.mkfifo(folder / name)


X = feeds(classifier())["x"]
WHOLE = classifier().SerializeToString()

CASES = [
    Case("wrong path", f"nett.onnx {PASSES}", 2, "no such file: nett.onnx", "did you mean net.onnx?"),
    Case("folder for a model", f". {PASSES}", 2, ". is a folder", ".onnx file"),
    Case("mistyped command", "chekc net.onnx", 2, "'chekc' is neither a command nor a file", "did you mean 'check'?"),
    Case(
        "not an ONNX file",
        f"text.onnx {PASSES}",
        3,
        "text.onnx is not an ONNX model",
        "checkpoint",
        put("text.onnx", b"hello, this is text\n"),
    ),
    Case(
        "truncated file",
        f"half.onnx {PASSES}",
        3,
        "half.onnx is not an ONNX model, or it is cut short",
        "download",
        put("half.onnx", WHOLE[: len(WHOLE) // 2]),
    ),
    Case(
        "empty file",
        f"empty.onnx {PASSES}",
        3,
        "empty.onnx holds no ONNX graph",
        "exporter",
        put("empty.onnx", b""),
    ),
    Case("unknown pass", "net.onnx --passes prnue", 2, "unknown pass 'prnue'", "did you mean 'prune'?"),
    Case(
        "unknown passes", "net.onnx --passes prnue,intt8", 2, "unknown passes 'prnue', 'intt8'", "did you mean 'prune'?"
    ),
    Case("no passes", "net.onnx", 2, "no passes are given", "--passes prune,int8"),
    Case("shape of no input", "net.onnx --input-shape z:1,12", 2, "the model has no input 'z'", "known: x"),
    Case("shape without a name", "net.onnx --input-shape 1,12", 2, "'1,12' names no input", "NAME:1,3,224,224"),
    Case("shape of another rank", "net.onnx --input-shape x:12", 2, "2 axes [batch,12], not 1", "x:batch,12"),
    Case("shape against the graph", "net.onnx --input-shape x:1,13", 2, "can't compute with x [1,13]", "x [batch,12]"),
    Case(
        "feeds of the old shape",
        "net.onnx --input-shape x:2,12 --data data.npz",
        2,
        "expected 2 at axis 0",
        "reshape it to [2,12]",
    ),
    Case("output that is none", "net.onnx --outputs logit", 2, "output 'logit'", "did you mean 'logits'?"),
    Case("input that is missing", "net.onnx --inputs h --outputs h", 2, "output 'h' is an input too", "computed"),
    Case("operator set too low", "net.onnx --opset 13", 2, "uses operator set 17", "17 or more"),
    Case("operator set too high", "net.onnx --opset 99", 2, "99 is out of range", "13 to 23"),
    Case("empty pass list", "net.onnx --passes ''", 2, "the pass list is empty", "at least one"),
    Case(
        "stray option of a pass", "net.onnx --passes prune,ratio=0.3", 2, "'ratio=0.3' stands alone", "prune:ratio=0.3"
    ),
    Case("braces that the shell split", "net.onnx --passes prunea=1 pruneb=2", 2, "'pruneb=2' stands alone", "quote"),
    Case("option value of a pass", f"{BAD}:Round:step=0", 2, "0.0 is out of range", "1e-06 to 100"),
    Case("unknown option of a pass", f"{BAD}:Round:stpe=1", 2, "no option 'stpe'", "'step'"),
    Case("missing pass file", "net.onnx --passes ./gone.py:Gone", 2, "no such pass file: ./gone.py", "FILE.py:CLASS"),
    Case("unknown option", f"net.onnx --pases {GOOD}", 2, "no such option: --pases", "did you mean --passes?"),
    Case("bad option value", f"{GOOD} --seed x", 2, "--seed: 'x' is not a valid integer", "--help"),
    Case("bad choice", f"{GOOD} --on-error go", 2, "--on-error: 'go' is not one of", "--help"),
    Case("option without value", "net.onnx --passes", 2, "requires an argument", "--help"),
    Case("too many words", f"net.onnx more.onnx {PASSES}", 2, "unexpected word: more.onnx", "one model"),
    Case("unknown target", f"{GOOD} --target x87", 2, "unknown target 'x87'", "did you mean 'x86'?"),
    Case("bad budget", f"{GOOD} --max-size 1XB", 2, "max_size '1XB'", "did you mean"),
    Case("two pass lists", f"{GOOD} -p dedup", 2, "--passes is given more than once", "commas"),
    Case("no number", f"{BAD}:WrongValues:factor=nan", 2, "option 'factor': nan is no number", "a finite number"),
    Case("no time", f"{GOOD} --latency-seconds nan", 2, "nan is no time that could be spent", "0 for no timing"),
    Case("endless time", f"{GOOD} --latency-seconds inf", 2, "inf is no time that could be spent", "seconds"),
    Case("two seeds", f"{GOOD} --seed 1 --seed 1", 2, "--seed is given more than once", "once"),
    Case("budget on a missing output", f"{GOOD} --min-sqnr logit=9", 2, "no output 'logit'", "did you mean 'logits'?"),
    Case("metric of a missing output", f"{GOOD} --metric top1@x", 2, "the model has no output 'x'", "logits"),
    Case("a share as a plain number", f"{GOOD} --max-drop top1=0.5", 2, "means 50 points", "top1=0.5pt"),
    Case("bad metric", f"{GOOD} --metric top11", 2, "unknown metric 'top11'", "did you mean 'top1'?"),
    Case("report format", f"{GOOD} --report r.pdf", 2, "can't be written as .pdf", ".json, .txt"),
    Case(
        "report onto a pipe", f"{GOOD} --report p.json --force", 2, "p.json: it is a named pipe", "file", pipe("p.json")
    ),
    Case(
        "report onto the input",
        f"net.txt {PASSES} --report ./net.txt --force",
        2,
        "the run uses that file",
        "another",
        put("net.txt", WHOLE),
    ),
    Case("report onto the output", f"{GOOD} -o o.json --report o.json", 2, "the run uses that file", "another"),
    Case("existing report", f"{GOOD} --report r.txt", 2, "r.txt exists already", "--force", put("r.txt", b"old")),
    Case("output onto a pipe", f"{GOOD} -o p.onnx --force", 2, "p.onnx: it is a named pipe", "-o", pipe("p.onnx")),
    Case(
        "existing failure",
        f"{GOOD} --keep-failed -o o.q8",
        2,
        "o.q8.failed.onnx exists already",
        "--force",
        put("o.q8.failed.onnx", b"old"),
    ),
    Case(
        "output folder missing",
        f"{GOOD} -o gone/o.onnx",
        2,
        "folder gone does not exist",
        "create it",
    ),
    Case("output below a file", f"{GOOD} -o data.npz/o.onnx", 2, "data.npz is a file", "choose another"),
    Case(
        "output is the input",
        f"{GOOD} --force -o ./net.onnx",
        2,
        "is the input itself",
        "choose another",
    ),
    Case(
        "existing output",
        GOOD,
        2,
        "net.onnxopt.onnx exists already",
        "--force",
        put("net.onnxopt.onnx", b"old"),
    ),
    Case(
        "data missing",
        f"{GOOD} --data gone.npz",
        2,
        "gone.npz: no such file",
        "",
    ),
    Case(
        "feeds with a wrong name",
        f"{GOOD} --data bad.npz",
        2,
        "the model has no input 'y'",
        "rename",
        save("bad.npz", X, member="y"),
    ),
    Case(
        "feeds of a wrong type",
        f"{GOOD} --data bad.npz",
        2,
        "input 'x': expected float32, got float64",
        "astype('float32')",
        save("bad.npz", X.astype(np.float64)),
    ),
    Case(
        "feeds of a wrong rank",
        f"{GOOD} --data bad.npz",
        2,
        "expected rank 2 [batch,12], got rank 3",
        "reshape",
        save("bad.npz", X[:, None]),
    ),
    Case(
        "feeds of a wrong size",
        f"{GOOD} --data bad.npz",
        2,
        "expected 12 at axis 1",
        "reshape",
        save("bad.npz", X[:, 1:]),
    ),
    Case("no data where it is required", f"{GOOD} --require-data", 5, "no real inputs", "--data"),
    Case("check without data", "check net.onnx --reference net.onnx", 5, "no real inputs", "--data"),
    Case("check without reference", "check net.onnx", 2, "--reference is missing", "onnxopt check --help"),
    Case("a pass that raises", f"{BAD}:Raise", 4, "failed: RuntimeError: halfway through", "-vv"),
    Case("a pass that lies", f"{BAD}:WrongValues", 4, "promised exact results", "rolled back"),
    Case("a pass that spoils", f"{BAD}:Unloadable", 4, "can't be loaded", "onnxruntime"),
    Case(
        "a pass that renames",
        f"{BAD}:Rename",
        4,
        "'logits' became 'logits_1'",
        "inputs and outputs",
    ),
]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cause_and_remedy_and_nothing_left_behind(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_example(tmp_path)
    case.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = digests(tmp_path)
    assert run(shlex.split(case.words)) == case.code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 2, said.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert case.cause in lines[0]
    assert case.hint in lines[1]
    assert digests(tmp_path) == before


def test_the_table_has_every_exit_code_an_input_can_cause() -> None:
    assert {case.code for case in CASES} == {2, 3, 4, 5}
