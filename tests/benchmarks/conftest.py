"""A folder with one model and its task, as the benchmarks want them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TASKS = """
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent


def names():
    return ["digits"]


def find_model(name):
    return HERE / f"{name}.onnx"


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class Task:
    primary = "agree"
    higher_is_better = True

    def calib_feeds(self):
        return iter(self.all()[:16])

    def feeds(self):
        return iter(self.all()[16:48])

    def all(self):
        with np.load(HERE / "feeds.npz") as arrays:
            rows = {name: arrays[name] for name in arrays.files}
        return [{name: row[i : i + 1] for name, row in rows.items()} for i in range(48)]

    def infer(self, session):
        return [session.run(None, feed) for feed in self.feeds()]

    def run(self, path, reference):
        outputs = self.infer(session(path))
        same = [a[0].argmax() == b[0].argmax() for a, b in zip(outputs, reference)]
        return {"agree": float(np.mean(same)), "seconds": 1.0}


def load(name):
    return Task()
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    folder = ROOT / "models" / "digits_cnn"
    (tmp_path / "digits.onnx").symlink_to(next(folder.glob("*.onnx")))
    with np.load(folder / "feeds" / "evaluate.npz") as arrays:
        np.savez(tmp_path / "feeds.npz", **{n: arrays[n] for n in arrays.files if n != "labels"})
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path
