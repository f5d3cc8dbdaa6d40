from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onnxopt.cli.run import run
from onnxopt.cli.terminal import Pace

COMMAND = [sys.executable, "-P", "-m", "onnxopt"]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(words) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_from_statistics_to_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "calibrate", "net.onnx", "--data", "data.npz")
    assert "measured  for int8: " in told
    assert "samples   30" in told
    assert told.endswith("written   net.stats.npz\n")
    assert max(map(len, told.splitlines())) <= 80
    words = ("net.onnx", "--passes", "int8", "--stats", "net.stats.npz", "--data", "data.npz", "--latency-seconds", "0")
    assert "verdict   passed" in said(capsys, *words)


def test_parts_are_named_and_merged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("1/2", "2/2"):
        assert f"samples   15, part {part}" in said(
            capsys, "calibrate", "net.onnx", "--data", "data.npz", "--shard", part
        )
    assert (folder / "net.1of2.stats.npz").is_file()
    text = said(capsys, "merge", "net.1of2.stats.npz", "-o", "all.npz", code=2)
    assert text.startswith("error: part 2/2 is missing\nhint: gather it with --shard 2/2;")
    assert not (folder / "all.npz").exists()
    assert "samples   30" in said(capsys, "merge", "net.2of2.stats.npz", "net.1of2.stats.npz", "-o", "all.npz")
    said(capsys, "calibrate", "net.onnx", "--data", "data.npz", "-q")
    with np.load("all.npz") as merged, np.load("net.stats.npz") as whole:
        for name in whole.files:
            if name != "meta" and not name.endswith("_low"):
                assert np.array_equal(merged[name], whole[name])


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--shard", "2"), "--shard: '2' names no part"),
        (("--shard", "a/b"), "--shard: 'a/b' names no part"),
        (("--shard", "9/4"), "shard 9/4: there is no such part"),
        (("--elements", "some"), "--elements: 'some' is no number"),
        (("--shard", "1/0"), "shard 1/0: there are no parts"),
        (("--elements", "-4"), "--elements: -4 is too few"),
        (("--data", ""), "an empty path names no feeds"),
        (("--passes", "dedup"), "none of the passes asks for statistics"),
        (("--stats", "net.onnx"), "net.onnx: it holds no statistics"),
        (("-o", "nowhere/x.npz"), "the folder nowhere does not exist"),
    ],
)
def test_wrong_words(folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], cause: str) -> None:
    text = said(capsys, "calibrate", "net.onnx", "--data", "data.npz", *words, code=2)
    assert text.startswith("error: ")
    assert cause in text
    assert text.count("\n") == 2


def test_without_data_the_exit_code_is_five(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.npz").rename(folder / "other.npz")
    text = said(capsys, "calibrate", "net.onnx", code=5)
    assert "no real inputs" in text


def test_one_file_merges_too_and_is_told_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "calibrate", "net.onnx", "--data", "data.npz")
    merged = said(capsys, "merge", "net.stats.npz", "-o", "again.npz")
    assert "from 1 file: " in merged
    measured = [" ".join(text.partition(": ")[2].split("\n\n")[0].split()) for text in (told, merged)]
    assert measured[0][:60] == measured[1][:60]  # lines break in other places
    assert "ranges" in measured[0]


def test_feeds_that_leave_python_are_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "leaving.py").write_text("def feeds():\n    yield {}\n    raise SystemExit(7)\n")
    text = said(capsys, "calibrate", "net.onnx", "--data", "leaving.py:feeds", code=2)
    assert text.startswith("error: leaving.py:feeds[1]: it failed: SystemExit: 7\n")


def test_all_elements_may_be_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "calibrate", "net.onnx", "--data", "data.npz", "--elements", "all", "-q")
    with np.load("net.stats.npz") as file:
        assert file["histograms/counts"].sum() == file["ranges/count"].sum()


SLOW = """
import time, numpy as np
class Slow:
    def __len__(self): return 1000
    def __getitem__(self, i):
        if i > 2: time.sleep(0.2)
        return {"x": np.ones((1, 12), np.float32)}
def feeds(): return Slow()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_nothing_is_written(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    words = ["calibrate", "net.onnx", "--data", "slow.py:feeds", "-v"]
    process = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "statistics for" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "error: interrupted" in err
    assert not list(folder.glob("*stats*"))


def test_the_pace_says_how_far_how_fast_and_how_long() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.tell("loading", 0, 0) == ""
    assert pace.tell("statistics", 1, 41) == "1/41"
    now[0] = 2.0
    assert pace.tell("statistics", 21, 41) == "21/41, 10/s, 2 s left"
    now[0] = 2.5
    assert pace.tell("comparing", 0, 41) == "0/41"
    now[0] = 3.5
    assert pace.tell("comparing", 1, 600) == "1/600, 1/s, 10 min left"
