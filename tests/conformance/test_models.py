"""The trained models of models/ through every pass, judged on real inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxopt.model import load
from onnxopt.passbase import Effect
from tests.conformance.__main__ import PASSES, make
from tests.helpers import apply, assert_close, assert_equal, run

MODELS = sorted((Path(__file__).parents[2] / "models").glob("*/*.onnx"))


def feeds(path: Path, inputs: set[str]) -> dict[str, Any]:
    """The first two samples of the model's evaluation feeds."""
    with np.load(path.parent / "feeds" / "evaluate.npz") as file:
        return {name: file[name][:2] for name in file.files if name in inputs}


@pytest.mark.parametrize("names", [*((name,) for name in PASSES), PASSES], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_outputs_and_signature_hold(path: Path, names: tuple[str, ...]) -> None:
    source = onnx.load(path)
    target = load(source)
    passes = [make(name) for name in names]
    for each in passes:
        apply(each, target)
    written = target.to_proto()
    onnx.checker.check_model(written)
    assert list(written.graph.input) == list(source.graph.input)
    assert list(written.graph.output) == list(source.graph.output)
    assert list(written.metadata_props) == list(source.metadata_props)
    given = feeds(path, {info.name for info in source.graph.input})
    before, after = run(source, given), run(written, given)
    if all(each.effect is Effect.EXACT for each in passes):
        assert_equal(before, after)
    else:
        assert_close(before, after)
    again = target.digest()
    for each in passes:
        if len(passes) == 1:
            assert not apply(each, target).changes
    assert len(passes) > 1 or target.digest() == again


def test_there_are_models() -> None:
    assert len(MODELS) >= 3
