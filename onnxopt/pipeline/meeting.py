"""Feeds opened, and each model from outside run on them once, in a process of its own before it runs in this one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from onnxopt.errors import PassError
from onnxopt.feeds import Split
from onnxopt.model import Limits, Model
from onnxopt.pipeline.inputs import Inputs
from onnxopt.pipeline.settings import Progress, silent
from onnxopt.runtime import Probe


def meet(
    reference: Model,
    path: Path | None,
    inputs: Inputs,
    limits: Limits,
    *,
    beside: Path | None = None,
    whole: bool = False,
    fit: bool = False,
    candidates: Sequence[tuple[Model, Path | None]] = (),
    threads: int = 1,
    progress: Progress = silent,
) -> Split:
    """The feeds of the reference; reference and candidates have loaded and run on the first of them by then.

    path: the reference's file, as those of the candidates. beside: the file beside which feeds may lie, where that is
    another. whole: keep no feeds for calibration; fit: keep them all for
    it. A model that fails on these inputs passes here: who runs it next says so. Raises LimitError when a model takes
    more memory or time than `limits` allow, ModelError when it can't be loaded or crashes onnxruntime, and what opening
    feeds raises.
    """
    progress("running it in a process of its own", 0, 0)
    with Probe(reference, path, limits, threads=threads) as probe:
        opener = inputs.open_fit if fit else inputs.open_whole if whole else inputs.open
        split = opener(reference, beside or path, None if probe.skipped else probe.run)
        _prove(probe, split)
    for candidate, file in candidates:
        with Probe(candidate, file, limits, threads=threads) as probe:
            _prove(probe, split)
    return split


def _prove(probe: Probe, split: Split) -> None:
    if probe.skipped:
        return
    with contextlib.suppress(PassError):
        probe.prove(split.evaluate[0].inputs)
