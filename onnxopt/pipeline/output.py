"""Where the result goes, and the proof that the file holds what was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import PassError, UsageError
from onnxopt.feeds import Sample
from onnxopt.model import Model
from onnxopt.pipeline.facts import sidecars
from onnxopt.report import obstacle
from onnxopt.runtime import Session
from onnxopt.runtime.worker import run_saved


def check_output(output: Path, source: Path | None, force: bool) -> None:
    """Refuse, before any work is done, a place where the result can't or must not be written. Raises UsageError."""
    if output.parent.exists() and not output.parent.is_dir():
        raise UsageError(f"can't write {output}: {output.parent} is a file", "choose another place with -o")
    if not output.parent.is_dir():
        raise UsageError(
            f"can't write {output}: the folder {output.parent} does not exist", "create it, or choose another with -o"
        )
    found = obstacle(output)
    if found is not None:
        raise UsageError(f"can't write {output}: it is {found}", "give the name of a file with -o")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"can't write {output}: the folder is read-only", "choose another place with -o")
    if not output.exists():
        return
    if source is not None and any(output.samefile(file) for file in (source, *sidecars(source)) if file.exists()):
        raise UsageError(f"{output} is the input itself", "choose another place with -o; the input is never replaced")
    if not force:
        raise UsageError(f"{output} exists already", "add --force to replace it, or choose another place with -o")


def failed_path(output: Path) -> Path:
    """Where a result that failed is kept: net.onnx -> net.failed.onnx, net.q8 -> net.q8.failed.onnx."""
    return output.with_name(f"{output.name.removesuffix('.onnx')}.failed.onnx")


def save(
    model: Model,
    output: Path,
    samples: Sequence[Sample],
    *,
    threads: int,
    timeout: float,
    skip: frozenset[str],
    external_data: str = "auto",
) -> None:
    """Write the model atomically. Before it takes its name, the file is run in a process of its own.

    Its outputs on `samples` must equal those of the model in memory, those in `skip` (random ones) aside. Without
    samples the file is written unproven. Raises PassError when they differ; nothing is left behind then.
    """
    if not samples:
        model.save(output, external_data=external_data)
        return
    inputs = [sample.inputs for sample in samples]
    session = Session(model, threads=threads)
    expected = [session.run(values) for values in inputs]
    del session  # and its packed weights, before the file is made in memory

    def prove(temporary: Path) -> None:
        found = run_saved(temporary, inputs, timeout, threads=threads)
        for sample, here, there in zip(samples, expected, found, strict=True):
            for name in here:
                if name not in skip and not equal(here[name], there[name]):
                    raise PassError(
                        f"output {name!r} of the saved file differs from the model in memory for {sample.source}",
                        "nothing was written; this is a bug, please report it",
                    )

    model.save(output, prove, external_data=external_data)


def equal(one: Any, other: Any) -> bool:
    """Whether two values of a run are bit for bit the same: arrays, lists and mappings of them, or None."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and _same_elements(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (one != one and other != other)


def _same_elements(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    if one.dtype.kind == "O":
        return bool(np.array_equal(one, other))
    return one.tobytes() == other.tobytes()
