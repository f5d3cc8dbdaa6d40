"""The quantization benchmark as a command, on a task made up for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_tells_of_each_recipe(zoo: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quantization", "--zoo", str(zoo), "--seconds", "0.1", "--samples", "8"]
    command += ["--only", "table", "levels", "wall", "weights", "rounding", "--wall-samples", "20"]
    command += ["--ours", "int8:all_layers=true", "--ours", "no_such_pass", "--peers", "u8s8", "nncf-fast"]
    command += ["--weights", "fuse_bn", "--rounding", "int8:all_layers=true", "--each", "--log", str(zoo / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]

    def line(start: str) -> str:
        return next(found for found in lines if found.startswith(start))

    assert line("digits: agree up")
    assert "agree 1.0000" in line("float")
    assert line("int8:all_layers=true  ").split()[1] == "agree"
    assert " bytes | " in line("u8s8")
    assert "unknown pass" in line("no_such_pass")
    assert line("nncf-fast").endswith("left out: --nncf names no interpreter")
    assert line("onnxsim").endswith("left out: --onnxsim names no interpreter")
    verdicts = [found for found in lines if found.startswith("int8:all_layers=true: ")]
    assert [found.split()[1] for found in verdicts] == ["latency", "bytes", "agree", "latency"]
    assert "over u8s8, the fastest peer" in verdicts[-1]
    assert any(found.endswith("loads at all 5 levels: yes") for found in lines)
    assert any(found.endswith("10 dB above: yes") for found in lines)
    assert any("operators on the same codes: " in found for found in lines)
    assert any("quantized layers (" in found for found in lines)
    assert any("with 20 samples" in found for found in lines)
    assert any(found.startswith("fuse_bn") and "Cast behind Cast" in found for found in lines)
    errors = [found for found in lines if " block " in found]
    assert errors
    # 8 bits err less than 4 do
    assert all(float(found.split()[1]) < float(found.split()[3].rstrip(",")) for found in errors)
    records = [json.loads(record) for record in (zoo / "log").read_text().splitlines()]
    assert {record.get("recipe") for record in records} >= {"u8s8", "int8:all_layers=true", "no_such_pass", "fuse_bn"}
