"""A model that a pass list of ours makes, in a process of its own.

    python -m benchmarks.ours PASSES SOURCE FEEDS OUT SAMPLES TARGET [parted]

runs the passes with what prepares them and prints the seconds and the notes of the listed passes as JSON. FEEDS is a
folder with one .npz (input name -> array) a sample, of which all up to SAMPLES calibrate and choose; parted: three
quarters calibrate and the rest choose, as on the command line with --eval.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from onnxopt.feeds import Feeds, Split
from onnxopt.feeds.open import open_feeds
from onnxopt.feeds.split import split_feeds
from onnxopt.model import Model, load
from onnxopt.pipeline.grammar import Step, parse
from onnxopt.pipeline.passes import Runner
from onnxopt.pipeline.prepare import with_prepared
from onnxopt.pipeline.settings import Settings
from onnxopt.report import PassRecord
from onnxopt.runtime import Session
from onnxopt.target import resolve


def run_steps(
    path: Path, steps: list[Step], feeds: Feeds, target: str, samples: int | None = None, parted: bool = False
) -> tuple[Model, list[PassRecord]]:
    """The model after the steps, and a record of each. All feeds calibrate and all choose, unless they are parted."""
    model = load(path)
    chosen = feeds if samples is None else feeds.take(samples)
    split = split_feeds(chosen, evaluate=chosen) if parted else Split(chosen, chosen, chosen)
    runner = Runner(model, load(path), split, Settings(), resolve(target), stages=None)
    runner.run(steps)
    return model, runner.records


def feeds_in(folder: Path, path: Path) -> Feeds:
    """The feeds of a folder, for a model."""
    return open_feeds([folder], Session(path).inputs, whole=True).fit


def made_by(
    text: str, source: Path, feeds: Path, out: Path, samples: int, target: str, parted: bool = False
) -> list[str]:
    """Run a pass list with what prepares it; returns the notes of the listed passes."""
    steps = with_prepared(parse(text))
    model, records = run_steps(source, steps, feeds_in(feeds, source), target, samples, parted)
    model.save(out)
    return [note for record in records if record.inserted_for is None for note in record.notes]


def main() -> int:
    """Make one model."""
    text, source, feeds, out, samples, target, *parted = sys.argv[1:]
    started = time.perf_counter()
    notes = made_by(text, Path(source), Path(feeds), Path(out), int(samples), target, parted == ["parted"])
    print(json.dumps({"seconds": time.perf_counter() - started, "notes": notes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
